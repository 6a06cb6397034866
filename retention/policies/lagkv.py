"""LagKV (arXiv 2504.04704): tokens that stand out against the range of those that came next."""

import functools

import jax
import jax.numpy as jnp

from retention.policies.base import Policy, Streams


def score(streams: Streams, lag: int) -> jax.Array:
    """The rank of an entry within its partition of `lag`, in [0, 1), by the mean of its keys' and values' softmax over the partition of the deviation,
    over channels, of what is scaled by the next partition's smallest and largest.

    Partitions begin behind the sinks; the last full one and what follows are kept first (1), as are the sinks. At every eviction they are cut anew from
    what is left, where the paper ranks a partition once: in chunks and turns, unlike in one-shot prefill, old ones shrink each time.
    """
    batch, heads, entries, dim = streams.keys.shape
    sinks = min(streams.sinks, entries)
    parts = max(1, -(-(entries - sinks) // lag))

    def deviation(x):
        # [B, H, parts, lag, D]
        x = jnp.pad(x.astype(jnp.float32)[:, :, sinks:], ((0, 0), (0, 0), (0, parts * lag - (entries - sinks)), (0, 0)))
        x = x.reshape(batch, heads, parts, lag, dim)
        after = jnp.roll(x, -1, axis=2)
        low, high = after.min(axis=3, keepdims=True), after.max(axis=3, keepdims=True)
        scaled = (x - low) / jnp.where(high > low, high - low, 1)
        return jax.nn.softmax(jnp.std(scaled, axis=-1, ddof=1), axis=-1)

    both = deviation(streams.keys) + deviation(streams.values)
    rank = jnp.argsort(jnp.argsort(both, axis=-1), axis=-1).reshape(batch, heads, parts * lag) / lag
    rank = jnp.pad(rank, ((0, 0), (0, 0), (sinks, 0)))[:, :, :entries]
    count = streams.live.sum(axis=-1, keepdims=True)
    full = (count - sinks) // lag
    entry = jnp.arange(entries)
    # Newer entries outrank older ones where too little has been read for a rank: 1 to 2, by their place.
    ranked = (entry >= sinks) & (entry < sinks + (full - 1) * lag)
    return jnp.where(ranked, rank, 1 + entry / entries)


def policy(sinks: int = 4, lag: int = 128) -> Policy:
    """sinks: protected. lag: entries of a partition. Raises ValueError for a lag below 2."""
    if lag < 2:
        raise ValueError(f"lag must be at least 2 entries, got {lag}")
    return Policy(functools.partial(score, lag=lag), streams=True, sinks=sinks, scope="head")
