"""Training documents: prose with planted facts and chat turns that ask for them, drawn from a numpy Generator.

A Draft is a document before its prose is chosen: facts to plant, turns to ask. `assemble` plants them in prose up to a number of tokens.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from retention.chat import ASK, END, SYSTEM, USER
from retention.training import text
from retention.training.families import FAMILIES
from retention.training.words import expand, pick

Part = tuple[list[int], bool]  # tokens, and whether they are an assistant's answer

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
