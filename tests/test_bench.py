"""The benchmark counts what it says; how long things take is not for tests."""

import dataclasses
import sys

import jax
import numpy as np
import pytest

from retention import bench, cache, compiled
from retention.training.metrics import forget_peak, peak_memory_bytes


def test_turns_are_taken_and_the_first_round_is_not_counted():
    called = []

    def prepare(name):
        called.append(f"prepare {name}")
        return lambda: called.append(name)

    seconds = bench.take_turns({name: lambda name=name: prepare(name) for name in ("a", "b")}, rounds=2)
    assert called == ["prepare a", "a", "prepare b", "b"] * 3
    assert {name: len(own) for name, own in seconds.items()} == {"a": 2, "b": 2}


def test_ratios_are_of_the_same_round():
    tokens = jax.numpy.zeros((4, 100))
    full, ours = bench.compared("read", tokens, 400, {"full cache": [2.0, 40.0, 6.0], "budget": [1.0, 10.0, 2.0]})
    assert full["times_full_cache"] == 1 and ours["times_full_cache"] == 3  # 2, 4, 3
    assert ours["tokens_per_second"] == 200 and ours["what"] == "read, 100 tokens of context, B=4: budget"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*beyond the")
def test_what_is_measured(small):
    sizes = bench.Sizes(contexts=(300,), batches=(1, 2), budget=16, new_tokens=8, long=(600,))
    rows = list(bench.rows(small, sizes))
    names = ("full cache", "budget")
    assert [row["what"] for row in rows] == [
        "read 600 tokens with budget 16",
        "read 600 tokens with the full cache",
        *(
            f"{what}, 300 tokens of context, B={batch}: {name}"
            for what, whose in (("read", names), ("decode", (*names, "entries alone")))
            for batch in (1, 2)
            for name in whose
        ),
    ]
    assert all(row["seconds"] > 0 for row in rows)
    # Beside the entries only each stream's start and a few numbers of the sequence; the write buffer's stat is counted with its entries, its positions once.
    assert 0.9 < rows[0]["cache_bytes"] / rows[0]["formula_bytes"] < 1.05


@pytest.mark.parametrize("policy", ["full", "retention", "kvzip"])
def test_what_compressing_costs(small, policy):
    row = bench.compression_row(small, policy, 100, 0.25, rounds=1)
    assert row["policy"] == policy and row["seconds"] > 0 and row["peak_bytes"] >= 0
    assert row["prefill"] == {"full": "plain", "retention": "chunks of 256", "kvzip": "one-shot"}[policy]
    assert row["times_plain"] == 1 if policy == "full" else row["times_plain"] > 0


def test_what_compressing_costs_is_not_measured_on_an_accelerator(monkeypatch):
    monkeypatch.setattr(bench.jax, "default_backend", lambda: "tpu")
    with pytest.raises(ValueError, match="which tpu does not allow; set JAX_PLATFORMS=cpu"):
        next(bench.compression_rows("smollm2-135m", ["full"]))


@pytest.mark.slow
def test_the_eviction_at_the_end_is_timed(small, monkeypatch):
    """What is waited for is the cache after it, and not the tokens alone."""
    timed = {}

    def take_turns(runs, rounds):
        timed.update((name, prepare()()) for name, prepare in runs.items())
        return dict.fromkeys(runs, [1.0])

    monkeypatch.setattr(bench, "take_turns", take_turns)
    list(bench.decode_rows(small, bench.Sizes(budget=16, new_tokens=8), None, np.ones((1, 300), int)))
    _, budget = timed["budget"]
    assert budget.seen.tolist() == [308] and budget.buffered.tolist() == [0] and int(budget.starts[0, -1]) == 16 * small.config.streams


def test_a_peak_is_told_only_where_it_is_new(small, monkeypatch):
    """A device keeps its highest."""
    half, sizes = dataclasses.replace(small, params=jax.tree.map(lambda leaf: leaf.astype("bfloat16"), small.params)), bench.Served(new_tokens=16, rounds=1)
    monkeypatch.setattr(bench, "device_bytes", lambda name: [700])
    for peak, told in ((700, None), (701, 701)):
        monkeypatch.setattr(bench, "peak_memory_bytes", lambda peak=peak: peak)
        assert bench.serving_row(half, 1e9, sizes, 1, 16, 300)["peak_bytes"] == told


def test_serving(small, monkeypatch):
    """Caches that seem to have read a context decode as others do: a stream's entries are those of its segment, and none too many."""
    half = dataclasses.replace(small, params=jax.tree.map(lambda leaf: leaf.astype(jax.numpy.bfloat16), small.params))
    sizes = bench.Served(contexts=(300, 9000), batches=(1, 3), budgets=(16,), new_tokens=32, rounds=1)
    entry = small.config.streams * 2 * small.config.head_dim * 2
    monkeypatch.setattr(bench, "memory_limit", lambda: compiled.size(half.params) + 9000 * entry)
    fits = bench.filled

    def filled(model, batch, context, budget, new_tokens):
        if (batch, budget) == (3, None):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return fits(model, batch, context, budget, new_tokens)

    monkeypatch.setattr(bench, "filled", filled)
    rows = {row["what"]: row for row in bench.serving_rows(half, 1e9, sizes)}
    full = "decode, B={}: full cache of {} tokens"
    assert list(rows) == [
        "decode, B=1: budget 16, any context", "decode, B=3: budget 16, any context",
        full.format(1, 300), full.format(3, 300), full.format(1, 9000), full.format(3, 9000),
    ]  # fmt: skip
    assert "beside it" in rows.pop(full.format(3, 300))["error"]
    assert rows.pop(full.format(3, 9000)) == {"what": full.format(3, 9000), "error": "does not fit"}
    for row in rows.values():
        assert row["tokens_per_second"] > 0 and row["of_bandwidth"] > 0 and row["peak_bytes"] > row["cache_bytes"] > 0
    # Keys, values, stat, and what is there once a token or once a stream.
    assert rows[full.format(1, 300)]["cache_bytes"] == pytest.approx((300 + 2 * 32) * (entry + 4 * small.config.streams), rel=0.1)

    run = fits(half, 3, 300, 16, 0)
    assert [run.stats(row).kept_entries for row in range(3)] == [16 * small.config.streams] * 3 and run.stats(0).seen_tokens == 300
    assert len({len(stream) for layer in cache.kept_positions(run.cache, 0) for stream in layer}) > 1
    assert [len(answer) for answer in run.decode_all(5, 0.0, 1.0, 0, ())] == [5] * 3


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process forget its peak")
def test_a_peak_is_forgotten():
    held = np.ones(25_000_000)
    del held
    before = peak_memory_bytes()
    assert forget_peak() < before - 100_000_000 and peak_memory_bytes() < before - 100_000_000
