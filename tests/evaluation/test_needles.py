"""The held-out tasks: what they hold, and that training never sees their words or phrasings."""

import re

import numpy as np
import pytest

from retention.chat import SYSTEM, USER
from retention.evaluation import needles
from retention.training import text
from retention.training.families import FAMILIES
from retention.training.words import WORDS

TOKEN = re.compile(r"<\|\w+\|>|\s?\w+|\s?[^\w\s]|\s")


def encode(string: str) -> list[int]:
    return [len(token) for token in TOKEN.findall(string)]


@pytest.fixture(scope="module")
def texts():
    return text.load("pydoc")


def read(context: str, question: str) -> set[str]:
    """An oracle reader: all that the statements of the question's kind say in the context of what it asks for."""
    found = set()
    for kind in (needles.NUMBER, *needles.FACTS.values()):
        for asked in kind.questions:
            key = re.match(re.escape("\n\n" + asked).replace(r"\{k\}", "(.+)"), question)
            for statement in kind.statements if key else ():
                pattern = re.escape(statement).replace(r"\{k\}", re.escape(key[1])).replace(r"\{v\}", r"([\w' ]+)")
                found |= {match[1] for match in re.finditer(pattern, context, re.IGNORECASE)}
    return found


@pytest.mark.parametrize("task", needles.TASKS)
@pytest.mark.parametrize("length", [200, 1000])
def test_samples(texts, task, length):
    found = needles.samples(task, encode, texts, length, 24, seed=5)
    assert found == needles.samples(task, encode, texts, length, 24, seed=5)
    assert found != needles.samples(task, encode, texts, length, 24, seed=6)
    assert len({sample.context for sample in found}) == 24
    for sample in found:
        assert abs(len(encode(sample.context)) - length) <= 0.02 * length
        assert sample.context.startswith(SYSTEM + USER) and "<|" not in sample.context[len(SYSTEM + USER) :]
        wanted = {"needle": (1,), "needle4": (4,), "facts": (2, 3)}[task]
        assert len(sample.questions) == len(sample.answers) in wanted
        assert len(set(sample.answers)) == len(sample.answers) and len(set(sample.questions)) == len(sample.questions)
        for question in sample.questions:
            assert re.fullmatch(r"\n\n[^\n]+\?<\|im_end\|>\n<\|im_start\|>assistant\n", question)
        for question, answer in zip(sample.questions, sample.answers, strict=True):
            assert read(sample.context, question) == {answer}
            assert sample.context.lower().count(answer.lower()) == 1
            assert not any(answer.lower() in question.lower() for question in sample.questions)
            assert bool(re.search(r"\d", answer)) == (task != "facts")
            assert task == "facts" or re.fullmatch(r"[1-9]\d{4}", answer)


def test_prose_that_holds_a_value_is_left_out():
    story = "In the year of the frost they walked to the coast and back. Nothing came of it. "
    prose = (story + " ".join(f"He hid it in the {place}." for place in needles.PLACES) + " ") * 40
    found = needles.samples("facts", encode, [prose], 400, 24, seed=0)
    assert any(answer in needles.PLACES for sample in found for answer in sample.answers)
    for sample in found:
        assert all(sample.context.lower().count(answer.lower()) == 1 for answer in sample.answers)


def test_needle_depths_cover_the_context(texts):
    found = needles.samples("needle", encode, texts, 1000, 20, seed=0)
    depths = sorted(sample.context.index(sample.answers[0]) / len(sample.context) for sample in found)
    assert depths[0] < 0.15 and depths[-1] > 0.85
    assert max(np.diff(depths)) < 0.2


def test_four_keys_share_one_statement(texts):
    for sample in needles.samples("needle4", encode, texts, 600, 6, seed=1):
        frames = set()
        for question, answer in zip(sample.questions, sample.answers, strict=True):
            [statement] = [piece for piece in text.sentences(sample.context) if answer in piece]
            keys = [k for k in [*needles.CITIES, *needles.OBJECTS] if k in question]
            assert len(keys) == 1 and keys[0] in statement  # the question's key is bound to its own answer
            key = rf"the \w+ {keys[0]}" if keys[0] in needles.OBJECTS else keys[0]
            frames.add(re.sub(key, "K", statement.strip().replace(answer, "V")))
        assert len(frames) == 1, frames


def _frames(strings):
    return {re.sub(r"\{\w\}", "{}", string.lower()) for string in strings}


def test_phrasings_are_held_out():
    kinds = [needles.NUMBER, *needles.FACTS.values()]
    for part in ("statements", "questions"):
        held_out = _frames(one for kind in kinds for one in getattr(kind, part))
        trained = _frames(one for family in FAMILIES.values() for one in getattr(family, part))
        assert len(held_out) >= 10 and not held_out & trained


def test_words_are_held_out():
    lists = [needles.FIRST, needles.LAST, needles.CITIES, needles.ADJECTIVES, needles.OBJECTS, needles.GROUPS, needles.THINGS]
    lists += [needles.PLACES, needles.SITES, needles.PRIZES, needles.REASONS]
    held_out = {entry.lower() for words in lists for entry in words}
    trained = {entry.lower() for words in WORDS.values() for entry in words}
    assert not held_out & trained

    def content(entries):
        small = {"the", "of", "a", "an", "was", "were", "on", "at", "in", "with", "and", "to", "too", "his", "up", "out", "over"}
        return {word for entry in entries for word in re.findall(r"[\w'-]+", entry)} - small

    assert content(held_out) & content(trained) == set()


@pytest.mark.parametrize(
    "task, answer, generated, expected",
    [
        ("needle", "52817", "The number is 52817.", True),
        ("needle", "52817", "It is 52,817.", True),
        ("needle", "52817", "52 817", True),
        ("needle", "52817", "They are 10234, 52817, 617.", True),
        ("needle", "52817", "1, 52817", True),
        ("needle4", "52817", "528170", False),
        ("needle4", "52817", "152,817", False),
        ("needle", "52817", "5281", False),
        ("needle", "52817", "", False),
        ("facts", "Vincent Yarrow", "It was vincent\nyarrow.", True),
        ("facts", "Vincent Yarrow", "Vincent Zeller", False),
        ("facts", "crypt", "In the cryptic room", False),
        ("facts", "crypt", "In the Crypt", True),
        ("facts", "a ruby pendant", "She was given the ruby pendant.", True),
        ("facts", "an oak cradle", "Oak cradle", True),
        ("facts", "the wolves returned", "Wolves returned.", True),
        ("facts", "a ruby pendant", "A sapphire brooch", False),
        ("facts", "a ruby pendant", "the ruby pendants", False),
        ("facts", "thecla", "cla", False),
    ],
)
def test_correct(task, answer, generated, expected):
    assert needles.correct(task, answer, generated) is expected


def test_errors(texts):
    with pytest.raises(ValueError, match="needle, needle4, facts"):
        needles.samples("needles", encode, texts, 1000, 1, seed=0)
    with pytest.raises(ValueError, match="needle, needle4, facts"):
        needles.correct("haystack", "1", "1")
    with pytest.raises(ValueError, match="texts"):
        needles.samples("needle", encode, [], 1000, 1, seed=0)
    with pytest.raises(ValueError, match="length"):
        needles.samples("needle", encode, texts, 50, 1, seed=0)
    with pytest.raises(ValueError, match="do not fill"):
        needles.samples("needle", encode, ["x" * 9000], 1000, 1, seed=0)
