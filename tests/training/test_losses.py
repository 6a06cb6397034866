"""Each loss against its formula in METHOD section 3, written again in plain float64 loops, or worked out by hand."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retention.training import sharding
from retention.training.losses import _BLOCK, capacity_loss, masked_mean, weighted_losses

MESH = sharding.make_mesh({}, jax.devices()[:1])

# Two streams, budget 2 tokens a stream. Mass at t = 0 .. 3, all retained by the first stream, half of the older ones by the second.
MASS = np.array([[1.0, 2.0, 3.0, 4.0], [1.0, 1.5, 2.0, 2.5]])
# Streams are the kv heads of all layers: [S, B, T] -> [L, B, T, H].
LAYOUTS = {"layers": lambda mass: mass[..., None], "heads": lambda mass: np.moveaxis(mass, 0, -1)[None]}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


jitted_capacity_loss = jax.jit(capacity_loss, static_argnums=4)


def loss_of(mass, budget, one_pool, positions=None, inside=None):
    positions = np.broadcast_to(np.arange(mass.shape[2]), mass.shape[1:3]) if positions is None else positions
    inside = np.ones(mass.shape[1:3], bool) if inside is None else inside
    return jitted_capacity_loss(jnp.asarray(mass, jnp.float32), jnp.asarray(positions), jnp.asarray(inside), jnp.float32(budget), one_pool)


@layouts
def test_capacity_of_one_global_pool(layout):
    # Sums 2, 3.5, 5, 6.5 against 2 * 2; the most there could be beyond it is 2 (t+1) - 4 = 2 at t = 2, 4 at t = 3.
    assert loss_of(layout(MASS[:, None]), 2, one_pool=True) == pytest.approx((1 / 2 + 2.5 / 4) / 2)


@layouts
def test_capacity_of_local_pools(layout):
    # Each stream against 2: the first exceeds by 1 of 1 at t = 2 and 2 of 2 at t = 3, the second by 0.5 of 2 at t = 3 alone.
    assert loss_of(layout(MASS[:, None]), 2, one_pool=False) == pytest.approx((1 + 1 + 0.5 / 2) / 3)


@layouts
def test_capacity_lets_streams_share_only_in_a_global_pool(layout):
    mass = layout(np.array([[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0]])[:, None])
    assert loss_of(mass, 2.5, one_pool=True) == 0
    assert loss_of(mass, 2.5, one_pool=False) == pytest.approx((0.5 / 1 + 1.5 / 1.5) / 2)


@pytest.mark.parametrize("one_pool", [True, False])
def test_capacity_is_0_if_nothing_exceeds(one_pool):
    mass = MASS[:, None, :, None]
    assert loss_of(mass, 4.5, one_pool) == 0
    np.testing.assert_array_equal(jax.grad(loss_of)(jnp.asarray(mass, jnp.float32), 4.5, one_pool), 0)


@pytest.mark.parametrize("one_pool", [True, False])
@pytest.mark.parametrize("budget", [3, 3.0001, 2.9999])
def test_no_spike_where_the_position_reaches_the_budget(budget, one_pool):
    """A full cache of p+1 tokens is at most 1, at p = M too, where the released code divides by max(0, 1) instead of by one token a stream."""
    for p in range(6):
        found = loss_of(np.full((5, 1, 1, 10), p + 1.0), budget, one_pool, positions=[[p]])
        assert 0 <= found <= 1 + 1e-6
        if p == 3:
            assert found == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("one_pool", [True, False])
def test_capacity_goes_by_the_position_in_the_document(one_pool):
    """Two documents in one row are worth what they are in a row each."""
    apart = np.stack([MASS, 1.2 * MASS], axis=1)
    packed = apart.reshape(2, 1, 8)
    found = loss_of(packed[..., None], 2, one_pool, positions=[[0, 1, 2, 3, 0, 1, 2, 3]])
    assert found == pytest.approx(float(loss_of(apart[..., None], 2, one_pool)))
    assert found != pytest.approx(float(loss_of(packed[..., None], 2, one_pool)))


@layouts
def test_capacity_of_times_outside_does_not_count(layout):
    mass = layout(np.stack([MASS, 100 * MASS], axis=1))
    # Of the second row only t = 0 lies inside: 200 against 4, over the divisor's least, 1.
    inside = np.arange(4) < np.array([[3], [1]])
    assert loss_of(mass, 2, True, inside=inside) == pytest.approx((1 / 2 + 196) / 2)
    inside[1] = False
    assert loss_of(mass, 2, True, inside=inside) == pytest.approx(1 / 2)
    gradient = jax.grad(loss_of)(jnp.asarray(mass, jnp.float32), 2, True, inside=inside)
    assert not gradient[:, 0, 3].any() and not gradient[:, 1].any() and gradient[:, 0, 2].all()


def inputs(shape, embed=8, vocab=11, weighted=0.6, seed=0):
    """hidden, teacher, head [V,E], labels and the two weights: tokens that have either, both or none."""
    rng = np.random.default_rng(seed)
    hidden, teacher = rng.normal(size=(2, *shape, embed))
    weights = rng.uniform(0.5, 2, (2, *shape)) * (rng.random((2, *shape)) < weighted)
    return *map(np.float32, (hidden, teacher, rng.normal(size=(vocab, embed)))), rng.integers(0, vocab, shape), *map(np.float32, weights)


# Quick to compile; and what is rounded to bfloat16 stays rounded, where XLA would leave it in float32.
OPTIONS = {"xla_backend_optimization_level": 0, "xla_allow_excess_precision": False}


@functools.partial(jax.jit, static_argnums=0, compiler_options=OPTIONS)
def run(tied, hidden, teacher, head, *rest):
    """((sum, (KL, cross-entropy)), gradient of the sum by `hidden`); head is [V,E] either way."""
    head = head if tied else head.T
    return jax.value_and_grad(lambda hidden: weighted_losses(MESH, tied, hidden, teacher, head, *rest), has_aux=True)(hidden)


@jax.jit
def dense(hidden, teacher, head, labels, kl_weight, ntp_weight):
    student, full = (jax.nn.log_softmax(jnp.einsum("BTE,VE->BTV", x, head, precision="highest")) for x in (hidden, teacher))
    kl = jnp.sum(jnp.exp(full) * (full - student), axis=-1)
    ntp = -jnp.take_along_axis(student, labels[..., None], axis=-1)[..., 0]
    return jnp.sum(kl_weight * kl + ntp_weight * ntp)


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum())


# The second makes three blocks, of which the last is not full.
shapes = pytest.mark.parametrize("shape", [(2, 5), (4, 200)], ids=["one_block", "blocks"])
heads = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


@shapes
@heads
def test_weighted_losses(tied, shape):
    hidden, teacher, head, labels, kl_weight, ntp_weight = arrays = inputs(shape)
    weighted = (kl_weight != 0) | (ntp_weight != 0)
    assert weighted.sum() > 2 * _BLOCK + 10 or weighted.sum() < weighted.size < _BLOCK
    (total, (kl, ntp)), _ = run(tied, *arrays)
    wanted = 0.0
    for at in zip(*np.nonzero(weighted), strict=True):
        student, full = (log_softmax(head.astype(np.float64) @ x[at]) for x in (hidden, teacher))
        divergence, cross_entropy = np.sum(np.exp(full) * (full - student)), -student[labels[at]]
        assert kl[at] == pytest.approx(divergence, rel=1e-4, abs=1e-5)
        assert ntp[at] == pytest.approx(cross_entropy, rel=1e-4, abs=1e-5)
        wanted += kl_weight[at] * divergence + ntp_weight[at] * cross_entropy
    assert total == pytest.approx(wanted, rel=1e-5)


@shapes
@heads
def test_gradient_of_weighted_losses(tied, shape):
    arrays = inputs(shape)
    _, gradient = run(tied, *arrays)
    np.testing.assert_allclose(gradient, jax.grad(dense)(*arrays), rtol=1e-4, atol=1e-5)


def test_gradient_of_weighted_losses_takes_the_cotangent():
    hidden, *rest = inputs((2, 5))
    rest[1] = rest[1].T
    total, gradient = jax.jit(jax.value_and_grad(lambda hidden: weighted_losses(MESH, False, hidden, *rest)[0] ** 2))(hidden)
    wanted = jax.grad(lambda hidden: dense(hidden, rest[0], rest[1].T, *rest[2:]) ** 2)(hidden)
    assert total > 1
    np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-3)


@heads
def test_nothing_weighted(tied):
    *arrays, kl_weight, ntp_weight = inputs((2, 5))
    (total, losses), gradient = run(tied, *arrays, 0 * kl_weight, 0 * ntp_weight)
    for zero in (total, *losses, gradient):
        np.testing.assert_array_equal(zero, 0)


@shapes
def test_tokens_without_a_weight_count_for_nothing(shape):
    hidden, teacher, *rest = inputs(shape)
    weighted = (rest[-1] != 0) | (rest[-2] != 0)
    (total, losses), gradient = run(True, hidden, teacher, *rest)
    for x in (hidden, teacher):
        x[~weighted] = np.inf
    (again, losses_again), gradient_again = run(True, hidden, teacher, *rest)
    assert again == total
    for found, wanted in zip((*losses_again, gradient_again), (*losses, gradient), strict=True):
        np.testing.assert_array_equal(found, wanted)
        np.testing.assert_array_equal(found[~weighted], 0)


def test_weighted_losses_do_not_overflow():
    head, one = np.eye(3, dtype=np.float32), np.ones((1, 1), np.float32)
    student, teacher = np.float32([[[1e4, 0, -1e4]]]), np.float32([[[0, 1e4, 0]]])
    label = np.array([[1]])
    (total, (kl, ntp)), gradient = run(True, student, teacher, head, label, one, one)
    assert kl[0, 0] == ntp[0, 0] == 1e4 and total == 2e4
    np.testing.assert_array_equal(gradient, [[[2, -2, 0]]])
    assert run(True, teacher, teacher, head, label, one, one)[0][0] == 0


def test_weighted_losses_of_bfloat16():
    hidden, teacher, head, *rest = inputs((2, 200), embed=32, vocab=64)
    half = [jnp.bfloat16(x) for x in (hidden, teacher, head)]
    (total, losses), gradient = run(False, *half, *rest)
    assert total.dtype == losses[0].dtype == losses[1].dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    # Logits are summed in float32, so that the losses are those of the rounded inputs; the gradient is rounded.
    (wanted, wanted_losses), wanted_gradient = run(False, *(np.float32(x) for x in half), *rest)
    assert total == pytest.approx(float(wanted), rel=1e-5)
    for found, exact in zip(losses, wanted_losses, strict=True):
        np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.float32(gradient), wanted_gradient, rtol=0.02, atol=0.01 * np.abs(wanted_gradient).max())


@heads
def test_logits_of_all_tokens_never_exist(tied):
    vocab = 3001
    text = run.lower(tied, *inputs((2, 512), vocab=vocab)).compile().as_text()
    sizes = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"\[(\d+(?:,\d+)*)\]", text)]
    assert max(sizes) == 2 * _BLOCK * vocab  # of a block's tokens, student and teacher


def test_masked_mean():
    values, mask = jnp.array([[1.0, 2.0], [jnp.inf, jnp.nan]]), jnp.array([[True, True], [False, False]])
    assert masked_mean(values, mask) == 1.5
    assert masked_mean(values, jnp.zeros((2, 2), bool)) == 0
    np.testing.assert_array_equal(jax.grad(lambda x: masked_mean(x, mask))(values), [[0.5, 0.5], [0, 0]])
