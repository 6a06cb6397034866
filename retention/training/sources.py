"""The sources of training documents: synthetic facts, windows of prose, and records of files. Each is a random access list of documents."""

import warnings
from typing import Protocol

import numpy as np
from ml_collections import ConfigDict

from retention import chat
from retention.checkpoints.tokenizer import Tokenizer
from retention.runs import digest
from retention.training import documents, text
from retention.training.records import Records

Document = tuple[np.ndarray, np.ndarray]  # tokens [n] int32, and whether each is an assistant's [n] bool
ENDLESS = 10_000_000  # documents of a source that makes them, before it begins again


class Source(Protocol):
    """A list of documents, each a function of its index alone, what opening the source found (see Pipeline.report), and the `runs.digest` of its files."""

    report: dict
    digest: str
    answers: bool  # whether its documents hold an assistant's tokens

    def __len__(self) -> int: ...

    def document(self, index: int, tokenizer: Tokenizer) -> Document:
        """At least one token."""


class _Endless:
    """Documents made of the prose of `path` as they are asked for, each from a generator of its own."""

    def __init__(self, path: str, length: int, seed: int):
        self._texts, self._length, self._seed = text.load(path), length, seed
        if (chars := sum(map(len, self._texts))) < 5 * length:
            again = "so that one document will say parts of it several times; give more text, or a smaller data.length"
            warnings.warn(f"the text of {path} has {chars} characters, fewer than the {length} tokens of a document take, {again}", stacklevel=2)
        self.report = {"documents": ENDLESS, "skipped": {}, "first": {}}
        self.digest = digest(one.encode() for one in self._texts)

    def __len__(self) -> int:
        return ENDLESS


class Facts(_Endless):
    """Prose with planted facts and chat turns that ask for them, in the model's own chat format (see documents.py). Nearly `length` tokens each."""

    answers = True

    def __init__(self, path: str, length: int, seed: int):
        if length < 192:
            raise ValueError(f"data.length must be at least 192 tokens to hold a fact and a question, not {length}")
        super().__init__(path, length, seed)

    def document(self, index: int, tokenizer: Tokenizer) -> Document:
        rng = np.random.default_rng((self._seed, index))
        start = tokenizer.encode("")
        parts = documents.document(self._texts, chat.encoder(tokenizer, written=True), rng, self._length - len(start))
        if parts[0][0][: len(start)] != start:  # an opening may have it
            parts.insert(0, (start, False))
        tokens = np.array([token for part, _ in parts for token in part], np.int32)
        return tokens, np.repeat([answer for _, answer in parts], [len(part) for part, _ in parts])


class Prose(_Endless):
    """Prose from a random sentence's start, `length` tokens."""

    answers = False

    def document(self, index: int, tokenizer: Tokenizer) -> Document:
        rng = np.random.default_rng((self._seed, index))
        chars, tokens = 5 * self._length, []
        while len(tokens) < self._length:  # text with long tokens, such as runs of white space, needs more characters
            tokens = tokenizer.encode(text.window(self._texts, rng, chars), special=False)
            chars *= 2
        return np.array(tokens[: self._length], np.int32), np.zeros(self._length, bool)


KINDS = ("facts", "text", "records")


def open_source(name: str, entry: ConfigDict, tokenizer: Tokenizer, length: int, max_chars: int, seed: int) -> Source:
    """The source that data.sources.`name` describes: {kind, path, weight}.

    kind "facts": synthetic chat over the prose of `path` (as text.load takes it); "text": windows of that prose; "records": see records.py.
    """
    if entry.kind == "facts":
        chat.encoder(tokenizer)  # a model without chat turns is refused now
        return Facts(entry.path, length, seed)
    if entry.kind == "text":
        return Prose(entry.path, length, seed)
    if entry.kind == "records":
        return Records(entry.path, tokenizer, max_chars)
    raise ValueError(f"data.sources.{name}.kind must be one of {', '.join(KINDS)}, not {entry.kind!r}")
