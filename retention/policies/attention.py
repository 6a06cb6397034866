"""Attention as policies look at it: which entries the newest queries look at."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from retention.policies.base import Streams


def weights(streams: Streams, group: Callable = lambda logits: logits, among: jax.Array | None = None) -> jax.Array:
    """[B, H, G, Q, N] float32: each noted query's softmax over the entries of its stream that are not newer than it; zeros where there is no query.

    group: what becomes of the logits before the softmax. among: [B, H, N] bool, the entries that it is over, where not all.
    """
    queries, keys = streams.queries.astype(jnp.float32), streams.keys.astype(jnp.float32)
    logits = jnp.einsum("BQHGD,BHND->BHGQN", queries, keys, preferred_element_type=jnp.float32) * keys.shape[-1] ** -0.5
    # [B, 1, 1, Q, 1] against [B, H, 1, 1, N]
    asked = streams.query_position[:, None, None, :, None]
    visible = (streams.live if among is None else among)[:, :, None, None] & (streams.position[:, :, None, None] <= asked) & (asked >= 0)
    return jnp.where(visible, jax.nn.softmax(group(logits), axis=-1, where=visible), 0)


def mean_over_queries(weights: jax.Array, streams: Streams) -> jax.Array:
    """weights [..., Q, N] -> [..., N], over the queries that there are."""
    count = jnp.sum(streams.query_position >= 0, axis=1).reshape(-1, *[1] * (weights.ndim - 2))
    return jnp.sum(weights, axis=-2) / jnp.maximum(count, 1)


def before_queries(streams: Streams) -> jax.Array:
    """[B, H, N] bool: the entries older than every noted query."""
    return streams.live & (streams.position < (streams.seen - streams.queries.shape[1])[:, None, None])


def pool(x: jax.Array, kernel: int, by=jnp.mean) -> jax.Array:
    """x [..., N] over the `kernel` (odd) neighbours of each entry, itself in the middle; zeros beyond the ends.

    Neighbours are those in the stream: once entries between them were evicted, tokens that were far apart, as in kvpress and R-KV's own code.
    """
    half = kernel // 2
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(half, half)])
    return by(jnp.stack([padded[..., i : i + x.shape[-1]] for i in range(kernel)]), axis=0)
