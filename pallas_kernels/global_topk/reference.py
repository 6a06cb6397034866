"""The meaning of global_topk, simple and not fast, and the checks on its arguments."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LOWEST, HIGHEST = np.iinfo(np.int32).min, np.iinfo(np.int32).max


class Selection(NamedTuple):
    """What is kept of B rows of N entries, C of them in pool slots, and where it goes."""

    keep: jax.Array  # [B, N] bool
    counts: jax.Array  # [B, S] int32, kept entries of each stream
    destinations: jax.Array  # [B, N] int32, the slot a kept entry goes to; C for what is dropped


class TopK(NamedTuple):
    """A Selection, and whether a valid score was NaN."""

    keep: jax.Array
    counts: jax.Array
    destinations: jax.Array
    has_nan: jax.Array  # [B] bool


def ordered_keys(score: jax.Array, valid: jax.Array, protected: jax.Array) -> jax.Array:
    """int32 keys that sort as the float32 scores do: -0.0 as +0.0, NaN as -inf; what is not valid below them all, what is protected above."""
    # (Adding 0.0 would turn -0.0 into +0.0 too, but not under jit, where XLA takes the sum for its first term.)
    score = jnp.where(jnp.isnan(score), -jnp.inf, jnp.where(score == 0, 0.0, score.astype(jnp.float32)))
    bits = jax.lax.bitcast_convert_type(score, jnp.int32)
    keys = jnp.where(bits < 0, bits ^ HIGHEST, bits)
    return jnp.where(valid, jnp.where(protected, HIGHEST, keys), LOWEST)


def top_k_mask(keys: jax.Array, k: jax.Array) -> jax.Array:
    """The k largest of keys [..., N] int32 as a mask; k [...] int32. Exactly k, or all above LOWEST if those are fewer; ties in slot order.

    The k-th largest key is found bit by bit, by counting: 32 sweeps and no sort.
    """

    def refine(i, threshold):
        candidate = threshold + jnp.left_shift(jnp.int32(1), 31 - i)
        enough = jnp.sum(keys >= candidate[..., None], axis=-1, dtype=jnp.int32) >= k
        return jnp.where(enough, candidate, threshold)

    threshold = jax.lax.fori_loop(0, 32, refine, jnp.full(keys.shape[:-1], LOWEST, jnp.int32))[..., None]
    above = keys > threshold
    tied = (keys == threshold) & (keys > LOWEST)
    quota = k[..., None] - jnp.sum(above, axis=-1, keepdims=True, dtype=jnp.int32)
    return above | (tied & (jnp.cumsum(tied, axis=-1, dtype=jnp.int32) <= quota))
