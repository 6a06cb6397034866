"""Record files: JSON lines, Parquet, ArrayRecord (of JSON objects). A file is scanned once, and then any record is loaded by its key."""

import json
import os
from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol

import grain
import numpy as np

from retention.training import text

Choose = Callable[[list[str]], Collection[str]]  # of a file's columns, those to read
BYTES_A_CHAR = 16  # a line of more than 16 max_chars bytes is not read to its end; JSON writes a character in 12 at most


class Unusable(ValueError):
    """A record to skip; says why."""


class File(Protocol):
    """Attributes: path; columns, None where each record has its own; number: of the record that `scan` gave last, from 1."""

    path: str
    columns: list[str] | None
    number: int

    def scan(self) -> Iterator[tuple[int, Any]]:
        """Every record's key and what decode takes."""

    def load(self, key: int) -> Any:
        """What decode takes."""

    def decode(self, raw: Any) -> dict[str, Any]:
        """Raises Unusable."""


def open_file(path: str, max_chars: int, choose: Choose) -> File:
    """The file by its extension. Raises ValueError for another extension, a folder, an empty file, one that is not what it says."""
    extension = os.path.splitext(path)[1]
    if extension not in FORMATS:
        raise ValueError(f"{path} is none of the record files that can be read: {', '.join(FORMATS)}")
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder; give the files in it, as '{path}/*{extension}'")
    if not os.path.getsize(path):
        raise ValueError(f"{path} is empty")
    return FORMATS[extension](path, max_chars, choose)


def paths(path: str) -> list[str]:
    """The files of a path, a glob, or several joined by commas; each once. Raises FileNotFoundError where one matches nothing."""
    every: dict[str, str] = {}
    for name in (part.strip() for part in path.split(",")):
        found = text.matching(name)
        if not found:
            raise FileNotFoundError(f"no record file matches {name!r}; give a path or a glob such as 'data/*.jsonl', several joined by commas")
        every |= {real: one for real, one in found.items() if real not in every}
    return list(every.values())


def _json(raw: bytes) -> dict[str, Any]:
    try:
        record = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise Unusable("invalid UTF-8") from None
    except (ValueError, RecursionError):
        raise Unusable("malformed JSON") from None
    if not isinstance(record, dict):
        raise Unusable("no JSON object")
    return record


class _JsonLines:
    """Keys are the lines' byte offsets; numbers count lines, blank ones too."""

    columns = None

    def __init__(self, path: str, max_chars: int, choose: Choose):
        self.path, self.number, self._most = path, 0, BYTES_A_CHAR * max_chars

    def scan(self) -> Iterator[tuple[int, bytes]]:
        with open(self.path, "rb") as file:
            offset = 0
            while raw := file.readline(self._most + 1):
                self.number += 1
                if raw.strip():
                    yield offset, raw
                while len(raw) > self._most and not raw.endswith(b"\n"):
                    raw = file.readline(self._most + 1)  # the rest of a line that is too long
                offset = file.tell()

    def load(self, key: int) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(key)
            return file.readline(self._most + 1)

    def decode(self, raw: bytes) -> dict[str, Any]:
        if len(raw) > self._most:
            raise Unusable("longer than max_chars")
        return _json(raw)


class _ArrayRecord:
    """Keys count records from 0."""

    columns = None

    def __init__(self, path: str, max_chars: int, choose: Choose):
        self.path, self.number = path, 0
        try:
            self._source = grain.sources.ArrayRecordDataSource(path)
            len(self._source)  # reads the index
        except Exception as error:  # the package raises whatever the damage leads to
            raise ValueError(f"{path} is no ArrayRecord file that can be read ({error})") from error

    def scan(self) -> Iterator[tuple[int, bytes]]:
        for key in range(len(self._source)):
            self.number = key + 1
            yield key, self.load(key)

    def load(self, key: int) -> bytes:
        try:
            return self._source[key]
        except Exception as error:
            raise ValueError(f"{self.path} is damaged: its record {key} cannot be read ({error})") from error

    def decode(self, raw: bytes) -> dict[str, Any]:
        return _json(raw)


class _Parquet:
    """Keys count rows from 0. A row is loaded with its whole row group, so files of small groups (a hundred rows) load fast."""

    def __init__(self, path: str, max_chars: int, choose: Choose):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise ImportError(f"{path} needs pyarrow: pip install 'retention-kv[data]'") from error
        self.path, self.number = path, 0
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
                self.columns = file.schema_arrow.names
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path} is no Parquet file that can be read ({error})") from error
        wanted = choose(self.columns)
        self._read = [name for name in self.columns if name in wanted]
        self._starts = np.cumsum([0, *sizes])

    def scan(self) -> Iterator[tuple[int, Any]]:
        for number, start in enumerate(self._starts[:-1]):
            group = self._group(number)
            for row in range(len(group)):
                key = int(start) + row
                self.number = key + 1
                yield key, group.slice(row, 1)

    def load(self, key: int) -> Any:
        number = int(np.searchsorted(self._starts, key, side="right")) - 1
        return self._group(number).slice(key - int(self._starts[number]), 1)

    def decode(self, raw: Any) -> dict[str, Any]:
        import pyarrow

        try:
            return raw.to_pylist()[0]
        except UnicodeDecodeError:
            raise Unusable("invalid UTF-8") from None
        except pyarrow.ArrowException as error:
            raise ValueError(f"{self.path} is damaged: a row of it cannot be read ({error})") from error

    def _group(self, number: int) -> Any:
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                return file.read_row_group(number, columns=self._read, use_threads=False)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{self.path} is damaged: its row group {number} cannot be read ({error})") from error


FORMATS = {".jsonl": _JsonLines, ".parquet": _Parquet, ".array_record": _ArrayRecord}
