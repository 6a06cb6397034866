"""Runs tasks over policies, scopes and budgets: every answer a record, every finished batch of a cell skipped when a run goes on.

What is read is compressed before the question is seen, unless config.question_seen. Policies of config.one_shot read a context whole and compress it once,
as their papers have it; all of them and all their budgets share that reading, and each cell is charged for all of it (what each costs by itself:
`experiments.benchmark --suite=compression`). The others read in chunks, in bounded memory, and evict while they read: their prefill_seconds hold both.
"""

import dataclasses
import json
import pathlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from retention import cache as cache_lib
from retention import chat, checkpoints, policies
from retention.checkpoints import arrays
from retention.evaluation import cells, needles, plots, prose, tasks
from retention.evaluation.cells import Cell, empty_rows, full_cell
from retention.model import Model
from retention.reading import Reading
from retention.rows import Rows
from retention.runs import RunFolder, digest, write_table
from retention.training import text

BINS = 16  # of distance, from the newest token to the oldest


def interval(mean: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a mean of `count` scores between 0 and 1."""
    z = 1.959964
    middle = (mean + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (mean * (1 - mean) / count + z * z / (4 * count * count)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def evaluate(config: ConfigDict, workdir: str | pathlib.Path) -> list[dict]:
    """Fills the table; writes metrics.jsonl (a record a question), results.csv, scores.csv, plots and run_meta.json; returns the table's rows.

    What is wrong with the config or a file is found before the first cell: raises as the functions of cells.py, `tasks.load` and `RunFolder` do.
    """
    table = cells.table(config)
    model, texts = load(config, config.gates)
    table = cells.scoped(table, model)
    cells.check(config, model, table)
    run = RunFolder(workdir, config, program="evaluate", **inputs(model, texts, [cell.policy for cell in table]))
    drop_cut_batches(run, config)
    before = run.metrics()
    done = {(Cell(**record["cell"]), record["sample"]) for record in before}
    missing: dict[tuple, list[Cell]] = {}
    for cell in table:
        if not all((cell, sample) in done for sample in range(config.samples)):
            missing.setdefault((cell.task, cell.length), []).append(cell)
    loaded = {(task, length): (prose_task if task == "prose" else asking_task)(config, model, texts, task, length) for task, length in missing}
    for key, group in missing.items():
        cells.check_fractions(config, model, group, loaded[key].shortest())
        loaded[key].check([record for record in before if (record["cell"]["task"], record["cell"]["length"]) == key])
    compiled: set[tuple[Cell, int]] = set()
    with tqdm(total=len(table) * config.samples, initial=len(done), unit="sample", desc="evaluating", smoothing=0) as progress:
        for (task, length), group in missing.items():
            for batch in batches(config):
                wanted = [cell for cell in group if (cell, batch[0]) not in done]
                for cell, records in loaded[task, length].run(wanted, batch) if wanted else ():
                    run.log_all([{"cell": dataclasses.asdict(cell), **record, "warm": (cell, len(batch)) in compiled} for record in records])
                    compiled.add((cell, len(batch)))
                    progress.update(len(batch))
                    if drop_programs():
                        compiled.clear()
                    progress.set_postfix_str(f"{task} {length or ''} {cell.policy} {cell.budget or ''}")
    records = run.metrics()
    by_cell: dict[Cell, list[dict]] = {cell: [] for cell in table}
    for record in records:
        by_cell[Cell(**record["cell"])].append(record)
    rows = [summarise(config, cell, own, by_cell.get(full_cell(cell.task, cell.length))) for cell, own in by_cell.items()]
    write_table(run.path / "results.csv", rows)
    write_table(run.path / "scores.csv", [dataclasses.asdict(cell) | by_sample(own) for cell, own in by_cell.items()])
    plots.plot_results(rows, records, run.path)
    run.finish(seed=config.seed)
    return rows


def load(config: ConfigDict, gates: str | None) -> tuple[Model, list[str]]:
    """config.model with these gates, and config.text. Raises ValueError for a model without a tokenizer, and as `checkpoints.load` and `text.load` do."""
    model = checkpoints.load(config.model, gates=gates, dtype=config.dtype)
    if model.tokenizer is None:
        raise ValueError(f"config.model {config.model} has no tokenizer, and tasks are texts; put a tokenizer.json into its folder")
    return model, text.load(config.text)


def inputs(model: Model, texts: Sequence[str], names: Sequence[str] = ()) -> dict[str, str]:
    """What answers depend on beside the config: what tells the weights, the tokenizer, the gates and the texts from others, as their files may change;
    and the user's own of these policies, if there are any."""
    gates = [] if model.gates is None else jax.tree.leaves(model.gates.params)
    foreign = [described.encode() for name in sorted(set(names)) if (described := policies.description(name))]
    return {
        **({"policies": digest(foreign)} if foreign else {}),
        "weights": arrays.fingerprint(model.params),
        "tokenizer": model.tokenizer.digest(),
        "gates": digest(np.asarray(leaf).tobytes() for leaf in gates),  # as the published runs have it
        "text": digest(one.encode() for one in texts),
    }


def drop_programs() -> bool:
    """Drops the compiled programs once their memory maps come near the number that Linux allows a process, as those of some 50 cells do; says whether."""
    maps, limit = pathlib.Path("/proc/self/maps"), pathlib.Path("/proc/sys/vm/max_map_count")
    full = limit.exists() and len(maps.read_bytes().splitlines()) > 0.6 * int(limit.read_text())
    if full:
        jax.clear_caches()
    return full


def batches(config: ConfigDict) -> list[range]:
    return [range(first, min(first + config.batch_size, config.samples)) for first in range(0, config.samples, config.batch_size)]


def drop_cut_batches(run: RunFolder, config: ConfigDict) -> None:
    """Takes from metrics.jsonl the batch that a crash has cut off while its records were written, if there is one: it runs again."""
    records = run.metrics()
    keys = [(Cell(**record["cell"]), record["sample"]) for record in records]
    found, wanted = Counter(keys), {key: record["questions"] for key, record in zip(keys, records, strict=True)}
    whole = {
        (cell, sample)
        for cell in dict.fromkeys(cell for cell, _ in keys)
        for batch in batches(config)
        if all(found[cell, sample] == wanted.get((cell, sample)) for sample in batch)
        for sample in batch
    }
    if not whole.issuperset(keys):
        run.keep_metrics([record for key, record in zip(keys, records, strict=True) if key in whole])


@dataclasses.dataclass
class Reader:
    """Reads a batch of contexts and hands out, for each cell, the rows that its policy leaves of them, with the seconds that it took."""

    config: ConfigDict
    model: Model

    def rows(self, wanted: Sequence[Cell], contexts: Sequence[Sequence[int]]) -> Iterator[tuple[Cell, Rows, dict]]:
        config = self.config
        shared: dict[str, list[Cell]] = {}
        for cell in wanted:
            if cell.policy in config.one_shot and cell.policy != "full":
                shared.setdefault(cell.policy, []).append(cell)
        # The full cache is read for itself: what others note of a reading takes time and memory.
        for cell in (cell for cell in wanted if cell.policy not in shared):
            start = time.time()
            rows = empty_rows(config, self.model, cell, len(contexts))
            rows.append(contexts)
            yield cell, rows, {"prefill_seconds": settled(rows, start), "evict_seconds": 0.0}
        if shared:
            start = time.time()
            reading = Reading(self.model, list(shared), contexts)
            seconds = settled(reading.full, start)
        for policy, own in shared.items():
            start = time.time()
            again = settled(reading.read_for(policy, config.sinks), start)
            for cell in own:
                start = time.time()
                rows = reading.compress(cell.budget, policy, cell.scope, config.sinks, config.window, config.prefill_chunk)
                yield cell, rows, {"prefill_seconds": round(seconds + again, 4), "evict_seconds": settled(rows, start)}


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
    contexts: Sequence[list[int]]  # the samples', as tokens
    dropped: Sequence[int] = ()  # and how many of each were too many for the model, where the benchmark cuts them

    def shortest(self) -> int:
        """Tokens of the shortest context; none where all that is read is the opening of the turn that asks."""
        bare = chat.SYSTEM + chat.USER
        return min(0 if sample.context == bare else len(context) for sample, context in zip(self.task.samples, self.contexts, strict=True))

    def check(self, records: Sequence[dict]) -> None:
        """Raises ValueError where records of this task are of other questions or answers, as when a file of config.data has changed."""
        # As JSON, which has no tuples; once for each question, whatever the number of cells.
        told = {(one["sample"], one["question"], one["questions"], one["prompt"], json.dumps(one["answer"])) for one in records}
        for i, number, *then in sorted(told):
            sample = self.task.samples[i]
            now = [len(sample.questions), prompt_hash(sample, number), json.dumps(sample.answers[number])] if number < len(sample.questions) else None
            if then != now:
                what = f"sample {i} of {self.task.name} is not what it was when this run began"
                raise ValueError(f"{what}; put the files of config.data back, or give a new workdir")

    def run(self, wanted: Sequence[Cell], batch: Sequence[int]) -> Iterator[tuple[Cell, list[dict]]]:
        """The records of one batch of samples, for each cell. decode_seconds: to read and answer all questions of a sample. cut_off: 1 for an answer that
        max_new_tokens ended. Where all that is read before the questions is the opening of a turn, what the cache holds is told of the answers' end."""
        tokenizer, bare = self.reader.model.tokenizer, not self.shortest()
        samples = [self.task.samples[i] for i in batch]
        for cell, rows, seconds in self.reader.rows(wanted, [self.contexts[i] for i in batch]):
            caches = [] if bare else [held(rows, row) for row in range(len(samples))]
            start = time.time()
            rounds = list(self.answers(rows, samples))
            seconds |= {"decode_seconds": round((time.time() - start) / len(samples), 4)}
            if bare:
                caches = [held(rows, row) for row in range(len(samples))]
            records = []
            for row, (i, sample, cache) in enumerate(zip(batch, samples, caches, strict=True)):
                cut = {"dropped_tokens": self.dropped[i]} if self.dropped else {}
                for number in range(len(sample.questions)):
                    answer, entries = rounds[number][row]
                    generated = tokenizer.decode(answer)
                    records.append(
                        {
                            "sample": i, "question": number, "questions": len(sample.questions),
                            "prompt": prompt_hash(sample, number), "answer": sample.answers[number],
                            "generated": generated, **self.task.score(i, number, generated),
                            "answer_tokens": len(answer), "cut_off": int(answer[-1] not in tokenizer.eos_ids),
                            **cut, **cache, "kept_at_end": entries, **seconds,
                        }
                    )  # fmt: skip
                    cache = {name: value for name, value in cache.items() if not name.startswith("kept_by")}  # said once
            yield cell, records

    def answers(self, rows: Rows, samples: Sequence) -> Iterator[list[tuple[list[int], int]]]:
        """To the first question of every sample, to the second, ...: each asked of a copy of the rows, or in turn where they are turns. The rows go on
        with the last. A question competes for the budget once it is answered (or the answer is longer than the write buffer), as in the rivals' papers: those
        that protect no window would drop it.

        Each with the entries that the cache held at its end. A sample without so many questions says whatever it says.
        """
        tokenizer, config = self.reader.model.tokenizer, self.reader.config
        encode = chat.encoder(tokenizer)
        turns, ended, last = samples[0].turns, [True] * len(samples), max(len(sample.questions) for sample in samples) - 1
        for number in range(last + 1):
            going = rows if turns or number == last else rows.fork()
            asked = [sample.questions[number] if number < len(sample.questions) else "" for sample in samples]
            if turns:  # an answer that was cut off is ended first, as a turn must be
                asked = [question if end else chat.END + question for question, end in zip(asked, ended, strict=True)]
            going.append([encode(question) for question in asked], answer=config.max_new_tokens)
            answers = going.decode_all(config.max_new_tokens, 0.0, 1.0, config.seed, tokenizer.eos_ids)
            ended = [answer[-1] in tokenizer.eos_ids for answer in answers]
            yield list(zip(answers, cache_lib.kept_entries(going.cache).tolist(), strict=True))


@dataclasses.dataclass
class Prose:
    """Held-out prose: what compressing a context changes about what follows."""

    reader: Reader
    windows: Sequence[tuple[list[int], list[int]]]

    def shortest(self) -> int:
        """Tokens of the shortest context."""
        return min(len(context) for context, _ in self.windows)

    def check(self, records: Sequence[dict]) -> None:
        """Nothing to check: a run of other texts is refused."""

    def run(self, wanted: Sequence[Cell], batch: Sequence[int]) -> Iterator[tuple[Cell, list[dict]]]:
        """The records of one batch of samples, for each cell."""
        contexts, continuations = zip(*(self.windows[i] for i in batch), strict=True)
        full = Rows(self.reader.model, len(batch), None)
        full.append(contexts)
        full = prose.continuation_logits(full, continuations)
        for cell, rows, seconds in self.reader.rows(wanted, contexts):
            measured = prose.divergence(full, prose.continuation_logits(rows, continuations), continuations)
            yield cell, [{"sample": i, "questions": 1, **measured[row], **held(rows, row), **seconds} for row, i in enumerate(batch)]


def asking_task(config: ConfigDict, model: Model, texts: list[str], task: str, length: int | None) -> Asking:
    encode = chat.encoder(model.tokenizer)
    loaded = tasks.load(task, encode, texts, length, config.samples, config.seed, config.data, config.execute)
    wanted = loaded.longest_answer(encode)
    if wanted > config.max_new_tokens:
        raise ValueError(f"max_new_tokens must be at least {wanted}, which an answer to {task} takes, got {config.max_new_tokens}")
    if config.question_seen:
        loaded = tasks.seen(loaded)
    contexts = [encode(sample.context, bos=True) for sample in loaded.samples]
    if not task.startswith("longbench"):
        return Asking(Reader(config, model), loaded, contexts)
    free = model.config.max_positions - config.max_new_tokens
    rooms = [free - max(len(encode(question)) for question in sample.questions) for sample in loaded.samples]
    if min(rooms) < 2:
        raise ValueError(f"max_new_tokens {config.max_new_tokens} and the question leave {task} none of the model's {model.config.max_positions} positions")
    cut = [without_middle(context, room) for context, room in zip(contexts, rooms, strict=True)]
    return Asking(Reader(config, model), loaded, cut, [len(context) - len(left) for context, left in zip(contexts, cut, strict=True)])


def without_middle(context: list[int], room: int) -> list[int]:
    """The first and the last half of `room` tokens of a context that has more, as LongBench and LongBench v2 cut what a model has no positions for."""
    half = room // 2
    return context if len(context) <= room else context[:half] + context[len(context) - half :]


def prose_task(config: ConfigDict, model: Model, texts: list[str], task: str, length: int) -> Prose:
    tokens = [model.tokenizer.encode(one) for one in texts]
    return Prose(Reader(config, model), prose.windows(tokens, length, config.continuation, config.samples, config.seed))


def prompt_hash(sample: needles.Sample, question: int) -> str:
    return digest([(sample.context + sample.questions[question]).encode()])


def by_sample(records: list[dict]) -> dict[int, float]:
    """Each sample's mean score over its questions; its KL where there are none. In scores.csv, so that any two policies of a run can be compared in pairs."""
    scores: dict[int, list[float]] = {}
    for record in records:
        scores.setdefault(record["sample"], []).append(record["score"] if "score" in record else record["kl"])
    return {sample: round(float(np.mean(own)), 4) for sample, own in sorted(scores.items())}


def summarise(config: ConfigDict, cell: Cell, records: list[dict], full: list[dict] | None) -> dict:
    """A row of the table: means over the records, and the scores' 95 % interval, in which several questions about one context count as one sample.

    With the full cache's records of the same task also on how many samples the score is above and below the full cache's: of the same contexts
    intervals that overlap may hide a difference that these pairs show. Seconds are means of the warm batches, if there are any: not the first of its size
    since the program started, or since it dropped its programs, which compiles.
    """
    known = {"cell", "sample", "question", "questions", "prompt", "answer", "generated", "kept_by_stream", "kept_by_distance", "warm"}
    samples = len({record["sample"] for record in records})
    warm = [record for record in records if record.get("warm")]
    row = {
        **dataclasses.asdict(cell),
        "prefill": f"chunks of {config.prefill_chunk}" if config.prefill_chunk and cell.policy not in ("full", *config.one_shot) else "one-shot",
        "question_seen": config.question_seen and cell.task != "prose",
        "samples": samples,
        "questions": len(records),
    }
    for name in (name for name in records[0] if name not in known):
        counted = warm if warm and name.endswith("_seconds") else records
        row[name] = round(float(np.mean([record[name] for record in counted])), 4)
    if "score" in row:
        row |= dict(zip(("low", "high"), (round(x, 4) for x in interval(row["score"], samples)), strict=True))
        if full and cell.policy != "full":
            theirs = by_sample(full)
            pairs = [(score, theirs[sample]) for sample, score in by_sample(records).items()]
            row |= {"above_full": sum(own > whole for own, whole in pairs), "below_full": sum(own < whole for own, whole in pairs)}
    return row
