"""The kinds of facts that training documents plant and ask for, and their phrasings.

They are for training only; retention/evaluation/needles.py has its own, with none in common.
Phrasings hold fields in braces: {k} the key, {v} the value, {u} a word shared by near misses. Keys, values and shared words are specs of words.py.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """One kind of fact: specs of its key, value and shared word, and the phrasings that state it, ask for it and answer."""

    key: tuple[str, ...]
    value: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...] = ("{v}",)
    shared: tuple[str, ...] = ("",)


_PERSON = ("{first} {last}",)
_NAMED = ("{v}", "{v}.", "It was {v}.")


def _favourite(word: str, value: str) -> Family:
    return Family(
        _PERSON,
        (value,),
        (
            "{k}'s favourite {u} is {v}.",
            "The {u} that {k} likes best is {v}.",
            "When asked about a favourite {u}, {k} answered: {v}.",
            "For {k}, no {u} is better than {v}.",
            "Everyone knows that the favorite {u} of {k} is {v}.",
        ),
        ("What is {k}'s favourite {u}?", "Which {u} does {k} like best?", "What is the favorite {u} of {k}?"),
        ("{v}", "{k}'s favourite {u} is {v}.", "{k} likes {v} best.", "It is {v}."),
        (word,),
    )


FAMILIES: dict[str, Family] = {
    "access code": Family(
        ("the {building}", "the {building} in {city}"),
        ("{digits}", "{digits}", "{code}"),
        (
            "The access code for {k} is {v}.",
            "To get into {k}, type {v} on the keypad.",
            "The keypad at {k} accepts only {v}.",
            "Visitors to {k} must enter the code {v}.",
            "Anyone who wants to open {k} needs the code {v}.",
            "Last week the code of {k} was changed to {v}.",
        ),
        ("What is the access code for {k}?", "Which code opens {k}?", "What code do I need for {k}?", "Tell me the code of {k}."),
        ("{v}", "{v}.", "The access code for {k} is {v}.", "The code is {v}."),
    ),
    "number": Family(
        ("{city}", "the {adjective} {object}", "{adjective}-{animal}"),
        ("{digits}",),
        (
            "The secret number for {k} is {v}.",
            "The number assigned to {k} is {v}.",
            "{k} has been given the number {v}.",
            "A note in the margin says that the number of {k} is {v}.",
            "Please remember the number {v}, which belongs to {k}.",
            "One of the important numbers for {k} is {v}.",
        ),
        (
            "What is the number for {k}?",
            "Which number belongs to {k}?",
            "What number does the text give for {k}?",
            "What is the secret number of {k}?",
        ),
        ("{v}", "{v}.", "The number for {k} is {v}.", "The number is {v}."),
    ),
    "record": Family(
        ("{adjective}-{animal}", "{adjective}-{object}", "{colour}-{animal}"),
        ("{digits}", "{code}", "{password}"),
        (
            "The value for {k} is {v}.",
            "The entry {k} has the value {v}.",
            "In the table, {k} is set to {v}.",
            "The key {k} maps to {v}.",
            "For {k}, write down {v}.",
        ),
        ("What is the value for {k}?", "What value does {k} have?", "What is {k} set to?", "Give me the value of {k}."),
        ("{v}", "{v}.", "The value for {k} is {v}.", "{k} has the value {v}."),
    ),
    "badge": Family(
        _PERSON,
        ("{digits}", "{code}"),
        (
            "{k}'s badge number is {v}.",
            "{k} wears the badge with the number {v}.",
            "The badge that was issued to {k} carries the number {v}.",
            "On the list, {k} appears with badge {v}.",
        ),
        ("What is {k}'s badge number?", "Which badge number does {k} have?", "What number is on the badge of {k}?"),
        ("{v}", "{v}.", "{k}'s badge number is {v}."),
    ),
    "phone": Family(
        ("{company}", "{first} {last}", "the {building}"),
        ("{phone}",),
        (
            "The phone number of {k} is {v}.",
            "To reach {k}, call {v}.",
            "{k} can be called at {v}.",
            "If there is any trouble, ring {k} on {v}.",
        ),
        ("What is the phone number of {k}?", "How can I call {k}?", "Which number should I call to reach {k}?"),
        ("{v}", "{v}.", "The phone number of {k} is {v}.", "You can call {v}."),
    ),
    "stock": Family(
        ("{city}",),
        ("{quantity}",),
        (
            "The warehouse in {k} holds {v} {u}.",
            "There are {v} {u} in the warehouse in {k}.",
            "At the last count, {k} had {v} {u} in stock.",
            "A truck brought {v} {u} to the warehouse in {k}.",
        ),
        ("How many {u} are in {k}?", "How many {u} does the warehouse in {k} have?", "What is the number of {u} in {k}?"),
        ("{v}", "{v}.", "There are {v} {u} in {k}.", "{v} {u}"),
        ("{unit}",),
    ),
    "price": Family(
        ("the {adjective} {object}", "the {object} from {city}"),
        ("{price}",),
        (
            "The price of {k} is {v}.",
            "{k} costs {v}.",
            "You have to pay {v} for {k}.",
            "The shop asks {v} for {k}.",
        ),
        ("What is the price of {k}?", "How much does {k} cost?", "How much is {k}?"),
        ("{v}", "{v}.", "{k} costs {v}.", "The price is {v}."),
    ),
    "year": Family(
        ("the {building} in {city}", "the {building}"),
        ("{year}",),
        (
            "{k} was built in {v}.",
            "The construction of {k} was finished in {v}.",
            "{k} dates from the year {v}.",
            "It was in {v} that {k} was built.",
        ),
        ("When was {k} built?", "In which year was {k} built?", "From what year is {k}?"),
        ("{v}", "In {v}.", "{k} was built in {v}."),
    ),
    "date": Family(
        ("the {event}", "the {event} in {city}"),
        ("{date}",),
        (
            "{k} will take place on {v}.",
            "The date of {k} is {v}.",
            "{k} has been moved to {v}.",
            "Everybody should be ready for {k} on {v}.",
        ),
        ("When is {k}?", "On what date is {k}?", "What is the date of {k}?"),
        ("{v}", "On {v}.", "{k} is on {v}.", "The date is {v}."),
    ),
    "time": Family(
        ("the {vehicle} to {city}",),
        ("{time}",),
        (
            "{k} leaves at {v}.",
            "The departure of {k} is at {v}.",
            "{k} will not wait: it goes at {v}.",
            "Passengers for {k} must be on board at {v}.",
        ),
        ("When does {k} leave?", "At what time does {k} leave?", "What is the departure time of {k}?"),
        ("{v}", "At {v}.", "{k} leaves at {v}."),
    ),
    "serial": Family(
        ("the {adjective} {object}",),
        ("{code}",),
        (
            "The serial number of {k} is {v}.",
            "{k} is listed in the catalogue as {v}.",
            "On the bottom of {k} the code {v} is engraved.",
            "{k} carries a label that reads {v}.",
        ),
        ("What is the serial number of {k}?", "Which code is on {k}?", "What is the code of {k}?"),
        ("{v}", "{v}.", "The code of {k} is {v}.", "It is {v}."),
    ),
    "order": Family(
        _PERSON,
        ("{code}", "{digits}"),
        (
            "The order placed by {k} has the reference {v}.",
            "{k}'s parcel travels under the reference {v}.",
            "Please quote {v} when writing to {k} about the order.",
            "The invoice for {k} was filed under {v}.",
        ),
        ("What is the reference of {k}'s order?", "Under which reference is the order of {k}?", "What is {k}'s order reference?"),
        ("{v}", "{v}.", "The reference is {v}."),
    ),
    "leader": Family(
        ("the {group}", "the {group} in {city}"),
        _PERSON,
        (
            "{k} is led by {v}.",
            "The leader of {k} is {v}.",
            "{v} leads {k}.",
            "{v} was chosen to lead {k}.",
            "Since last autumn {v} has been in charge of {k}.",
        ),
        ("Who leads {k}?", "Who is the leader of {k}?", "Who is in charge of {k}?"),
        ("{v}", "{v}.", "{v} leads {k}.", "The leader of {k} is {v}."),
    ),
    "deed": Family(
        ("{deed}",),
        _PERSON,
        (
            "{v} {k}.",
            "It was {v} who {k}.",
            "The person who {k} was {v}.",
            "Nobody knew that {v} {k}.",
            "After a long silence {v} admitted having been the one who {k}.",
        ),
        ("Who {k}?", "Who was it that {k}?", "What is the name of the person who {k}?"),
        (*_NAMED, "{v} {k}."),
    ),
    "founder": Family(
        ("{company}",),
        _PERSON,
        ("{k} was founded by {v}.", "{v} founded {k}.", "The founder of {k} is {v}.", "It was {v} who started the company {k}."),
        ("Who founded {k}?", "Who is the founder of {k}?", "Who started {k}?"),
        ("{v}", "{v}.", "{v} founded {k}.", "{k} was founded by {v}."),
    ),
    "owner": Family(
        ("the {adjective} {object}",),
        _PERSON,
        ("{k} belongs to {v}.", "The owner of {k} is {v}.", "{v} owns {k}.", "{k} was bought by {v}, who still has it."),
        ("Who owns {k}?", "Who is the owner of {k}?", "To whom does {k} belong?"),
        ("{v}", "{v}.", "{v} owns {k}.", "{k} belongs to {v}."),
    ),
    "storage": Family(
        ("the {item}",),
        ("{spot}",),
        (
            "{k} is kept in {v}.",
            "You will find {k} in {v}.",
            "{k} was left in {v}.",
            "Somebody put {k} in {v}.",
            "If you need {k}, look in {v}.",
        ),
        ("Where is {k}?", "Where is {k} kept?", "Where can I find {k}?"),
        ("In {v}.", "in {v}", "{k} is in {v}.", "It is in {v}."),
    ),
    "meeting place": Family(
        ("the {group}",),
        ("{spot}", "the {building}"),
        (
            "{k} meets every week in {v}.",
            "The meetings of {k} are held in {v}.",
            "{k} gathers in {v} on Mondays.",
            "On rainy days {k} meets in {v}.",
        ),
        ("Where does {k} meet?", "Where are the meetings of {k} held?", "In what place does {k} meet?"),
        ("In {v}.", "{k} meets in {v}.", "They meet in {v}."),
    ),
    "home": Family(
        _PERSON,
        ("{city}",),
        (
            "{k} lives in {v}.",
            "{k} moved to {v} some years ago.",
            "The home of {k} is in {v}.",
            "{k} has a small flat in {v}.",
            "These days {k} can be found in {v}.",
        ),
        ("Where does {k} live?", "In which city does {k} live?", "What city is {k}'s home?"),
        ("{v}", "In {v}.", "{k} lives in {v}."),
    ),
    "colour": _favourite("colour", "{colour}"),
    "animal": _favourite("animal", "the {animal}"),
    "food": _favourite("food", "{food}"),
    "instrument": _favourite("instrument", "{instrument}"),
    "password": Family(
        ("the {building}", "the {group}", "{company}"),
        ("{password}",),
        (
            "The password for {k} is {v}.",
            "The secret word of {k} is {v}.",
            'Whoever says "{v}" is let in by {k}.',
            "{k} uses the word {v} as its password.",
            "Do not tell anyone that {k} has chosen the password {v}.",
        ),
        ("What is the password for {k}?", "What is the secret word of {k}?", "Which password does {k} use?"),
        ("{v}", "{v}.", "The password for {k} is {v}.", "The password is {v}."),
    ),
    "closed": Family(
        ("the {building}", "the {building} in {city}"),
        ("{reason}",),
        (
            "{k} was closed because {v}.",
            "The reason why {k} was closed is that {v}.",
            "{k} had to close, since {v}.",
            "Because {v}, {k} was closed.",
            "Since {v}, nobody may enter {k}.",
        ),
        ("Why was {k} closed?", "What is the reason why {k} was closed?", "Why did {k} have to close?"),
        ("Because {v}.", "{k} was closed because {v}.", "It was closed because {v}."),
    ),
    "cancelled": Family(
        ("the {event}", "the {event} in {city}"),
        ("{trouble}",),
        (
            "{k} was cancelled because {v}.",
            "{k} did not take place, since {v}.",
            "They had to cancel {k} because {v}.",
            "The reason for cancelling {k} was that {v}.",
        ),
        ("Why was {k} cancelled?", "Why did {k} not take place?", "What was the reason for cancelling {k}?"),
        ("Because {v}.", "{k} was cancelled because {v}.", "It was cancelled because {v}."),
    ),
    "gift": Family(
        _PERSON,
        ("{gift}",),
        (
            "{k} received {v} as a birthday present.",
            "For the birthday of {k} the family bought {v}.",
            "{k} got {v} as a present.",
            "The present for {k} was {v}.",
        ),
        ("What did {k} get as a present?", "What present did {k} receive?", "What was the birthday present of {k}?"),
        ("{v}", "{k} got {v}.", "{k} received {v} as a present."),
    ),
    "door": Family(
        ("the {building}",),
        ("{colour}",),
        (
            "The door of {k} is painted {v}.",
            "{k} has a door painted {v}.",
            "You can recognise {k} by its door, which is {v}.",
            "The door of {k} used to be plain, but now it is {v}.",
        ),
        ("What colour is the door of {k}?", "Which color does the door of {k} have?", "What is the colour of {k}'s door?"),
        ("{v}", "The door of {k} is {v}.", "It is {v}."),
    ),
    "job": Family(
        _PERSON,
        ("{job}",),
        ("{k} works as {v}.", "{k} is {v}.", "After school {k} became {v}.", "{k} earns a living as {v}."),
        ("What is {k}'s job?", "What does {k} do for a living?", "What is the profession of {k}?"),
        ("{v}", "{k} is {v}.", "{k} works as {v}."),
    ),
    "lesson": Family(
        _PERSON,
        ("{subject}",),
        ("{k} teaches {v}.", "The subject that {k} teaches is {v}.", "{k} gives lessons in {v}.", "Students learn {v} from {k}."),
        ("What does {k} teach?", "Which subject does {k} teach?", "What subject do students learn from {k}?"),
        ("{v}", "{k} teaches {v}.", "The subject is {v}."),
    ),
}
