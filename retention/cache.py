"""The slot pool: a fixed number of KV entries for each sequence, for which the entries of all layers and heads compete.

Between calls a sequence owns C slots. Stream s, one kv head of one layer, owns slots starts[s]..starts[s+1]: segments lie end to end in (layer, head)
order, each in time order, and how long each is falls out of the selection. New tokens go to a dense write buffer; a selection ranks pool and buffer
together, keeps the best, and compacts them into the pool. Keys are stored after RoPE at true positions, and every slot knows its position.

The full cache is the same thing with a pool of no slots and a buffer long enough for everything. Nothing here knows of models.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.compact import Buffer, Pool, compact
from pallas_kernels.global_topk import select_keys
from pallas_kernels.global_topk.reference import HIGHEST, LOWEST, ordered_keys, top_k_mask

SCOPES = ("global", "layer", "head", "shared")


class Cache(NamedTuple):
    """B sequences, each under its own budget. Slots past starts[:, -1] and buffer rows past `buffered` hold anything and are never read."""

    keys: jax.Array  # [B, C, D] after RoPE
    values: jax.Array  # [B, C, D]
    stat: jax.Array  # [B, C] float32, the one number the policy stores per entry
    position: jax.Array  # [B, C] int32, true positions
    starts: jax.Array  # [B, S+1] int32
    budget: jax.Array  # [B] int32, M: entries per stream on average
    buffer_keys: jax.Array  # [L, B, H, W, D]
    buffer_values: jax.Array  # [L, B, H, W, D]
    buffer_stat: jax.Array  # [L, B, H, W] float32
    buffer_position: jax.Array  # [B, W] int32
    buffered: jax.Array  # [B] int32, tokens in the write buffer
    seen: jax.Array  # [B] int32, tokens ever appended: the next token's position
    noted: dict  # what else the policy has noted about the tokens seen, arrays by name; empty for most


class Streams(NamedTuple):
    """The streams of one layer, each dense and in time order: its pool segment, then the buffer. Rows that are not live are zeros."""

    keys: jax.Array  # [B, H, N, D]
    values: jax.Array  # [B, H, N, D]
    stat: jax.Array  # [B, H, N] float32
    position: jax.Array  # [B, H, N] int32
    live: jax.Array  # [B, H, N] bool


def init(layers: int, kv_heads: int, head_dim: int, budget, slots: int, buffer: int, dtype=jnp.float32, noted: dict | None = None) -> Cache:
    """An empty cache.

    Args:
      budget: [B] ints, M for each sequence. slots: C, at least S * max(budget); 0 for the full cache. buffer: W, tokens the write buffer holds.
      noted: what `Cache.noted` begins with.
    """
    budget = jnp.asarray(budget, jnp.int32)
    batch, streams = budget.shape[0], layers * kv_heads
    # One array for each field, never a shared one: each may be donated.
    return Cache(
        keys=jnp.zeros((batch, slots, head_dim), dtype),
        values=jnp.zeros((batch, slots, head_dim), dtype),
        stat=jnp.zeros((batch, slots), jnp.float32),
        position=jnp.zeros((batch, slots), jnp.int32),
        starts=jnp.zeros((batch, streams + 1), jnp.int32),
        budget=budget,
        buffer_keys=jnp.zeros((layers, batch, kv_heads, buffer, head_dim), dtype),
        buffer_values=jnp.zeros((layers, batch, kv_heads, buffer, head_dim), dtype),
        buffer_stat=jnp.zeros((layers, batch, kv_heads, buffer), jnp.float32),
        buffer_position=jnp.zeros((batch, buffer), jnp.int32),
        buffered=jnp.zeros(batch, jnp.int32),
        seen=jnp.zeros(batch, jnp.int32),
        noted=noted or {},
    )


def with_buffer(cache: Cache, buffer: int) -> Cache:
    """The same cache with room for `buffer` tokens in its write buffer, which keeps what it holds."""
    extra = buffer - cache.buffer_position.shape[1]

    def resize(array, axis):
        if extra <= 0:
            return jax.lax.slice_in_dim(array, 0, buffer, axis=axis)
        return jnp.pad(array, [(0, extra if i == axis else 0) for i in range(array.ndim)])

    return cache._replace(
        buffer_keys=resize(cache.buffer_keys, 3),
        buffer_values=resize(cache.buffer_values, 3),
        buffer_stat=resize(cache.buffer_stat, 3),
        buffer_position=resize(cache.buffer_position, 1),
    )


def append(cache: Cache, keys: jax.Array, values: jax.Array, stat: jax.Array, valid: jax.Array) -> Cache:
    """Puts T new tokens of all layers behind the buffered ones: keys, values [L,B,T,H,D], stat [L,B,T,H].

    Of each sequence the first valid[b] count; the rest is padding, which the next append covers.
    """
    position = cache.seen[:, None] + jnp.arange(keys.shape[2], dtype=jnp.int32)
    # Each field as the buffer has it, with the axis of sequences and that of tokens: [L, B, H, T, D], [L, B, H, T], [B, T]
    fields = [
        (cache.buffer_keys, jnp.swapaxes(keys, 2, 3), 1, 3),
        (cache.buffer_values, jnp.swapaxes(values, 2, 3), 1, 3),
        (cache.buffer_stat, jnp.swapaxes(stat, 2, 3), 1, 3),
        (cache.buffer_position, position, 0, 1),
    ]

    # A scan over the new tokens, sequences first. A loop that slices them itself is one that libtpu 0.0.42 takes for a copy of whole buffers, and fails.
    def put(buffer, new, batch_axis, token_axis):
        def put_row(buffer, inputs):
            row, update, buffered = inputs
            place = [0] * buffer.ndim
            place[batch_axis], place[token_axis] = row, buffered
            return jax.lax.dynamic_update_slice(buffer, jnp.expand_dims(update, batch_axis).astype(buffer.dtype), place), None

        rows = jnp.arange(position.shape[0]), jnp.moveaxis(new, batch_axis, 0), cache.buffered
        return jax.lax.scan(put_row, buffer, rows)[0]

    buffers = [put(*field) for field in fields]
    return cache._replace(
        buffer_keys=buffers[0],
        buffer_values=buffers[1],
        buffer_stat=buffers[2],
        buffer_position=buffers[3],
        buffered=cache.buffered + valid,
        seen=cache.seen + valid,
    )


def floor_mask(keys: jax.Array, stream: jax.Array, k: jax.Array, floor: int) -> jax.Array:
    """The k [B] of keys [B,N] int32 that stay, as a mask, where every stream keeps its top `floor` entries; stream [B,N] int32 says whose each is.

    Each of the others is ranked by the key `floor` places above it in its stream. That gives stream s the count that a plain top-k of k - S*floor would,
    plus `floor`: METHOD section 4's floor, with the total exact even where a stream runs short. Of equal keys in a stream the first stays.
    """

    def mask_row(keys, stream, k):
        # Best first within each stream: of raised keys that tie, those of the better entries come first too.
        order = jnp.lexsort((~keys, stream))
        keys_sorted, stream_sorted = keys[order], stream[order]
        above = jnp.arange(keys.shape[0]) - floor
        same_stream = (above >= 0) & (stream_sorted[above] == stream_sorted)
        raised = jnp.where(same_stream, keys_sorted[above], HIGHEST)
        return jnp.zeros(keys.shape, bool).at[order].set(top_k_mask(jnp.where(keys_sorted > LOWEST, raised, LOWEST), k))

    return jax.vmap(mask_row)(keys, stream, k)


def pool_streams(cache: Cache) -> jax.Array:
    """[B, C] int32, the stream that each slot belongs to; any for those past the end."""
    slot = jnp.arange(cache.position.shape[1], dtype=jnp.int32)
    stream = jax.vmap(lambda starts: jnp.searchsorted(starts, slot, side="right").astype(jnp.int32) - 1)(cache.starts)
    return jnp.clip(stream, 0, cache.starts.shape[1] - 2)


def streams_of(cache: Cache, layer: jax.Array, longest: int) -> Streams:
    """The streams of `layer`, of N = longest + W entries each. No pool segment may be longer than `longest`."""
    slots, heads, width = cache.position.shape[1], cache.buffer_stat.shape[2], cache.buffer_stat.shape[3]
    stream = layer * heads + jnp.arange(heads)
    # [B, H, 1]
    start, length = cache.starts[:, stream, None], (cache.starts[:, stream + 1] - cache.starts[:, stream])[..., None]
    entry = jnp.arange(longest + width, dtype=jnp.int32)
    # [B, H, N]
    pooled = entry < length
    live = pooled | (entry - length < cache.buffered[:, None, None])
    slot, place = jnp.clip(start + entry, 0, slots - 1), jnp.clip(entry - length, 0, width - 1)

    def pick(pool, buffer):
        new = jnp.take_along_axis(buffer, place.reshape(place.shape + (1,) * (buffer.ndim - 3)), axis=2)
        if slots:
            old = jax.vmap(lambda row, i: row[i])(pool, slot)
            new = jnp.where(pooled.reshape(pooled.shape + (1,) * (new.ndim - 3)), old, new)
        return jnp.where(live.reshape(live.shape + (1,) * (new.ndim - 3)), new, 0)

    position = jnp.broadcast_to(cache.buffer_position[:, None], (*start.shape[:2], width))
    return Streams(
        pick(cache.keys, cache.buffer_keys[layer]),
        pick(cache.values, cache.buffer_values[layer]),
        pick(cache.stat, cache.buffer_stat[layer]),
        pick(cache.position, position),
        live,
    )


def scatter_streams(cache: Cache, dense: jax.Array) -> tuple[jax.Array, jax.Array]:
    """dense [L, B, H, N], a number for each entry as `streams_of` orders them -> [B, C] for the pool's and [B, S, W] for the buffer's."""
    layers, batch, heads, entries = dense.shape
    slots, width = cache.position.shape[1], cache.buffer_stat.shape[3]
    # [B, S, N]
    dense = jnp.moveaxis(dense, 1, 0).reshape(batch, layers * heads, entries)
    length = cache.starts[:, 1:] - cache.starts[:, :-1]
    new = jnp.take_along_axis(dense, jnp.minimum(length[..., None] + jnp.arange(width), entries - 1), axis=2)
    if not slots:
        return jnp.zeros((batch, 0), dense.dtype), new
    stream, row = pool_streams(cache), jnp.arange(batch)[:, None]
    return dense[row, stream, jnp.clip(jnp.arange(slots) - cache.starts[row, stream], 0, entries - 1)], new


def entry_scores(cache: Cache, score: Callable) -> tuple[jax.Array, jax.Array]:
    """What score(stat, position, seen) -> float32 of their common shape gives for pool [B, C] and buffer [B, S, W]."""
    batch, _ = cache.position.shape
    layers, _, heads, width = cache.buffer_stat.shape
    stat = jnp.moveaxis(cache.buffer_stat, 1, 0).reshape(batch, layers * heads, width)
    position = jnp.broadcast_to(cache.buffer_position[:, None], stat.shape)
    return score(cache.stat, cache.position, cache.seen[:, None]), score(stat, position, cache.seen[:, None, None])


def select(
    cache: Cache,
    scores: tuple[jax.Array, jax.Array],
    scope: str,
    sinks: int = 0,
    window: int | jax.Array = 0,
    floor: int = 0,
    layer_budgets: jax.Array | None = None,
    lowest: float = -np.inf,
    due: jax.Array | None = None,
) -> Cache:
    """One eviction: ranks pool and buffer together, keeps the best within the budget, and compacts them into the pool; the buffer ends empty.

    Args:
      scores: of the pool's entries [B, C] and of the buffer's [B, S, W], float32; higher stays.
      scope: what competes for what. "global": all entries of a sequence for S*M slots; "layer": each layer's for H*M; "head": each stream's for M;
        "shared": tokens for M, each kept in all streams or in none, by its mean score over streams.
      sinks, window: the first and the newest positions that always stay; window may be [B]. sinks + window + floor <= M.
      floor: entries that every stream keeps whatever the others score (scope global).
      layer_budgets: [B, L] int32, what stands for M in each layer (scope head): at most 2M, and M on average.
      lowest: entries that are not protected and score below it go even where there is room.
      due: [B] bool, the sequences that evict; the others keep pool and buffer as they are. None: all.
    """
    batch, slots = cache.position.shape
    layers, _, heads, width = cache.buffer_stat.shape
    streams = layers * heads
    window = jnp.broadcast_to(window, (batch,))

    def keys_of(score, position, valid):
        newest = (cache.seen - window).reshape(batch, *[1] * (score.ndim - 1))
        protected = (position < sinks) | (position >= newest)
        if lowest > -np.inf:
            valid &= protected | (score >= lowest)
        return ordered_keys(score, valid, protected)

    old_score, new_score = scores
    # The pool's entries, [B, C], and which of them are live; the buffer's, [B, S, W].
    slot = jnp.arange(slots, dtype=jnp.int32)
    live = slot < cache.starts[:, -1:]
    new_position = jnp.broadcast_to(cache.buffer_position[:, None], new_score.shape)
    new_live = jnp.broadcast_to((jnp.arange(width) < cache.buffered[:, None])[:, None], new_score.shape)

    if scope == "global":
        new_keys = keys_of(new_score, new_position, new_live).reshape(batch, streams * width)
        keys = jnp.concatenate([keys_of(old_score, cache.position, live), new_keys], axis=1)
        if floor:
            new_stream = jnp.broadcast_to(jnp.repeat(jnp.arange(streams, dtype=jnp.int32), width), (batch, streams * width))
            chosen = floor_mask(keys, jnp.concatenate([pool_streams(cache), new_stream], axis=1), streams * cache.budget, floor)
            keys = jnp.where(chosen, HIGHEST, LOWEST)
    else:
        # Groups of streams that compete among themselves; a group's slots are contiguous, and it owns at most its share of C.
        groups = {"layer": layers, "head": streams, "shared": streams}[scope]
        members = streams // groups
        limit = jnp.broadcast_to(members * cache.budget[:, None], (batch, groups))
        share = slots // groups
        if layer_budgets is not None:
            limit, share = jnp.repeat(layer_budgets, groups // layers, axis=1), min(slots, 2 * share)
        group_start = cache.starts[:, ::members]
        # [B, groups, share]
        index = group_start[:, :-1, None] + jnp.arange(share)
        inside = index < group_start[:, 1:, None]
        gather = functools.partial(jax.vmap(lambda row, i: row[i]), i=jnp.minimum(index, slots - 1))
        old_score, old_position = gather(old_score), gather(cache.position)
        if scope == "shared":
            old_score, new_score = (jnp.mean(score, axis=1, keepdims=True) for score in (old_score, new_score))
            old_key, new_key = keys_of(old_score, old_position[:, :1], inside[:, :1]), keys_of(new_score, new_position[:, :1], new_live[:, :1])
            keep = top_k_mask(jnp.concatenate([old_key, new_key], axis=2), cache.budget[:, None])
            keep = jnp.broadcast_to(keep, (batch, streams, share + width))
        else:
            old_key = keys_of(old_score, old_position, inside)
            new_key = keys_of(new_score, new_position, new_live).reshape(batch, groups, members * width)
            keep = top_k_mask(jnp.concatenate([old_key, new_key], axis=2), limit)
        group = pool_streams(cache) // members
        row = jnp.arange(batch)[:, None]
        old_keep = live & keep[row, group, jnp.clip(slot - group_start[row, group], 0, share - 1)]
        # What is chosen outranks all else, and nothing else is valid: the selection below keeps it and finds its places.
        chosen = jnp.concatenate([old_keep, keep[:, :, share:].reshape(batch, streams * width)], axis=1)
        keys = jnp.where(chosen, HIGHEST, LOWEST)
    buffered = jnp.zeros_like(cache.buffered)
    if due is not None:
        stays = jnp.where(jnp.concatenate([live, jnp.zeros((batch, streams * width), bool)], axis=1), HIGHEST, LOWEST)
        keys, buffered = jnp.where(due[:, None], keys, stays), jnp.where(due, 0, cache.buffered)
    selection = select_keys(keys, streams * cache.budget, cache.starts, width)
    pool = compact(
        Pool(cache.keys, cache.values, cache.stat, cache.position),
        Buffer(cache.buffer_keys, cache.buffer_values, cache.buffer_stat, cache.buffer_position),
        selection.destinations,
    )
    return cache._replace(
        **pool._asdict(),
        starts=jnp.pad(jnp.cumsum(selection.counts, axis=1, dtype=jnp.int32), ((0, 0), (1, 0))),
        buffered=buffered,
    )


def kept_positions(cache: Cache, row: int) -> list[list[np.ndarray]]:
    """[layer][head] int arrays: the true positions that sequence `row` holds, in order."""
    layers, _, heads, _ = cache.buffer_stat.shape
    position, starts = np.asarray(cache.position[row]), np.asarray(cache.starts[row])
    buffered = np.asarray(cache.buffer_position[row])[: int(cache.buffered[row])]
    segments = [np.concatenate([position[starts[s] : starts[s + 1]], buffered]) for s in range(layers * heads)]
    return [segments[layer * heads : (layer + 1) * heads] for layer in range(layers)]


def kept_entries(cache: Cache) -> np.ndarray:
    """[B] live entries over all streams, pool and buffer."""
    return np.asarray(cache.starts[:, -1] + cache.buffered * (cache.starts.shape[1] - 1))


def allocated_bytes(cache: Cache) -> int:
    """Bytes of all the cache's arrays, over the whole batch."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
