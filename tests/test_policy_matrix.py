"""Every policy of the registry, under every scope that it may have, through the same tests: it evicts exactly, within the budget, row by row.

A policy that is registered is tested here without a line more.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retention import cache, gates, policies, programs
from retention import rows as rows_lib
from retention.policies import expected_attention
from retention.reading import Reading, reader
from retention.rows import Rows
from tests.conftest import small_config, small_model
from tests.test_generation import Recorder, masked_full_logits, random_prompts

BUDGET, CHUNK = 12, 16
# The newest tokens that are in every stream after an eviction: half of the budget, a quarter, the last query, or `small_window`.
PROTECTED = {"h2o": 6, "epikv_flat": 3, "epikv_band": 3, "epikv_seg": 3, "tova": 1} | dict.fromkeys(("snapkv", "pyramidkv", "ada_snapkv", "rkv", "infokv"), 4)
# Of all that a policy may need of the model and of the cache. The others take minutes to compile and are slow tests; what they compute is in test_rivals.py.
REPRESENTATIVES = ("ada_snapkv", "epikv_flat", "expected_attention", "h2o", "infokv", "kvzip", "pyramidkv", "retention")


@pytest.fixture(autouse=True)
def free_compiled_programs_of_each_policy():
    """So many programs that one module's would run out of memory maps, see conftest."""
    yield
    jax.clear_caches()


def evicting():
    return [name for name in policies.names() if policies.get(name).score is not None]


def matrix():
    """(name, scope): each policy under every scope that it may have; slow but for the representatives' own."""
    for name in evicting():
        policy = policies.get(name)
        for scope in policy.scopes:
            quick = name in REPRESENTATIVES and scope == policy.scope
            yield pytest.param(name, scope, marks=[] if quick else pytest.mark.slow)


def small_window(name):
    """No more of the newest tokens than so small a budget can protect; None: the policy's own."""
    own = policies.get(name).window
    return None if callable(own) or own <= 4 else 4


def run_of(model, batch, name, scope=None, budget=BUDGET, chunk=CHUNK):
    run = Rows(model, batch, budget, name, scope, chunk, window=small_window(name))
    run.piece = 1  # the same program of decoding for all that is asked here
    return run


def kept(run, row):
    return [stream.tolist() for layer in cache.kept_positions(run.cache, row) for stream in layer]


def answer(run, steps):
    tokens = np.concatenate(list(run.decode(steps, 0.0, 1.0, 0, stop=())), axis=1)
    return tokens.tolist()


@pytest.fixture(scope="module")
def wide():
    """So many tokens that a prompt need not repeat one: of two entries alike, rounding decides which one stays."""
    return small_model(small_config(vocab_size=127))


@pytest.mark.parametrize("name, scope", list(matrix()))
def test_it_evicts_exactly_within_the_budget_row_by_row(wide, name, scope):
    """Evicting equals the masked full cache at every step; the budget is held; a batch equals its rows alone; forks go their own ways."""
    rng = np.random.default_rng(0)
    prompts, steps = [rng.permutation(127)[:length].tolist() for length in (50, 33, 7)], 40
    run, alone = run_of(wide, 3, name, scope), run_of(wide, 1, name, scope)
    record = Recorder(run, prompts, steps)
    capacity = BUDGET * wide.config.streams
    for row, prompt in enumerate(prompts):
        total = len(prompt) + steps
        visible = record.visible[row, :, :, :total, :total]
        assert visible[:, :, -1].sum() < wide.config.streams * total / 2, "the mask must bite, or the oracle proves nothing"
        expected = masked_full_logits(wide, record.tokens[row], visible)[len(prompt) :]
        assert np.abs(np.stack(record.logits[row]) - expected).max() <= 1e-5 * np.ptp(expected)
        assert run.stats(row).kept_entries == capacity == run.stats(row).capacity
        assert all(set(range(total - PROTECTED.get(name, 0), total)) <= set(stream) for stream in kept(run, row))
    lengths = np.array([[len(stream) for stream in kept(run, row)] for row in range(3)]).reshape(3, wide.config.layers, -1)
    if scope == "layer":
        assert (lengths.sum(axis=2) == BUDGET * wide.config.kv_heads).all()
    if scope in ("head", "shared") and policies.get(name).layer_budgets is None:
        assert (lengths == BUDGET).all()
    if scope == "shared":
        assert all(len(set(map(tuple, kept(run, row)))) == 1 for row in range(3))

    for begin in range(0, 33, CHUNK):  # as the recorder feeds it, which noted what the first token decoded could see
        alone.append([prompts[1][begin : begin + CHUNK]])
    held = record.visible[1].reshape(wide.config.streams, *record.visible.shape[3:])[:, 33, :33]
    assert kept(alone, 0) == [np.flatnonzero(stream).tolist() for stream in held]

    before = [kept(run, row) for row in range(3)]
    first, second = run.fork(), run.fork()
    tokens = answer(first, 20)
    second.append([prompt[:CHUNK] for prompt in prompts])
    assert [kept(run, row) for row in range(3)] == before, "what forks do is theirs"
    assert answer(run, 20) == tokens


# Some that note (SnapKV fewer queries than others), one that only looks at the cache, one that reads twice, and one that stores what was asked of the model.
QUICK_READINGS = ("epikv_band", "expected_attention", "knorm", "kvzip", "snapkv")


@pytest.fixture(scope="module")
def reading(small):
    """In chunks of 32 and 16 tokens: policies look back over their borders."""
    before, rows_lib.CHUNK = rows_lib.CHUNK, 32
    yield Reading(small, evicting(), random_prompts([70, 41], seed=3))
    rows_lib.CHUNK = before


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK_READINGS else pytest.mark.slow) for name in evicting()])
def test_one_reading_serves_all_as_one_shot_prefill(small, reading, name):
    once = run_of(small, 2, name, budget=0.25, chunk=None)
    once.append(reading.prompts)
    compressed = reading.compress(0.25, name, window=small_window(name), prefill_chunk=once.width)
    assert reading.full.stats(0).kept_entries == 70 * small.config.streams
    assert [kept(compressed, row) for row in (0, 1)] == [kept(once, row) for row in (0, 1)]
    np.testing.assert_allclose(compressed.logits, once.logits, atol=1e-5)
    # And both go on alike: what the policy has noted is there too.
    for run in (once, compressed):
        run.append(random_prompts([30, 30], seed=4))
    assert [kept(compressed, row) for row in (0, 1)] == [kept(once, row) for row in (0, 1)]


@pytest.mark.parametrize("sinks", [pytest.param(0, marks=pytest.mark.slow), 7])
def test_a_second_reading_looks_at_the_sinks_that_are_asked_for(small, sinks):
    """Of KVzip, part by part: the parts after the first look at the sinks too."""
    name, prompts = "kvzip:chunk=30", random_prompts([90], seed=3)
    once = Rows(small, 1, 0.25, name, None, None, sinks=sinks)
    once.append(prompts)
    compressed = Reading(small, (name,), prompts).compress(0.25, name, sinks=sinks)
    assert kept(compressed, 0) == kept(once, 0)


def test_a_reading_serves_other_sinks_too(small):
    name, reading = "kvzip:chunk=30", Reading(small, ("kvzip:chunk=30",), random_prompts([90, 41], seed=3))
    for sinks in (0, 7):
        alone = Reading(small, (name,), reading.prompts).compress(0.25, name, sinks=sinks)
        shared = reading.compress(0.25, name, sinks=sinks)
        assert [kept(shared, row) for row in (0, 1)] == [kept(alone, row) for row in (0, 1)] and shared.seen.tolist() == [90, 41]


def arithmetic(lowered):
    return np.array([lowered.cost_analysis()[name] for name in ("flops", "transcendentals")])


def test_what_retention_does_not_need_is_not_there(small):
    """Nor computed: its program's arithmetic is that of a policy that only knows positions, and the gates'."""

    def reading(name):
        run = run_of(small, 1, name)
        run._open([40])
        run._expect(40)
        arrays = jnp.zeros((1, CHUNK), jnp.int32), jnp.full(1, CHUNK, jnp.int32), run.logits
        return run, arithmetic(programs.prefill.lower(run.plan, small.params, run.gates, run.cache, *arrays, evict=False))

    run, retention = reading("retention")
    assert run.cache.noted == {} and not run.plan.policy.streams and run.plan.longest == 0
    # Of a loop over the layers one round is counted, in the programs and here.
    gate = jax.tree.map(lambda leaf: leaf[0], gates.per_layer(run.gates, small.config, run.plan.gate))
    h = jnp.zeros((1, CHUNK, small.config.embed_dim))
    window = reading("window")[1]
    assert (retention == window + arithmetic(jax.jit(gates.log_beta, static_argnums=2).lower(gate, h, small.config.kv_heads))).all()
    assert all((reading(name)[1] > window).all() for name in ("h2o", "infokv", "epikv_flat", "expected_attention")), "what others need would show"


def test_what_cannot_be_read_together_is_said():
    early, late = expected_attention.policy(), dataclasses.replace(expected_attention.policy(), moments=9)
    with pytest.raises(ValueError, match=r"moments from positions \[4, 9\] on cannot share a reading"):
        reader((early, policies.get("snapkv"), late))


def test_a_reading_is_compressed_only_by_those_it_was_made_for(small):
    reading = Reading(small, ("snapkv", "pyramidkv"), random_prompts([50]))
    for name in ("expected_attention", "kvzip", "h2o"):
        with pytest.raises(ValueError, match=f"were read for snapkv, pyramidkv, not for {name}"):
            reading.compress(12, name)
    with pytest.raises(ValueError, match="makes no sense under scope='layer'; its scope may be head"):
        reading.compress(40, "pyramidkv", scope="layer")
    with pytest.raises(ValueError, match="makes no sense under scope='global'; its scope may be head"):
        Rows(small, 1, 12, "tova", "global")
    whole = reading.compress(small.config.max_positions, "snapkv")
    assert whole.stats(0).kept_entries == 50 * small.config.streams, "as many tokens as the model can use are the full cache"
