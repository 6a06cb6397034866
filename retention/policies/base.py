"""What a policy is: the number it stores with each cache entry, and how it ranks entries by it."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

# score(stat, position, seen) -> float32 of their common shape. Entries with higher scores stay. stat is what `stat` stored, position the entry's true
# position, seen the tokens so far, which is the next token's position.
Score = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def no_stat(log_beta: jax.Array | None, position: jax.Array, stream: jax.Array) -> jax.Array:
    """For policies that rank by position alone."""
    return jnp.zeros((*position.shape, stream.shape[0]), jnp.float32)


@dataclasses.dataclass(frozen=True)
class Policy:
    """A ranking of cache entries.

    score: see `Score`; None never evicts. stat(log_beta [B,T,H] or None, position [B,T], stream [H]) -> [B,T,H] float32: the number stored with each
    entry when it is written. gated: whether it needs log_beta, and so gates. sinks, window: the first and newest positions protected by default
    (None: as many sinks as the gates were trained with). floor: entries every stream keeps whatever the others score (scope global).
    """

    score: Score | None
    stat: Callable[[jax.Array | None, jax.Array, jax.Array], jax.Array] = no_stat
    gated: bool = False
    sinks: int | None = 0
    window: int = 0
    floor: int = 0
