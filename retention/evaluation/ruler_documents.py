"""Questions over documents for RULER's QA tasks, read from SQuAD's or HotpotQA's JSON file, which the user supplies."""

import json
import os
from dataclasses import dataclass

from retention.training.text import without_marks

Path = str | os.PathLike


@dataclass(frozen=True)
class Question:
    """answers: any of them is right. golden: the paragraphs that hold the answer. near: paragraphs of the same article or entry, the hardest
    distractors."""

    question: str
    answers: tuple[str, ...]
    golden: tuple[str, ...]
    near: tuple[str, ...]


def squad(path: Path) -> tuple[list[Question], list[str]]:
    """The questions and all distinct paragraphs of a file in SQuAD's format (1.1, or 2.0, whose unanswerable questions are left out).

    Raises ValueError where the file is no JSON, lacks a field, or has no question that can be asked.
    """
    questions, paragraphs = [], []
    for a, article in enumerate(_field(_json(path), "data", list, path, "the file")):
        where = f"data[{a}]"
        entries = _field(article, "paragraphs", list, path, where)
        contexts = tuple(_field(entry, "context", str, path, f"{where}.paragraphs[{p}]") for p, entry in enumerate(entries))
        paragraphs += contexts
        for p, entry in enumerate(entries):
            for q, asked in enumerate(_field(entry, "qas", list, path, f"{where}.paragraphs[{p}]")):
                here = f"{where}.paragraphs[{p}].qas[{q}]"
                answers = tuple(
                    dict.fromkeys(
                        _field(answer, "text", str, path, f"{here}.answers[{i}]") for i, answer in enumerate(_field(asked, "answers", list, path, here))
                    )
                )
                near = tuple(context for context in contexts if context != contexts[p])
                questions.append(Question(_field(asked, "question", str, path, here), answers, (contexts[p],), near))
    return _usable(questions, path), list(dict.fromkeys(paragraphs))


def hotpotqa(path: Path) -> tuple[list[Question], list[str]]:
    """The questions and all distinct paragraphs, each under its title, of a file in HotpotQA's format (its distractor setting).

    Raises ValueError where the file is no JSON, lacks a field, or has no question that can be asked.
    """
    entries = _json(path)
    if not isinstance(entries, list):
        raise ValueError(f"{path} is not in HotpotQA's format: the file must hold a list of questions, not {type(entries).__name__}")
    questions, paragraphs = [], []
    for e, entry in enumerate(entries):
        where = f"entry {e}"
        documents = {}
        for d, document in enumerate(_field(entry, "context", list, path, where)):
            match document:
                case [str(title), [*sentences]] if all(isinstance(sentence, str) for sentence in sentences):
                    documents[title] = without_marks(f"{title}\n{''.join(sentences)}")
                case _:
                    raise ValueError(f"{path}: context[{d}] of {where} is not a title and a list of sentences")
        golden = {}
        for f, fact in enumerate(_field(entry, "supporting_facts", list, path, where)):
            match fact:
                case [str(title), _] if title in documents:
                    golden[title] = documents[title]
                case _:
                    raise ValueError(f"{path}: supporting_facts[{f}] of {where} does not begin with a title of its 'context'")
        near = tuple(documents[title] for title in documents if title not in golden)
        answers = (_field(entry, "answer", str, path, where),)
        questions.append(Question(_field(entry, "question", str, path, where), answers, tuple(golden.values()), near))
        paragraphs += documents.values()
    return _usable(questions, path), list(dict.fromkeys(paragraphs))


def holds(paragraph: str, answers: tuple[str, ...]) -> bool:
    """Whether any of `answers` stands in `paragraph`, whatever its case: what `ruler.score` would find."""
    return any(answer.lower() in paragraph.lower() for answer in answers)


def _usable(questions: list[Question], path: Path) -> list[Question]:
    """Those whose answers stand in their paragraphs and not in the question: not HotpotQA's yes or no, nor a choice of two that it names."""
    found = [
        one
        for one in questions
        if one.answers
        and all(answer.strip() and any(holds(paragraph, (answer,)) for paragraph in one.golden) for answer in one.answers)
        and not holds(one.question, one.answers)
    ]
    if not found:
        raise ValueError(f"{path} has no question whose answer stands in its paragraphs and not in the question itself")
    return found


def _json(path: Path):
    with open(path, "rb") as file:
        raw = file.read()
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError too
        raise ValueError(f"{path} is not JSON ({error}); give the file as the benchmark publishes it") from None


def _field(entry, name: str, kind: type, path: Path, where: str):
    if not isinstance(entry, dict) or not isinstance(entry.get(name), kind):
        raise ValueError(f"{path}: {where} has no field {name!r} with a {'text' if kind is str else 'list'}")
    return without_marks(entry[name]) if kind is str else entry[name]
