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


def sources(destinations: jax.Array, slots: int) -> jax.Array:
    """The entry that comes to each slot, [B, C] int32: numbered as destinations [B, C+S*W] are; 0 where none does."""
    row = jnp.arange(destinations.shape[0])[:, None]
    entry = jnp.broadcast_to(jnp.arange(destinations.shape[1], dtype=jnp.int32), destinations.shape)
    return jnp.zeros((destinations.shape[0], slots), jnp.int32).at[row, destinations].set(entry, mode="drop")


def mover(source: jax.Array, pool: Pool, buffer: Buffer):
    """move(field of the pool, field of the buffer) -> the field [B, C, ...] after the move."""
    batch, slots = source.shape
    layers, _, heads, width = buffer.stat.shape
    row = jnp.arange(batch, dtype=jnp.int32)[:, None]
    from_pool, old = source < slots, row * slots + jnp.minimum(source, slots - 1)
    layer, head, token = jnp.unravel_index(jnp.maximum(source - slots, 0), (layers, heads, width))
    new = ((layer * batch + row) * heads + head) * width + token

    def move(old_field, new_field):
        tail = old_field.shape[2:]
        # The buffer's positions are [B, W], one for all streams.
        index = row * width + token if new_field.ndim == 2 else new
        moved = old_field.reshape(-1, *tail)[old], new_field.reshape(-1, *tail)[index]
        return jnp.where(from_pool.reshape(batch, slots, *[1] * len(tail)), *moved)

    return move


def gather(source: jax.Array, pool: Pool, buffer: Buffer) -> tuple[jax.Array, jax.Array]:
    """stat and position after the move."""
    move = mover(source, pool, buffer)
    return move(pool.stat, buffer.stat), move(pool.position, buffer.position)


def compact(pool: Pool, buffer: Buffer, destinations: jax.Array) -> Pool:
    """See the package. Slots that nothing moves to get the pool's first entry."""
    return Pool(*map(mover(sources(destinations, pool.position.shape[1]), pool, buffer), pool, buffer))


def check(pool: Pool, buffer: Buffer, destinations: jax.Array) -> None:
    """Raises ValueError naming the first argument that does not fit, what it is and what would fit. Destinations are looked at where they are known."""
    if pool.keys.ndim != 3 or buffer.keys.ndim != 5 or 0 in pool.keys.shape or 0 in buffer.keys.shape:
        raise ValueError(f"pool.keys [B,C,D] and buffer.keys [L,B,H,W,D] have the shapes {pool.keys.shape} and {buffer.keys.shape}, none may be 0")
    batch, slots, dim = pool.keys.shape
    layers, _, heads, width, _ = buffer.keys.shape
    dtype, cells = pool.keys.dtype, (layers, batch, heads, width)
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"pool.keys is {dtype}: bfloat16 and float32 work")
    entries = slots + layers * heads * width
    for name, array, shape, kind in (
        ("pool.values", pool.values, (batch, slots, dim), dtype),
        ("pool.stat", pool.stat, (batch, slots), jnp.float32),
        ("pool.position", pool.position, (batch, slots), jnp.int32),
        ("buffer.keys", buffer.keys, (*cells, dim), dtype),
        ("buffer.values", buffer.values, (*cells, dim), dtype),
        ("buffer.stat", buffer.stat, cells, jnp.float32),
        ("buffer.position", buffer.position, (batch, width), jnp.int32),
        ("destinations", destinations, (batch, entries), jnp.int32),
    ):
        if array.shape != shape or array.dtype != kind:
            raise ValueError(f"{name} is {array.dtype}{list(array.shape)}: beside these pool.keys and buffer.keys it must be {jnp.dtype(kind)}{list(shape)}")
    if isinstance(destinations, jax.core.Tracer):
        return
    for row in np.asarray(destinations):
        parts = row[:slots][row[:slots] < slots], row[slots:][row[slots:] < slots]
        both = np.sort(np.concatenate(parts))
        if any(np.any(np.diff(part) <= 0) for part in parts) or not np.array_equal(both, np.arange(both.size)):
            raise ValueError("destinations must rise over the pool's kept entries and over the buffer's, and be together 0..n-1, each once, C for the dropped")
