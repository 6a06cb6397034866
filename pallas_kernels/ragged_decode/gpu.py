"""The GPU kernels (Pallas in its Triton lowering): shares of a sequence's entries at once, then one small kernel that merges what they found.

The segments of a layer's H heads lie end to end in the pool, so a sequence's entries are one list: its slots, then its buffered rows, head by head.
Every program takes an equal share of one sequence's list, whatever streams that covers, and multiplies all H*G queries with each block of it, masked to
their own segments. A share usually touches one or two of the heads, and only their partial results are written.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.cached import check_gpu

MULTIPROCESSORS = 132  # of an H100
PROGRAMS = 4 * MULTIPROCESSORS  # at most, over the whole batch, but at least one a sequence
SHARE = 256  # entries of a share, from which on its partial results are little beside it
BLOCK_BYTES = 16 * 1024  # of keys; three stages of keys and values let two programs live on a multiprocessor
MERGED = 64  # shares merged at a time


def block_size(dim: int, itemsize: int) -> int:
    """Entries of a block."""
    return min(max(BLOCK_BYTES // (dim * itemsize), 16), 128)


def most_shares(batch: int, entries: int, block: int) -> int:
    """Programs of each sequence, if a layer has `entries` on average: enough for one that has twice as many to get one for each block."""
    return min(pl.cdiv(PROGRAMS, batch), pl.cdiv(2 * entries, block))


def share_size(entries, batch: int, shares: int, block: int):
    """How many of a sequence's entries each of its programs takes: whole blocks; SHARE, but fewer if multiprocessors would idle, and more if it must."""
    wanted = jnp.maximum(pl.cdiv(entries, shares), jnp.minimum(SHARE, pl.cdiv(entries, max(MULTIPROCESSORS // batch, 1))))
    return jnp.maximum(pl.cdiv(wanted, block), 1) * block


def listed(layer, starts, buffered, b, heads):
    """Of sequence b: its first slot, how many slots and how many entries it has in this layer."""
    first = starts[b, layer[0] * heads]
    slots = starts[b, (layer[0] + 1) * heads] - first
    return first, slots, slots + heads * buffered[b]


def attend_kernel(layer, starts, buffered, q, *refs, block):
    """One share. All arrays whole, layer [1]. refs: keys and values of pool and buffer, if they have slots at all; largest and total [B,shares,H*G] and
    sums [B,shares,H*G,D], of which only the rows are written that have a total."""
    *cached, largest_out, total_out, sums_out = refs
    b, share = pl.program_id(0), pl.program_id(1)
    batch, heads, group, dim = q.shape
    rows = max(pl.next_power_of_2(heads * group), 16)
    row, column = jnp.arange(rows), jnp.arange(dim)
    head, some = row // group, row < heads * group
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    first, slots, entries = listed(layer, starts, buffered, b, heads)
    size = share_size(entries, batch, pl.num_programs(1), block)
    begin, end = share * size, jnp.minimum((share + 1) * size, entries)

    @pl.when(begin < end)
    def _():
        queries = plgpu.load(
            q.at[*jnp.broadcast_arrays(b, head[:, None], (row % group)[:, None], column)], mask=jnp.broadcast_to(some[:, None], (rows, dim)), other=0
        )
        stream = layer[0] * heads + head
        segment_begin, segment_end = (plgpu.load(starts.at[b, stream + x], mask=some, other=0) for x in (0, 1))

        def attend(keys, values, place, begin, end, visible, state):
            """Adds the entries begin..end of keys[place(entry)] and values[place(entry)]; each query sees those that visible(entry) [rows,block] says."""

            def attend_block(i, state):
                largest, total, sums = state
                entry = begin + i * block + jnp.arange(block)
                # Entries past the end may hold anything, NaN too, and 0 * NaN is NaN.
                live = jnp.broadcast_to((entry < end)[:, None], (block, dim))
                key, value = (plgpu.load(x.at[*place(entry)], mask=live, other=0) for x in (keys, values))
                logits = jax.lax.dot_general(queries, key, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
                logits = jnp.where(visible(entry) & (entry < end)[None, :], logits * (dim**-0.5 * math.log2(math.e)), -jnp.inf)
                new_largest = jnp.maximum(largest, jnp.max(logits, axis=1))
                # A query that has seen nothing yet has -inf for its largest; any finite stand-in keeps exp(-inf) = 0 instead of NaN.
                safe = jnp.where(new_largest == -jnp.inf, 0.0, new_largest)
                weights, decay = jnp.exp2(logits - safe[:, None]), jnp.exp2(largest - safe)
                update = jnp.dot(weights.astype(value.dtype), value, precision=precision, preferred_element_type=jnp.float32)
                return new_largest, total * decay + jnp.sum(weights, axis=1), sums * decay[:, None] + update

            return jax.lax.fori_loop(0, pl.cdiv(jnp.maximum(end - begin, 0), block), attend_block, state)

        state = jnp.full((rows,), -jnp.inf, jnp.float32), jnp.zeros((rows,), jnp.float32), jnp.zeros((rows, dim), jnp.float32)
        if len(cached) == 4:
            state = attend(
                *cached[:2],
                lambda slot: jnp.broadcast_arrays(b, slot[:, None], column),
                first + begin,
                first + jnp.minimum(end, slots),
                lambda slot: (slot[None, :] >= segment_begin[:, None]) & (slot[None, :] < segment_end[:, None]),
                state,
            )
        in_each = jnp.maximum(buffered[b], 1)

        def of_head(entry):
            return jax.lax.div(entry, jnp.broadcast_to(in_each, entry.shape))

        largest, total, sums = attend(
            *cached[-2:],
            lambda entry: jnp.broadcast_arrays(layer[0], b, of_head(entry)[:, None], (entry - of_head(entry) * in_each)[:, None], column),
            jnp.maximum(begin - slots, 0),
            end - slots,
            lambda entry: of_head(entry)[None, :] == head[:, None],
            state,
        )
        plgpu.store(largest_out.at[b, share, row], largest, mask=some)
        plgpu.store(total_out.at[b, share, row], total, mask=some)
        place = jnp.broadcast_arrays(b, share, row[:, None], column)
        plgpu.store(sums_out.at[*place], sums, mask=jnp.broadcast_to((some & (total > 0))[:, None], (rows, dim)))


def merge_kernel(layer, starts, buffered, q, k, v, largest_in, total_in, sums_in, out, *, block):
    """One query: its shares and its own token, in one softmax."""
    b, row = pl.program_id(0), pl.program_id(1)
    batch, heads, group, dim = q.shape
    head = row // group
    _, _, entries = listed(layer, starts, buffered, b, heads)
    shares = pl.cdiv(entries, share_size(entries, batch, largest_in.shape[1], block))
    own = jnp.sum(q[b, head, row % group].astype(jnp.float32) * k[b, head].astype(jnp.float32)) * (dim**-0.5 * math.log2(math.e))

    def merge(i, state):
        largest, total, sums = state
        share = i * MERGED + jnp.arange(MERGED)
        parts = plgpu.load(total_in.at[b, share, row], mask=share < shares, other=0)
        has = parts > 0
        peaks = plgpu.load(largest_in.at[b, share, row], mask=has, other=-jnp.inf)
        place = jnp.broadcast_arrays(b, share[:, None], row, jnp.arange(dim))
        partial_sums = plgpu.load(sums_in.at[*place], mask=jnp.broadcast_to(has[:, None], (MERGED, dim)), other=0)
        new_largest = jnp.maximum(largest, jnp.max(peaks))
        weights, decay = jnp.exp2(peaks - new_largest), jnp.exp2(largest - new_largest)
        return new_largest, total * decay + jnp.sum(parts * weights), sums * decay + jnp.sum(partial_sums * weights[:, None], axis=0)

    _, total, sums = jax.lax.fori_loop(0, pl.cdiv(shares, MERGED), merge, (own, jnp.float32(1), v[b, head].astype(jnp.float32)))
    out[b, head, row % group] = (sums / total).astype(out.dtype)


def ragged_decode(q, k, v, pool_keys, pool_values, starts, buffer_keys, buffer_values, buffered, layer, interpret=False):
    """As the package's ragged_decode."""
    batch, heads, group, dim = q.shape
    check_gpu(dim)
    block = block_size(dim, q.dtype.itemsize)
    shares = most_shares(batch, pl.cdiv(pool_keys.shape[1], buffer_keys.shape[0]) + heads * buffer_keys.shape[3], block)
    layer = jnp.asarray(layer, jnp.int32)[None]
    cached = [x for x in (pool_keys, pool_values, buffer_keys, buffer_values) if x.size]
    partial = jax.ShapeDtypeStruct((batch, shares, heads * group), jnp.float32)
    parts = pl.pallas_call(
        functools.partial(attend_kernel, block=block),
        grid=(batch, shares),
        out_shape=[partial, partial, jax.ShapeDtypeStruct((*partial.shape, dim), jnp.float32)],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="ragged_decode",
    )(layer, starts, buffered, q, *cached)
    return pl.pallas_call(
        functools.partial(merge_kernel, block=block),
        grid=(batch, heads * group),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="ragged_decode_merge",
    )(layer, starts, buffered, q, k, v, *parts)
