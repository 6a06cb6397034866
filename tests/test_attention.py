"""Attention against softmax written by hand, one query at a time, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retention.attention import Segments, causal_attention, segments_attention

causal = jax.jit(causal_attention)
segments = jax.jit(segments_attention)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def softmax(x):
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def by_hand(q, k, v, mask, log_beta=None):
    """One query head at a time: q [T,H,G,D], k, v [I,H,D], mask [T,I] of what each query sees, log_beta [I,H]."""
    length, heads, group, dim = q.shape
    out = np.zeros(q.shape)
    distance = np.arange(length)[:, None] - np.arange(k.shape[0])
    for h in range(heads):
        for g in range(group):
            logits = q[:, h, g].astype(np.float64) @ k[:, h].astype(np.float64).T / np.sqrt(dim)
            if log_beta is not None:
                logits = logits + distance * log_beta[:, h].astype(np.float64)
            out[:, h, g] = softmax(np.where(mask, logits, -np.inf)) @ v[:, h].astype(np.float64)
    return out


def inputs(length, group=2, batch=2, heads=2, dim=4):
    q, k, v = normal(0, batch, length, heads, group, dim), normal(1, batch, length, heads, dim), normal(2, batch, length, heads, dim)
    log_beta = -np.random.default_rng(3).exponential(0.1, (batch, length, heads)).astype(np.float32)
    return q, k, v, log_beta


# Whole sequences. Blocks are of 128 queries: lengths below, at, just past and far past one block, odd ones among them.


def test_the_mask_is_the_lower_triangle():
    mask = np.array(
        [
            [1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [1, 1, 1, 0, 0],
            [1, 1, 1, 1, 0],
            [1, 1, 1, 1, 1],
        ],
        bool,
    )
    q, k, v, _ = inputs(5)
    for row in range(2):
        np.testing.assert_allclose(causal(q, k, v)[row], by_hand(q[row], k[row], v[row], mask), atol=1e-6)


@pytest.mark.parametrize("length, group", [(1, 1), (128, 3), (129, 1), (301, 3)])
@pytest.mark.parametrize("gated", [False, True])
def test_causal_attention(length, group, gated):
    q, k, v, log_beta = inputs(length, group)
    log_beta = log_beta if gated else None
    out = causal(q, k, v, log_beta)
    assert out.shape == q.shape and out.dtype == q.dtype
    for row in range(2):
        expected = by_hand(q[row], k[row], v[row], np.tri(length, dtype=bool), log_beta[row] if gated else None)
        np.testing.assert_allclose(out[row], expected, atol=2e-6)


def test_query_head_n_reads_kv_head_n_over_group():
    """Hugging Face's order: query head n = h*G + g."""
    q, k, v, _ = inputs(3, group=3)
    v[:, :, 0], v[:, :, 1] = 10.0, 20.0
    out = np.asarray(causal(q, k, v)).reshape(2, 3, 6, 4)
    np.testing.assert_allclose(out[:, :, :3], 10.0, rtol=1e-6)
    np.testing.assert_allclose(out[:, :, 3:], 20.0, rtol=1e-6)


def test_beta_of_one_is_plain_attention():
    q, k, v, log_beta = inputs(150)
    np.testing.assert_array_equal(causal(q, k, v, jnp.zeros_like(log_beta)), causal(q, k, v))


def test_the_bias_multiplies_the_weight_and_leaves_the_diagonal():
    """With equal logits the weight of i is beta_i^(t-i) over their sum: were beta applied to the logit, or before scaling, it would not be."""
    length, beta = 6, np.array([0.9, 0.5, 0.99, 0.1, 0.7, 0.01])
    q, k = np.full((1, length, 1, 1, length), 3.0, np.float32), np.full((1, length, 1, length), 2.0, np.float32)
    v = np.eye(length, dtype=np.float32)[None, :, None]
    weights = np.asarray(causal(q, k, v, np.log(beta).astype(np.float32)[None, :, None]))[0, :, 0, 0]
    for t in range(length):
        kept = np.array([beta[i] ** (t - i) if i <= t else 0.0 for i in range(length)])
        assert kept[t] == 1.0
        np.testing.assert_allclose(weights[t], kept / kept.sum(), atol=1e-6)


@pytest.mark.parametrize("length", [7, 150])
def test_gradients(length):
    arguments = tuple(map(jnp.asarray, inputs(length)))
    weight = normal(9, 2, length, 2, 2, 4)

    def naive(q, k, v, log_beta):
        distance = jnp.arange(length)[:, None] - jnp.arange(length)
        logits = jnp.einsum("bthgd,bihd->bhgti", q, k) / 2.0 + distance * log_beta.transpose(0, 2, 1)[:, :, None, None]
        return jnp.einsum("bhgti,bihd->bthgd", jax.nn.softmax(jnp.where(distance >= 0, logits, -jnp.inf), axis=-1), v)

    def gradients(attention):
        return jax.jit(jax.grad(lambda *a: jnp.sum(weight * attention(*a)), argnums=(0, 1, 2, 3)))(*arguments)

    for ours, theirs in zip(gradients(causal_attention), gradients(naive), strict=True):
        assert np.abs(theirs).max() > 1e-2
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


def test_a_gradient_by_hand():
    """d/d log_beta_j by central differences of the float64 form: the two implementations above could share a mistake."""
    q, k, v, log_beta = inputs(7, batch=1)
    weight = normal(9, 7, 2, 2, 4)
    ours = jax.grad(lambda x: jnp.sum(weight * causal_attention(q, k, v, x)[0]))(jnp.asarray(log_beta))
    for j, h in ((0, 0), (3, 1), (6, 1)):
        step = np.zeros((7, 2))
        step[j, h] = 1e-5
        difference = [np.sum(weight * by_hand(q[0], k[0], v[0], np.tri(7, dtype=bool), log_beta[0] + sign * step)) for sign in (1, -1)]
        np.testing.assert_allclose(ours[0, j, h], (difference[0] - difference[1]) / 2e-5, atol=1e-5)
    assert ours[0, 6, 1] == 0.0, "the last token only sees itself at distance 0"


def test_storage_in_bfloat16_keeps_softmax_in_float32():
    q, k, v, log_beta = inputs(200)
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    out = causal(*rounded, log_beta)
    assert out.dtype == jnp.bfloat16
    q, k, v = (np.asarray(x, np.float32) for x in rounded)
    np.testing.assert_allclose(np.asarray(out, np.float32)[0], by_hand(q[0], k[0], v[0], np.tri(200, dtype=bool), log_beta[0]), atol=0.02)


# Ragged segments.

D = 4


def scatter(lengths, room, slots, seed=0, dead=np.nan):
    """Segments of these lengths [B,H], each in `room` slots or, with None, end to end so that the last ends with the last slot.

    Returns the flat keys and values, dead slots holding `dead`, and the start of each segment.
    """
    lengths = np.asarray(lengths)
    flat = lengths.reshape(-1)
    starts = np.arange(flat.size) * room if room else slots - flat.sum() + np.cumsum(flat) - flat
    keys, values = np.full((2, slots, D), dead, np.float32)
    for i, (start, length) in enumerate(zip(starts, flat, strict=True)):
        keys[start : start + length], values[start : start + length] = normal(seed + i, 2, length, D)
    return keys, values, starts.reshape(lengths.shape).astype(np.int32)


def expected_segments(q, sources):
    """Each query against the entries that it sees in all sources, gathered by hand."""
    out = np.zeros(q.shape)
    batch, length, heads, group, dim = q.shape
    for b, t, h in np.ndindex(batch, length, heads):
        seen = [slice(s.start[b, h], s.start[b, h] + s.limit[b, h, t]) for s in sources]
        keys = np.concatenate([s.keys[w] for s, w in zip(sources, seen, strict=True)]).astype(np.float64)
        values = np.concatenate([s.values[w] for s, w in zip(sources, seen, strict=True)]).astype(np.float64)
        if len(keys):
            out[b, t, h] = softmax(q[b, t, h].astype(np.float64) @ keys.T / np.sqrt(dim)) @ values
    return out


def causal_limits(lengths, tokens):
    """The buffer's limits: query t of `tokens` sees all but the tokens after it."""
    return np.maximum(np.asarray(lengths)[..., None] - tokens + 1 + np.arange(tokens), 0).astype(np.int32)


def constant_limits(lengths, tokens):
    return np.repeat(np.asarray(lengths, np.int32)[..., None], tokens, axis=2)


def check(q, *sources, atol=2e-6):
    out = np.asarray(segments(q, [Segments(*map(jnp.asarray, s)) for s in sources]))
    assert out.shape == q.shape and out.dtype == q.dtype
    np.testing.assert_allclose(out, expected_segments(q, sources), atol=atol)


# Against one block of 128 slots (512 for a single query): empty, one entry, a block but one, a block, a block and one, many blocks.
UNEQUAL = np.array([[0, 1], [127, 128], [129, 700]])


@pytest.mark.parametrize("tokens, group", [(1, 1), (1, 3), (5, 3)])
def test_pool_and_buffer_in_one_softmax(tokens, group):
    """As the cache calls it: segments end to end up to the last slot, and a buffer of fixed room with the new tokens at its end."""
    keys, values, start = scatter(UNEQUAL, None, 1200)
    assert start[-1, -1] + UNEQUAL[-1, -1] == 1200
    held = np.array([[5, 9], [5, 9], [16, 16]])
    new_keys, new_values, new_start = scatter(held, 16, 16 * 6, seed=50)
    check(
        normal(7, 3, tokens, 2, group, D),
        Segments(keys, values, start, constant_limits(UNEQUAL, tokens)),
        Segments(new_keys, new_values, new_start, causal_limits(held, tokens)),
    )


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("slots", [90, 130, 600])
def test_segments_at_the_end_of_the_slots(tokens, slots):
    """A block that would run over the end is moved back, into slots that are another's or dead."""
    lengths = np.array([[3, 0], [1, 2], [40, 7]])
    keys, values, start = scatter(lengths, None, slots)
    check(normal(7, 3, tokens, 2, 2, D), Segments(keys, values, start, constant_limits(lengths, tokens)))
    # The same with the last segments empty: they start past the last slot.
    lengths = np.array([[3, 50], [1, 2], [0, 0]])
    keys, values, start = scatter(lengths, None, slots)
    assert start[-1, -1] == slots
    check(normal(7, 3, tokens, 2, 2, D), Segments(keys, values, start, constant_limits(lengths, tokens)))


@pytest.mark.parametrize("dead", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("tokens", [1, 5])
def test_dead_slots_before_and_behind_a_segment_do_not_leak(tokens, dead):
    lengths = np.array([[10, 30], [0, 31]])
    keys, values, start = scatter(lengths, 32, 128, dead=dead)
    check(normal(7, 2, tokens, 2, 2, D), Segments(keys, values, start, constant_limits(lengths, tokens)))


def test_another_sequences_nan_stays_its_own():
    lengths = np.array([[20, 20], [20, 20]])
    keys, values, start = scatter(lengths, 32, 128)
    keys[:20], values[:20] = np.nan, np.nan
    q = normal(7, 2, 1, 2, 2, D)
    out = np.asarray(segments(q, [Segments(*map(jnp.asarray, (keys, values, start, constant_limits(lengths, 1))))]))
    assert np.isnan(out[0, :, 0]).all() and np.isfinite(out[0, :, 1]).all() and np.isfinite(out[1]).all()


def test_a_query_that_sees_nothing_gets_zero():
    lengths = np.array([[0, 4]])
    keys, values, start = scatter(lengths, 8, 16)
    # The first query of head 1 sees nothing, the later ones more and more.
    limit = np.array([[[0, 0, 0], [0, 1, 4]]], np.int32)
    q = normal(7, 1, 3, 2, 1, D)
    check(q, Segments(keys, values, start, limit))
    out = np.asarray(segments(q, [Segments(*map(jnp.asarray, (keys, values, start, limit)))]))
    assert (out[0, :, 0] == 0).all() and (out[0, 0, 1] == 0).all() and np.allclose(out[0, 1, 1], values[8], atol=1e-6)


def test_segments_equal_causal_attention():
    """One segment per head, limits growing by one: the same thing by the other door."""
    q, k, v, _ = inputs(301)
    start = (np.arange(4) * 301).reshape(2, 2).astype(np.int32)
    flat = [np.swapaxes(x, 1, 2).reshape(-1, D) for x in (k, v)]
    limit = np.broadcast_to(np.arange(1, 302, dtype=np.int32), (2, 2, 301))
    np.testing.assert_allclose(segments(q, [Segments(*flat, start, limit)]), causal(q, k, v), atol=2e-6)


def test_large_logits_do_not_overflow():
    lengths = np.array([[300, 5]])
    keys, values, start = scatter(lengths, None, 305)
    check(200 * normal(7, 1, 5, 2, 2, D), Segments(keys, values, start, constant_limits(lengths, 5)), atol=1e-4)


# METHOD section 5: the theory that the method rests on, read off the attention that training uses.


@functools.cache
def masses(gated):
    """The weights [T] that the last of 40 queries gives to each entry (values are unit vectors), and what beta^(t-i) retains of each."""
    length = 40
    q, k = normal(0, 1, length, 1, 1, length), normal(1, 1, length, 1, length)
    log_beta = -np.random.default_rng(2).exponential(0.1, (1, length, 1)).astype(np.float32)
    v = np.eye(length, dtype=np.float32)[None, :, None]
    weights = causal(q, k, v, log_beta if gated else None)[0, -1, 0, 0]
    retained = np.exp((length - 1 - np.arange(length)) * log_beta[0, :, 0].astype(np.float64))
    return np.asarray(weights, np.float64), retained


def test_gated_odds_identity():
    """odds(U | retained) = (mean r_U / mean r_D) odds(U), the means weighted by plain attention: exact for any split into U and D."""
    plain, retained = masses(False)
    gated, _ = masses(True)
    for seed in range(20):
        useful = np.random.default_rng(seed).random(40) < 0.3
        assert 0 < useful.sum() < 40
        mean_useful, mean_rest = (np.average(retained[part], weights=plain[part]) for part in (useful, ~useful))
        odds = plain[useful].sum() / plain[~useful].sum()
        np.testing.assert_allclose(gated[useful].sum() / gated[~useful].sum(), mean_useful / mean_rest * odds, rtol=2e-5)


@pytest.mark.parametrize("distractors", [10, 100, 250])
@pytest.mark.parametrize("delta", [0.1, 2.0])
def test_dilution_bound(distractors, delta):
    """m distractors within delta of the best useful logit: useful mass <= |U| / (|U| + m e^-delta), and equal where all are on the edge."""
    useful, length = 3, 300
    bound = useful / (useful + distractors * np.exp(-delta))

    def useful_mass(logits):
        # The first dimension carries the logit of each entry; queries are the unit vector times sqrt(D).
        k = np.zeros((1, length, 1, 2), np.float32)
        k[0, :, 0, 0] = logits
        q = np.zeros((1, length, 1, 1, 2), np.float32)
        q[..., 0] = np.sqrt(2)
        v = np.zeros((1, length, 1, 2), np.float32)
        v[0, :useful, 0, 0] = 1
        return float(causal(q, k, v)[0, -1, 0, 0, 0])

    rest = np.full(length - useful - distractors, -100.0)
    edge = np.concatenate([np.full(useful, 5.0), np.full(distractors, 5.0 - delta), rest])
    np.testing.assert_allclose(useful_mass(edge), bound, rtol=1e-5)
    random = np.random.default_rng(distractors)
    for _ in range(5):
        logits = np.concatenate([5.0 - random.exponential(1.0, useful), 5.0 + delta * random.uniform(-1, 1, distractors), rest])
        logits[0] = 5.0
        assert useful_mass(logits) < bound
