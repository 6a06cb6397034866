"""The form for CPUs: what XLA makes fast there. Counting in int16 lanes finds the threshold, triangular matrices make the prefix counts."""

import jax
import jax.numpy as jnp

from pallas_kernels.global_topk.reference import LOWEST, Selection

ADDENDS = 256  # counted in an int16 lane, one below the other: reductions over the outer axis vectorise
BLOCK = 128  # entries whose prefix counts are one matrix product


def _search(words: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The k-th largest of words [..., N] int16, and how many lie above it; k [...] int32."""
    padded = jnp.pad(words, [(0, 0)] * (words.ndim - 1) + [(0, -words.shape[-1] % ADDENDS)], constant_values=-(2**15))
    lanes = padded.reshape(*words.shape[:-1], ADDENDS, -1)

    def refine(state):
        i, threshold, reached, above = state
        candidate = threshold + jnp.left_shift(jnp.int16(1), (15 - i).astype(jnp.int16))
        in_lanes = jnp.sum((lanes >= candidate[..., None, None]).astype(jnp.int16), axis=-2, dtype=jnp.int16)
        count = jnp.sum(in_lanes, axis=-1, dtype=jnp.int32)
        enough = count >= k
        return i + 1, jnp.where(enough, candidate, threshold), jnp.where(enough, count, reached), jnp.where(enough, above, count)

    # Once exactly k reach the threshold, more bits change nothing.
    start = (jnp.int32(0), jnp.full(k.shape, -(2**15), jnp.int16), jnp.full_like(k, -1), jnp.zeros_like(k))
    _, threshold, _, above = jax.lax.while_loop(lambda state: (state[0] < 16) & jnp.any(state[2] != k), refine, start)
    return threshold, above


def _blocks(x: jax.Array) -> jax.Array:
    """[..., N] -> [..., blocks, BLOCK], zeros behind the end."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % BLOCK)]).reshape(*x.shape[:-1], -1, BLOCK)


def _before(x: jax.Array) -> jax.Array:
    """[..., n] float32 -> [..., n], the sum of all before each."""

    def earlier(x):
        n = x.shape[-1]
        return jnp.matmul(x, jnp.triu(jnp.ones((n, n), jnp.float32), 1), precision=jax.lax.Precision.HIGHEST)

    # Not jnp.cumsum: XLA fuses its last steps into whatever reads it, and the reader no longer vectorises.
    if x.shape[-1] <= BLOCK:
        return earlier(x)
    blocks = _blocks(x)
    return (earlier(blocks) + _before(jnp.sum(blocks, axis=-1))[..., None]).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]


def top_k_mask(keys: jax.Array, k: jax.Array) -> jax.Array:
    """reference.top_k_mask, for N up to 2**24, as far as float32 counts: keys [..., N] int32, k [...] int32 -> [..., N] bool."""
    high = (keys >> 16).astype(jnp.int16)
    high_threshold, high_above = _search(high, k)
    # The lower half in the order of int16; what does not share the upper half of the threshold is never counted, as its lowest value is not.
    low = jnp.where(high == high_threshold[..., None], (keys ^ 0x8000).astype(jnp.int16), -(2**15))
    low_threshold, low_above = _search(low, k - high_above)
    threshold = high_threshold.astype(jnp.int32) << 16 | (low_threshold.astype(jnp.int32) & 0xFFFF) ^ 0x8000
    quota = jnp.where(threshold == LOWEST, 0, jnp.maximum(k - high_above - low_above, 0))[..., None]
    threshold = threshold[..., None]
    # Of those tied at the threshold the first `quota` stay: up to an entry in the first block that has more.
    tied = _blocks(keys == threshold)
    count = jnp.sum(tied, axis=-1, dtype=jnp.float32)
    before = _before(count)
    block = jnp.minimum(jnp.sum(before + count <= quota, axis=-1, keepdims=True), tied.shape[-2] - 1)
    in_block = jnp.take_along_axis(tied, block[..., None], axis=-2)[..., 0, :]
    up_to = jnp.take_along_axis(before, block, axis=-1) + jnp.cumsum(in_block, axis=-1)
    cut = block * BLOCK + jnp.sum(up_to <= quota, axis=-1, keepdims=True)
    return (keys > threshold) | ((keys == threshold) & (jnp.arange(keys.shape[-1]) < cut))


def select_keys(keys: jax.Array, k: jax.Array, starts: jax.Array, width: int) -> Selection:
    """reference.select_keys, for N up to 2**24, as far as float32 counts."""
    batch, entries = keys.shape
    streams = starts.shape[1] - 1
    slots = entries - streams * width
    keep = top_k_mask(keys, k)
    # What is kept before the bounds of the streams, in the pool and in the buffer.
    buffers = jnp.broadcast_to(slots + width * jnp.arange(streams + 1, dtype=jnp.int32), (batch, streams + 1))
    bounds = jnp.concatenate([starts, buffers], axis=1)
    blocks = _blocks(keep)
    at = jnp.minimum(bounds // BLOCK, blocks.shape[1] - 1)
    in_block = jnp.take_along_axis(blocks, at[:, :, None], axis=1) & (jnp.arange(BLOCK) < (bounds - at * BLOCK)[:, :, None])
    blocks_before = _before(jnp.sum(blocks, axis=-1, dtype=jnp.float32)).astype(jnp.int32)
    before = jnp.take_along_axis(blocks_before, at, axis=1) + jnp.sum(in_block, axis=-1, dtype=jnp.int32)
    pool, buffer = before[:, : streams + 1], before[:, streams + 1 :]
    # An entry goes to its rank in pool or buffer, moved by what the other keeps before it: an offset for each segment (the pool's streams, the slots
    # that none owns, the buffer's streams). The step from one offset to the next joins the sum at the last entry before its segment.
    offsets = jnp.concatenate([buffer, pool[:, 1:]], axis=1) - buffer[:, :1]
    steps = jnp.diff(offsets, axis=1, prepend=0)
    first = jnp.sum(jnp.where(bounds[:, :-1] == 0, steps, 0), axis=1, keepdims=True)
    last_before = jnp.where(bounds[:, :-1] == 0, entries, bounds[:, :-1] - 1)
    addends = keep.astype(jnp.float32).at[jnp.arange(batch)[:, None], last_before].add(steps.astype(jnp.float32), mode="drop")
    destinations = jnp.where(keep, _before(addends).astype(jnp.int32) + first, slots)
    return Selection(keep, jnp.diff(pool) + jnp.diff(buffer), destinations)
