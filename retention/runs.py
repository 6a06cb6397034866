"""The run folder: config.json, metrics.jsonl, run_meta.json, beside the tables, plots and checkpoints that a program writes."""

import contextlib
import csv
import fcntl
import hashlib
import importlib.metadata
import io
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Collection, Iterable, Iterator
from typing import TextIO

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from retention.distributed import is_primary


class RunFolder:
    """Opens `workdir` for a run, or goes on with the run that is in it. Of several processes all read it and the first one writes.

    free: names of entries ("keep_checkpoints"; "mesh" with all below it) that may differ from those the run was started with. inputs: what its records
    depend on besides, such as the program that writes them and `digest`s of what it reads; config.json holds them too.

    Raises ValueError if the folder holds a run with another config or other inputs. One that has logged nothing yet does not count, for what failed at
    the start is started again with a corrected config; FileExistsError where `workdir` is a file, or holds a config.json that is no run's, as a model's
    folder does; RuntimeError while another process is at that run.
    """

    def __init__(self, workdir: str | pathlib.Path, config: ConfigDict, free: Collection[str] = (), **inputs: str):
        self.path = pathlib.Path(workdir).expanduser().absolute()
        self._start, self._here, self._logged = time.time(), commit(), False
        self._commit = self._here
        self._meta = self.path / "run_meta.json"
        file = self.path / "config.json"
        entries = config.to_dict() | ({"inputs": inputs} if inputs else {})
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"workdir {self.path} is a file; give the path of a folder, which is made where there is none")
        if is_primary():
            with writing(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
            if file.exists() and not (self.path / ".lock").exists() and not self.metrics():
                raise FileExistsError(f"workdir {self.path} holds a config.json that is no run's; give another folder")
            self._lock = _lock(self.path / ".lock")
        if file.exists() and self.metrics():
            if self._meta.exists():  # records of several versions of the code name them all
                self._commit = ", ".join(dict.fromkeys([*json.loads(self._meta.read_text())["commit"].split(", "), self._here]))
            check_same(json.loads(file.read_text()), entries, free, f"workdir {self.path} holds a run with another config (config.json)")
        multihost_utils.sync_global_devices("the run folder was read")  # before it changes
        if is_primary():
            text = json.dumps(entries, indent=2)
            if not file.exists() or file.read_text() != text:
                replace_text(file, text)
            metrics = self.path / "metrics.jsonl"
            if metrics.exists() and not metrics.read_text().endswith("\n"):
                self.keep_metrics(self.metrics())  # the next record would be glued to a last line that a crash has cut off
        multihost_utils.sync_global_devices("the run folder was written")
        if not file.exists():
            raise FileNotFoundError(f"process 0 wrote {file}, and this process cannot see it: workdir must be on a file system that all processes share")

    def metrics(self) -> list[dict]:
        """The records of metrics.jsonl."""
        file = self.path / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def keep_metrics(self, records: list[dict]) -> None:
        """Replaces metrics.jsonl, when a resumed run starts before the last record. Where none stays the run is this code's alone."""
        if not records:
            self._commit = self._here
        if is_primary():
            replace_text(self.path / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))

    def log_all(self, records: list[dict]) -> None:
        """Appends records to metrics.jsonl in one write. Before the first, run_meta.json says by which commit they are."""
        if is_primary():
            if not self._logged:
                self._logged = True
                replace_text(self._meta, json.dumps({"commit": self._commit}))
            file = self.path / "metrics.jsonl"
            with writing(file), open(file, "a") as opened:
                opened.write("".join(json.dumps(record) + "\n" for record in records))

    def log(self, **record) -> None:
        """Appends one record to metrics.jsonl."""
        self.log_all([record])

    def finish(self, **facts) -> dict:
        """Writes and returns run_meta.json: commit, command, versions, device, seconds since this process opened the folder, and the
        facts given (seed, ...).

        That of a run which was finished before, and to which nothing was added, stays as it is.
        """
        if not self._logged and self.metrics() and self._meta.exists() and "command" in (before := json.loads(self._meta.read_text())):
            return before
        meta = {
            "commit": self._commit,
            "command": shlex.join(["python", *sys.orig_argv[1:]]),
            "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")},
            "python": platform.python_version(),
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "host": f"{os.cpu_count()} x {processor()}",
            "seconds": round(time.time() - self._start, 1),
            **facts,
        }
        if is_primary():
            replace_text(self._meta, json.dumps(meta, indent=2))
        return meta


_held: weakref.WeakValueDictionary[pathlib.Path, TextIO] = weakref.WeakValueDictionary()


def _lock(file: pathlib.Path) -> TextIO | None:
    """Keeps other processes from a run as long as what is returned lives. In one process a run may be opened again, as after Ctrl-C in a notebook."""
    file = file.resolve()  # a lock is the process's, by whatever path, and is lost when any file that it has opened there is closed
    if file in _held:
        return _held[file]
    try:
        opened = open(file, "a")
        fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RuntimeError(f"another process is at the run in {file.parent}; let it end, or give a new workdir") from None
    except OSError as error:
        warnings.warn(f"{file} cannot be locked ({error.strerror}); see to it that no other process is at this run", stacklevel=3)
        return None
    _held[file] = opened
    return opened


def digest(parts: Iterable[bytes]) -> str:
    """The first 16 digits of their SHA-256."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    return whole.hexdigest()[:16]


def replace_text(file: pathlib.Path, text: str) -> None:
    """Writes the file whole or not at all. Raises OSError, see `writing`."""
    partial = file.with_name(file.name + ".partial")
    with writing(file):
        partial.write_text(text, newline="")
        partial.replace(file)


def write_table(file: pathlib.Path, rows: list[dict]) -> None:
    """Writes rows as CSV, whole or not at all, with every column that one of them has; empty where a row has it not."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, dict.fromkeys(name for row in rows for name in row))
    writer.writeheader()
    writer.writerows(rows)
    replace_text(file, text.getvalue())


@contextlib.contextmanager
def writing(file: pathlib.Path) -> Iterator[None]:
    """Around what writes a file of a run: an OSError, such as a full disk, names the file and what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{file} cannot be written ({error.strerror}); put that right and start again, and the run goes on") from error


def check_same(stored: dict, config: dict, free: Collection[str], what: str) -> None:
    """Raises ValueError, beginning with `what`, that names each entry in which two configs (nested dicts) differ, but for those that are free."""

    def flat(entries: dict, prefix: str = "") -> dict:
        named = {prefix + name: value for name, value in entries.items()}
        return {
            key: leaf
            for name, value in named.items()
            if name not in free
            for key, leaf in (flat(value, name + ".") if isinstance(value, dict) else {name: value}).items()
        }

    # As JSON has it: a tuple is read back as a list.
    before, now = flat(stored), flat(json.loads(json.dumps(config)))
    missing = "nothing"
    differing = [name for name in (now | before) if before.get(name, missing) != now.get(name, missing)]
    if differing:
        changes = ", ".join(f"{name} is {before.get(name, missing)!r} there and {now.get(name, missing)!r} here" for name in differing)
        remedy = "give a new workdir"
        if any(not name.startswith("inputs.") for name in differing):
            remedy += ", or that config"
        if any(name.startswith("inputs.") and name != "inputs.program" for name in differing):  # digests, which nobody can give
            remedy += ", or put back the files that it began with"
        raise ValueError(f"{what}: {changes}; {remedy}")


def processor() -> str:
    """The CPU's name, as Linux tells it; elsewhere what Python knows."""
    info = pathlib.Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """The checkout's commit, with "+" if files differ from it; "unknown" outside a checkout."""
    here = pathlib.Path(__file__).resolve().parent
    try:
        found = subprocess.run(["git", "rev-parse", "--show-toplevel", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        top, head = found.stdout.splitlines()
        if pathlib.Path(top).resolve() != here.parent:
            return "unknown"  # installed inside of a repository that is another's
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if dirty else "")
