"""Streams through evicting caches: the same numbers as decoding them, and the full cache as the yardstick."""

import csv
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retention import checkpoints
from retention.chat import encoder
from retention.checkpoints import gates as gates_file
from retention.evaluation import prose, streaming
from retention.rows import Rows
from tests.conftest import small_config, small_model
from tests.tiny import write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("tiny") / "model")
    gates_file.save(folder / "gates.safetensors", small_model(small_config()).gates)
    return folder


def test_following_is_decoding(folder):
    """The losses of a stream that a cache has decoded itself are those of the choices it made."""
    model = checkpoints.load(folder, gates=None)
    prompts = [[5, 6, 7, 8] * 6, [9, 10, 11] * 5]

    def rows(budget, policy):
        made = Rows(model, 2, budget, policy, prefill_chunk=8, sinks=1, window=4)
        made.append(prompts)
        return made

    decoded = rows(12, "window")
    stream = np.concatenate(list(decoded.decode(40, 0.0, 1.0, 0, ())), axis=1)
    caches = {"window": rows(12, "window"), "full": Rows(model, 2, None)}
    caches["full"].append(prompts)
    seen, largest = [], 0
    for begin, name, loss, kl in streaming.follow(caches, stream, 8):
        seen.append((begin, name))
        assert loss.shape == kl.shape == (2, 8)
        if name == "full":
            np.testing.assert_allclose(kl, 0, atol=1e-6)
        else:
            largest = max(largest, float(kl.max()))
            assert (loss < np.log(model.config.vocab_size)).all(), "the likeliest token is likelier than most"
    assert seen == [(begin, name) for begin in range(0, 40, 8) for name in ("full", "window")] and largest > 1e-4
    assert [caches["window"].stats(row).kept_entries for row in (0, 1)] == [12 * model.config.streams] * 2
    np.testing.assert_allclose(jax.nn.log_softmax(caches["window"].logits), jax.nn.log_softmax(decoded.logits), atol=1e-4)


def test_a_story_is_told_at_the_temperature_and_by_the_seed_given(folder):
    model = checkpoints.load(folder, gates=None)
    greedy, first, again, other = (streaming.tell(model, [[5, 6, 7]], 12, *how) for how in ((0.0, 0), (1.0, 0), (1.0, 0), (1.0, 1)))
    assert (first == again).all() and len({tuple(one[0]) for one in (greedy, first, other)}) == 3


def test_losses_and_divergence_are_those_of_numpy():
    """KL(full || cache), in this direction, and the losses, of prose's continuations and of a stream's piece, from given logits."""
    full, cache = np.random.default_rng(0).normal(scale=2, size=(2, 2, 3, 4))
    labels = np.array([[0, 3, 1], [2, 2, 0]])
    p, q = (np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True) for logits in (full, cache))
    kl = (p * np.log(p / q)).sum(axis=2)
    full_loss, loss = (-np.log(np.take_along_axis(one, labels[:, :, None], axis=2)[:, :, 0]) for one in (p, q))
    found = prose.divergence(jnp.asarray(full), jnp.asarray(cache), np.insert(labels, 0, 1, axis=1))
    for row in (0, 1):
        assert found[row] == pytest.approx({"kl": kl[row].mean(), "loss": loss[row].mean(), "full_loss": full_loss[row].mean()}, rel=1e-4)
    caches = {name: types.SimpleNamespace(score=lambda tokens, logits=logits: jnp.asarray(logits)) for name, logits in (("window", cache), ("full", full))}
    pieces = list(streaming.follow(caches, np.pad(labels, ((0, 0), (3, 0))), 3, 3))
    assert [piece[:2] for piece in pieces] == [(3, "full"), (3, "window")]
    for (*_, its_loss, its_kl), wanted in zip(pieces, ((full_loss, 0 * kl), (loss, kl)), strict=True):
        np.testing.assert_allclose(its_loss, wanted[0], rtol=1e-4)
        np.testing.assert_allclose(its_kl, wanted[1], rtol=1e-4, atol=1e-6)


def test_a_stream_goes_on_from_saved_caches(folder, tmp_path):
    model = checkpoints.load(folder, gates=folder / "gates.safetensors")
    stream = np.random.default_rng(0).integers(3, 500, (2, 48))

    def rows():
        kinds = {"full": (None, "full"), "h2o 0.5": (0.5, "h2o"), "snapkv:window=4 12": (12, "snapkv:window=4")}
        return {name: Rows(model, 2, budget, policy, prefill_chunk=8) for name, (budget, policy) in kinds.items()}

    whole = rows()
    (tmp_path / "caches").mkdir()
    (tmp_path / "caches" / "mine").touch()
    assert streaming.resume(tmp_path / "caches", whole) == (None, 0)
    for own in whole.values():
        own.append([[5, 6, 7, 8] * 6, [9, 10, 11] * 5])
    expected = []
    for begin, name, loss, kl in streaming.follow(whole, stream, 8):
        expected.append((begin, name, loss.tolist(), kl.tolist()))
        if name == list(whole)[-1] and begin in (0, 16):
            streaming.save(tmp_path / "caches", whole, stream, begin + 8)
    assert [path.name for path in (tmp_path / "caches").iterdir() if path.name != "mine"] == ["24"], "one time is enough"
    assert (tmp_path / "caches" / "mine").exists()
    resumed = rows()
    again, done = streaming.resume(tmp_path / "caches", resumed)
    assert done == 24 and (again == stream).all()
    rest = [(begin, name, loss.tolist(), kl.tolist()) for begin, name, loss, kl in streaming.follow(resumed, again, 8, done)]
    assert rest == expected[3 * 3 :]


def test_stories_hold_their_answer_once_and_ask_for_it():
    samples = streaming.stories(5, seed=0)
    assert samples == streaming.stories(5, seed=0) and len({sample.answers for sample in samples}) == 5
    for sample in samples:
        assert sample.context.count(sample.answers[0]) == 1 and sample.answers[0] not in sample.questions[0]


def test_each_story_is_remembered_by_itself(folder):
    """Of three, the last says the first's number."""
    samples, tokenizer, asked = streaming.stories(3, seed=0), checkpoints.load(folder, gates=None).tokenizer, []
    said = [f"It is {samples[i].answers[0]}." for i in (0, 1, 0)]
    rows = types.SimpleNamespace(
        model=types.SimpleNamespace(tokenizer=tokenizer),
        append=lambda prompts, answer: asked.append((prompts, answer)),
        decode_all=lambda count, *_: [tokenizer.encode(one, bos=False)[:count] for one in said],
    )
    assert streaming.remembered(rows, samples) == [True, True, False]
    assert asked == [([encoder(tokenizer)(sample.questions[0]) for sample in samples], 24)]


def command_of(folder, workdir, kind, tokens):
    return [
        sys.executable, "-m", "experiments.stream", f"--config=configs/stream.py:{kind}", f"--workdir={workdir}", f"--config.model={folder}",
        f"--config.gates={folder}/gates.safetensors", "--config.samples=2", f"--config.tokens={tokens}", "--config.policies=('window','retention')",
        "--config.budgets=(20,)", "--config.bins=2", "--config.piece=8",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_program_goes_on_after_kill_9(folder, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run(command_of(folder, whole, "story", 640), check=True, capture_output=True)
    killed = subprocess.Popen(command_of(folder, cut, "story", 640), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (cut / "caches" / "320").exists():
        assert killed.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    before = (cut / "metrics.jsonl").read_text()
    done = subprocess.run(command_of(folder, cut, "story", 640), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (cut / "stream.csv").read_text() == (whole / "stream.csv").read_text()
    assert (cut / "metrics.jsonl").read_text().startswith("".join(before.splitlines(keepends=True)[: 3 * 40]))
    assert not (cut / "caches").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind, tokens", [("story", 64), ("prose", 96)])
def test_the_program(folder, tmp_path, kind, tokens):
    command = command_of(folder, tmp_path, kind, tokens)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(open(tmp_path / "stream.csv")))
    assert [(row["policy"], row["budget"]) for row in rows[::2]] == [("full", ""), ("window", "20"), ("retention", "20")]
    assert [(int(row["from"]), int(row["to"])) for row in rows[:2]] == [(0, tokens // 2), (tokens // 2, tokens)]
    assert all(float(row["kl"]) < 1e-6 for row in rows[:2]) and all(float(row["kl"]) > 0 for row in rows[3:])
    assert bool(rows[1]["answered"]) == (kind == "story") and (tmp_path / "stream.png").stat().st_size > 10_000
