"""Runs needle tasks over policies and budgets: every sample a record, every finished cell skipped when a run goes on."""

import csv
import dataclasses
import itertools
import pathlib
import time
from collections.abc import Sequence

from ml_collections import ConfigDict
from tqdm import tqdm

from retention import checkpoints
from retention.evaluation import needles
from retention.generation import Session
from retention.runs import RunFolder
from retention.training import text


@dataclasses.dataclass(frozen=True)
class Cell:
    """One entry of the table. kept: the fraction of the context's entries that stay, 1 for the full cache."""

    task: str
    length: int
    policy: str
    kept: float


def cells(config: ConfigDict) -> list[Cell]:
    """The full cache once for each task and length, then every policy at every fraction."""
    table = []
    for task, length in itertools.product(config.tasks, config.lengths):
        table.append(Cell(task, length, "full", 1.0))
        table += [Cell(task, length, policy, kept) for kept, policy in itertools.product(config.kept, config.policies)]
    return table


def evaluate(config: ConfigDict, workdir: str | pathlib.Path) -> list[dict]:
    """Fills the table and writes metrics.jsonl (a record a question), results.csv and run_meta.json; returns the table's rows.

    The context is compressed before the question is seen: it is appended alone, and each question then asked of a fork.
    """
    run = RunFolder(workdir, config)
    model = checkpoints.load(config.model, gates=config.gates, dtype=config.dtype)
    texts = text.load(config.text)
    done = run.metrics()
    table = cells(config)
    samples: dict[tuple[str, int], Sequence[needles.Sample]] = {}
    progress = tqdm(table, unit="cell", desc="evaluating")
    for cell in progress:
        if (cell.task, cell.length) not in samples:
            samples[cell.task, cell.length] = needles.samples(
                cell.task, model.tokenizer.encode, texts, cell.length, config.samples, config.seed
            )
        seen = {record["sample"] for record in done if record["cell"] == dataclasses.asdict(cell)}
        for i, sample in enumerate(samples[cell.task, cell.length]):
            if i in seen:
                continue
            records = answer(model, config, cell, sample)
            for record in records:
                done.append({"cell": dataclasses.asdict(cell), "sample": i, **record})
            run.log_all(done[len(done) - len(records) :])
            progress.set_postfix_str(f"{cell.task} {cell.length} {cell.policy} {cell.kept:.3f}: {i + 1}/{config.samples}")
    rows = [summarise(cell, [r for r in done if r["cell"] == dataclasses.asdict(cell)]) for cell in table]
    with open(run.path / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    run.finish(seed=config.seed)
    return rows


def answer(model, config: ConfigDict, cell: Cell, sample: needles.Sample) -> list[dict]:
    """One record for each question of one sample."""
    budget = None if cell.policy == "full" else max(1, int(cell.kept * cell.length))
    session = Session(model, budget=budget, policy=cell.policy, scope=config.scope, prefill_chunk=config.prefill_chunk)
    start = time.time()
    session.append(sample.context)
    stats = session.stats
    seconds = time.time() - start
    records = []
    for question, expected in zip(sample.questions, sample.answers, strict=True):
        generation = session.fork().generate(question, max_new_tokens=config.max_new_tokens)
        records.append(
            {
                "correct": needles.correct(cell.task, expected, generation.text),
                "answer": expected,
                "generated": generation.text,
                "kept_entries": stats.kept_entries,
                "allocated_bytes": stats.allocated_bytes,
                "context_tokens": stats.seen_tokens,
                "prefill_seconds": round(seconds, 3),
            }
        )
    return records


def summarise(cell: Cell, records: list[dict]) -> dict:
    correct = sum(record["correct"] for record in records)
    return {
        **dataclasses.asdict(cell),
        "correct": correct,
        "questions": len(records),
        "accuracy": round(correct / len(records), 4),
        "kept_entries": round(sum(record["kept_entries"] for record in records) / len(records)),
        "allocated_bytes": max(record["allocated_bytes"] for record in records),
    }
