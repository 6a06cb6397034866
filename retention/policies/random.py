"""Random eviction: the floor that any ranking has to beat.

An entry's score is a hash of (seed, stream, position), drawn when it is written: the same entry scores the same at every eviction, in any batch row.
"""

import jax
import jax.numpy as jnp

from retention.names import check_seed
from retention.policies.base import Policy, Written, as_stored


def _mix(x: jax.Array) -> jax.Array:
    """A bijective avalanche of uint32 (the "lowbias32" constants): one changed bit in changes about half of the bits out."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def policy(seed: int = 0) -> Policy:
    """Raises ValueError for a seed that is none."""
    check_seed(seed)

    def stat(written: Written) -> jax.Array:
        row = _mix(written.stream.astype(jnp.uint32) + _mix(jnp.uint32(seed)))
        mixed = _mix(written.position.astype(jnp.uint32)[..., None] ^ row)
        # The top 24 bits: exactly representable, uniform in [0, 1).
        return (mixed >> 8).astype(jnp.float32) / 2**24

    return Policy(as_stored, stat)
