"""The evaluation harness on a tiny model: what it writes, that it goes on where it stopped, and what the numbers mean."""

import copy
import csv
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

from configs import eval_leaderboard, eval_needles, eval_prose, eval_reasoning, eval_ruler
from retention import cache, policies, runs
from retention.chat import ASK, END, USER, encoder
from retention.checkpoints import gates as gates_file
from retention.evaluation import cells, harness, needles, prose, tasks
from retention.rows import Rows
from retention.runs import RunFolder
from tests import tiny
from tests.conftest import small_config, small_model
from tests.evaluation.test_datasets import RECORDS, write

STREAMS = small_config().streams
ANSWER = 7  # tokens that may be generated: as many as the longest of these tasks' answers takes
QUICKLY = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # nearly all the time here is XLA's
TIMES = ("prefill_seconds", "evict_seconds", "decode_seconds")


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tiny.write_folder(tmp_path_factory.mktemp("tiny"))
    gates_file.save(folder / "gates.safetensors", small_model(small_config()).gates)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return harness.checkpoints.load(str(folder), gates=str(folder / "gates.safetensors"))


def config_of(folder, **changes):
    config = eval_needles.get_config()
    values = dict(
        model=str(folder), gates=str(folder / "gates.safetensors"), tasks=("needle4", "kv_turns", "prose"), lengths=(310,), samples=4, batch_size=2,
        budgets=(0.25,), policies=("retention",), one_shot=("window",), prefill_chunk=64, max_new_tokens=ANSWER, continuation=80,
    )  # fmt: skip
    config.update({**values, **changes})
    return config


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A run of three tasks: one whose questions are forks, one of turns, and prose."""
    workdir = tmp_path_factory.mktemp("run") / "whole"
    return workdir, harness.evaluate(config_of(folder), workdir)


def records_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def timeless(rows):
    return [{name: value for name, value in row.items() if name not in (*TIMES, "warm")} for row in rows]


def in_order(records):
    return sorted(timeless(records), key=lambda record: json.dumps([record["cell"], record["sample"], record.get("question")]))


def test_the_last_batch_may_be_smaller(folder):
    assert harness.batches(config_of(folder, samples=5)) == [range(0, 2), range(2, 4), range(4, 5)]


def test_the_full_cache_and_the_window_are_there_unless_the_config_says_otherwise(folder):
    table = cells.table(config_of(folder, lengths=(310, 620), budgets=(0.5, 0.25), scopes=("global", "layer"), policies=("full", "retention", "retention")))
    assert len(table) == len(set(table)) == 3 * 2 * (1 + 2 * 2 * 2)
    assert {cell.policy for cell in table} == {"full", "retention", "window"}
    assert sum(cell.policy == "full" for cell in table) == 3 * 2
    bare = cells.table(config_of(folder, lengths=(310,), policies=("retention",), baselines=False))
    assert {cell.policy for cell in bare} == {"retention"} and set(bare) < set(cells.table(config_of(folder, lengths=(310,), policies=("retention",))))
    assert all(cell.length is None for cell in cells.table(config_of(folder, tasks=("gsm8k",), policies=policies.names())))


def test_a_run_writes_its_folder(whole):
    workdir, rows = whole
    names = ("full", "retention", "window")
    assert [(row["task"], row["policy"]) for row in rows] == [(task, name) for task in ("needle4", "kv_turns", "prose") for name in names]
    files = {".lock", "config.json", "metrics.jsonl", "results.csv", "scores.csv", "run_meta.json", "accuracy.png", "kept_by_head.png", "kept_by_distance.png"}
    assert {file.name for file in workdir.iterdir()} == files
    with open(workdir / "results.csv") as file:
        assert [(row["policy"], row["prefill"], row["question_seen"]) for row in csv.DictReader(file)] == 3 * [
            ("full", "one-shot", "False"), ("retention", "chunks of 64", "False"), ("window", "one-shot", "False"),
        ]  # fmt: skip
    with open(workdir / "scores.csv") as file:
        for row, own in zip(rows, csv.DictReader(file), strict=True):
            assert [own["task"], own["policy"]] == [row["task"], row["policy"]]
            assert np.mean([float(own[str(sample)]) for sample in range(4)]) == pytest.approx(row["score"] if "score" in row else row["kl"], abs=1e-4)
    meta = json.loads((workdir / "run_meta.json").read_text())
    assert meta["seed"] == 0 and meta["commit"] and meta["command"].startswith("python ") and meta["seconds"] > 0
    for row in rows:
        assert row["samples"] == 4 and row["questions"] == {"needle4": 16, "kv_turns": 16, "prose": 4}[row["task"]]
        assert (row["low"] <= row["score"] <= row["high"]) if row["task"] != "prose" else "score" not in row


def test_records_say_what_was_asked_and_what_was_kept(folder, model, whole):
    records = records_of(whole[0])
    assert len(records) == 3 * (16 + 16 + 4)
    texts = harness.text.load("pydoc")
    samples = {task: tasks.load(task, encoder(model.tokenizer), texts, 310, 4, 0).samples for task in ("needle4", "kv_turns")}
    for record in records:
        cell = record["cell"]
        held = record["context_tokens"] if cell["policy"] == "full" else int(0.25 * record["context_tokens"])
        assert record["kept_entries"] == held * STREAMS and record["allocated_bytes"] > held * STREAMS * 2 * small_config().head_dim * 4
        assert all(record[name] >= 0 for name in TIMES[:2])
        if cell["task"] == "prose":
            assert record["context_tokens"] == 310 and (record["kl"] == 0 and record["loss"] == record["full_loss"]) == (cell["policy"] == "full")
        else:
            sample = samples[cell["task"]][record["sample"]]
            prompt = sample.context + sample.questions[record["question"]]
            assert record["prompt"] == runs.digest([prompt.encode()])
            assert np.ravel(record["answer"]).tolist() == np.ravel(sample.answers[record["question"]]).tolist()
            assert record["cut_off"] == int(record["answer_tokens"] == ANSWER), "the tiny model ends no answer by chance on its last token"
            assert 1 <= record["answer_tokens"] <= ANSWER and abs(record["context_tokens"] - 310) <= 0.02 * 310
            assert record["score"] == tasks.Task(cell["task"], samples[cell["task"]]).score(record["sample"], record["question"], record["generated"])["score"]
            assert cell["policy"] == "full" or record["kept_at_end"] == held * STREAMS, "what is appended and generated is evicted too"
        if record.get("question", 0) == 0:
            assert np.sum(record["kept_by_stream"]) == record["kept_entries"] and np.shape(record["kept_by_stream"]) == (3, 2)
            assert len(record["kept_by_distance"]) == harness.BINS
            if cell["policy"] == "full":
                assert record["kept_by_distance"] == [1] * harness.BINS
            if cell["policy"] == "window":
                assert record["kept_by_distance"][:3] == [1, 1, 1] and set(record["kept_by_distance"][5:-1]) == {0}, "the newest, and at the end 4 sinks"
                assert 0 < record["kept_by_distance"][-1] < 0.5
        else:
            assert "kept_by_stream" not in record


def test_answers_equal_those_to_questions_asked_by_hand(model, whole):
    encode, stop = encoder(model.tokenizer), model.tokenizer.eos_ids
    for task in ("kv_turns", "needle4"):
        samples = tasks.load(task, encode, harness.text.load("pydoc"), 310, 4, 0).samples[:2]
        rows = Rows(model, 2, 0.25, prefill_chunk=64)
        rows.append([encode(sample.context, bos=True) for sample in samples])
        ended = [True, True]
        for number in range(4):
            asked = rows if task == "kv_turns" else rows.fork()
            questions = [sample.questions[number] for sample in samples]
            asked.append([encode(question if end else END + question, bos=False) for question, end in zip(questions, ended, strict=True)], answer=ANSWER)
            [tokens] = asked.decode(ANSWER, 0.0, 1.0, 0, stop)
            for row in (0, 1):
                told = tokens[row][tokens[row] >= 0].tolist()
                ended[row] = task == "needle4" or told[-1] in stop
                cell = dict(task=task, length=310, policy="retention", scope="global", budget=0.25)
                [record] = [r for r in records_of(whole[0]) if (r["cell"], r["sample"], r.get("question")) == (cell, row, number)]
                assert (record["generated"], record["answer_tokens"]) == (model.tokenizer.decode(told), len(told))


class Scripted:
    """Stands for Rows: logs what is appended, by number of the fork, and answers with `replies`, a [B, T] array for each decode."""

    def __init__(self, replies, log, number=0):
        self.replies, self.log, self.number, self.forks = replies, log, number, [0]
        self.cache = None

    def fork(self):
        self.forks[0] += 1
        other = Scripted(self.replies, self.log, self.forks[0])
        return other

    def append(self, prompts, answer):
        assert answer == ANSWER, "a question is answered before it competes"
        self.log.append((self.number, prompts))

    def decode(self, max_new_tokens, temperature, top_p, seed, stop):
        assert temperature == 0
        yield from np.split(self.replies.pop(0), [2], axis=1)

    decode_all = Rows.decode_all


def test_turns_follow_each_other_and_other_questions_do_not(folder, model, monkeypatch):
    """An answer that was cut off is ended by the harness; the sample with fewer questions is asked nothing."""
    monkeypatch.setattr(harness.cache_lib, "kept_entries", lambda cache: np.array([7, 8]))
    encode, (stop, *_) = model.tokenizer.encode, model.tokenizer.eos_ids
    questions = ("\n\nA?" + ASK, f"\n{USER}B?{ASK}", f"\n{USER}C?{ASK}")
    asking = harness.Asking(harness.Reader(config_of(folder), model), None, [])
    replies = [[[65, 66, 67, 68], [65, stop, -1, -1]], [[69, stop, -1, -1], [70, 71, 72, 73]], [[74, 75, 76, stop], [77, 78, 79, 80]]]
    for turns in (True, False):
        samples = [needles.Sample("One.", questions, ("1", "2", "3"), turns), needles.Sample("Two.", questions[:2], ("4", "5"), turns)]
        log = []
        rounds = list(asking.answers(Scripted([np.array(reply) for reply in replies], log), samples))
        assert rounds[0] == [([65, 66, 67, 68], 7), ([65, stop], 8)] and rounds[1][0] == ([69, stop], 7)
        first, second, third = (tuple(encode(question, bos=False) for question in (one, other)) for one, other in zip(questions, questions, strict=True))
        end = encode(END, bos=False)
        if turns:
            assert log == [(0, [*first]), (0, [end + second[0], second[1]]), (0, [third[0], end])]
        else:  # the last goes on with the rows themselves
            assert log == [(1, [*first]), (2, [*second]), (0, [third[0], []])]


def test_every_answer_is_scored_by_its_own_question(folder, model, monkeypatch):
    """Of samples 2 and 3 of four: one says its first answer both times, the other that one and then its own second."""
    monkeypatch.setattr(harness.cache_lib, "kept_entries", lambda cache: np.array([7, 8]))
    monkeypatch.setattr(harness, "held", lambda rows, row: {"context_tokens": row})
    monkeypatch.setattr(harness, "time", types.SimpleNamespace(time=itertools.count().__next__))
    stop, samples = model.tokenizer.eos_ids[0], [needles.Sample("One.", ("\n\nA?" + ASK, "\n\nB?" + ASK), (f"{i}1", f"{i}2")) for i in range(4)]
    replies = [np.array([[*model.tokenizer.encode(answer, bos=False), stop, -1, -1, -1][:4] for answer in said]) for said in (("21", "21"), ("21", "32"))]

    def rows(wanted, contexts):
        assert contexts == [[2], [3]]
        yield wanted[0], Scripted(replies, []), {"prefill_seconds": 3.0}

    reader = types.SimpleNamespace(model=model, config=config_of(folder), rows=rows)
    [(_, records)] = harness.Asking(reader, tasks.Task("needle4", samples), [[i] for i in range(4)]).run(["cell"], [2, 3])
    told = [tuple(record[name] for name in ("sample", "question", "answer", "generated", "score", "context_tokens", "kept_at_end")) for record in records]
    assert told == [(2, 0, "21", "21", 1, 0, 7), (2, 1, "22", "21", 0, 0, 7), (3, 0, "31", "21", 0, 1, 8), (3, 1, "32", "32", 1, 1, 8)]
    assert {(record["prefill_seconds"], record["decode_seconds"]) for record in records} == {(3.0, 0.5)}, "a second for both samples"


def test_each_input_of_a_run_is_told_from_others(folder, model):
    doubled = dataclasses.replace(model.gates, params=jax.tree.map(lambda leaf: 2 * leaf, model.gates.params))
    other_weights = dataclasses.replace(model, params=model.params | {"norm": 2 * model.params["norm"]})
    told = harness.inputs(model, ["text"])
    for changed, name in (
        (harness.inputs(dataclasses.replace(model, gates=doubled), ["text"]), "gates"),
        (harness.inputs(dataclasses.replace(model, gates=None), ["text"]), "gates"),
        (harness.inputs(other_weights, ["text"]), "weights"),
        (harness.inputs(model, ["other text"]), "text"),
    ):
        assert [entry for entry in told if told[entry] != changed[entry]] == [name]



def test_programs_are_run_only_where_the_config_says_so(folder, tmp_path):
    name = "longproc_pseudo_to_code_0.5k"
    write(tmp_path, name, RECORDS[name])
    with pytest.raises(ValueError, match="pass execute=True where that may be done"):
        harness.evaluate(config_of(folder, tasks=(name,), data=str(tmp_path), samples=1), tmp_path / "run")


def test_seed_and_dtype_are_the_configs(folder):
    configs = [config_of(folder, seed=seed, dtype="bfloat16") for seed in (0, 0, 1)]
    model, texts = harness.load(configs[0], gates=None)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {"bfloat16"}
    first, again, other = (harness.asking_task(config, model, texts, "needle4", 310).contexts for config in configs)
    assert first == again != other
    first, again, other = (harness.prose_task(config, model, texts, "prose", 310).windows for config in configs)
    assert first == again != other


def test_an_interrupted_run_goes_on_and_says_the_same(folder, whole, tmp_path, monkeypatch):
    """Cut off after a random number of batches of cells, amid the writing of one's records."""
    calls, log_all = [], RunFolder.log_all
    cut = int(np.random.default_rng().integers(1, 3 * 3 * 2))

    def interrupted(run, records):
        calls.append(records)
        if len(calls) == cut:
            with open(run.path / "metrics.jsonl", "a") as file:  # all of the batch but the end of its last record
                file.write("".join(json.dumps(record) + "\n" for record in records)[:-30])
            raise KeyboardInterrupt
        log_all(run, records)

    monkeypatch.setattr(RunFolder, "log_all", interrupted)
    monkeypatch.setattr(runs, "commit", iter(("aaaaaaa", "bbbbbbb", *5 * ["ccccccc"])).__next__)
    with pytest.raises(KeyboardInterrupt):
        harness.evaluate(config_of(folder), tmp_path / "cut")
    rows = harness.evaluate(config_of(folder), tmp_path / "cut")
    assert timeless(rows) == timeless(whole[1]), cut
    assert len(calls) == 3 * 3 * 2 + 1, "the batch of a cell that was cut off runs again, and nothing else"
    assert in_order(records_of(tmp_path / "cut")) == in_order(records_of(whole[0]))
    meta = (tmp_path / "cut" / "run_meta.json").read_text()
    assert json.loads(meta)["commit"] == ("bbbbbbb" if cut == 1 else "aaaaaaa, bbbbbbb"), "of all that wrote records"
    assert harness.evaluate(config_of(folder), tmp_path / "cut") == rows and len(calls) == 3 * 3 * 2 + 1
    assert (tmp_path / "cut" / "run_meta.json").read_text() == meta, "nothing was done, and by another commit"
    with pytest.raises(ValueError, match="seed is 0 there and 1 here"):
        harness.evaluate(config_of(folder, seed=1), tmp_path / "cut")
    monkeypatch.setattr(harness.text, "load", lambda source: ["Another text. " * 900])
    with pytest.raises(ValueError, match="inputs.text is '[0-9a-f]{16}' there and '[0-9a-f]{16}' here"):
        harness.evaluate(config_of(folder), tmp_path / "cut")
    model = harness.checkpoints.load(folder, gates=folder / "gates.safetensors")
    other = dataclasses.replace(model, params={**model.params, "norm": -model.params["norm"]}, tokenizer=copy.copy(model.tokenizer))
    other.tokenizer.chat_template += "!"
    monkeypatch.setattr(harness.checkpoints, "load", lambda *_, **__: other)
    differing = ", ".join(f"inputs.{name} is '[0-9a-f]{{16}}' there and '[0-9a-f]{{16}}' here" for name in ("weights", "tokenizer", "text"))
    with pytest.raises(ValueError, match=differing):
        harness.evaluate(config_of(folder), tmp_path / "cut")


def test_a_run_of_another_policy_of_that_name_is_refused(folder, tmp_path, monkeypatch):
    registry = dict(policies._REGISTRY)
    monkeypatch.setattr(policies, "_REGISTRY", registry)

    def oldest(stat, position, seen):
        return -1.0 * position

    def signed(stat, position, seen, sign):
        return sign * position

    scores = oldest, functools.partial(signed, sign=1.0), functools.partial(signed, sign=-1.0)
    mine = [policies.Policy(score=oldest, sinks=2), *(policies.Policy(score=score) for score in scores)]
    told = set()
    for policy in mine:
        registry.pop("mine", None)
        policies.register("mine", policy)
        told.add(policies.description("mine"))
    assert len(told) == 4 and policies.description("snapkv:window=16") is None
    config = config_of(folder, tasks=("needle",), policies=("mine",), one_shot=(), baselines=False, budgets=(0.5,), samples=1)
    harness.evaluate(config, tmp_path)
    registry.pop("mine")
    policies.register("mine", mine[0])
    with pytest.raises(ValueError, match="inputs.policies is '[0-9a-f]{16}' there and '[0-9a-f]{16}' here"):
        harness.evaluate(config, tmp_path)


def test_a_killed_run_goes_on(folder, whole, tmp_path):
    command = [
        sys.executable, "-m", "experiments.evaluate", "--config=configs/eval_needles.py", f"--workdir={tmp_path / 'run'}",
        *(f"--config.{name}={value}" for name, value in config_of(folder).items() if value is not None and value != eval_needles.get_config()[name]),
    ]  # fmt: skip
    log = tmp_path / "run" / "metrics.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=QUICKLY)
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    before = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
    assert 0 < len(before) < 3 * (16 + 16 + 4)
    rows = harness.evaluate(config_of(folder), tmp_path / "run")
    assert timeless(rows) == timeless(whole[1]) and in_order(records_of(tmp_path / "run")) == in_order(records_of(whole[0]))
    assert log.read_text().startswith("".join(before[: len(before) // 8 * 8])), "what was logged is not done again"  # every eighth record ends a batch


def test_policies_and_budgets_share_a_reading(folder, model, monkeypatch):
    readings, read = [], harness.Reading
    monkeypatch.setattr(harness, "Reading", lambda *arguments: readings.append(arguments[1]) or read(*arguments))
    config = config_of(folder, policies=("keydiff", "retention"), one_shot=("keydiff", "window"), budgets=(0.25, 0.5))
    contexts = [list(range(3, 303)), list(range(40, 320))]
    wanted = [cell for cell in cells.table(config) if cell.task == "prose"]
    seconds = {}
    for cell, rows, seconds[cell] in harness.Reader(config, model).rows(wanted, contexts):
        held = [int((cell.budget or 1) * len(context)) * STREAMS for context in contexts]
        assert [harness.held(rows, row)["kept_entries"] for row in (0, 1)] == held
    assert set(seconds) == set(wanted) and readings == [["keydiff", "window"]]
    for policy in config.one_shot:
        shared = [seconds[cell] for cell in wanted if cell.policy == policy]
        assert len({one["prefill_seconds"] for one in shared}) == 1 and all(one["evict_seconds"] > 0 for one in shared), "each is charged for all of it"


def test_each_cell_is_charged_for_what_it_takes(folder, monkeypatch):
    """By a clock that only reading (10 s), KVzip's second reading (100 s) and compressing (1 s) move on: seconds are for one sequence of the batch."""
    clock = [0.0]

    def rows(batch, seconds):
        clock[0] += seconds
        return types.SimpleNamespace(batch=batch, cache=None, logits=None, append=lambda contexts: rows(batch, 10))

    def reading(model, names, contexts):
        batch, again = len(contexts), {("kvzip", 3): 100}  # once, looking at as many sinks as the config says
        return types.SimpleNamespace(
            full=rows(batch, 10),
            read_for=lambda policy, sinks: rows(batch, again.pop((policy, sinks), 0)),
            compress=lambda budget, policy, scope, sinks, *_: rows(batch, 1 + again.pop((policy, sinks), 0)),
        )

    monkeypatch.setattr(harness, "time", types.SimpleNamespace(time=lambda: clock[0]))
    monkeypatch.setattr(harness, "empty_rows", lambda config, model, cell, batch: rows(batch, 0))
    monkeypatch.setattr(harness, "Reading", reading)
    config = config_of(folder, tasks=("prose",), policies=("kvzip", "retention"), one_shot=("window", "kvzip"), budgets=(0.5, 0.25), sinks=3)
    wanted = {"full": (10, 0), "retention": (10, 0), "window": (10, 1), "kvzip": (10 + 100, 1)}
    for batch in (1, 2):
        found = [(cell, seconds) for cell, _, seconds in harness.Reader(config, None).rows(cells.table(config), batch * [[3]])]
        assert len(found) == 1 + 2 * 3
        for cell, seconds in found:
            assert (seconds["prefill_seconds"], seconds["evict_seconds"]) == tuple(s / batch for s in wanted[cell.policy]), (cell, batch)


def test_sinks_and_window_are_the_configs(folder, model):
    for one_shot in ((), ("knorm",)):
        config = config_of(folder, tasks=("prose",), policies=("knorm",), one_shot=one_shot, baselines=False, sinks=7, window=9, prefill_chunk=16)
        [(_, rows, _)] = harness.Reader(config, model).rows(cells.scoped(cells.table(config), model), [list(range(3, 103))])
        for positions in itertools.chain(*cache.kept_positions(rows.cache, 0)):
            assert {*range(7), *range(91, 100)} <= set(positions.tolist()) < set(range(100))
        assert rows.width == 16, "the write buffer that decoding fills between evictions"


def test_the_question_may_be_seen(folder, tmp_path):
    config = config_of(folder, tasks=("needle4",), policies=(), lengths=(290,), question_seen=True, samples=2)
    rows = harness.evaluate(config, tmp_path)
    assert all(row["question_seen"] and row["questions"] == row["samples"] == 2 for row in rows)
    assert min(record["context_tokens"] for record in records_of(tmp_path)) > 300
    with pytest.raises(ValueError, match="question_seen makes no sense for kv_turns"):
        harness.evaluate(config_of(folder, tasks=("kv_turns",), question_seen=True), tmp_path / "turns")


def test_reasoning_evicts_while_it_decodes(folder, tmp_path):
    problems = [{"question": f"What is {i} + 1? " + "Think well. " * 40, "answer": f"#### {i + 1}"} for i in range(9)]
    (tmp_path / "gsm8k_test.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    changes = dict(tasks=("gsm8k",), data=str(tmp_path), policies=(), one_shot=(), budgets=(77,), samples=2)
    rows = harness.evaluate(config_of(folder, **changes), tmp_path / "run")
    assert [(row["length"], row["budget"]) for row in rows] == [(None, None), (None, 77)]
    for record in records_of(tmp_path / "run"):
        assert record["context_tokens"] > 200, "the problem is the question: what is told of the cache is of the end"
        assert record["kept_entries"] == record["kept_at_end"] == (77 if record["cell"]["budget"] else record["context_tokens"]) * STREAMS
        assert sum(map(sum, record["kept_by_stream"])) == record["kept_entries"]
    assert rows[0]["allocated_bytes"] > 1.5 * rows[1]["allocated_bytes"], "the full cache grew, and the other's buffer is of its chunk"
    with pytest.raises(ValueError, match="gsm8k, window .global. at budget 0.5: a fraction of a context must .* one has 0 tokens; give tokens per stream"):
        harness.evaluate(config_of(folder, **{**changes, "budgets": (0.5,)}), tmp_path / "fractions")


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(tasks=("needel",)), "unknown task 'needel': did you mean needle"),
        (dict(tasks=("longbench_quasper",)), "did you mean longbench_qasper"),
        (dict(policies=("retension",)), "unknown policy 'retension': did you mean retention"),
        (dict(policies=("lagkv:lag=32",), one_shot=("lagkv",)), "config.one_shot has lagkv and config.policies lagkv:lag=32; give one name, with"),
        (dict(policies=(), one_shot=("expected_attention", "expected_attention:sinks=9")), r"positions \[4, 9\] on cannot share a reading"),
        (dict(one_shot=("snapvk",)), "unknown policy 'snapvk': did you mean snapkv"),
        (dict(scopes=("globl",)), "unknown scope 'globl': did you mean global"),
        (dict(policies=("pyramidkv",), scopes=("layer",)), r"needle4 of 310 tokens, pyramidkv \(layer\) at budget 0.25: .* its scope may be head"),
        (dict(policies=("snapkv",), budgets=(16,)), r"snapkv \(head\) at budget 16: budget 16 is smaller than sinks \+ window = 0 \+ 32"),
        (dict(policies=("snapkv",), budgets=(0.05,)), r"snapkv \(head\) at budget 0.05: budget 15 is smaller than sinks \+ window"),
        (dict(policies=("snapkv",), budgets=(32 / 310,)), "budget 31 is smaller than"),  # contexts may be a few tokens shorter than their length
        (dict(budgets=(1 / 310,)), "needle4 of 310 tokens, .* at budget 0.00322581: a fraction of a context must be at least one token of it"),
        (dict(budgets=(1.5,)), r"a fractional budget must be in \(0, 1\], got 1.5"),
        (dict(tasks=("gsm8k",)), "gsm8k is read from a file: give the folder that holds it as config.data"),
        (dict(tasks=("qa_1",)), "qa_1 is read from a file"),
        (dict(lengths=(100,)), "length must be at least 160"),
        (dict(tasks=("niah_single_3",)), "max_new_tokens must be at least 36, which an answer to niah_single_3 takes, got 7"),
        (dict(tasks=("niah_multivalue",)), "max_new_tokens must be at least 44, which"),  # four lines such as "\n1. 1234567"
        (dict(samples=0), "config.samples must be a whole number of at least 1, got 0"),
        (dict(batch_size=0), "config.batch_size must be a whole number of at least 1"),
        (dict(seed=-1), "config.seed must be a whole number of at least 0"),
        (dict(lengths=(256.5,)), "config.lengths must be whole numbers of tokens, got 256.5"),
        (dict(budgets=("a",)), "config.budgets must be fractions of the context's tokens or tokens per stream, got 'a'"),
        (dict(budgets=(1, 0.5, 1.0)), "config.budgets has fractions of a context and tokens per stream, which tables cannot order"),
        (dict(tasks=()), "there is nothing to evaluate: config.tasks"),
        (dict(policies=(), baselines=False), "there is nothing to evaluate"),
        (dict(continuation=10**7), "text holds no document of 10000310 tokens"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_cell(folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        harness.evaluate(config_of(folder, **changes), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_samples_are_paired_with_the_full_caches(folder):
    """Three samples of two questions, in another order: one better, one worse, one that gains an answer and loses one."""
    cell = cells.Cell("needle4", 310, "window", "global", 0.25)

    def records(scores):
        return [{"sample": sample, "question": i, "questions": 2, "score": score} for sample, pair in scores.items() for i, score in enumerate(pair)]

    own, full = records({2: (1.0, 0.0), 0: (1.0, 1.0), 1: (0.0, 0.0)}), records({0: (1.0, 0.0), 1: (0.0, 1.0), 2: (0.0, 1.0)})
    row = harness.summarise(config_of(folder), cell, own, full)
    assert (row["above_full"], row["below_full"], row["score"]) == (1, 1, 0.5)
    assert (row["low"], row["high"]) == pytest.approx(harness.interval(0.5, 3), abs=5e-5), "two questions about one context are no two samples"
    assert "above_full" not in harness.summarise(config_of(folder), cell, own, None), "where the full cache was not run there is nothing to pair"


def test_seconds_are_of_batches_that_compile_nothing(folder):
    cell = cells.Cell("needle", 310, "window", "global", 0.25)
    records = [{"sample": i, "question": 0, "questions": 1, "score": 1.0, "decode_seconds": s, "warm": s < 9} for i, s in enumerate((9.0, 9.0, 1.0, 3.0, 9.0))]
    for count, wanted in ((5, 2.0), (4, 2.0), (3, 1.0), (2, 9.0)):
        assert harness.summarise(config_of(folder), cell, records[:count], None)["decode_seconds"] == pytest.approx(wanted, abs=1e-4)


def test_batches_are_warm_once_their_programs_are_compiled(folder, tmp_path, monkeypatch):
    """Of four batches: the run is broken off after the first, and drops its programs after the third."""
    config = config_of(folder, tasks=("needle",), policies=("retention",), baselines=False, batch_size=1)
    calls, log_all = [], RunFolder.log_all
    monkeypatch.setattr(harness, "drop_programs", lambda: len(calls) == 4)

    def interrupted(run, records):
        calls.append(records)
        if len(calls) == 2:
            raise KeyboardInterrupt
        log_all(run, records)

    monkeypatch.setattr(RunFolder, "log_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        harness.evaluate(config, tmp_path)
    harness.evaluate(config, tmp_path)
    assert [record["warm"] for record in records_of(tmp_path)] == [False, False, True, False]


@pytest.mark.parametrize("seen", [False, True])
def test_longbench_contexts_lose_their_middle(folder, model, tmp_path, seen):
    """Only as many tokens as the model knows positions are read, asked and answered; the first and last are there."""
    words = " ".join(f"w{n}" for n in range(3000))
    record = {"input": "Who?", "context": f"Ann first. {words} Bob last.", "answers": ["Ann"], "all_classes": None}
    (tmp_path / "hotpotqa.jsonl").write_text("\n".join(json.dumps(one) for one in (record, record | {"context": "Ann."})))
    config = config_of(folder, tasks=("longbench_hotpotqa",), data=str(tmp_path), samples=2, question_seen=seen)
    asking = harness.asking_task(config, model, [], "longbench_hotpotqa", None)
    encode, (long, short) = encoder(model.tokenizer), asking.task.samples
    whole = encode(long.context, bos=True)
    kept = model.config.max_positions - ANSWER - len(encode(long.questions[0]))
    assert len(asking.contexts[0]) == kept - kept % 2 and asking.dropped == [len(whole) - len(asking.contexts[0]), 0]
    assert asking.contexts[0] == whole[: kept // 2] + whole[-(kept // 2) :] and asking.contexts[1] == encode(short.context, bos=True)
    assert "Ann first" in model.tokenizer.decode(asking.contexts[0]) and "Bob last" in model.tokenizer.decode(asking.contexts[0])
    assert harness.without_middle([1, 2, 3], 3) == [1, 2, 3]
    config.max_new_tokens = model.config.max_positions
    with pytest.raises(ValueError, match=rf"max_new_tokens {config.max_new_tokens} and the question leave longbench_hotpotqa none of the model's"):
        harness.asking_task(config, model, [], "longbench_hotpotqa", None)


def test_a_run_of_other_questions_is_refused(folder, tmp_path, monkeypatch):
    """The benchmark's file has changed while the run was interrupted."""
    lines = [json.dumps({"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"}) for n in range(4)]
    (tmp_path / "gsm8k_test.jsonl").write_text("\n".join(lines))
    config = config_of(folder, tasks=("gsm8k",), policies=("retention",), baselines=False, budgets=(64,), data=str(tmp_path))
    log_all = RunFolder.log_all

    def interrupted(run, records):
        log_all(run, records)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(RunFolder, "log_all", interrupted)
        harness.evaluate(config, tmp_path / "run")
    for changed in (["{}", *lines[1:]], [lines[0].replace("#### 1", "#### 2"), *lines[1:]], lines[::-1]):
        (tmp_path / "gsm8k_test.jsonl").write_text("\n".join(changed).replace("{}", lines[0].replace("is", "was")))
        with pytest.raises(ValueError, match="sample 0 of gsm8k is not what it was when this run began; put the files of config.data back"):
            harness.evaluate(config, tmp_path / "run")
    (tmp_path / "gsm8k_test.jsonl").write_text("\n".join(lines))
    assert harness.evaluate(config, tmp_path / "run")[0]["samples"] == 4


def test_rows_say_how_a_context_was_read(folder):
    records = [{"sample": 0, "question": 0, "questions": 1, "score": 1.0}]
    for chunk, policy, task, wanted in (
        (64, "retention", "needle", ("chunks of 64", True)), (None, "retention", "needle", ("one-shot", True)), (64, "window", "prose", ("one-shot", False)),
    ):  # fmt: skip
        config = config_of(folder, prefill_chunk=chunk, question_seen=True)
        row = harness.summarise(config, cells.Cell(task, 310, policy, "global", 0.25), records, None)
        assert (row["prefill"], row["question_seen"]) == wanted


def test_each_policy_has_its_own_scope_unless_the_config_says_otherwise(folder, model):
    local = dataclasses.replace(model, gates=dataclasses.replace(model.gates, config=dataclasses.replace(model.gates.config, kind="local")))
    table = cells.table(config_of(folder, tasks=("gsm8k",), policies=policies.names()))
    own = {name: policies.get(name).scope for name in policies.names()}
    for loaded, scope in ((model, "global"), (local, "head")):
        assert {cell.policy: cell.scope for cell in cells.scoped(table, loaded)} == own | {"retention": scope}
    asked = cells.table(config_of(folder, tasks=("gsm8k",), scopes=("global", "head")))
    assert cells.scoped(asked, local) == asked and {cell.scope for cell in asked if cell.policy == "retention"} == {"global", "head"}


@pytest.mark.parametrize(
    "mean, count, low, high",
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3; the last two have closed forms: z2/(n+z2) from either end.
    [(81 / 263, 263, 0.2553, 0.3662), (15 / 148, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1 / 29, 29, 0.0061, 0.1718), (1, 20, 0.8389, 1)],
)
def test_interval(mean, count, low, high):
    assert harness.interval(mean, count) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("module", [eval_needles, eval_leaderboard, eval_ruler, eval_reasoning, eval_prose])
def test_each_config_says_how_to_run_it_and_names_what_there_is(module):
    config = module.get_config()
    name = pathlib.Path(module.__file__).name
    assert f"--config=configs/{name} --workdir=" in module.__doc__ and re.search(r"minutes|hours", module.__doc__)
    assert set(config.keys()) == set(eval_needles.get_config().keys())
    assert {cell.policy for cell in cells.table(config)} == {"full", "window", *config.policies}
    assert set(config.one_shot) <= set(config.policies)


def test_prose_with_everything_kept_costs_nothing(model):
    pairs = prose.windows([list(range(500))], 310, 80, 2, seed=0)
    assert all(continuation[0] == context[-1] + 1 for context, continuation in pairs)
    contexts, continuations = zip(*pairs, strict=True)

    def logits(budget):
        rows = Rows(model, 2, budget, prefill_chunk=64)
        rows.append(contexts)
        return prose.continuation_logits(rows, continuations)

    for measured in prose.divergence(logits(None), logits(310), continuations):
        assert abs(measured["kl"]) < 1e-6 and measured["loss"] == pytest.approx(measured["full_loss"], abs=1e-5)
    with pytest.raises(ValueError, match="no document of 400 tokens"):
        prose.windows([list(range(300))], 300, 100, 1, seed=0)


def test_the_generate_program_streams_and_names_bad_flags(folder, tmp_path):
    def run(*flags):
        command = [sys.executable, "-m", "experiments.generate", f"--model={folder}", f"--gates={folder}/gates.safetensors", *flags]
        return subprocess.run(command, capture_output=True, text=True, env=QUICKLY)

    (tmp_path / "book.txt").write_text("A letter lay on the step, and nobody came. " * 20)
    done = run("--prompt=Who came?", f"--context={tmp_path}/book.txt", "--budget=0.25", "--max_new_tokens=5", "--chat")
    assert done.returncode == 0, done.stderr
    assert "kept_entries=" in done.stdout and int(re.search(r"seen_tokens=(\d+)", done.stdout)[1]) > 200, "the context too was read"
    failed = run("--prompt=Who came?", "--budget=half")
    assert failed.returncode != 0 and "--budget must be a whole number, a fraction such as 0.125, or none, got 'half'" in failed.stderr
