"""R-KV (arXiv 2505.24133): attention received, less for keys that resemble others: what a reasoning model repeats is kept once."""

import functools

import jax
import jax.numpy as jnp

from retention.policies import attention, snapkv
from retention.policies.base import Policy, Streams

ROWS = 256  # of the similarity matrix at a time


def redundancy(keys: jax.Array, live: jax.Array, threshold: float) -> jax.Array:
    """Softmax over entries of the mean cosine to all others: keys [B,H,N,D], live [B,H,N] -> [B,H,N].

    Of the entries whose cosine to an entry is above the threshold, the newest one is spared that entry's share.
    """
    batch, heads, entries, dim = keys.shape
    keys = keys.astype(jnp.float32)
    unit = keys / jnp.maximum(jnp.linalg.norm(keys, axis=-1, keepdims=True), 1e-12)
    blocks = -(-entries // ROWS)
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)  # a TPU would round to bfloat16, and with it what is above the threshold
    rows = jnp.pad(unit, ((0, 0), (0, 0), (0, blocks * ROWS - entries), (0, 0))).reshape(batch, heads, blocks, ROWS, dim)

    def spare(block):
        row, first = block
        cosine = product("BHID,BHJD->BHIJ", row, unit)
        itself = (first + jnp.arange(ROWS))[:, None] == jnp.arange(entries)
        newest = jnp.where((cosine > threshold) & ~itself, jnp.arange(entries), -1).max(axis=-1)
        spared = jnp.where((newest >= 0)[..., None] & (newest[..., None] == jnp.arange(entries)), cosine, 0)
        return jnp.sum(jnp.where(itself, cosine, spared), axis=2)

    uncounted = jax.lax.map(spare, (jnp.moveaxis(rows, 2, 0), jnp.arange(blocks) * ROWS)).sum(axis=0)
    total = product("BHND,BHD->BHN", unit, unit.sum(axis=2)) - uncounted
    return jax.nn.softmax(total / jnp.maximum(live.sum(axis=-1, keepdims=True), 1), axis=-1, where=live)


def score(streams: Streams, kernel: int, balance: float, threshold: float) -> jax.Array:
    """balance * attention - (1 - balance) * redundancy.

    The attention is the mean over the noted queries of the softmax, over the entries older than they, of the largest logit among the query heads, and
    of that the largest among the `kernel` neighbours.
    """
    older = attention.before_queries(streams)
    votes = attention.weights(streams, lambda logits: logits.max(axis=2, keepdims=True), older)[:, :, 0]
    votes = jnp.where(older, attention.pool(attention.mean_over_queries(votes, streams), kernel, jnp.max), 0)
    return balance * votes - (1 - balance) * redundancy(streams.keys, streams.live, threshold)


def policy(window: int = 8, kernel: int = 7, balance: float = 0.1, threshold: float = 0.5) -> Policy:
    """window: the queries that vote, and the newest tokens protected. balance, threshold: see `score`, `redundancy`.

    Raises ValueError as `snapkv.policy`, and for a balance outside [0, 1].
    """
    snapkv.check(window, kernel)
    if not 0 <= balance <= 1:
        raise ValueError(f"balance must be in [0, 1], got {balance}")
    rank = functools.partial(score, kernel=kernel, balance=balance, threshold=threshold)
    return Policy(rank, streams=True, queries=window, window=window, scope="head")
