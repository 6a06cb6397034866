"""Runs needle tasks and prose over policies and budgets: every sample a record, every finished cell skipped when a run goes on."""

import csv
import dataclasses
import itertools
import pathlib
import time
from collections.abc import Sequence

from ml_collections import ConfigDict
from tqdm import tqdm

from retention import checkpoints
from retention.evaluation import needles, prose
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
        table += [Cell(task, length, policy, kept) for policy, kept in itertools.product(config.policies, config.kept)]
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
    samples: dict[tuple[str, int], Sequence] = {}
    progress = tqdm(table, unit="cell", desc="evaluating")
    for cell in progress:
        if (cell.task, cell.length) not in samples:
            if cell.task == "prose":
                tokens = [model.tokenizer.encode(one) for one in texts]
                samples["prose", cell.length] = prose.windows(tokens, cell.length, config.continuation, config.samples, config.seed)
            else:
                samples[cell.task, cell.length] = needles.samples(
                    cell.task, model.tokenizer.encode, texts, cell.length, config.samples, config.seed
                )
        seen = {record["sample"] for record in done if record["cell"] == dataclasses.asdict(cell)}
        for i, sample in enumerate(samples[cell.task, cell.length]):
            if i in seen:
                continue
            records = score_prose(model, config, cell, *sample) if cell.task == "prose" else answer(model, config, cell, sample)
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


def cache_options(config: ConfigDict, cell: Cell) -> dict:
    """The arguments of Session for a cell."""
    budget = None if cell.policy == "full" else max(1, int(cell.kept * cell.length))
    return dict(budget=budget, policy=cell.policy, scope=config.scope, prefill_chunk=config.prefill_chunk, sinks=config.sinks)


def score_prose(model, config: ConfigDict, cell: Cell, context: Sequence[int], continuation: Sequence[int]) -> list[dict]:
    """One record: what compressing the context changes about the continuation."""
    kl, loss, full_loss = prose.divergence(model, context, continuation, **cache_options(config, cell))
    return [{"kl": kl, "loss": loss, "full_loss": full_loss}]


def answer(model, config: ConfigDict, cell: Cell, sample: needles.Sample) -> list[dict]:
    """One record for each question of one sample."""
    session = Session(model, **cache_options(config, cell))
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
    """A row of the table; what a task does not measure is left empty."""

    def mean(name):
        return round(sum(record[name] for record in records) / len(records), 4) if name in records[0] else ""

    return {
        **dataclasses.asdict(cell),
        "samples": len(records),
        "accuracy": mean("correct"),
        "kl": mean("kl"),
        "loss": mean("loss"),
        "full_loss": mean("full_loss"),
        "kept_entries": mean("kept_entries"),
        "allocated_bytes": mean("allocated_bytes"),
    }
