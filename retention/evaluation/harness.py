"""Runs tasks over policies, scopes and budgets: every answer a record, every finished batch of a cell skipped when a run goes on.

What is read is compressed before the question is seen, unless config.question_seen. Policies of config.one_shot read a context whole and compress it once,
as their papers have it; those that can share the reading, and all their budgets, do. The others read in chunks, in bounded memory.
"""

import csv
import dataclasses
import hashlib
import itertools
import pathlib
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from retention import cache as cache_lib
from retention import checkpoints, generation, policies
from retention.evaluation import plots, prose, tasks
from retention.generation import Rows
from retention.model import Model
from retention.names import check_name
from retention.runs import RunFolder
from retention.training import text
from retention.training.documents import END

BINS = 16  # of distance, from the newest token to the oldest


@dataclasses.dataclass(frozen=True)
class Cell:
    """One entry of the table. length: None where the task has its own. budget: a fraction of the context's tokens or tokens per stream; None: all."""

    task: str
    length: int | None
    policy: str
    scope: str
    budget: float | int | None


def cells(config: ConfigDict) -> list[Cell]:
    """For each task and length the full cache, then every policy under each of its scopes at every budget; "window", the baseline, among them.

    Raises ValueError for a name that is not known, and a scope that a policy cannot have.
    """
    for task in config.tasks:
        tasks.check(task)
    for name in (*config.policies, *config.one_shot):
        policies.get(name)
    for scope in config.scopes:
        check_name("scope", scope, cache_lib.SCOPES)
    named = dict.fromkeys((*(name for name in config.policies if name != "full"), "window"))
    table = []
    for task in config.tasks:
        for length in config.lengths if tasks.has_length(task) else (None,):
            table.append(Cell(task, length, "full", "global", None))
            for name in named:
                scopes = config.scopes or (policies.get(name).scope,)
                table += [Cell(task, length, name, scope, budget) for scope, budget in itertools.product(scopes, config.budgets)]
    return table


def interval(mean: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a mean of `count` scores between 0 and 1."""
    z = 1.959964
    middle = (mean + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (mean * (1 - mean) / count + z * z / (4 * count * count)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def evaluate(config: ConfigDict, workdir: str | pathlib.Path) -> list[dict]:
    """Fills the table; writes metrics.jsonl (a record a question), results.csv, plots and run_meta.json; returns the table's rows."""
    table = cells(config)
    run = RunFolder(workdir, config)
    model = checkpoints.load(config.model, gates=config.gates, dtype=config.dtype)
    texts = text.load(config.text)
    done = {(Cell(**record["cell"]), record["sample"]) for record in run.metrics()}
    with tqdm(total=len(table) * config.samples, unit="sample", desc="evaluating", smoothing=0) as progress:
        progress.update(len(done))
        for (task, length), group in itertools.groupby(table, lambda cell: (cell.task, cell.length)):
            group = list(group)
            if all((cell, sample) in done for cell in group for sample in range(config.samples)):
                continue
            load = prose_task if task == "prose" else asking_task
            samples = load(config, model, texts, task, length)
            for first in range(0, config.samples, config.batch_size):
                batch = range(first, min(first + config.batch_size, config.samples))
                missing = [cell for cell in group if not all((cell, sample) in done for sample in batch)]
                for cell, records in samples.run(missing, batch):
                    run.log_all([{"cell": dataclasses.asdict(cell), **record} for record in records])
                    progress.update(len(batch))
                    progress.set_postfix_str(f"{task} {length or ''} {cell.policy} {cell.budget or ''}")
    records = run.metrics()
    rows = [summarise(config, cell, [record for record in records if Cell(**record["cell"]) == cell]) for cell in table]
    with open(run.path / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    plots.plot_results(rows, records, run.path)
    run.finish(seed=config.seed)
    return rows


def read_once(config: ConfigDict, name: str) -> bool:
    return name in config.one_shot or name == "full"


@dataclasses.dataclass
class Reader:
    """Reads a batch of contexts and hands out, for each cell, the rows that its policy leaves of them, with the seconds that it took."""

    config: ConfigDict
    model: Model

    def rows(self, wanted: Sequence[Cell], contexts: Sequence[Sequence[int]]) -> Iterator[tuple[Cell, Rows, dict]]:
        config, whole = self.config, [cell for cell in wanted if read_once(self.config, cell.policy)]
        named = [name for name in dict.fromkeys(cell.policy for cell in whole) if name != "full"]
        groups = generation.together(named)
        # Any reading is the full cache.
        for group in groups or ([()] if whole else []):
            start = time.time()
            reading = generation.read(self.model, group, contexts) if group else self.append(Rows(self.model, len(contexts), None), contexts)
            seconds = settled(reading, start)
            full = [cell for cell in whole if cell.policy == "full" and group == (groups[0] if groups else ())]
            for cell in full + [cell for cell in whole if cell.policy in group]:
                start = time.time()
                rows = reading
                if cell.policy != "full":
                    rows = reading.compress(cell.budget, cell.policy, cell.scope, config.sinks, config.window, config.prefill_chunk)
                yield cell, rows, {"prefill_seconds": seconds, "evict_seconds": settled(rows, start)}
        for cell in wanted:
            if cell not in whole:
                start = time.time()
                empty = Rows(
                    self.model, len(contexts), cell.budget, cell.policy, cell.scope, config.prefill_chunk, config.sinks, config.window
                )  # fmt: skip
                rows = self.append(empty, contexts)
                yield cell, rows, {"prefill_seconds": settled(rows, start), "evict_seconds": 0.0}

    def append(self, rows: Rows, tokens: Sequence[Sequence[int]]) -> Rows:
        rows.append(tokens)
        return rows


def settled(rows: Rows, start: float) -> float:
    """Seconds since `start`, for one sequence of the batch, once the rows are computed."""
    jax.block_until_ready((rows.cache, rows.logits))
    return round((time.time() - start) / rows.batch, 4)


def held(rows: Rows, row: int) -> dict:
    """What a sequence's cache holds: entries by layer and head, and the share kept of each BINS-th of the distances from the newest token."""
    kept, stats = cache_lib.kept_positions(rows.cache, row), rows.stats(row)
    distance = np.concatenate([stats.seen_tokens - 1 - positions for layer in kept for positions in layer])
    edges = np.linspace(0, stats.seen_tokens, BINS + 1)
    possible = np.histogram(np.arange(stats.seen_tokens), edges)[0] * rows.model.config.streams
    return {
        "kept_entries": stats.kept_entries,
        "allocated_bytes": stats.allocated_bytes,
        "context_tokens": stats.seen_tokens,
        "kept_by_stream": [[len(positions) for positions in layer] for layer in kept],
        "kept_by_distance": np.round(np.histogram(distance, edges)[0] / np.maximum(possible, 1), 4).tolist(),
    }


@dataclasses.dataclass
class Asking:
    """A task of contexts and questions."""

    reader: Reader
    task: tasks.Task

    def run(self, wanted: Sequence[Cell], batch: Sequence[int]) -> Iterator[tuple[Cell, list[dict]]]:
        """The records of one batch of samples, for each cell."""
        encode, samples = self.reader.model.tokenizer.encode, [self.task.samples[i] for i in batch]
        contexts = [encode(sample.context, bos=True) for sample in samples]
        for cell, rows, seconds in self.reader.rows(wanted, contexts):
            start = time.time()
            answers = list(self.answers(rows, samples))
            seconds |= {"decode_seconds": round((time.time() - start) / len(samples), 4)}
            records = []
            for row, (i, sample) in enumerate(zip(batch, samples, strict=True)):
                cache = held(rows, row)
                for question, asked in enumerate(sample.questions):
                    generated = answers[question][row]
                    records.append(
                        {
                            "sample": i, "question": question, "prompt": hashlib.sha256((sample.context + asked).encode()).hexdigest()[:16],
                            "answer": sample.answers[question], "generated": generated, **self.task.score(i, question, generated), **cache, **seconds,
                        }
                    )  # fmt: skip
                    cache = {name: value for name, value in cache.items() if not name.startswith("kept_by")}  # said once
            yield cell, records

    def answers(self, rows: Rows, samples: Sequence) -> Iterator[list[str]]:
        """To the first question of every sample, to the second, ...: each asked of a copy of the rows, or in turn where they are turns."""
        tokenizer, config = self.reader.model.tokenizer, self.reader.config
        turns, ended = samples[0].turns, [True] * len(samples)
        going = rows.fork()
        for number in range(max(len(sample.questions) for sample in samples)):
            going = going if turns else rows.fork()
            asked = [sample.questions[number] if number < len(sample.questions) else "" for sample in samples]
            if turns:  # an answer that was cut off is ended first, as a turn must be
                asked = [question if end or not question else END + question for question, end in zip(asked, ended, strict=True)]
            going.append([tokenizer.encode(question, bos=False) if question else [] for question in asked])
            tokens = np.concatenate(list(going.decode(config.max_new_tokens, 0.0, 1.0, config.seed, tokenizer.eos_ids)), axis=1)
            answers = [[int(token) for token in row if token >= 0] for row in tokens]
            ended = [bool(answer) and answer[-1] in tokenizer.eos_ids for answer in answers]
            yield [tokenizer.decode(answer) for answer in answers]


@dataclasses.dataclass
class Prose:
    """Held-out prose: what compressing a context changes about what follows."""

    reader: Reader
    windows: Sequence[tuple[list[int], list[int]]]

    def run(self, wanted: Sequence[Cell], batch: Sequence[int]) -> Iterator[tuple[Cell, list[dict]]]:
        """The records of one batch of samples, for each cell."""
        contexts, continuations = zip(*(self.windows[i] for i in batch), strict=True)
        full = Rows(self.reader.model, len(batch), None)
        full = prose.continuation_logits(self.reader.append(full, contexts), continuations)
        for cell, rows, seconds in self.reader.rows(wanted, contexts):
            measured = prose.divergence(full, prose.continuation_logits(rows, continuations), continuations)
            yield cell, [{"sample": i, **measured[row], **held(rows, row), **seconds} for row, i in enumerate(batch)]


def asking_task(config: ConfigDict, model: Model, texts: list[str], task: str, length: int | None) -> Asking:
    loaded = tasks.load(task, model.tokenizer.encode, texts, length, config.samples, config.seed, config.data)
    if config.question_seen:
        loaded = tasks.seen(loaded)
    return Asking(Reader(config, model), loaded)


def prose_task(config: ConfigDict, model: Model, texts: list[str], task: str, length: int) -> Prose:
    tokens = [model.tokenizer.encode(one) for one in texts]
    return Prose(Reader(config, model), prose.windows(tokens, length, config.continuation, config.samples, config.seed))


def summarise(config: ConfigDict, cell: Cell, records: list[dict]) -> dict:
    """A row of the table: means over the records, and the scores' 95 % interval, in which several questions about one context count as one sample.

    Seconds are those of the fastest batch: the first one compiles.
    """
    known = {"cell", "sample", "question", "prompt", "answer", "generated", "kept_by_stream", "kept_by_distance"}
    samples = len({record["sample"] for record in records})
    row = {
        **dataclasses.asdict(cell),
        "prefill": "one-shot" if read_once(config, cell.policy) else f"chunks of {config.prefill_chunk}",
        "question_seen": config.question_seen,
        "samples": samples,
        "questions": len(records),
    }
    for name in (name for name in records[0] if name not in known):
        values = [record[name] for record in records]
        row[name] = round(float(min(values) if name.endswith("_seconds") else np.mean(values)), 4)
    if "score" in row:
        row |= dict(zip(("low", "high"), (round(x, 4) for x in interval(row["score"], samples)), strict=True))
    return row
