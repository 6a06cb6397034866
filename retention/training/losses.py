"""What the gates are trained on: KL to the full-cache teacher, next-token loss, and the capacity of the budget. METHOD section 3."""

import jax
import jax.numpy as jnp


def capacity_loss(mass: jax.Array, times: jax.Array, lengths: jax.Array, budget: jax.Array) -> jax.Array:
    """How far the retained mass exceeds the budget, relative to the most it could, averaged over the times that exceed it; 0 if none does.

    c_t = max(0, (sum_s S_t - M n) / max((t+1) n - M n, 1)), n streams competing together; the mean over c > 0.

    Args:
      mass: [B,P,n,N] retained mass of n streams in each of P pools: P = 1, n = L*H for a global budget, P = L*H, n = 1 for local ones.
      times: [N] positions. lengths: [B] tokens; later times do not count. budget: scalar M, tokens per stream.
    """
    n = mass.shape[2]
    excess = (mass.sum(axis=2) - budget * n) / jnp.maximum((times + 1 - budget) * n, 1.0)
    excess = jnp.where(times < lengths[:, None, None], jnp.maximum(excess, 0.0), 0.0)
    return excess.sum() / jnp.maximum(jnp.sum(excess > 0), 1)


def token_losses(student: jax.Array, teacher: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """KL(teacher || student) over the full vocabulary at temperature 1, and cross-entropy with the labels.

    student, teacher: [B,K,V] float32 logits; labels: [B,K] int. Returns two [B,K] float32 arrays, in nats.
    """
    student, teacher = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
    divergence = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
    return divergence, -jnp.take_along_axis(student, labels[..., None], axis=-1)[..., 0]


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean of values where mask holds, 0 where it holds nowhere."""
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1)
