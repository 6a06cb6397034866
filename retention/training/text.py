"""Haystack prose: loading, splitting at sentence ends, random windows, and pieces that fill a number of tokens.

A document is a string of paragraphs, joined by blank lines; within one only code has line breaks. A piece is one sentence with the white
space before it, so that pieces concatenate to the text and, as tokenizers start a word at white space, their numbers of tokens add up to
the text's (near enough to size it).
"""

import glob
import os
import re
from collections.abc import Callable, Iterable

import numpy as np

Encode = Callable[[str], list[int]]

_ABBREVIATION = r"(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bSt)(?<!\bMs)(?<!\b[A-Z])(?<!e\.g)(?<!i\.e)"
_SENTENCE_END = re.compile(rf"{_ABBREVIATION}[.!?][\"'”’)\]]*(?=\s+[\"'“‘(\[]?[A-Z])|(?=\n\n)")
_MARKS = re.compile(r"<\|\w+\|>")
_GLUED = re.compile(r"([a-z]{2}[.!?][\"”)]?)(?=[A-Z][a-z]*[ ,'’-])")  # "software.Not": paragraphs whose break was lost with the markup
_NO_PROSE = ("::=", ">>>", "|", "+--", "***", "===", "---", "~~~")
_WORD = re.compile(r"\s*\S+")


def load(source: str) -> list[str]:
    """Documents of one or several comma-separated sources: "pydoc" (the manual inside every CPython) or a path or glob of text files, each read once.

    Files named .txt are prose, whose hard line breaks are undone; others, such as .py, keep their lines and indents. Raises FileNotFoundError
    where no file matches, ValueError for a folder and for a file that is not UTF-8 or holds no text.
    """
    documents, before = [], set()
    for name in (part.strip() for part in source.split(",")):
        if not name:
            raise ValueError(f'source {source!r} has an empty part; give "pydoc", a path or a glob such as "texts/*.txt", joined by commas')
        if name == "pydoc":
            if name in before:
                continue
            before.add(name)
            from pydoc_data.topics import topics

            found = [_prose(topics[topic]) for topic in sorted(topics)]
        else:
            paths = matching(name)
            if not paths:
                raise FileNotFoundError(f'no text file matches source {name!r}; give "pydoc", a path or a glob such as "texts/*.txt"')
            found = [_read(path) for real, path in paths.items() if real not in before]
            before.update(paths)
        documents += filter(None, found)  # a page of the manual may hold no prose
    return documents


def matching(name: str) -> dict[str, str]:
    """The files of a path or a glob, each once whatever links lead to it: its real path, and its path as found. A file's own name is no pattern."""
    path = os.path.expanduser(name)
    found: dict[str, str] = {}
    for one in [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True)):
        found.setdefault(os.path.realpath(one), one)
    return found


def without_marks(text: str) -> str:
    """Text from outside, without what a tokenizer would take for control tokens, such as a turn's end."""
    return _MARKS.sub("", text)


def read(path: str | os.PathLike) -> str:
    """A text file as it is, but for the ends of its lines. Raises FileNotFoundError, and ValueError for a folder and for what is not UTF-8 or no text."""
    try:
        with open(os.path.expanduser(path), "rb") as file:
            raw = file.read()
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder; give a text file, or where several may be given a glob such as '{path}/*.txt'") from None
    try:
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"the text file {path} is not UTF-8 (byte {error.start}); convert it or leave it out") from None
    if not text.strip():
        raise ValueError(f"the text file {path} holds no text; leave it out")
    return text


def _read(path: str) -> str:
    text = without_marks(read(path))
    if not text.strip():
        raise ValueError(f"the text file {path} holds nothing but control tokens; leave it out")
    return _paragraphs(text) if path.endswith(".txt") else text.strip("\n")


def _paragraphs(raw: str) -> str:
    """Undoes hard line breaks: lines of a paragraph joined by one space, paragraphs by a blank line."""
    raw = _GLUED.sub(r"\1\n\n", raw)
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", raw) if paragraph.strip())


def _prose(raw: str) -> str:
    """The paragraphs of a manual page that read as prose: no grammar, code, tables, headings or underlines."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", raw):
        lines = [line for line in paragraph.split("\n") if line.strip()]
        text = " ".join(paragraph.split())
        code = any(mark in text for mark in _NO_PROSE) or not lines or lines[0].startswith("    ")
        letters = sum(char.isalpha() or char == " " for char in text)
        if not code and len(text) > 60 and text[-1] in ".!?:" and letters > 0.88 * len(text):
            kept.append(text)
    return _paragraphs("\n\n".join(kept))


def sentences(text: str) -> list[str]:
    """Pieces of `text`, one a sentence, each with the white space before it; their concatenation is `text`."""
    ends = [0, *(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]
    return [text[start:end] for start, end in zip(ends, ends[1:], strict=False) if end > start]


def window(texts: list[str], rng: np.random.Generator, chars: int) -> str:
    """At least `chars` contiguous characters that start at a random sentence, running on into the next texts where one ends.

    A text is drawn in proportion to its length. The window ends with a text or in mid-sentence; `sentences` and `fit` make clean ends.
    """
    sizes = np.array([len(text) for text in texts])
    at = int(rng.integers(sizes.sum()))
    index = int(np.searchsorted(np.cumsum(sizes), at, side="right"))
    text, offset = texts[index], at - int(sizes[:index].sum())
    end = _SENTENCE_END.search(text, offset)
    first = text[end.end() :].lstrip() if end else ""
    parts = [first[:chars]] if first else []
    while sum(map(len, parts)) < chars:
        index = (index + 1) % len(texts)
        parts.append(texts[index][:chars])
    return "\n\n".join(parts)


def fit(pieces: Iterable[str], encode: Encode, budget: int) -> list[str]:
    """Leading `pieces`, at most `budget` tokens in all, and within a few of it where there are pieces enough.

    The last one is shortened to its first words and closed by a full stop, so that the text ends at a sentence end. Each piece is encoded
    once but for the last, whose length is found by bisection.
    """
    taken = []
    for piece in pieces:
        tokens = len(encode(piece))
        if tokens <= budget:
            taken.append(piece)
            budget -= tokens
            continue
        words = _WORD.findall(piece)
        low, high, best = 0, min(len(words) - 1, budget), ""
        while low < high:
            middle = (low + high + 1) // 2
            cut = "".join(words[:middle]).rstrip(" ,;:-—.!?\"'“”‘’(") + "."
            if len(encode(cut)) <= budget:
                low, best = middle, cut
            else:
                high = middle - 1
        return taken + [best] if best else taken
    return taken


def join(pieces: Iterable[str]) -> str:
    """One text: no white space before the first piece, a space before one that brings none, a blank line after a piece of several lines."""
    parts: list[str] = []
    block = False
    for piece in pieces:
        bare = piece.lstrip()
        space = piece[: len(piece) - len(bare)]
        if block and not space.startswith("\n\n"):
            space = "\n\n"
        parts.append((space or " ") + bare if parts else bare)
        block = "\n" in bare
    return "".join(parts)
