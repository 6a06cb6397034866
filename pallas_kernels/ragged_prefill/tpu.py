"""The TPU kernel (Mosaic): flash attention whose blocks of cached keys are fetched by a loop as long as what is cached.

A program has one kv head and one block of queries, with all their G query heads as rows of one matrix. Pool and buffer stay in HBM, whole: a program
fetches the blocks that its segment touches, each while the one before is worked on. The first block of the chunk's own keys comes with the program,
so that its arithmetic hides the first fetch; every query sees the chunk's first token, so that from there on no maximum is infinite.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
ROW_BYTES = 2048  # of one column of a program's query rows: at most 1024 rows of bfloat16, all of T=256 and G=4, which then reads each segment once
BLOCK = 512  # keys of a block: the longer, the less its start weighs (on v6e half as long a one costs 0.7 of its time) ...
HALF = 256  # ... and what is fetched of it and worked on if that is enough


class Part(NamedTuple):
    """Rows offset..offset+rows of pool or buffer; a tail, the last few that no aligned fetch reaches, is an array of its own."""

    pool: bool
    tail: bool
    offset: int
    rows: int


class Source(NamedTuple):
    """Where a program fetches: blocks first..last of its loop are the blocks of `size` rows that entries begin..end of keys and values [rows,D] touch."""

    keys: jax.Array
    values: jax.Array
    size: int
    begin: jax.Array
    end: jax.Array
    first: jax.Array
    last: jax.Array


def sublanes(dtype) -> int:
    """Rows of a tile in memory: a fetch starts at a multiple of them."""
    return 32 // jnp.dtype(dtype).itemsize


def queries_block(length: int, group: int, dtype) -> int:
    """Queries of a program: T split evenly, rows of no more than ROW_BYTES."""
    align = sublanes(dtype)
    most = max(ROW_BYTES // jnp.dtype(dtype).itemsize // group // align * align, align)
    return pl.cdiv(pl.cdiv(length, pl.cdiv(length, most)), align) * align


def chunk_block(length: int) -> int:
    """Keys of a block of the chunk."""
    return min(HALF, pl.cdiv(length, LANES) * LANES)


def parts(slots: int, width: int, dtype) -> list[Part]:
    """What there is to fetch from, for C slots and a buffer of W."""
    align, found = sublanes(dtype), []
    for pool, rows in ((True, slots), (False, width)):
        whole = rows // align * align
        if whole:
            found.append(Part(pool, False, 0, whole))
        if rows > whole:
            found.append(Part(pool, True, whole, align))
    return found


def touched(part: Part, begin, end, dtype):
    """Entries begin..end of pool or buffer as rows of `part`, and how many blocks they touch: (begin, end, count)."""
    begin, end = jnp.maximum(begin - part.offset, 0), jnp.minimum(end - part.offset, part.rows)
    return begin, end, jnp.where(end > begin, pl.cdiv(end - (begin & -sublanes(dtype)), min(BLOCK, part.rows)), 0)


def block_row(i, begin, rows: int, size: int, dtype):
    """The row from which block i is fetched; one that would run past the last row is moved back."""
    return jnp.minimum((begin & -sublanes(dtype)) + i * size, rows - size)


def spread(x, width: int):
    """x [rows,128], the same in all lanes, as [rows,width]."""
    return x[:, :width] if width < LANES else jnp.tile(x, (1, width // LANES))


def kernel(layer, valid, starts, buffered, q, first_keys, first_values, *refs, parts):
    """The attention of one block of queries of one kv head.

    layer [1], valid [B], starts [B*(H+1)], buffered [B] in SMEM; q [1,1,G,queries,D]; first_keys, first_values [1,1,block,D]. refs: keys and values of
    the chunk [B,H,T,D] and of each part in HBM; the output; landing places of two blocks [2,rows,D] for keys and for values, their semaphores; the
    state of the softmax: largest [rows,128], totals by lane [rows,128], sums [rows,D].
    """
    *sources, out, key_blocks, value_blocks, semaphores, largest, total, sums = refs
    batch, head, tile = (pl.program_id(axis) for axis in range(3))
    group, queries, dim = q.shape[2:]
    rows, dtype, block = group * queries, q.dtype, first_keys.shape[2]
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    first_query, length = tile * queries, valid[batch]
    seen = jnp.minimum(first_query + queries, length)  # how much of the chunk

    def attend(keys, values, begin, end, diagonal=None):
        """Adds keys begin..end of a block; with `diagonal`, query i sees those up to diagonal + i."""
        size = keys.shape[0]
        logits = jax.lax.dot_general(
            q[0, 0].reshape(rows, dim), keys, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
        )
        if diagonal is None:
            column = jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
            visible = (column >= begin) & (column < end)
        else:
            query, column = (jax.lax.broadcasted_iota(jnp.int32, (group, queries, size), axis) for axis in (1, 2))
            visible = (column - query <= diagonal).reshape(rows, size)
        logits = jnp.where(visible, logits * (dim**-0.5 * math.log2(math.e)), -jnp.inf)
        # Rows that nobody sees may hold anything, NaN too, and 0 * NaN is NaN.
        row = jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
        values = jnp.where((row >= begin) & (row < end), values, 0)
        new_largest = jnp.maximum(largest[...], jnp.max(logits, axis=1, keepdims=True))
        weights, decay = jnp.exp2(logits - spread(new_largest, size)), jnp.exp2(largest[...] - new_largest)
        largest[...] = new_largest
        # Each lane keeps its own total: adding up lanes is slow, and once at the end is enough.
        total[...] = total[...] * decay + sum(weights[:, at : at + LANES] for at in range(0, size, LANES))
        update = jnp.dot(weights.astype(dtype), values, precision=precision, preferred_element_type=jnp.float32)
        sums[...] = sums[...] * spread(decay, dim) + update

    @pl.when(first_query >= length)
    def _():
        out[...] = jnp.zeros_like(out)

    @pl.when(first_query < length)
    def _():
        cached, count = [], 0
        for part, keys, values in zip(parts, sources[2::2], sources[3::2], strict=True):
            if part.pool:
                place, bounds = (batch,), [starts[batch * (pl.num_programs(1) + 1) + head + i] for i in (0, 1)]
            else:
                place, bounds = (0 if part.tail else layer[0], batch, head), [0, buffered[batch]]
            begin, end, blocks = touched(part, *bounds, dtype)
            cached.append(Source(keys.at[place], values.at[place], min(BLOCK, part.rows), begin, end, count, count + blocks))
            count += blocks
        cached_blocks = count
        own = []
        if sources[0].shape[2] > block:
            count += pl.cdiv(seen, block) - 1
            own.append(Source(*(x.at[batch, head] for x in sources[:2]), block, block, seen, cached_blocks, count))

        def row_of(source, i):
            return block_row(i - source.first, source.begin, source.keys.shape[0], source.size, dtype)

        def each_copy(i, act):
            for source in cached + own:
                row = row_of(source, i)
                for at in range(0, source.size, HALF):

                    @pl.when((i >= source.first) & (i < source.last) & (source.end > row + at))
                    def _(source=source, row=row, at=at):
                        size = min(HALF, source.size - at)
                        from_rows = pl.ds(pl.multiple_of(row + at, sublanes(dtype)), size)
                        for x, (array, landing) in enumerate(((source.keys, key_blocks), (source.values, value_blocks))):
                            act(pltpu.make_async_copy(array.at[from_rows], landing.at[i & 1, pl.ds(at, size)], semaphores.at[i & 1, x]))

        def fetch(i):
            @pl.when(i + 1 < count)
            def _():
                each_copy(i + 1, lambda copy: copy.start())

            each_copy(i, lambda copy: copy.wait())

        def attend_cached(i, _):
            fetch(i)
            begin, end = 0, 0
            for source in cached:
                row, mine = row_of(source, i), i >= source.first
                new = jnp.maximum(source.begin, (source.begin & -sublanes(dtype)) + (i - source.first) * source.size)
                begin, end = jnp.where(mine, new - row, begin), jnp.where(mine, source.end - row, end)
            for size in range(HALF, key_blocks.shape[1] + 1, HALF):

                @pl.when((end > HALF) == (size > HALF))
                def _(size=size):
                    attend(key_blocks[i & 1, :size], value_blocks[i & 1, :size], begin, end)

        def attend_own(i, _):
            fetch(i)
            row = row_of(own[0], i)
            attend(key_blocks[i & 1, :block], value_blocks[i & 1, :block], 0, seen - row, first_query - row)

        largest[...] = jnp.full_like(largest, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

        @pl.when(count > 0)
        def _():
            each_copy(0, lambda copy: copy.start())

        attend(first_keys[0, 0], first_values[0, 0], 0, seen, first_query)
        if cached:
            jax.lax.fori_loop(0, cached_blocks, attend_cached, None)
        if own:
            jax.lax.fori_loop(cached_blocks, count, attend_own, None)
        query = first_query + jax.lax.broadcasted_iota(jnp.int32, (group, queries, dim), 1)
        result = (sums[...] / jnp.sum(total[...], axis=1, keepdims=True)).reshape(group, queries, dim)
        out[0, 0] = jnp.where(query < length, result, 0).astype(dtype)


def ragged_prefill(q, k, v, valid, pool_keys, pool_values, starts, buffer_keys, buffer_values, buffered, layer, interpret=False):
    """The package's ragged_prefill. Pool and buffer are not copied where C and W are multiples of 16 (8 in float32) and D of 128."""
    batch, length, heads, group, dim = q.shape
    dtype, layer = q.dtype, jnp.asarray(layer, jnp.int32)
    queries, block = queries_block(length, group, dtype), chunk_block(length)
    # [B, H, G, T, D], [B, H, T, D], T padded to whole blocks
    q = jnp.pad(jnp.transpose(q, (0, 2, 3, 1, 4)), ((0, 0), (0, 0), (0, 0), (0, -length % queries), (0, 0)))
    k, v = (jnp.pad(jnp.moveaxis(x, 1, 2), ((0, 0), (0, 0), (0, -length % block), (0, 0))) for x in (k, v))
    segments = jax.lax.dynamic_slice_in_dim(starts, layer * heads, heads + 1, axis=1)

    def source(part, array):
        if not part.tail:
            return array
        array = array if part.pool else jax.lax.dynamic_slice_in_dim(array, layer, 1)
        tail = array[..., part.offset :, :]
        return jnp.pad(tail, [(0, 0)] * (tail.ndim - 2) + [(0, part.rows - tail.shape[-2]), (0, 0)])

    cached = parts(pool_keys.shape[1], buffer_keys.shape[3], dtype)
    sources = [k, v]
    for part in cached:
        sources += [source(part, x) for x in ((pool_keys, pool_values) if part.pool else (buffer_keys, buffer_values))]
    landing = HALF if all(part.rows <= HALF for part in cached) else BLOCK

    def tile_place(batch, head, tile, layer, valid, *_):
        # Where a sequence has ended nothing is fetched: the block before stays.
        return batch, head, 0, jnp.minimum(tile, jnp.maximum(pl.cdiv(valid[batch], queries) - 1, 0)), 0

    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    first_block = pl.BlockSpec((1, 1, block, dim), lambda batch, head, *_: (batch, head, 0, 0))
    out = pl.pallas_call(
        functools.partial(kernel, parts=cached),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(batch, heads, pl.cdiv(length, queries)),
            in_specs=[pl.BlockSpec((1, 1, group, queries, dim), tile_place), first_block, first_block] + [in_hbm] * len(sources),
            out_specs=pl.BlockSpec((1, 1, group, queries, dim), lambda batch, head, tile, *_: (batch, head, 0, tile, 0)),
            scratch_shapes=[
                pltpu.VMEM((2, landing, dim), dtype),
                pltpu.VMEM((2, landing, dim), dtype),
                pltpu.SemaphoreType.DMA((2, 2)),
                pltpu.VMEM((group * queries, LANES), jnp.float32),
                pltpu.VMEM((group * queries, LANES), jnp.float32),
                pltpu.VMEM((group * queries, dim), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="ragged_prefill",
    )(layer[None], valid, segments.reshape(-1), buffered, q, k, v, *sources)
    return jnp.transpose(out[:, :, :, :length], (0, 3, 1, 2, 4))
