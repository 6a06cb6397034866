"""Random words, names and numbers for training documents.

They are for training only; retention/evaluation/needles.py has its own, with none in common.
A spec is a string with fields in braces, each the name of a list in WORDS or of a maker in MADE.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np

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


def expand(spec: str, rng: np.random.Generator) -> str:
    """`spec` with each {name} replaced by a word of WORDS or a string of MADE."""
    return re.sub(r"\{(\w+)\}", lambda m: MADE[m[1]](rng) if m[1] in MADE else pick(rng, WORDS[m[1]]), spec)
