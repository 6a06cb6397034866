"""StreamingLLM (arXiv 2309.17453): attention sinks and the newest tokens."""

import jax
import jax.numpy as jnp

from retention.policies.base import Policy


def score(stat: jax.Array, position: jax.Array, seen: jax.Array) -> jax.Array:
    """The newer, the higher. Exact in float32 up to position 2^24."""
    return jnp.broadcast_to(position, stat.shape).astype(jnp.float32)


def policy(sinks: int = 4) -> Policy:
    return Policy(score=score, sinks=sinks)
