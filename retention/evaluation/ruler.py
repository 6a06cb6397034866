"""RULER's thirteen tasks (Hsieh et al. 2024, arXiv 2404.06654), written from the paper's description, and two of several turns.

  niah_single_1    a needle "key: number" in noise, five sentences repeated; _2: in prose; _3: in prose, the value a UUID
  niah_multikey_1  one needle of four in prose is asked for; _2: one of a haystack that is all needles; _3: the same, keys and values UUIDs
  niah_multivalue  four values of one key in prose; niah_multiquery: four keys in prose, asked for at once
  vt               variable tracking: a number handed on over four hops in noise; all five variables that hold it
  cwe              common words: the ten of a numbered list (fewer in a short one) that stand in it ten times as often as the others
  fwe              frequent words: made-up words in Zeta-distributed numbers; the three most frequent after the dots, which are noise
  qa_1, qa_2       a question over documents of the user's SQuAD or HotpotQA file, the golden ones among distractors
  kv_turns         a table of keys and values, asked for a key in each of four turns
  needle_turns     four needles told in four turns of a dialogue, asked for in four later ones

Of HotpotQA's questions qa_2 asks those alone whose answer stands in their paragraphs and not in the question: no yes or no, no choice of two.
The words differ from the paper's; the one-shot example that its authors put before vt and cwe is left out. Each question ends, like theirs,
with the first words of its answer.
"""

import functools
import itertools
import math
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from retention.chat import ASK, END, SYSTEM, USER
from retention.evaluation import ruler_documents
from retention.evaluation.needles import Sample, plant, strata
from retention.evaluation.ruler_words import ADJECTIVES, NOUNS
from retention.names import check_name
from retention.training import text
from retention.training.words import pick

Make = Callable[[np.random.Generator], str]

NOISE = ("\nThe lake is cold.", " The moon is pale.", " The road is long.", " On we walk.", " Up and down once more.")
NEEDLE = "One of the magic {kind}s for {key} is {value}."
TURNS = 4
HOPS = 4
COMMON = 10
RATIO = 10  # a common word stands this many times as often as another
FREQUENT = 3  # and the fewest common words
DOTS = "...."
REPLIES = ("I have read it.", "Understood.", "I will remember it.", "All right.")
TOO_SHORT = "length {length} is too short for {task}: {what}; give more tokens"


def _word(rng: np.random.Generator) -> str:
    return f"{pick(rng, ADJECTIVES)}-{pick(rng, NOUNS)}"


def _number(rng: np.random.Generator) -> str:
    return str(int(rng.integers(1_000_000, 10_000_000)))


def _uuid(rng: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def _coined(rng: np.random.Generator) -> str:
    """Six consonants, so that no English word is part of it."""
    return "".join(pick(rng, "bcdfghjklmnpqrstvwxz") for _ in range(6))


def _variable(rng: np.random.Generator) -> str:
    return "".join(pick(rng, "ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(5))


def _distinct(make: Make, rng: np.random.Generator, taken: set[str]) -> Iterator[str]:
    """Strings from `make`, without end, none twice and none of `taken`, to which they are added. None is part of another one."""
    while True:
        new = make(rng)
        if new not in taken:
            taken.add(new)
            yield new


@dataclass(frozen=True)
class Needles:
    """A needle task. haystack: "noise", "prose" or "needles". kind: what the values are called."""

    haystack: str
    kind: str = "number"
    key: Make = _word
    value: Make = _number
    keys: int = 1
    asked: int = 1
    values: int = 1  # of each key


NIAH = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("prose"),
    "niah_single_3": Needles("prose", "uuid", value=_uuid),
    "niah_multikey_1": Needles("prose", keys=4),
    "niah_multikey_2": Needles("needles"),
    "niah_multikey_3": Needles("needles", "uuid", key=_uuid, value=_uuid),
    "niah_multivalue": Needles("prose", values=4),
    "niah_multiquery": Needles("prose", keys=4, asked=4),
}
QA = {"qa_1": ruler_documents.squad, "qa_2": ruler_documents.hotpotqa}
TASKS = (*NIAH, "vt", "cwe", "fwe", *QA, "kv_turns", "needle_turns")
PROSE = {*(task for task, kind in NIAH.items() if kind.haystack == "prose"), "needle_turns"}


@dataclass(frozen=True)
class _Draft:
    """A sample before its haystack. build: the context with a haystack of at most so many tokens, none for 0."""

    build: Callable[[int], str]
    questions: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]
    turns: bool = False


@dataclass(frozen=True)
class _Maker:
    """What haystacks are made from: pieces of text, at most `room` tokens of them."""

    encode: text.Encode
    texts: list[str]
    rng: np.random.Generator

    def cost(self, piece: str) -> int:
        return len(self.encode(piece))

    def noise(self, room: int) -> list[str]:
        return text.fit(itertools.cycle(NOISE), self.encode, room)

    def prose(self, room: int, planted: set[str]) -> list[str]:
        """Sentences without a planted key or value."""
        if room <= 0:
            return []
        found = text.sentences(text.window(self.texts, self.rng, 7 * room + 200))
        return text.fit((piece for piece in found if not any(one.lower() in piece.lower() for one in planted)), self.encode, room)

    def whole(self, lines: Iterator[str], room: int) -> tuple[list[str], list[str]]:
        """Lines uncut, and noise for the rest of the room: a line may be longer than a length may be missed by."""
        taken = []
        for line in lines:
            if self.cost(line) > room:
                return taken, self.noise(room)
            room -= self.cost(line)
            taken.append(line)


def samples(task: str, encode: text.Encode, texts: list[str], length: int, count: int, seed: int, data: ruler_documents.Path | None = None) -> list[Sample]:
    """`count` samples whose contexts have `length` tokens within 2 %, a function of the arguments alone.

    Every string of an answer stands in its context, in no other role, and in no question; asked-for needles and golden documents are spread over
    all depths. data: the path of a SQuAD file for qa_1 or of a HotpotQA file for qa_2; the other tasks need none.

    Raises ValueError for an unknown task, a length too short for the task's own words, texts or a file that do not fill it, no texts where a
    task needs prose, and no data or malformed data where a task needs documents.
    """
    check_name("task", task, TASKS)
    if task in PROSE and not any(texts):
        raise ValueError(f"{task} needs prose and texts holds none; give the documents that text.load returns")
    rng = np.random.default_rng((TASKS.index(task), seed))
    maker = _Maker(encode, texts, rng)
    depths = strata(count, rng)
    if task in NIAH:
        drafts = (_niah(NIAH[task], maker, depth) for depth in depths)
    elif task in QA:
        if data is None:
            raise ValueError(f"{task} needs data, the path of a {'SQuAD' if task == 'qa_1' else 'HotpotQA'} file")
        drafts = _qa(task, maker, length, depths, *QA[task](data))
    else:
        draw = {"vt": _vt, "cwe": functools.partial(_cwe, length), "fwe": functools.partial(_fwe, length)}
        draw |= {"kv_turns": _kv_turns, "needle_turns": _needle_turns}
        drafts = (draw[task](maker) for _ in range(count))
    return [_sized(task, draft, encode, length) for draft in drafts]


def score(task: str, answer: tuple[str, ...], generated: str) -> float:
    """The share of the strings of `answer` that `generated` holds; for qa_1 and qa_2 whether it holds any: 1 or 0. Case does not matter.

    These are the benchmark's own measures, by substring. Raises ValueError for an unknown task.
    """
    check_name("task", task, TASKS)
    found = [ruler_documents.holds(generated, (one,)) for one in answer]
    return float(any(found)) if task in QA else sum(found) / len(found)


def _sized(task: str, draft: _Draft, encode: text.Encode, length: int) -> Sample:
    fixed = len(encode(draft.build(0)))
    if fixed > 0.75 * length:
        raise ValueError(TOO_SHORT.format(length=length, task=task, what=f"its own words take {fixed} tokens"))
    room = length - fixed
    for _ in range(20):  # the tokens of pieces add up to the text's nearly, and documents may leave a gap
        context = draft.build(room)
        missed = length - len(encode(context))
        if abs(missed) <= 0.02 * length:
            return Sample(context, draft.questions, draft.answers, draft.turns)
        room += missed
    if task in QA or task in PROSE:
        source = "file's documents" if task in QA else "texts"
        raise ValueError(f"the {source} do not fill {length} tokens within 2 % for {task}; give more of them, or ordinary prose in sentences")
    raise ValueError(TOO_SHORT.format(length=length, task=task, what="one piece of its list is more than 2 % of it"))


def _context(introduction: str, body: str) -> str:
    return f"{SYSTEM}{USER}{introduction}\n\n{body}"


def _ask(question: str, prefix: str) -> str:
    return f"\n\n{question}{ASK}{prefix}"


def _listed(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]


def _niah(kind: Needles, maker: _Maker, depth: float) -> _Draft:
    taken: set[str] = set()
    keys = list(itertools.islice(_distinct(kind.key, maker.rng, taken), kind.keys))
    values = _distinct(kind.value, maker.rng, taken)
    pairs = [(key, next(values)) for key in keys for _ in range(kind.values)]
    planted = set(taken)
    asked = keys[: kind.asked]
    answer = tuple(value for key, value in pairs if key in asked)
    # One needle that is asked for stands at `depth`; several stand in strata of their own.
    depths = strata(len(answer), maker.rng) if len(answer) > 1 else [depth]
    depths += list(maker.rng.random(len(pairs) - len(answer)))
    space = "\n" if kind.haystack == "needles" else " "

    def needle(key: str, value: str) -> str:
        return space + NEEDLE.format(kind=kind.kind, key=key, value=value)

    def build(room: int) -> str:
        padding: list[str] = []
        if kind.haystack == "noise":
            body = maker.noise(room)
        elif kind.haystack == "prose":
            body = maker.prose(room, planted)
        else:
            used = set(planted)
            others = zip(_distinct(kind.key, maker.rng, used), _distinct(kind.value, maker.rng, used), strict=True)
            body, padding = maker.whole(itertools.starmap(needle, others), room)
        body = plant(body, [needle(*pair) for pair in pairs], depths)
        return _context(f"Some magic {kind.kind}s are hidden in the text below. Remember them: you will be asked for them later.", text.join(body + padding))

    named, many = _listed(asked), len(answer) > 1
    question = f"What {f'are all the magic {kind.kind}s' if many else f'is the magic {kind.kind}'} for {named} in the text above?"
    prefix = f"The magic {kind.kind}{'s' if many else ''} for {named} in the text above {'are' if many else 'is'}"
    return _Draft(build, (_ask(question, prefix),), (answer,))


def _vt(maker: _Maker) -> _Draft:
    names = list(itertools.islice(_distinct(_variable, maker.rng, set()), HOPS + 1))
    value = str(int(maker.rng.integers(10_000, 100_000)))
    sources = [value, *(f"VAR {name}" for name in names)]
    chain = [f" VAR {name} = {source}." for name, source in zip(names, sources, strict=False)]
    depths = sorted(strata(len(chain), maker.rng))

    def build(room: int) -> str:
        introduction = "Assignments of variables are hidden in the text below. Follow which value each variable holds."
        return _context(introduction, text.join(plant(maker.noise(room), chain, depths)))

    question = f"Which variables hold the value {value} in the text above? There are {len(names)} of them."
    return _Draft(build, (_ask(question, f"The {len(names)} variables that hold the value {value} are"),), (tuple(names),))


def _cwe(length: int, maker: _Maker) -> _Draft:
    words = [str(word) for word in maker.rng.permutation(ADJECTIVES + NOUNS)]
    entry = sum(maker.cost(f" 100. {word}") for word in words[:COMMON]) / COMMON
    # Ten words 30 times against 3 for the others; where those fill most of the context fewer times, and then fewer words, in the same ratio.
    fitting = int(0.6 * length / (RATIO * entry))
    once, count = min(3, max(1, fitting // COMMON)), min(COMMON, fitting)
    if count < FREQUENT:
        raise ValueError(TOO_SHORT.format(length=length, task="cwe", what=f"{FREQUENT} words, {RATIO} times each, fill most of it"))
    common, rest = words[:count], words[COMMON:]

    def build(room: int) -> str:
        found = common * (RATIO * once)
        for word in itertools.chain(rest, _distinct(_coined, maker.rng, set())):  # a long list needs more words than there are
            numbers = range(len(found) + 1, len(found) + once + 1)
            room -= once * maker.cost(f" {word}") + sum(maker.cost(f" {number}.") for number in numbers)
            if room < 0:
                break
            found += [word] * once
        order = maker.rng.permutation(len(found))
        body = " ".join(f"{number}. {found[index]}" for number, index in enumerate(order, 1))
        return _context("Below is a numbered list of words, some of which recur more often than others. Remember those that recur most.", body)

    question = f"Which {count} words occur most often in the list above?"
    return _Draft(build, (_ask(question, f"The {count} words that occur most often in the list are"),), (tuple(common),))


def _zeta(total: int) -> list[int]:
    """How often each rank occurs among `total` words of a Zeta distribution with exponent 2, rounded down, as long as it does."""
    return list(itertools.takewhile(bool, (int(total * 6 / (math.pi * rank) ** 2) for rank in itertools.count(1))))


def _fwe(length: int, maker: _Maker) -> _Draft:
    # A word has a token at least, so that no more than `length` words, and no rank beyond its root, are needed.
    words = [DOTS, *itertools.islice(_distinct(_coined, maker.rng, set()), math.isqrt(length) + FREQUENT)]
    costs = [maker.cost(f" {word}") for word in words]

    def build(room: int) -> str:
        total = 0
        step = 1 << length.bit_length()
        while step := step // 2:  # the greatest total that fits
            counts = _zeta(total + step)
            if sum(times * cost for times, cost in zip(counts, costs, strict=False)) <= room:
                total += step
        counts = _zeta(total)
        if room and (len(counts) <= FREQUENT + 1 or counts[FREQUENT] == counts[FREQUENT + 1]):
            raise ValueError(TOO_SHORT.format(length=length, task="fwe", what="the third word would not occur more often than the fourth"))
        found = [word for word, times in zip(words, counts, strict=False) for _ in range(times)]
        body = " ".join(found[index] for index in maker.rng.permutation(len(found)))
        return _context("The coded text below is made of invented words. Keep count of how often each occurs; the dots do not matter.", body)

    question = "Which three coded words occur most often in the text above, dots aside?"
    return _Draft(build, (_ask(question, "The three coded words that occur most often are"),), (tuple(words[1 : FREQUENT + 1]),))


def _qa(task: str, maker: _Maker, length: int, depths: list[float], questions: list[ruler_documents.Question], paragraphs: list[str]) -> Iterator[_Draft]:
    order = (questions[index] for index in maker.rng.permutation(len(questions)))
    fitting = list(itertools.islice((one for one in order if sum(map(maker.cost, one.golden)) <= length / 2), len(depths)))
    if not fitting:
        raise ValueError(TOO_SHORT.format(length=length, task=task, what="no question's own paragraphs fill less than half of it"))
    if len(fitting) < len(depths):
        fits = f"{len(fitting)} questions whose own paragraphs fill less than half of {length} tokens"
        raise ValueError(f"the file of {task} has {fits}, and config.samples asks for {len(depths)}; ask for no more")
    return (_documents(maker, depth, paragraphs, one) for one, depth in zip(fitting, depths, strict=True))


def _documents(maker: _Maker, depth: float, paragraphs: list[str], asked: ruler_documents.Question) -> _Draft:
    depths = [depth] if len(asked.golden) == 1 else strata(len(asked.golden), maker.rng)
    heading = maker.cost("\n\nDocument 10:\n")

    def distractors(room: int) -> list[str]:
        """Near ones first; the last one cut so that they fill the room."""
        taken = []
        pools = [[pool[index] for index in maker.rng.permutation(len(pool))] for pool in (asked.near, paragraphs)]
        for one in dict.fromkeys(itertools.chain(*pools)):
            if one in asked.golden or ruler_documents.holds(one, asked.answers):
                continue
            if heading + maker.cost(one) > room:
                cut = text.fit(text.sentences(one), maker.encode, room - heading)
                return taken + ["".join(cut)] if cut else taken
            room -= heading + maker.cost(one)
            taken.append(one)
        return taken

    def build(room: int) -> str:
        found = distractors(room)
        shuffled = [found[index] for index in maker.rng.permutation(len(found))]
        planted = plant(shuffled, list(asked.golden), depths)
        body = "\n\n".join(f"Document {number}:\n{one}" for number, one in enumerate(planted, 1))
        return _context("Read the documents below. They hold the answer to a question that you will be asked.", body)

    question = f"Answer from the documents above, with the answer alone: {asked.question}"
    return _Draft(build, (_ask(question, "Answer:"),), (asked.answers,))


def _kv_turns(maker: _Maker) -> _Draft:
    planted: set[str] = set()
    keys, values = _distinct(_word, maker.rng, planted), _distinct(_number, maker.rng, planted)
    pairs = [(next(keys), next(values)) for _ in range(TURNS)]
    depths = strata(TURNS, maker.rng)

    def line(key: str, value: str) -> str:
        return f'\n  "{key}": "{value}",'

    def build(room: int) -> str:
        used = {word for pair in pairs for word in pair}
        others = zip(_distinct(_word, maker.rng, used), _distinct(_number, maker.rng, used), strict=True)
        rows, padding = maker.whole(itertools.starmap(line, others), room)
        table = "".join(plant(rows, [line(*pair) for pair in pairs], depths)).rstrip(",")
        return _context("Below is a table of keys and their values. You will be asked for some of the values.", f"{{{table}\n}}" + "".join(padding))

    questions = [(f'What is the value of "{key}" in the table?', f'The value of "{key}" is') for key, _ in pairs]
    return _Draft(build, (_ask(*questions[0]), *(_next(*one) for one in questions[1:])), tuple((value,) for _, value in pairs), turns=True)


def _next(question: str, prefix: str) -> str:
    """A question as a turn of its own; the one before has been closed by END."""
    return f"\n{USER}{question}{ASK}{prefix}"


def _needle_turns(maker: _Maker) -> _Draft:
    planted: set[str] = set()
    keys, values = _distinct(_word, maker.rng, planted), _distinct(_number, maker.rng, planted)
    pairs = [(next(keys), next(values)) for _ in range(TURNS)]
    depths = maker.rng.random(TURNS)
    introduction = "I will send you four passages. A magic number is hidden in each: remember them all.\n\n"

    def build(room: int) -> str:
        told = []
        for turn, (key, value) in enumerate(pairs):
            needle = " " + NEEDLE.format(kind="number", key=key, value=value)
            passage = text.join(plant(maker.prose(room // TURNS, planted), [needle], [depths[turn]]))
            told.append(f"{USER}{'' if turn else introduction}{passage}{ASK}{REPLIES[turn]}{END}")
        return SYSTEM + "\n".join(told)

    asked = [pairs[index] for index in maker.rng.permutation(TURNS)]
    questions = tuple(_next(f"What is the magic number for {key}?", f"The magic number for {key} is") for key, _ in asked)
    return _Draft(build, questions, tuple((value,) for _, value in asked), turns=True)
