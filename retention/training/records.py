"""Documents from record files: JSON lines, Parquet, ArrayRecord (of JSON). Chat records are rendered in the model's own chat format.

What a record holds is found by the columns of its file, or of the file's first record that has those of a layout:

  messages              a list of {role, content} (OpenR1-Math)
  conversations         a list of {from, value} (ShareGPT), from being system, human or gpt
  instruction, output   one turn; with `input`, that follows the instruction (Alpaca, LongAlpaca)
  problem, generations  one turn, answered by the first generation (OpenR1-Math)
  problem, solution     one turn
  text                  a plain document, without answers

Opening a source looks at every record once. A record that cannot be used is skipped and counted by reason, with the place (file:record, from 1) of
the first; blank lines are no records. What then remains is used in training, all of it. A file that is empty or of which nothing remains is refused.
"""

import array
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from retention.checkpoints.tokenizer import Tokenizer
from retention.runs import digest
from retention.training import files
from retention.training.files import Unusable

Messages = list[dict[str, str]]


class Records:
    """The usable records of `path` (a path, a glob or several, joined by commas), each a document.

    Raises FileNotFoundError where no file matches, ValueError for an unknown extension, a file without records, without usable ones or without the
    columns of a layout.
    """

    def __init__(self, path: str, tokenizer: Tokenizer, max_chars: int):
        self._max_chars = max_chars
        self._files: list[files.File] = []
        self._layouts: list[Layout] = []
        self.report: dict[str, Any] = {"documents": 0, "skipped": {}, "first": {}}
        check = functools.lru_cache(maxsize=1024)(functools.partial(_check_roles, tokenizer))
        which, keys, contents = array.array("i"), array.array("q"), hashlib.sha256()
        for name in files.paths(path):
            file = files.open_file(name, max_chars, read_columns)
            layout, columns, skipped, before = None, file.columns, {}, len(keys)
            for key, raw in file.scan():
                try:
                    record = file.decode(raw)
                    columns = columns or list(record)
                    layout = layout or _layout(file.columns or [column for column, value in record.items() if value is not None])
                    content = layout(record)
                    _check_content(content, max_chars)
                    if not isinstance(content, str) and (refusal := check(tuple(message["role"] for message in content))):
                        raise Unusable(refusal)
                except Unusable as error:
                    skipped[str(error)] = skipped.get(str(error), 0) + 1
                    self.report["first"].setdefault(str(error), f"{name}:{file.number}")
                    continue
                which.append(len(self._files))
                keys.append(key)
                contents.update(repr(content).encode())
            if len(keys) == before:
                if columns and not layout:
                    known = ", or ".join(" with ".join(needed) for needed in LAYOUTS)
                    raise ValueError(f"{name} has the columns {', '.join(columns)}; records need {known}")
                found = ", ".join(f"{count} x {reason}" for reason, count in skipped.items())
                raise ValueError(f"{name} holds no usable record ({found or 'it is empty'})")
            for reason, count in skipped.items():
                self.report["skipped"][reason] = self.report["skipped"].get(reason, 0) + count
            self._files.append(file)
            self._layouts.append(layout)
        self.report["documents"] = len(keys)
        self._where, self._keys = np.array(which, np.int32), np.array(keys, np.int64)
        self.digest = digest([self._where.tobytes(), self._keys.tobytes(), contents.digest()])
        self.answers = any(layout is not _text for layout in self._layouts)

    def __len__(self) -> int:
        return len(self._keys)

    def document(self, index: int, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
        at = self._where[index]
        file = self._files[at]
        try:
            content = self._layouts[at](file.decode(file.load(int(self._keys[index]))))
            _check_content(content, self._max_chars)
        except Unusable as error:
            raise ValueError(f"{file.path} is not what it was when training began ({error}); leave data files as they are, and start again") from error
        if isinstance(content, str):
            parts = [(tokenizer.encode(content, special=False), False)]
        else:
            # Encoded piece by piece, as a generation prompt and the tokens generated behind it are. What is said cannot end a turn.
            content = [turn | {"content": tokenizer.plain(turn["content"])} for turn in content]
            pieces = [(piece, answer) for piece, answer in chat_pieces(content, tokenizer) if piece]
            parts = [(tokenizer.encode(piece, bos=not number), answer) for number, (piece, answer) in enumerate(pieces)]
        tokens = np.array([token for part, _ in parts for token in part], np.int32)
        return tokens, np.repeat([answer for _, answer in parts], [len(part) for part, _ in parts])


def chat_pieces(messages: Messages, tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """The conversation's text in pieces, with whether each is an assistant's: what its turn adds to the text that ends in the generation prompt, up to the
    token that closes it.

    A turn that the template writes in another way once others follow is an assistant's if what it says stands there as it was given (some put an empty
    thought before the last alone), and else only as far as both agree (some leave out the thoughts of earlier ones).
    """
    whole = tokenizer.chat(messages, add_generation_prompt=False)
    done = 0
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            start = _common(tokenizer.chat(messages[:number]), whole)
            alone = tokenizer.chat(messages[: number + 1], add_generation_prompt=False)
            end = _common(alone, whole)
            end = start + len(whole[start:end].rstrip())  # the line break behind the closing token is the template's
            if said := message["content"].strip():
                closing = alone.rpartition(said)[2].rstrip()
                begin = whole.find(said + closing, start, start + len(message["content"] + closing))
                if begin >= 0 and not whole[start:begin].strip():
                    end = begin + len(said + closing)
            if done <= start < end:
                yield whole[done:start], False
                yield whole[start:end], True
                done = end
    yield whole[done:], False


def _common(first: str, second: str) -> int:
    """The length of their common beginning."""
    return len(first) if second.startswith(first) else len(os.path.commonprefix([first, second]))


def _check_roles(tokenizer: Tokenizer, roles: Sequence[str]) -> str:
    """Why the model's chat template cannot take turns of these roles, "" if it can. Tried once, instead of rendering every record."""
    try:
        pieces = list(chat_pieces([{"role": role, "content": f"turn {number}"} for number, role in enumerate(roles)], tokenizer))
    except ValueError as error:
        return str(error)
    return "" if any(answer for _, answer in pieces) else "the chat template shows no assistant's turn"


def _check_content(content: str | Messages, max_chars: int) -> None:
    if isinstance(content, str):
        texts = [content]
    else:
        if not all(isinstance(message["role"], str) and isinstance(message["content"], str) for message in content):
            raise Unusable("turns that are not text")
        if not any(message["role"] == "assistant" and message["content"].strip() for message in content):
            raise Unusable("no assistant's turn")
        texts = [message["content"] for message in content]
    if not any(text.strip() for text in texts):
        raise Unusable("no text")
    if sum(map(len, texts)) > max_chars:
        raise Unusable("longer than max_chars")
    try:
        "".join(texts if isinstance(content, str) else texts + [message["role"] for message in content]).encode()
    except UnicodeEncodeError:  # JSON can escape half a character
        raise Unusable("invalid UTF-8") from None


# Layouts: from a record to plain text, or to messages.

Layout = Callable[[Mapping[str, Any]], str | Messages]


def _column(record: Mapping[str, Any], name: str, kind: type) -> Any:
    value = record.get(name)
    if not isinstance(value, kind):
        raise Unusable(f"`{name}` is missing or no {'text' if kind is str else 'list'}")
    return value


def _turns(record: Mapping[str, Any], column: str, role: str, content: str) -> Messages:
    turns = _column(record, column, list)
    if not all(isinstance(turn, dict) and {role, content} <= turn.keys() for turn in turns):
        raise Unusable(f"`{column}` is not a list of {{{role}, {content}}}")
    return [{"role": turn[role], "content": turn[content]} for turn in turns]


def _one_turn(question: str, answer: str) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _messages(record: Mapping[str, Any]) -> Messages:
    return _turns(record, "messages", "role", "content")


def _conversations(record: Mapping[str, Any]) -> Messages:
    names = {"human": "user", "gpt": "assistant"}
    return [turn | {"role": names.get(str(turn["role"]), turn["role"])} for turn in _turns(record, "conversations", "from", "value")]


def _instruction(record: Mapping[str, Any]) -> Messages:
    asked = _column(record, "instruction", str)
    given = record.get("input")
    if isinstance(given, str) and given.strip():
        asked = f"{asked}\n\n{given}"
    return _one_turn(asked, _column(record, "output", str))


def _generations(record: Mapping[str, Any]) -> Messages:
    found = _column(record, "generations", list)
    if not found or not isinstance(found[0], str):
        raise Unusable("`generations` holds no text")
    return _one_turn(_column(record, "problem", str), found[0])


def _solution(record: Mapping[str, Any]) -> Messages:
    return _one_turn(_column(record, "problem", str), _column(record, "solution", str))


def _text(record: Mapping[str, Any]) -> str:
    return _column(record, "text", str)


LAYOUTS: dict[tuple[str, ...], Layout] = {
    ("messages",): _messages,
    ("conversations",): _conversations,
    ("instruction", "output"): _instruction,
    ("problem", "generations"): _generations,
    ("problem", "solution"): _solution,
    ("text",): _text,
}


def read_columns(columns: Sequence[str]) -> set[str]:
    """Those that are read of a file with these: its layout's, and `input`."""
    return {"input"}.union(*[needed for needed in LAYOUTS if set(needed) <= set(columns)][:1])


def _layout(columns: Sequence[str]) -> Layout:
    for needed, layout in LAYOUTS.items():
        if set(needed) <= set(columns):
            return layout
    raise Unusable("columns of no known layout")
