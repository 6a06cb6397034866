"""Attention against softmax written by hand, one query at a time, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retention import attention
from retention.attention import retention_attention


def causal_attention(q, k, v, log_beta=None):
    return retention_attention(q, k, v, log_beta)[0]


causal = jax.jit(causal_attention)


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


@pytest.mark.parametrize("dim", [80, 8])
def test_a_prompt_that_could_be_read_and_not_decoded_is_refused_at_once(monkeypatch, dim):
    monkeypatch.setattr(attention, "platform", lambda: "gpu")
    q, k, v, _ = inputs(8, dim=dim)
    with pytest.raises(NotImplementedError, match=f"q has the head dimension {dim}: on a GPU powers of 2 from 16 work"):
        attention.cached_attention(q, k, v, None)


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
