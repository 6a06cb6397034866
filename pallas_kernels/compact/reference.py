"""compact as it is meant: the pool's and the buffer's kept entries move to the slots that a selection has given them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Pool(NamedTuple):
    """B sequences of C slots."""

    keys: jax.Array  # [B, C, D]
    values: jax.Array  # [B, C, D]
    stat: jax.Array  # [B, C] float32
    position: jax.Array  # [B, C] int32


class Buffer(NamedTuple):
    """The newest W tokens of S = L*H streams."""

    keys: jax.Array  # [L, B, H, W, D]
    values: jax.Array  # [L, B, H, W, D]
    stat: jax.Array  # [L, B, H, W] float32
    position: jax.Array  # [B, W] int32


def compact(pool: Pool, buffer: Buffer, destinations: jax.Array) -> Pool:
    """See the package. Slots that nothing moves to get the pool's first entry."""
    batch, slots = pool.position.shape
    layers, _, heads, width = buffer.stat.shape
    row = jnp.arange(batch, dtype=jnp.int32)[:, None]
    entry = jnp.broadcast_to(jnp.arange(destinations.shape[1], dtype=jnp.int32), destinations.shape)
    # The entry that comes to each slot, [B, C]
    source = jnp.zeros((batch, slots), jnp.int32).at[row, destinations].set(entry, mode="drop")
    from_pool, old = source < slots, row * slots + jnp.minimum(source, slots - 1)
    layer, head, token = jnp.unravel_index(jnp.maximum(source - slots, 0), (layers, heads, width))
    new = ((layer * batch + row) * heads + head) * width + token

    def move(pool, buffer, new=new):
        tail = pool.shape[2:]
        moved = pool.reshape(-1, *tail)[old], buffer.reshape(-1, *tail)[new]
        return jnp.where(from_pool.reshape(batch, slots, *[1] * len(tail)), *moved)

    return Pool(*map(move, pool[:3], buffer[:3]), move(pool.position, buffer.position, row * width + token))
