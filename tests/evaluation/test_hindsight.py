"""Caches that keep what the text ahead attends to."""

import csv
import subprocess
import sys

import numpy as np
import pytest

from retention import cache
from retention.evaluation import hindsight
from retention.reading import Reading
from tests.test_generation import random_prompts
from tests.tiny import write_folder


def test_future_attention_is_all_attention_but_the_contexts_own(small):
    contexts, continuations = random_prompts([40, 40], seed=1), random_prompts([20, 20], seed=2)
    ahead = np.asarray(hindsight.future_attention(Reading(small, ("h2o",), contexts), continuations))[..., :40]
    own, both = (
        np.asarray(Reading(small, ("h2o",), read).full.cache.buffer_stat)[..., :40]
        for read in (contexts, [context + continuation for context, continuation in zip(contexts, continuations, strict=True)])
    )
    assert (ahead >= 0).all() and ahead.sum(axis=3).max() < 20, "the rest of each query's attention is on the continuation"
    np.testing.assert_allclose(ahead, both - own, atol=1e-5)


def test_what_the_text_ahead_attends_to_most_is_kept(small):
    contexts, continuations = random_prompts([48, 48], seed=1), random_prompts([16, 16], seed=2)
    reading = Reading(small, ("h2o",), contexts)
    ahead = np.array(hindsight.future_attention(reading, continuations))[..., :48]
    ahead[..., 0] = np.inf
    kept = {scope: rows for scope, _, rows in hindsight.caches(reading, continuations, ("global", "head"), (0.25,))}
    for row in (0, 1):
        per_head = np.sort(np.argsort(ahead[:, row], axis=-1)[..., -12:], axis=-1)
        assert [stream.tolist() for layer in cache.kept_positions(kept["head"].cache, row) for stream in layer] == per_head.reshape(-1, 12).tolist()
        least = np.sort(ahead[:, row].ravel())[-12 * small.config.streams]
        chosen = [np.flatnonzero(stream >= least).tolist() for stream in ahead[:, row].reshape(-1, 48)]
        assert [stream.tolist() for layer in cache.kept_positions(kept["global"].cache, row) for stream in layer] == chosen


def test_divergences_vanish_with_all_that_is_evicted(small):
    contexts, continuations = random_prompts([48, 48], seed=1), random_prompts([16, 16], seed=2)
    measured = hindsight.divergences(small, contexts, continuations, ("global", "layer", "head"), (1.0, 0.25))
    rows = hindsight.table([{"length": 48, **row} for row in measured])
    assert [(row["length"], row["scope"], row["budget"], row["samples"]) for row in rows] == [
        (48, scope, budget, 2) for scope in ("global", "layer", "head") for budget in (1.0, 0.25)
    ]
    assert all(row["kl"] == 0 for row in rows[::2]) and all(row["kl"] > 0.001 for row in rows[1::2])


def test_batches_are_put_together():
    def row(scope, *kl):
        return {"scope": scope, "budget": 0.5, "kl": list(kl)}

    table = hindsight.table([row("head", 1.0, 2.0), row("layer", 5.0), row("head", 6.0)])
    assert [(one["scope"], one["samples"], one["kl"], one["error"]) for one in table] == [("head", 3, 3.0, round(7**0.5 / 3**0.5, 4)), ("layer", 1, 5.0, None)]


@pytest.mark.slow
def test_the_program(tmp_path):
    folder = write_folder(tmp_path / "model")
    command = [sys.executable, "-m", "experiments.hindsight", "--config=configs/eval_prose.py", f"--workdir={tmp_path / 'run'}"]
    sizes = ["lengths=(200,)", "samples=3", "batch_size=2", "continuation=16", "budgets=(0.25,)"]
    done = subprocess.run([*command, f"--config.model={folder}", *(f"--config.{size}" for size in sizes)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(open(tmp_path / "run" / "hindsight.csv")))
    assert [(row["scope"], row["samples"]) for row in rows] == [("global", "3"), ("layer", "3"), ("head", "3")]
    assert (tmp_path / "run" / "run_meta.json").exists()
