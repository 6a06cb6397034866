"""Each loss against its formula in METHOD section 3, written again in plain float64 loops, or worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retention.training.losses import capacity_loss, masked_mean, token_losses


def double_loop_mass(log_beta, times):
    """S_t = sum over j <= t of beta_j^(t-j). log_beta [B,T,H], times [N] -> [B,H,N] float64."""
    batch, length, heads = log_beta.shape
    mass = np.zeros((batch, heads, len(times)))
    for n, t in enumerate(times):
        for j in range(min(t + 1, length)):
            mass[:, :, n] += np.exp((t - j) * log_beta[:, j].astype(np.float64))
    return mass


# Two streams, budget 2 tokens a stream. Mass at t = 0 .. 3, all retained by the first stream, half of the older ones by the second.
MASS = np.array([[1.0, 2.0, 3.0, 4.0], [1.0, 1.5, 2.0, 2.5]])


def capacity(mass, budget, lengths=(4,), times=(0, 1, 2, 3)):
    return float(capacity_loss(jnp.asarray(mass, jnp.float32), jnp.asarray(times), jnp.asarray(lengths), jnp.float32(budget)))


def test_capacity_of_one_global_pool():
    # Sums 2, 3.5, 5, 6.5 against 2 * 2; the most there could be beyond it is 2 (t+1) - 4 = 2 at t = 2, 4 at t = 3.
    assert capacity(MASS[None, None], 2) == pytest.approx((1 / 2 + 2.5 / 4) / 2)


def test_capacity_of_local_pools():
    # Each stream against 2: the first exceeds by 1 of 1 at t = 2 and 2 of 2 at t = 3, the second by 0.5 of 2 at t = 3 alone.
    assert capacity(MASS[None, :, None], 2) == pytest.approx((1 + 1 + 0.5 / 2) / 3)


def test_capacity_lets_streams_share_only_in_a_global_pool():
    mass = np.array([[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0]])
    assert capacity(mass[None, None], 2.5) == 0
    assert capacity(mass[None, :, None], 2.5) == pytest.approx((0.5 / 1 + 1.5 / 1.5) / 2)


def test_capacity_is_0_if_nothing_exceeds():
    assert capacity(MASS[None, None], 4) == 0
    gradient = jax.grad(lambda mass: capacity_loss(mass, jnp.arange(4), jnp.array([4]), jnp.float32(4)))(jnp.asarray(MASS[None, None]))
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("budget", [3, 3.0001, 2.9999])
def test_no_spike_where_the_position_reaches_the_budget(budget):
    """A full cache of t+1 tokens is at most 1, at t = M too, where the released code divides by max(0, 1) instead of by one token a stream."""
    streams = 50
    for t in range(6):
        full = np.full((1, 1, streams, 1), t + 1.0)
        found = capacity(full, budget, lengths=(6,), times=(t,))
        assert 0 <= found <= 1 + 1e-6
        if t == 3:
            assert found == pytest.approx(1, abs=1e-3)


def test_times_beyond_the_length_do_not_count():
    mass = np.stack([MASS[None], 100 * MASS[None]])  # [B, 1, 2, N]
    # Of the second document only t = 0 lies inside: 200 against 4, over the divisor's least, 1.
    assert capacity(mass, 2, lengths=(3, 1)) == pytest.approx((1 / 2 + 196) / 2)
    assert capacity(mass, 2, lengths=(3, 0)) == pytest.approx(1 / 2)
    gradient = jax.grad(lambda m: capacity_loss(m, jnp.arange(4), jnp.array([3, 0]), jnp.float32(2)))(jnp.asarray(mass))
    assert not gradient[0, :, :, 3].any() and not gradient[1].any() and gradient[0, :, :, 2].all()


def test_token_losses():
    rng = np.random.default_rng(0)
    student, teacher = 4 * rng.normal(size=(2, 2, 5, 11))
    labels = rng.integers(0, 11, (2, 5))
    divergence, cross_entropy = token_losses(jnp.float32(student), jnp.float32(teacher), jnp.asarray(labels))
    for b in range(2):
        for k in range(5):
            q = np.exp(student[b, k]) / np.exp(student[b, k]).sum()
            p = np.exp(teacher[b, k]) / np.exp(teacher[b, k]).sum()
            assert divergence[b, k] == pytest.approx(np.sum(p * np.log(p / q)), rel=1e-4)
            assert cross_entropy[b, k] == pytest.approx(-np.log(q[labels[b, k]]), rel=1e-4)


def test_token_losses_do_not_overflow():
    student, teacher = jnp.array([[[1e4, 0.0, -1e4]]]), jnp.array([[[0.0, 1e4, 0.0]]])
    divergence, cross_entropy = token_losses(student, teacher, jnp.array([[1]]))
    assert divergence[0, 0] == cross_entropy[0, 0] == 1e4
    assert token_losses(teacher, teacher, jnp.array([[1]]))[0][0, 0] == 0


def test_masked_mean():
    values, mask = jnp.array([[1.0, 2.0], [jnp.inf, jnp.nan]]), jnp.array([[True, True], [False, False]])
    assert masked_mean(values, mask) == 1.5
    assert masked_mean(values, jnp.zeros((2, 2), bool)) == 0
    np.testing.assert_array_equal(jax.grad(lambda x: masked_mean(x, mask))(values), [[0.5, 0.5], [0, 0]])
