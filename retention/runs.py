"""The run folder: config.json, metrics.jsonl, run_meta.json, beside the tables, plots and checkpoints that a program writes."""

import importlib.metadata
import json
import pathlib
import platform
import subprocess
import time

import jax
from ml_collections import ConfigDict


class RunFolder:
    """Opens `workdir` for a run, or goes on with the run that is in it.

    Raises ValueError if the folder holds a run with another config. One that has logged nothing yet does not count, for what failed at the
    start is started again with a corrected config.
    """

    def __init__(self, workdir: str | pathlib.Path, config: ConfigDict):
        self.path = pathlib.Path(workdir).absolute()
        self.path.mkdir(parents=True, exist_ok=True)
        self._start = time.time()
        text = json.dumps(config.to_dict(), indent=2)
        file = self.path / "config.json"
        if not file.exists() or file.read_text() != text:
            if self.metrics():
                raise ValueError(f"workdir {self.path} holds a run with another config (config.json); give a new workdir, or that config")
            file.write_text(text)
        metrics = self.path / "metrics.jsonl"
        if metrics.exists() and not metrics.read_text().endswith("\n"):
            self.keep_metrics(self.metrics())  # the next record would be glued to a last line that a crash has cut off

    def metrics(self) -> list[dict]:
        """The records of metrics.jsonl."""
        file = self.path / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def keep_metrics(self, records: list[dict]) -> None:
        """Replaces metrics.jsonl, when a resumed run starts before the last record."""
        kept = self.path / "metrics.jsonl.kept"
        kept.write_text("".join(json.dumps(record) + "\n" for record in records))
        kept.replace(self.path / "metrics.jsonl")

    def log_all(self, records: list[dict]) -> None:
        """Appends records to metrics.jsonl in one write."""
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))

    def log(self, **record) -> None:
        """Appends one record to metrics.jsonl."""
        self.log_all([record])

    def finish(self, **facts) -> dict:
        """Writes and returns run_meta.json: commit, versions, device, seconds, and the facts given (seed, ...)."""
        meta = {
            "commit": commit(),
            "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")},
            "python": platform.python_version(),
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "seconds": round(time.time() - self._start, 1),
            **facts,
        }
        (self.path / "run_meta.json").write_text(json.dumps(meta, indent=2))
        return meta


def commit() -> str:
    """The checkout's commit, with "+" if files differ from it; "unknown" outside a checkout."""
    here = pathlib.Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if dirty else "")
