"""Why fewer entries can answer better: how distractors dilute attention and what retention does about it (DBTrimKV, arXiv 2605.09649; METHOD section 5)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from retention import cache as cache_lib
from retention.attention import cached_attention


def useful_mass(weights: jax.Array, useful: jax.Array) -> jax.Array:
    """The share of the attention weights [..., N], unnormalised or not, that useful [..., N] bool entries get: [...]."""
    return jnp.sum(jnp.where(useful, weights, 0), axis=-1) / jnp.sum(weights, axis=-1)


def mass_bound(useful: int, distractors: int, margin: float) -> float:
    """|U| / (|U| + m e^-margin): the most that `useful` entries can get beside m distractors whose logits are within `margin` of the best useful one's."""
    return useful / (useful + distractors * np.exp(-margin))


def odds(weights: jax.Array, useful: jax.Array) -> jax.Array:
    """The attention on useful entries over that on the others: [...]."""
    mass = useful_mass(weights, useful)
    return mass / (1 - mass)


def retained_odds(weights: jax.Array, retention: jax.Array, useful: jax.Array) -> jax.Array:
    """The odds once every weight is multiplied by its entry's retention [..., N], in [0, 1]: (mean retention of the useful / of the others) * odds.

    The means are weighted by attention. Retention 0 or 1 is eviction; beta^(t-i) is what training's bias (t-i) log beta does.
    """

    def mean(chosen):
        return jnp.sum(jnp.where(chosen, weights * retention, 0), axis=-1) / jnp.sum(jnp.where(chosen, weights, 0), axis=-1)

    return mean(useful) / mean(~useful) * odds(weights, useful)


@functools.partial(jax.jit, static_argnames="budget")
def recall(keys: jax.Array, values: jax.Array, query: jax.Array, score: jax.Array, evidence: jax.Array, budget: int | None):
    """One head looks one key up among N, over the slot pool: from keys, values [B,N,D], query [B,D], scores [B,N] of which the best `budget` stay (None:
    all do), and the evidence's place [B], the attention that it gets and whether the output is nearest to its value, both [B]."""
    batch, entries, dim = keys.shape
    cache = cache_lib.init(1, 1, dim, [budget or 0] * batch, budget or 0, entries)
    whole = jnp.full(batch, entries, jnp.int32)
    cache = cache_lib.append(cache, keys[None, :, :, None], values[None, :, :, None], score[None, :, :, None], whole)
    if budget:
        cache = cache_lib.select(cache, cache_lib.entry_scores(cache, lambda stat, position, seen: stat), "global")
    pool, buffer = (cache.keys, cache.starts), (cache.buffer_keys, cache.buffered)

    def attend(values, buffer_values):
        # The query's own key points away from it, so that it takes no attention.
        new = query[:, None, None]
        out = cached_attention(
            new[:, :, :, None], -100 * new, jnp.zeros_like(new), jnp.ones(batch, jnp.int32), pool[0], values, pool[1], buffer[0], buffer_values, buffer[1], 0
        )
        return out[:, 0, 0, 0]

    out = attend(cache.values, cache.buffer_values)
    # Attention to an entry is what its indicator, as a value, becomes.
    hit, new_hit = ((x == evidence.reshape(shape)).astype(jnp.float32) for x, shape in ((cache.position, (-1, 1)), (cache.buffer_position, (-1, 1))))
    mass = attend(jnp.broadcast_to(hit[..., None], cache.values.shape), jnp.broadcast_to(new_hit[None, :, None, :, None], cache.buffer_values.shape))[:, 0]
    nearest = jnp.argmax(jnp.einsum("BD,BND->BN", out, values), axis=-1)
    return mass, nearest == evidence
