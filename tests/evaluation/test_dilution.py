"""The dilution bound and the odds identity, of numbers and of this code's own attention."""

import csv
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retention.attention import retention_attention
from retention.evaluation import dilution


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 200), st.floats(0, 6), st.integers(0, 10**6))
def test_no_logits_within_the_margin_beat_the_bound(useful, distractors, margin, seed):
    rng = np.random.default_rng(seed)
    best = rng.normal()
    # Any useful logits up to the best, any distractors from the margin up.
    logits = np.concatenate([[best], best - rng.exponential(size=useful - 1), best - margin + rng.exponential(size=distractors)])
    chosen = np.arange(len(logits)) < useful
    with jax.enable_x64(True):
        mass = float(dilution.useful_mass(jnp.exp(logits), jnp.asarray(chosen)))
    assert mass <= dilution.mass_bound(useful, distractors, margin) * (1 + 1e-12)
    # And it is attained.
    logits = np.where(chosen, best, best - margin)
    with jax.enable_x64(True):
        mass = float(dilution.useful_mass(jnp.exp(logits), jnp.asarray(chosen)))
    assert mass == pytest.approx(dilution.mass_bound(useful, distractors, margin), rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 50), st.integers(0, 10**6))
def test_the_odds_identity_is_exact(entries, seed):
    rng = np.random.default_rng(seed)
    weights, retention, useful = rng.exponential(size=entries), rng.random(entries), np.arange(entries) < rng.integers(1, entries)
    with jax.enable_x64(True):
        found = float(dilution.retained_odds(*map(jnp.asarray, (weights, retention, useful))))
        direct = float(dilution.odds(jnp.asarray(weights * retention), jnp.asarray(useful)))
        plain = float(dilution.retained_odds(jnp.asarray(weights), jnp.ones(entries), jnp.asarray(useful)))
        assert plain == pytest.approx(float(dilution.odds(jnp.asarray(weights), jnp.asarray(useful))), rel=1e-9), "beta = 1 leaves the odds"
    assert found == pytest.approx(direct, rel=1e-9)


def test_training_attention_obeys_the_identity():
    """The gated attention of this code, whose mass on a set is read out by values that indicate it."""
    length, heads, dim = 40, 2, 8
    keys = jax.random.split(jax.random.key(0), 3)
    q, k = (jax.random.normal(key, shape) for key, shape in zip(keys, ((1, length, heads, 1, dim), (1, length, heads, dim)), strict=False))
    log_beta = -0.1 * jax.random.exponential(keys[2], (1, length, heads))
    useful = jnp.arange(length) % 5 == 1
    values = jnp.broadcast_to(useful[None, :, None, None].astype(jnp.float32), k.shape)
    gated, plain = (retention_attention(q, k, values, gate)[0][0, -1, :, 0, 0] for gate in (log_beta, None))
    weights = jax.nn.softmax(jnp.einsum("HD,IHD->HI", q[0, -1, :, 0], k[0]) * dim**-0.5)
    retention = jnp.exp((length - 1 - jnp.arange(length)) * log_beta[0].T)
    np.testing.assert_allclose(plain / (1 - plain), dilution.odds(weights, useful), rtol=1e-4)
    np.testing.assert_allclose(gated / (1 - gated), dilution.retained_odds(weights, retention, useful), rtol=1e-4)


def test_evicting_from_the_real_cache_obeys_the_identity():
    entries, dim, budget = 60, 8, 20
    keys = jax.random.split(jax.random.key(1), 4)
    k, v = (jax.random.normal(key, (3, entries, dim)) for key in keys[:2])
    query, score = jax.random.normal(keys[2], (3, dim)), jax.random.normal(keys[3], (3, entries))
    evidence = jnp.argmax(score, axis=1)
    mass, _ = dilution.recall(k, v, query, score, evidence, budget)
    weights = jax.nn.softmax(jnp.einsum("BD,BND->BN", query, k) * dim**-0.5)
    stays = (score >= jnp.sort(score, axis=1)[:, -budget, None]).astype(jnp.float32)
    expected = dilution.retained_odds(weights, stays, jnp.arange(entries) == evidence[:, None])
    np.testing.assert_allclose(mass / (1 - mass), expected, rtol=1e-4)
    whole, _ = dilution.recall(k, v, query, score, evidence, None)
    np.testing.assert_allclose(whole, jnp.take_along_axis(weights, evidence[:, None], axis=1)[:, 0], rtol=1e-4)


def test_what_is_recalled_is_the_nearest_value():
    """Four keys, each with another's direction as its value: one finds its evidence, one has evicted it, one looks another key up."""
    eye = jnp.eye(4)
    keys, values = (jnp.broadcast_to(one, (3, 4, 4)) for one in (eye, jnp.roll(eye, 1, axis=1)))
    query, score, evidence = 20 * eye[jnp.array([1, 2, 0])], jnp.array([[0.0, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 1]]), jnp.array([1, 2, 3])
    assert dilution.recall(keys, values, query, score, evidence, None)[1].tolist() == [True, True, False]
    assert dilution.recall(keys, values, query, score, evidence, 2)[1].tolist() == [True, False, False]


def test_the_experiment_shows_the_fall_and_the_recovery(tmp_path):
    command = [sys.executable, "-m", "experiments.dilution", f"--workdir={tmp_path}", "--config.distractors=(16, 1024)", "--config.samples=16"]
    subprocess.run(command, check=True, capture_output=True)
    with open(tmp_path / "dilution.csv") as file:
        found = {(row["cache"], int(row["distractors"])): float(row["mass"]) for row in csv.DictReader(file)}
    assert found["full cache", 1024] < 0.05 < 0.6 < found["full cache", 16] < dilution.mass_bound(1, 16, 4.0)
    assert found["full cache", 1024] < dilution.mass_bound(1, 1024, 4.0)
    assert found["gate, noise 0.25", 1024] > 5 * found["full cache", 1024]
    assert (tmp_path / "dilution.png").stat().st_size > 10_000
