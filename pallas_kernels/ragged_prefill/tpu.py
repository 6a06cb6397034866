"""The TPU kernel (Mosaic): flash attention whose blocks of cached keys are fetched by a loop as long as what is cached.

A program has one kv head and one block of queries, with all their G query heads as rows of one matrix. Pool and buffer stay in HBM, whole: a program
fetches the blocks that its segment touches, each while the one before is worked on. The first block of the chunk's own keys comes with the program,
so that its arithmetic hides the first fetch; every query sees the chunk's first token, so that from there on no maximum is infinite.
"""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.cached import LANES, along_lanes

ROW_BYTES = 2048  # of one column of a program's query rows: at most 1024 rows of bfloat16, all of T=256 and G=4, which then reads each segment once
BLOCK = 512  # keys of a block: the longer, the less its start weighs (on v6e half as long a one costs 0.7 of its time) ...
HALF = 256  # ... and what is fetched of it and worked on if that is enough


class Part(NamedTuple):
    """Entries offset..offset+entries of pool, buffer or chunk, which are fetched in blocks from multiples of `tile`.

    A tail, the last few that no whole tile holds, is an array of its own. lanes: entries lie along lanes, [..,D,entries], as XLA lays out arrays
    whose D would leave lanes empty; any other way would cost a copy.
    """

    of: str
    lanes: bool
    tail: bool
    offset: int
    entries: int
    tile: int
    block: int

    def touched(self, begin, end):
        """Where in the part the entries begin..end of the whole are, and how many blocks they touch: (begin, end, count)."""
        begin, end = jnp.maximum(begin - self.offset, 0), jnp.minimum(end - self.offset, self.entries)
        return begin, end, jnp.where(end > begin, pl.cdiv(end - (begin & -self.tile), self.block), 0)

    def place(self, i, begin):
        """Of the block i that entries from `begin` on touch: the entry from which it is fetched, and the first that counts.

        A block that would run past the end is moved back, and what it repeats does not count.
        """
        at = (begin & -self.tile) + i * self.block
        return jnp.minimum(at, self.entries - self.block), jnp.maximum(at, begin)


class Source(NamedTuple):
    """What a program fetches of a part: entries begin..end of keys and values [entries,D], which are the blocks first..last of its loop."""

    part: Part
    keys: jax.Array
    values: jax.Array
    begin: jax.Array
    end: jax.Array
    first: jax.Array
    last: jax.Array


def sublanes(dtype) -> int:
    """Rows of a tile in memory."""
    return 32 // jnp.dtype(dtype).itemsize


def queries_block(length: int, group: int, dtype) -> int:
    """Queries of a program: T split evenly, rows of no more than ROW_BYTES."""
    align = sublanes(dtype)
    most = max(ROW_BYTES // jnp.dtype(dtype).itemsize // group // align * align, align)
    return pl.cdiv(pl.cdiv(length, pl.cdiv(length, most)), align) * align


def chunk_block(length: int) -> int:
    """Keys of a block of the chunk."""
    return min(HALF, pl.cdiv(length, LANES) * LANES)


def parts(slots: int, width: int, length: int, dim: int, dtype) -> list[Part]:
    """What there is to fetch, for C slots, a buffer of W and a chunk of T; side by side what one loop can go through."""
    found, block = [], chunk_block(length)
    for of, entries in (("pool", slots), ("buffer", width)):
        lanes = along_lanes(entries, dim)
        tile = LANES if lanes else sublanes(dtype)
        whole = entries // tile * tile
        if whole:
            found.append(Part(of, lanes, False, 0, whole, tile, min(BLOCK, whole)))
        if entries > whole:
            found.append(Part(of, lanes, True, whole, tile, tile, tile))
    if length > block:
        found.append(Part("chunk", False, False, 0, pl.cdiv(length, block) * block, block, block))
    return sorted(found, key=kind)


def kind(part: Part) -> tuple[bool, bool]:
    return part.lanes, part.of == "chunk"


def spread(x, width: int):
    """x [rows,128], the same in all lanes, as [rows,width]."""
    return x[:, :width] if width < LANES else jnp.tile(x, (1, width // LANES))


def kernel(layer, valid, starts, buffered, q, first_keys, first_values, *refs, parts):
    """The attention of one block of queries of one kv head.

    layer [1], valid [B], starts [B*(H+1)], buffered [B] in SMEM; q [1,1,G,queries,D]; first_keys, first_values [1,1,block,D]. refs: keys and values
    of each part in HBM; the output; for rows and for lanes, where used, the landing places of two blocks of keys and of values; the semaphores of
    those; the state of the softmax: largest [rows,128], totals by lane [rows,128], sums [rows,D].
    """
    sources, (out, *landings, semaphores, largest, total, sums) = refs[: 2 * len(parts)], refs[2 * len(parts) :]
    landings = dict(zip(sorted({part.lanes for part in parts}), zip(landings[::2], landings[1::2], strict=True), strict=True))
    batch, head, tile = (pl.program_id(axis) for axis in range(3))
    group, queries, dim = q.shape[2:]
    rows, dtype, block = group * queries, q.dtype, first_keys.shape[2]
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    first_query, length = tile * queries, valid[batch]
    seen = jnp.minimum(first_query + queries, length)  # how much of the chunk

    def attend(keys, values, begin, end, diagonal=None, lanes=False):
        """Adds entries begin..end of a block; with `diagonal`, query i sees those up to diagonal + i."""
        size = keys.shape[lanes]
        logits = jax.lax.dot_general(
            q[0, 0].reshape(rows, dim), keys, (((1,), (1 - lanes,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
        )
        if diagonal is None:
            entry = jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
            visible = (entry >= begin) & (entry < end)
        else:
            query, entry = (jax.lax.broadcasted_iota(jnp.int32, (group, queries, size), axis) for axis in (1, 2))
            visible = (entry - query <= diagonal).reshape(rows, size)
        logits = jnp.where(visible, logits * (dim**-0.5 * math.log2(math.e)), -jnp.inf)
        # Entries that nobody sees may be anything, NaN too, and 0 * NaN is NaN.
        entry = jax.lax.broadcasted_iota(jnp.int32, (1, size) if lanes else (size, 1), lanes)
        values = jnp.where((entry >= begin) & (entry < end), values, 0)
        new_largest = jnp.maximum(largest[...], jnp.max(logits, axis=1, keepdims=True))
        weights, decay = jnp.exp2(logits - spread(new_largest, size)), jnp.exp2(largest[...] - new_largest)
        largest[...] = new_largest
        # Each lane keeps its own total: adding up lanes is slow, and once at the end is enough.
        total[...] = total[...] * decay + sum(weights[:, at : at + LANES] for at in range(0, size, LANES))
        update = jax.lax.dot_general(weights.astype(dtype), values, (((1,), (int(lanes),)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
        sums[...] = sums[...] * spread(decay, dim) + update

    @pl.when(first_query >= length)
    def _():
        out[...] = jnp.zeros_like(out)

    @pl.when(first_query < length)
    def _():
        fetched, count = [], 0
        for part, keys, values in zip(parts, sources[::2], sources[1::2], strict=True):
            segment = batch * (pl.num_programs(1) + 1) + head
            place, begin, end = {
                "pool": ((batch,), starts[segment], starts[segment + 1]),
                "buffer": ((0 if part.tail else layer[0], batch, head), 0, buffered[batch]),
                "chunk": ((batch, head), block, seen),
            }[part.of]
            begin, end, blocks = part.touched(begin, end)
            fetched.append(Source(part, keys.at[place], values.at[place], begin, end, count, count + blocks))
            count += blocks

        def each_copy(i, act):
            slot = i & 1
            for source in fetched:
                part = source.part
                begin, _ = part.place(i - source.first, source.begin)
                for at in range(0, part.block, HALF):

                    @pl.when((i >= source.first) & (i < source.last) & (source.end > begin + at))
                    def _(source=source, part=part, begin=begin, at=at):
                        size, columns = min(HALF, part.block - at), (slice(None),) * part.lanes
                        place = pl.ds(pl.multiple_of(begin + at, part.tile), size)
                        for x, array, landing in zip((0, 1), (source.keys, source.values), landings[part.lanes], strict=True):
                            landed = landing.at[slot, *columns, pl.ds(at, size)]
                            act(pltpu.make_async_copy(array.at[*columns, place], landed, semaphores.at[slot, x]))

        def attend_block(i, sources):
            @pl.when(i + 1 < count)
            def _():
                each_copy(i + 1, lambda copy: copy.start())

            each_copy(i, lambda copy: copy.wait())
            at, begin, end = 0, 0, 0
            for source in sources:
                place, first = source.part.place(i - source.first, source.begin)
                new = place, first - place, jnp.minimum(source.end - place, source.part.block)
                at, begin, end = (jnp.where(i >= source.first, x, y) for x, y in zip(new, (at, begin, end), strict=True))
            lanes, chunk = kind(sources[0].part)
            for size in sorted({HALF, BLOCK if max(source.part.block for source in sources) > HALF else HALF}):

                @pl.when((end > HALF) == (size > HALF))
                def _(size=size):
                    place = (i & 1, *(slice(None),) * lanes, slice(size))
                    keys, values = (landing[place] for landing in landings[lanes])
                    attend(keys, values, begin, end, first_query - at if chunk else None, lanes)

        largest[...] = jnp.full_like(largest, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

        @pl.when(count > 0)
        def _():
            each_copy(0, lambda copy: copy.start())

        attend(first_keys[0, 0], first_values[0, 0], 0, seen, first_query)
        for _, alike in itertools.groupby(fetched, lambda source: kind(source.part)):
            alike = list(alike)
            jax.lax.fori_loop(alike[0].first, alike[-1].last, lambda i, _, alike=alike: attend_block(i, alike), None)
        query = first_query + jax.lax.broadcasted_iota(jnp.int32, (group, queries, dim), 1)
        result = (sums[...] / jnp.sum(total[...], axis=1, keepdims=True)).reshape(group, queries, dim)
        out[0, 0] = jnp.where(query < length, result, 0).astype(dtype)


def ragged_prefill(q, k, v, valid, pool_keys, pool_values, starts, buffer_keys, buffer_values, buffered, layer, interpret=False):
    """As the package's ragged_prefill."""
    batch, length, heads, group, dim = q.shape
    dtype, layer = q.dtype, jnp.asarray(layer, jnp.int32)
    if dim > LANES and dim % LANES:
        raise ValueError(f"q has rows of {dim}: on a TPU up to {LANES}, or a multiple of it, would work")
    queries, block = queries_block(length, group, dtype), chunk_block(length)
    # [B, H, G, T, D], [B, H, T, D], T padded to whole blocks
    q = jnp.pad(jnp.transpose(q, (0, 2, 3, 1, 4)), ((0, 0), (0, 0), (0, 0), (0, -length % queries), (0, 0)))
    k, v = (jnp.pad(jnp.moveaxis(x, 1, 2), ((0, 0), (0, 0), (0, -length % block), (0, 0))) for x in (k, v))
    segments = jax.lax.dynamic_slice_in_dim(starts, layer * heads, heads + 1, axis=1)

    def array_of(part, array):
        if part.tail:
            array = jax.lax.dynamic_slice_in_dim(array, layer, 1) if part.of == "buffer" else array
            array = array[..., part.offset :, :]
            array = jnp.pad(array, [(0, 0)] * (array.ndim - 2) + [(0, part.entries - array.shape[-2]), (0, 0)])
        return jnp.swapaxes(array, -1, -2) if part.lanes else array

    fetched = parts(pool_keys.shape[1], buffer_keys.shape[3], length, dim, dtype)
    pairs = {"pool": (pool_keys, pool_values), "buffer": (buffer_keys, buffer_values), "chunk": (k, v)}
    sources = [array_of(part, array) for part in fetched for array in pairs[part.of]]
    landings = []
    for lanes in sorted({part.lanes for part in fetched}):
        size = HALF if max(part.block for part in fetched if part.lanes == lanes) <= HALF else BLOCK
        landings += [pltpu.VMEM((2, dim, size) if lanes else (2, size, dim), dtype)] * 2

    def tile_place(batch, head, tile, layer, valid, *_):
        # Where a sequence has ended nothing is fetched: the block before stays.
        return batch, head, 0, jnp.minimum(tile, jnp.maximum(pl.cdiv(valid[batch], queries) - 1, 0)), 0

    first_block = pl.BlockSpec((1, 1, block, dim), lambda batch, head, *_: (batch, head, 0, 0))
    out = pl.pallas_call(
        functools.partial(kernel, parts=fetched),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(batch, heads, pl.cdiv(length, queries)),
            in_specs=[pl.BlockSpec((1, 1, group, queries, dim), tile_place), first_block, first_block] + [pl.BlockSpec(memory_space=pl.ANY)] * len(sources),
            out_specs=pl.BlockSpec((1, 1, group, queries, dim), lambda batch, head, tile, *_: (batch, head, 0, tile, 0)),
            scratch_shapes=[
                *landings,
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
