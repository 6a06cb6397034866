"""Expected Attention (arXiv 2510.00636): the attention that an entry may expect of queries to come, were they normally distributed."""

import functools

import jax
import jax.numpy as jnp

from retention.policies.base import Policy, Streams
from retention.rope import apply_rope


def score(streams: Streams, future: int) -> jax.Array:
    """E[softmax(q.k / sqrt(D))] ||v||, E exp(q.k / sqrt(D)) = exp(mu.k / sqrt(D) + k.Sigma.k / 2D), mean over the query heads.

    mu and Sigma are of the queries so far before RoPE, turned by the mean rotation over the next `future` positions. The sinks, which are
    protected, take no part in the softmax.
    """
    dim = streams.keys.shape[-1]
    angle = (streams.seen[:, None] + jnp.arange(future))[..., None] * streams.frequency
    # The mean of rotations is no rotation, and linear all the same. [B, 1, D/2]
    turn = functools.partial(apply_rope, cos=jnp.cos(angle).mean(axis=1, keepdims=True), sin=jnp.sin(angle).mean(axis=1, keepdims=True))
    mean = turn(streams.query_mean[:, None])[:, 0]
    # R Sigma R^T, [B, H, G, D, D]
    rows = turn(streams.query_covariance[:, None])[:, 0]
    covariance = turn(jnp.swapaxes(rows, -1, -2)[:, None])[:, 0]
    keys = streams.keys.astype(jnp.float32)
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)  # as the moments were noted
    logits = product("BHGD,BHND->BHGN", mean, keys) * dim**-0.5
    logits += product("BHNC,BHGCD,BHND->BHGN", keys, covariance, keys) / (2 * dim)
    counted = streams.live & (streams.position >= streams.sinks)
    expected = jax.nn.softmax(logits, axis=-1, where=counted[:, :, None]).mean(axis=2)
    return expected * jnp.linalg.norm(streams.values.astype(jnp.float32), axis=-1)


def policy(sinks: int = 4, future: int = 512) -> Policy:
    """sinks: protected, and their queries not counted. future: positions ahead over which the rotation is averaged. Raises ValueError for future < 1."""
    if future < 1:
        raise ValueError(f"future must be at least 1 position, got {future}")
    return Policy(functools.partial(score, future=future), streams=True, moments=sinks, sinks=sinks, scope="head")
