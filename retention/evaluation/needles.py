"""Held-out retrieval tasks: facts planted in prose, asked for after the context has been compressed.

Word lists and phrasings have nothing in common with those the gates are trained on (retention/training/words.py, families.py).

  needle   one five-digit number, planted at depths stratified over the samples; one question
  needle4  four keys with different five-digit numbers in the same words, so that the key matters; four questions
  facts    two or three facts without digits: a person, a place, a reason or an object; a question each
"""

import re
from dataclasses import dataclass

import numpy as np

from retention.chat import ASK, SYSTEM, USER
from retention.names import check_name
from retention.training import text
from retention.training.words import pick

FIRST = (
    "Agatha Benedict Cornelia Desmond Ottilie Fergus Rowena Humphrey Isadora Jasper Kirsten Leopold Miranda Nathaniel Ophelia "
    "Percival Rosalind Sylvester Thaddeus Ursula Vincent Winifred Yolanda Zachary"
).split()
LAST = (
    "Ackerman Blackwood Cavendish Donovan Ellsworth Fitzroy Goldberg Hargreaves Ingram Jefferson Kensington Lancaster Montgomery "
    "Northcott Pemberton Rutherford Sinclair Templeton Vandermeer Wellington Yarrow Zeller"
).split()
CITIES = (
    "Amsterdam Barcelona Budapest Copenhagen Delhi Glasgow Helsinki Karachi Leipzig Manila Melbourne Moscow Rotterdam Salzburg "
    "Shanghai Singapore Sydney Tallinn Tokyo Vancouver"
).split()
ADJECTIVES = (
    "ancient shattered crooked damp enormous fragile hidden invisible lonely mighty noble polished rare scarlet tiny unusual wild"
).split()
OBJECTS = (
    "teacup padlock hourglass pendulum scarecrow weathervane sailboat chandelier snowglobe typewriter gramophone birdcage "
    "wheelbarrow sundial"
).split()
GROUPS = (
    "orchestra|bowling league|cooking class|rescue squad|tennis academy|puppet theatre|expedition|weavers' guild|weather bureau|"
    "dance troupe"
).split("|")
THINGS = (
    "telegram|passport|diamond necklace|secret formula|treasure chest|manuscript|crown|parrot|marriage certificate|crystal ball"
).split("|")
PLACES = (
    "pantry|lighthouse|disused windmill|nursery|crypt|orangery|watchtower|dovecote|smokehouse|conservatory|coal bunker|wardrobe upstairs"
).split("|")
SITES = ("railway tunnel|zoo|ski resort|airport|toy factory|aquarium|planetarium|skating rink|cinema|marina|campsite|cable car").split("|")
REASONS = (
    "the wolves returned|lightning struck the mast|the ceiling cracked|smoke filled the corridors|a landslide buried the track|"
    "the mayor resigned|thieves stole the cables|the ice grew thin|mould covered the walls|the insurance lapsed|a fuse blew|"
    "the ground began to sink"
).split("|")
PRIZES = (
    "a sapphire brooch|a ruby pendant|an ivory comb|a marble bust|a wicker basket|a porcelain swan|a punch bowl|a tartan shawl|"
    "an oak cradle"
).split("|")


@dataclass(frozen=True)
class Kind:
    """Phrasings of one kind of held-out fact, {k} the key, {v} the value; each question asks what each statement says."""

    statements: tuple[str, ...]
    questions: tuple[str, ...]


NUMBER = Kind(
    (
        "The special magic number for {k} is {v}.",
        "If anyone mentions {k}, the right reply is the number {v}.",
        "It is worth noting that {k} is tied to the number {v}.",
        "By the way, {v} is the magic number of {k}.",
        "In the old ledger, {k} is followed by the number {v}.",
        "The lucky number that goes with {k} happens to be {v}.",
    ),
    (
        "What is the magic number for {k}?",
        "Which number goes with {k}?",
        "What number is mentioned together with {k}?",
        "According to the text, what is the number of {k}?",
    ),
)
FACTS = {
    "person": Kind(
        (
            "The new head of {k} is called {v}.",
            "Everyone agreed that {v} should run {k}.",
            "At present {k} is directed by {v}.",
            "{k} has been managed by {v} for years.",
        ),
        ("Who runs {k}?", "What is the name of the head of {k}?", "Who is the head of {k}?"),
    ),
    "place": Kind(
        (
            "In the end {k} was hidden inside the {v}.",
            "The children discovered {k} at the back of the {v}.",
            "For safety, {k} had been locked away in the {v}.",
            "{k} lay forgotten in the {v}.",
        ),
        ("Where was {k}?", "In what place was {k}?", "Where exactly was {k} found?"),
    ),
    "reason": Kind(
        (
            "People were sent home from {k} because {v}.",
            "{k} shut its gates for a month because {v}.",
            "There was trouble at {k}: it had to shut down because {v}.",
            "All work at {k} stopped because {v}.",
        ),
        ("Why did {k} shut down?", "For what reason did {k} shut down?", "What made {k} shut down?"),
    ),
    "object": Kind(
        (
            "As a farewell gift, {k} was handed {v}.",
            "{k} inherited {v} from an aunt.",
            "On the last evening {k} came home with {v}.",
            "At the raffle {k} won {v}.",
        ),
        ("What was {k} given?", "Which object did {k} get?", "What object did {k} come to own?"),
    ),
}
TASKS = ("needle", "needle4", "facts")


@dataclass(frozen=True)
class Sample:
    """One context and what is asked of it.

    context: all that comes before the question, chat wrapper included. questions: what to append to it, one at a time; the model's answer
    follows directly. answers: the value that each answer must hold, or the strings that `ruler.score` looks for. turns: whether the
    questions are turns of one conversation, each appended after the answer to the one before; else each is appended to the bare context.
    """

    context: str
    questions: tuple[str, ...]
    answers: tuple[str, ...] | tuple[tuple[str, ...], ...]
    turns: bool = False


def samples(task: str, encode: text.Encode, texts: list[str], length: int, count: int, seed: int) -> list[Sample]:
    """`count` samples whose contexts have `length` tokens within 2 %, a function of the arguments alone.

    Each answer stands exactly once in its context and in no question. Its key is no other planted fact's; the prose may hold that word too.
    Raises ValueError for an unknown task, empty texts, and a length below 160.
    """
    check_name("task", task, TASKS)
    if not any(texts):
        raise ValueError("texts holds no text; give the documents that text.load returns")
    if length < 160:
        raise ValueError(f"length must be at least 160 tokens to hold the planted facts and prose around them, not {length}")
    rng = np.random.default_rng((TASKS.index(task), seed))
    places = rng.permutation(count)
    return [_sample(task, encode, texts, length, (place + rng.random()) / count, rng) for place in places]


def correct(task: str, answer: str, generated: str) -> bool:
    """Whether `generated` holds the value `answer` as a whole word or number, whatever its case; digits may be grouped (52,817 or 52 817), and an article
    that the value begins with may be another.

    Raises ValueError for an unknown task.
    """
    check_name("task", task, TASKS)
    plain = " ".join(generated.lower().split())
    grouped = re.sub(r"(?<=\d)[, ](?=\d{3}(?!\d))", "", plain)
    value = re.sub(r"^(?:an?|the)\s+", "", answer.lower())  # she was given "the ruby pendant": it had been mentioned before
    wanted = re.compile(rf"(?<!\w){re.escape(value)}(?!\w)")
    return bool(wanted.search(plain) or wanted.search(grouped))


def strata(count: int, rng: np.random.Generator) -> list[float]:
    """`count` depths in [0, 1) in random order, one in each of as many equal parts."""
    return [(place + rng.random()) / count for place in rng.permutation(count)]


def plant(body: list[str], plants: list[str], depths: list[float]) -> list[str]:
    """The pieces of `body` with each of `plants` at the boundary nearest its depth, a fraction of the body's characters."""
    ends = np.cumsum([0, *(len(piece) for piece in body)])
    planted = list(body)
    for index in np.argsort(depths)[::-1]:  # from the end, so that earlier boundaries stay where they are
        planted.insert(int(np.abs(ends - depths[index] * ends[-1]).argmin()), plants[index])
    return planted


def full_name(rng: np.random.Generator) -> str:
    return f"{pick(rng, FIRST)} {pick(rng, LAST)}"


def _distinct(make, count: int) -> list[str]:
    """`count` strings from `make`, none part of another one."""
    found: list[str] = []
    while len(found) < count:
        new = make()
        if not any(new in one or one in new for one in found):
            found.append(new)
    return found


def number(rng: np.random.Generator) -> tuple[str, str, str]:
    """A statement that gives a key a five-digit number, the question for it, and the number."""
    return _numbers(1, rng)[0]


def _numbers(count: int, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """(statement, question, value) of `count` keys in the same words."""

    def key():
        return pick(rng, CITIES) if cities else f"the {pick(rng, ADJECTIVES)} {pick(rng, OBJECTS)}"

    cities = rng.random() < 0.5
    keys = _distinct(key, count)
    values = _distinct(lambda: str(int(rng.integers(10_000, 100_000))), count)
    statement, question = pick(rng, NUMBER.statements), pick(rng, NUMBER.questions)
    return [(statement.format(k=k, v=v), question.format(k=k), v) for k, v in zip(keys, values, strict=True)]


def _facts(rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """(statement, question, value) of a person, a place and, in two samples of three, a reason or an object."""
    kinds = ["person", "place", *([pick(rng, ("reason", "object"))] if rng.random() < 2 / 3 else [])]
    person, other = _distinct(lambda: full_name(rng), 2)
    pairs = {
        "person": (f"the {pick(rng, GROUPS)}", person),
        "place": (f"the {pick(rng, THINGS)}", pick(rng, PLACES)),
        "reason": (f"the {pick(rng, SITES)}", pick(rng, REASONS)),
        "object": (other, pick(rng, PRIZES)),
    }
    out = []
    for kind in kinds:
        key, value = pairs[kind]
        statement, question = pick(rng, FACTS[kind].statements).format(k=key, v=value), pick(rng, FACTS[kind].questions).format(k=key)
        out.append((statement[0].upper() + statement[1:], question, value))
    return out


def _sample(task: str, encode: text.Encode, texts: list[str], length: int, depth: float, rng: np.random.Generator) -> Sample:
    facts = _facts(rng) if task == "facts" else _numbers(1 if task == "needle" else 4, rng)
    # A lone fact stands at `depth`; several stand in strata of their own, so that no two samples have them at the same places.
    depths = [depth] if len(facts) == 1 else strata(len(facts), rng)
    values = [value.lower() for _, _, value in facts]
    plants = [" " + statement for statement, _, _ in facts]
    room = length - len(encode(SYSTEM + USER)) - sum(len(encode(plant)) for plant in plants)
    for _ in range(20):  # a long word at the end may leave too large a gap
        prose = text.sentences(text.window(texts, rng, 7 * room + 200))
        body = text.fit((piece for piece in prose if not any(value in piece.lower() for value in values)), encode, room)
        context = SYSTEM + USER + text.join(plant(body, plants, depths))
        if abs(len(encode(context)) - length) <= 0.02 * length:
            questions = tuple(f"\n\n{question}{ASK}" for _, question, _ in facts)
            return Sample(context, questions, tuple(value for _, _, value in facts))
    raise ValueError(f"the texts do not fill {length} tokens within 2 %; give texts of ordinary prose, in sentences")
