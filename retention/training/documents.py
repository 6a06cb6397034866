"""Training documents: prose with planted facts and chat turns that ask for them, drawn from a numpy Generator.

A Draft is a document before its prose is chosen: facts to plant, turns to ask. `assemble` plants them in prose up to a number of tokens.
The word lists and phrasings here are for training only; retention/evaluation/needles.py has its own, with none in common.

Templates and specs hold fields in braces: {k} the key, {v} the value, {u} a word shared by near misses, and names of WORDS or MADE.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from retention.training import text

SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
USER = "<|im_start|>user\n"
ASK = "<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"

Part = tuple[list[int], bool]  # tokens, and whether they are an assistant's answer

WORDS: dict[str, tuple[str, ...]] = {
    "first": tuple(
        "Alice Bruno Clara Dmitri Esther Felix Greta Hassan Ingrid Jonas Katya Leon Marta Nadia Omar Petra Quentin Rosa Stefan "
        "Tamara Ulrich Vera Walter Xenia Yusuf Zelda Amara Boris Carmen Diego Elena Farid Gloria Hugo Irene Javier Kenji Lucia "
        "Miguel Noor Olga Pablo Ravi Sonia Teresa Viktor Wanda Anton Beatriz Cedric Deborah Gavin Helga Ismael Judith Kofi Lorna "
        "Mabel".split()
    ),
    "last": tuple(
        "Abbott Barros Castell Dunlop Eriksen Fontaine Grimaldi Haverford Ivanov Jansen Kowalski Lindqvist Moreau Nakamura "
        "Okafor Pereira Quigley Rossi Sandoval Tanaka Underhill Vargas Whitlock Yamada Zimmer Ashby Bergman Corrigan Delgado "
        "Ekström Falk Gunther Holloway Jimenez Keller Larkin Mendez Norwood Osborne Pritchard Ramsey Stanton Thornton Ullman "
        "Velasco Winslow Yates Albright Bianchi Chandra Drummond Fairbanks Gallagher Hutton Kimura Lockhart".split()
    ),
    "city": tuple(
        "Lisbon Oslo Nairobi Toronto Kyoto Prague Dublin Havana Jakarta Lima Madrid Naples Ottawa Perth Quito Riga Seattle Tunis "
        "Vienna Warsaw Zurich Athens Boston Cairo Denver Edinburgh Florence Geneva Hamburg Istanbul Krakow Lyon Munich Osaka "
        "Porto Seville Turin Utrecht Valencia Austin Bergen Chicago Dakar Houston Montreal Phoenix Santiago Stockholm".split()
    ),
    "colour": tuple(
        "red blue green yellow purple orange brown black white grey pink turquoise crimson violet silver gold beige navy".split()
    ),
    "animal": tuple(
        "otter falcon badger heron lynx tortoise dolphin hedgehog panther sparrow walrus beetle camel donkey eagle ferret "
        "gazelle hamster iguana jackal kangaroo leopard magpie octopus pelican rabbit salmon tiger weasel zebra bison cobra "
        "crane fox goose hyena moose".split()
    ),
    "adjective": tuple(
        "amber brisk calm dusty early fancy gentle hollow icy jolly keen lively mellow narrow odd plain quiet rapid sturdy tidy "
        "vivid wooden young bright copper dark elegant faded golden heavy little modern painted rusty silent velvet winter yellow".split()
    ),
    "object": tuple(
        "lantern compass violin kettle ladder mirror saddle telescope umbrella wagon anchor barrel candle drum engine flute "
        "globe hammer kite locket medal needle oar piano quilt ring statue trumpet vase whistle camera bicycle clock desk carpet "
        "guitar helmet suitcase".split()
    ),
    "item": tuple(
        "spare key|first-aid kit|old map|guest book|toolbox|fire extinguisher|tax file|silver tray|projector|green folder|"
        "box of candles|sewing machine|garden hose|chess set|blue notebook|signed contract|coffee grinder|wedding album|"
        "sleeping bag|backup disk|master key|medicine cabinet|ship's log|tent|microphone|ballot box|recipe book|stamp collection".split("|")
    ),
    "spot": tuple(
        "the boathouse|the attic|the top drawer of the desk|the cellar|the garden shed|the back office|the music room|"
        "the bell tower|the kitchen cupboard|the garage|the laundry room|the greenhouse|the reading room|the glove compartment|"
        "the basement vault|the barn|the cloakroom|the wine cellar|the boiler room|the hall closet|the tool cabinet|"
        "the front lobby|the chapel|the stable".split("|")
    ),
    "building": tuple(
        "north library|city museum|harbour office|old mill|east warehouse|town hall|science lab|art gallery|train depot|"
        "west clinic|grain store|post office|swimming hall|sports centre|concert hall|bus station|bakery|observatory|fish market|"
        "school gym|south tower|court house|film studio|power plant|radio station|fire station|visitor centre|pump house|"
        "customs office".split("|")
    ),
    "group": tuple(
        "chess club|rowing team|village choir|film society|gardening club|debate team|brass band|book circle|hiking group|"
        "robotics team|drama club|photography club|history society|knitting circle|swim team|cycling club|poetry group|"
        "astronomy club|relief committee|sailing crew|finance committee|design team|night shift|research group".split("|")
    ),
    "event": tuple(
        "spring fair|annual dinner|harvest festival|science fair|board meeting|charity auction|summer concert|opening ceremony|"
        "staff picnic|winter market|book sale|final exam|school play|boat race|job interview|press briefing|graduation party|"
        "town meeting|flower show|safety drill|piano recital|wedding rehearsal".split("|")
    ),
    "vehicle": tuple("train|ferry|night bus|express coach|early flight|mail boat|last tram|shuttle".split("|")),
    "company": tuple(
        "Northwind|Bluepeak|Ironleaf|Sunharbor|Clearbrook|Stonegate|Redfern|Oakline|Brightwell|Goldcrest|Silverton|Windmere|"
        "Foxglove|Pinecrest|Lakeside Foods|Apex Tools|Delta Freight|Meridian Books|Corvus Labs|Orbit Press|Tidewater Bank|"
        "Kestrel Motors".split("|")
    ),
    "unit": tuple(
        "crates of oranges|folding chairs|bags of rice|glass bottles|old books|wooden planks|light bulbs|tins of paint|"
        "rolls of cloth|pairs of boots|bicycle tyres|sacks of flour|boxes of nails|blankets|barrels of oil|ceramic tiles".split("|")
    ),
    "food": tuple(
        "mango|lentil soup|apple pie|grilled fish|rye bread|pumpkin|dark chocolate|rice pudding|mushrooms|plums|goat cheese|honey".split(
            "|"
        )
    ),
    "instrument": tuple(
        "the cello|the flute|the trombone|the harp|the accordion|the clarinet|the banjo|the oboe|the mandolin|the tuba".split("|")
    ),
    "subject": tuple("chemistry|Latin|geography|algebra|music|drawing|astronomy|economics|biology|philosophy|Spanish|carpentry".split("|")),
    "job": tuple(
        "a plumber|an architect|a pilot|a baker|a nurse|an electrician|a translator|a beekeeper|a lawyer|a carpenter|a tailor|"
        "a dentist|a librarian|a mechanic|a surveyor|a gardener|a watchmaker|a fisherman|a teacher|a journalist".split("|")
    ),
    "password": tuple(
        "marigold|thunder|biscuit|pineapple|avalanche|cinnamon|domino|elephant|firefly|gravity|harvest|jigsaw|kingdom|lavender|"
        "mosquito|nutmeg|origami|parachute|quicksand|raspberry|saffron|tangerine|velcro|waterfall|yesterday|zeppelin|button|"
        "cathedral".split("|")
    ),
    "reason": tuple(
        "the roof leaked|the heating broke down|the owner moved abroad|a pipe burst|the floor was unsafe|the licence had expired|"
        "the staff went on strike|the bridge was under repair|the power failed|there were too few visitors|the rent was raised|"
        "a tree fell on it|the river flooded|the paint was still wet|the director fell ill|the alarm kept ringing|"
        "the keys were lost|the lift was stuck|bees had nested in the wall|the boiler exploded|the money ran out|"
        "the windows were broken".split("|")
    ),
    "trouble": tuple(
        "it rained all day|the speaker missed the train|nobody bought a ticket|the hall was double-booked|"
        "the snow blocked the road|the guests had caught a cold|the permit was refused|the stage collapsed|"
        "the invitations were never sent|the storm came early|the sponsor withdrew|the van broke down|the food was spoiled|"
        "the organiser forgot the date".split("|")
    ),
    "deed": tuple(
        "repaired the clock tower|won the baking contest|found the missing ring|painted the mural|wrote the farewell speech|"
        "built the stone wall|planted the apple trees|discovered the cave|designed the new logo|rescued the dog|broke the window|"
        "solved the riddle|organised the parade|translated the letter|sold the farm|invented the machine|reported the fire|"
        "cooked the dinner".split("|")
    ),
    "gift": tuple(
        "a silk scarf|a pocket watch|a chess board|a pair of skates|a fishing rod|a teapot|a box of paints|a leather wallet|"
        "a puppy|a music box|a fountain pen|a woollen hat|a star chart|a bread knife|a rocking chair|a set of dice".split("|")
    ),
    "month": tuple("January February March April June July August September October November December".split()),
}


def pick(rng: np.random.Generator, choices: Sequence):
    """One of `choices`, evenly (rng.choice would first make an array of them)."""
    return choices[int(rng.integers(len(choices)))]


def digits(rng: np.random.Generator, low: int = 3, high: int = 7) -> str:
    """A number of `low` to `high` digits that does not start with 0."""
    count = int(rng.integers(low, high + 1))
    return str(int(rng.integers(10 ** (count - 1), 10**count)))


def _letters(rng, count):
    return "".join(chr(ord("A") + int(rng.integers(26))) for _ in range(count))


def _phone(rng):
    return pick(rng, ("555-0{}", "({2}) 555-{1}", "{2}-{1}", "0{2} {1}")).format(digits(rng, 3, 3), digits(rng, 4, 4), digits(rng, 3, 3))


def _code(rng):
    form = pick(rng, ("{a}-{d}", "{d}{a}", "{a}{d}", "{d}-{a}-{e}", "{a}{d}{b}"))
    code = form.format(a=_letters(rng, int(rng.integers(1, 4))), b=_letters(rng, 1), d=digits(rng, 2, 4), e=digits(rng, 2, 2))
    return code.lower() if rng.random() < 0.2 else code


def _quantity(rng):
    number = digits(rng, 2, 5)
    return f"{int(number):,}" if rng.random() < 0.4 else number


def _date(rng):
    return pick(rng, ("{m} {d}", "{d} {m}", "{m} {d}, {y}", "{d} {m} {y}")).format(
        m=pick(rng, WORDS["month"]), d=int(rng.integers(1, 29)), y=int(rng.integers(1900, 2030))
    )


def _time(rng):
    hour, minute = int(rng.integers(1, 13)), int(rng.integers(60))
    return pick(
        rng, (f"{hour}:{minute:02d} in the morning", f"{hour}:{minute:02d} pm", f"{hour + 11}:{minute:02d}", f"{hour}:{minute:02d}")
    )


MADE: dict[str, Callable[[np.random.Generator], str]] = {
    "digits": digits,
    "code": _code,
    "phone": _phone,
    "quantity": _quantity,
    "price": lambda rng: pick(rng, ("${}", "{} dollars", "{} euros")).format(_quantity(rng)),
    "year": lambda rng: str(int(rng.integers(1400, 2025))),
    "date": _date,
    "time": _time,
}


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

INSTRUCTIONS = (
    "Here is a text.",
    "Read the following:",
    "Please read this text carefully.",
    "Below is a document. I will ask about it afterwards.",
    "Use the text below to answer my questions.",
    "Text:",
    "I am going to show you a document.",
)
RECITE = (
    "Repeat the sentence that mentions {k}.",
    "Quote the sentence about {k}.",
    "What does the text say about {k}? Quote it.",
    "Which sentence of the text mentions {k}?",
)
_TITLES = ("The following values were recorded:", "Records:", "Here is the list:", "Notes on the margin:", "Settings:")


@dataclass(frozen=True)
class Fact:
    family: str
    fields: dict[str, str]  # k, v, u
    template: str  # the statement, with its fields open

    @property
    def statement(self) -> str:
        return _sentence(self.template, self.fields)


@dataclass(frozen=True)
class Draft:
    """A document before its prose: pieces to plant (each one sentence or one block), turns (question, answer), and the values they hold."""

    prefix: str  # what comes before the text
    plants: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]
    values: tuple[str, ...]


def expand(spec: str, rng: np.random.Generator) -> str:
    """`spec` with each {name} replaced by a word of WORDS or a string of MADE."""
    return re.sub(r"\{(\w+)\}", lambda m: MADE[m[1]](rng) if m[1] in MADE else pick(rng, WORDS[m[1]]), spec)


def _sentence(template: str, fields: dict[str, str]) -> str:
    """The template filled in; a capital first where that is not a bare value or a record's key, which must stay as they are."""
    filled = template.format(**fields)
    return filled if template in ("{v}", "{v}.") or "-" in filled.split(" ", 1)[0] else filled[0].upper() + filled[1:]


def _clash(new: Fact, facts: Sequence[Fact]) -> bool:
    """Whether a value would be found in another statement or in a question, or a key in another statement."""
    key, value, said = new.fields["k"].lower(), new.fields["v"].lower(), new.statement.lower()
    if said.count(value) != 1 or said.count(key) != 1:
        return True
    return any(
        value in (other := fact.statement.lower()) or key in other or fact.fields["v"].lower() in said or fact.fields["k"].lower() in said
        for fact in facts
    )


def fact(rng: np.random.Generator, family: str, like: Fact | None = None, same_words: bool = False) -> Fact:
    """A fact of `family`; a near miss of `like` (the same shared word, another key and value), in the same words if asked."""
    kind = FAMILIES[family]
    fields = {
        "k": expand(pick(rng, kind.key), rng),
        "v": expand(pick(rng, kind.value), rng),
        "u": like.fields["u"] if like else expand(pick(rng, kind.shared), rng),
    }
    return Fact(family, fields, like.template if like and same_words else pick(rng, kind.statements))


def _facts(rng, count, one_family, same_words):
    """Up to `count` facts without clashes; each may be a near miss of the one before (always, if `one_family`)."""
    facts: list[Fact] = []
    names = tuple(FAMILIES)
    for _ in range(4 * count):  # a clash is drawn again
        near = bool(facts) and (one_family or rng.random() < 0.35)
        like = facts[-1] if near else None
        new = fact(rng, like.family if like else pick(rng, names), like, same_words or rng.random() < 0.6)
        if not _clash(new, facts):
            facts.append(new)
        if len(facts) == count:
            break
    return facts


def _record_block(rng, facts):
    """The records as one block of lines, JSON-like or "key = value"."""
    pairs = [(f.fields["k"], f.fields["v"]) for f in facts]
    form = int(rng.integers(4))
    if form == 0:
        lines = ["{", *(f'  "{k}": "{v}",' for k, v in pairs[:-1]), '  "{}": "{}"'.format(*pairs[-1]), "}"]
    else:
        lines = [("{} = {}", "{}: {}", "- {}: {}")[form - 1].format(k, v) for k, v in pairs]
    return "\n\n" + "\n".join(([pick(rng, _TITLES)] if rng.random() < 0.7 else []) + lines)


def _prefix(rng):
    kind = rng.random()
    if kind < 0.5:
        return SYSTEM + USER
    if kind < 0.7:
        return ""  # raw text, then chat turns
    return (SYSTEM if kind < 0.85 else "") + USER + pick(rng, INSTRUCTIONS) + "\n\n"


def draft(rng: np.random.Generator, most_facts: int = 8, most_turns: int = 4) -> Draft:
    """A random document: 55 % facts of several families, 27 % of one family (so that keys bind to values), 18 % a block of records.

    It has 1 to 8 facts (at least 4 of one family or in a block) and 2 to 4 turns, but at most `most_facts` and `most_turns`.
    """
    kind = rng.random()
    records = kind < 0.18
    one_family = kind < 0.45
    count = min(most_facts, int(rng.integers(4, 9) if one_family else rng.integers(1, 9)))
    if records:
        facts = []
        for _ in range(4 * count):
            new = fact(rng, "record")
            if len(facts) < count and not _clash(new, facts):
                facts.append(new)
        plants = (_record_block(rng, facts),)
    else:
        facts = _facts(rng, count, one_family, one_family and rng.random() < 0.7)
        plants = tuple((" " if rng.random() < 0.8 else "\n\n") + one.statement for one in facts)

    turns = []
    wanted = min(most_turns, int(rng.integers(2, 5)))
    asked = [facts[i] for i in rng.permutation(len(facts))[:wanted]]
    if len(asked) < wanted:
        asked.append(asked[0])  # a lone fact is asked twice
    for one in asked:
        family = FAMILIES[one.family]
        if not records and one.family != "deed" and rng.random() < 0.1:  # a deed is no thing that a sentence is about
            turns.append((pick(rng, RECITE).format(**one.fields), one.statement))
        else:
            turns.append((_sentence(pick(rng, family.questions), one.fields), _sentence(pick(rng, family.answers), one.fields)))
    return Draft(_prefix(rng), plants, tuple(turns), tuple(f.fields["v"] for f in facts))


def assemble(draft: Draft, texts: list[str], encode: text.Encode, rng: np.random.Generator, length: int) -> list[Part] | None:
    """The document as parts, `length` tokens or a few less; None where facts and turns leave no room.

    The context, each question and each answer are encoded on their own, as they are when a session appends them. Prose that holds a
    planted value is left out.
    """
    turns: list[Part] = []
    for index, (question, answer) in enumerate(draft.turns):
        opening = "\n" + USER if index else "\n\n" if draft.prefix else "\n\n" + USER
        turns += [(encode(opening + question + ASK), False), (encode(answer + END), True)]
    room = length - sum(len(tokens) for tokens, _ in turns) - sum(len(encode(piece)) for piece in (draft.prefix, *draft.plants) if piece)
    room -= 4  # white space that joining may add
    if room < 0:
        return None
    planted = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, draft.values))})(?!\w)", re.IGNORECASE)
    prose = text.sentences(text.window(texts, rng, 7 * room + 200))
    body = text.fit((piece for piece in prose if not planted.search(piece)), encode, room)
    for plant in draft.plants:
        body.insert(int(rng.integers(len(body) + 1)), plant)
    parts = [(encode(draft.prefix + text.join(body)), False), *turns]
    return parts if sum(len(tokens) for tokens, _ in parts) <= length else None


def document(texts: list[str], encode: text.Encode, rng: np.random.Generator, length: int) -> list[Part]:
    """Parts of a random document of at most `length` tokens; where a draft is too long, a smaller one is drawn.

    Raises ValueError where not even one fact and one question fit.
    """
    for smaller in range(8):
        parts = assemble(draft(rng, 8 - smaller, max(1, 4 - smaller)), texts, encode, rng, length)
        if parts is not None:
            return parts
    raise ValueError(f"length {length} is too short for a document with a fact and a question; give 256 tokens or more")
