"""KVzip (arXiv 2505.23416): what the model looks at when it is asked to repeat the context. Two passes, and the context held whole meanwhile."""

import jax
import jax.numpy as jnp

from retention.policies.base import Policy, Written

UNREAD = 2.0  # in place of the attention, which is 1 at most


def stat(written: Written) -> jax.Array:
    """UNREAD, until the token is read again."""
    layers, *_, heads = written.stream.shape
    return jnp.full((layers, *written.position.shape, heads), UNREAD, jnp.float32)


def score(stat: jax.Array, position: jax.Array, seen: jax.Array) -> jax.Array:
    """The most attention that any query of the second reading paid the entry, over its query heads.

    The paper says nothing of generated tokens. With a question that competes once it is answered they are read again as part of it; others are not, and
    stay before all others, the newest first (exact up to position 2^23).
    """
    return jnp.where(stat == UNREAD, 1 + position * 2.0**-23, stat)


def policy(sinks: int = 4, chunk: int = 2048) -> Policy:
    """chunk: tokens read again at a time, which see the first `sinks` entries, the chunk and themselves. Raises ValueError for one below 1.

    With a prefill_chunk each chunk is read again before it is compressed, in bounded memory; the paper's way is prefill_chunk=None.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    return Policy(score, stat, sinks=sinks, reread=chunk)
