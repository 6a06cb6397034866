"""The TPU kernel (Mosaic): one flat list of blocks, fetched from HBM by hand, the next ones always under way.

The segments of a layer's H heads lie end to end in the pool, so the kernel walks their common slot range in blocks, multiplies all H*G queries with
each block (a matrix unit has those rows anyway) and masks each query to its own segment. Work is split by entries, not by streams: a long stream
serialises nothing and a short one is not padded. The write buffer follows in the same way, some entries of all heads making one block.
A sequence's list is its pool blocks, then its buffer blocks; those of all sequences make one list, over which the fetches run ahead.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.cached import LANES, along_lanes

BLOCK_BYTES = 512 * 1024  # of keys, and as many of values
DEPTH = 4  # blocks in VMEM: one is worked on, three are under way
LOWEST = -1e30  # stands for -inf, of which differences are NaN


class Source(NamedTuple):
    """How the entries of the pool or of the buffer lie in HBM, and how they are cut into blocks.

    entries: C or W. heads: those of which a block holds `block` entries each; None for the pool, where they lie end to end. block: a power of two.
    tile: fetches begin and end at its multiples. lanes: entries lie along lanes, features along sublanes; that is how XLA lays out arrays whose D would
    leave lanes empty, and any other way would cost a copy.
    """

    entries: int
    heads: int | None
    block: int
    tile: int
    lanes: bool

    @property
    def whole(self) -> int:
        """The entries in whole tiles. The rest come as an array of their own, padded to a tile: no fetch runs past an array's end."""
        return self.entries // self.tile * self.tile

    def span(self, begin, end):
        """The entry at which the first block of the entries begin..end begins, and how many blocks there are."""
        first = begin & -self.tile
        return first, jnp.where(end > begin, (end - first + self.block - 1) // self.block, 0)

    def fetched(self, at, end):
        """Of a block that begins at `at`: how many entries in whole tiles are to be fetched, and whether the rest is."""
        count = jnp.minimum((end - at + self.tile - 1) & -self.tile, self.block)
        whole = jnp.minimum(count, self.whole - at)
        return whole, count > whole

    def pieces(self, whole):
        """(size, offset, needed) of the fetches that can bring the first `whole` entries of a block, fewer than all: of sizes that are static."""
        size = self.block // 2
        while size >= self.tile:
            if size <= self.whole:
                yield size, whole & -(2 * size), whole & size != 0
            size //= 2

    def slice(self, at, size: int) -> tuple:
        """Indexes the entries at..at+size of an array of one sequence."""
        index = (pl.ds(at, size),) if self.lanes else (pl.ds(at, size), slice(None))
        return (slice(None),) * ((self.heads is not None) + self.lanes) + index

    def landing(self, dim: int, dtype) -> pltpu.VMEM:
        block = (dim, self.block) if self.lanes else (self.block, dim)
        return pltpu.VMEM((DEPTH, *(() if self.heads is None else (self.heads,)), *block), dtype)

    def arrays(self, array: jax.Array, layer: jax.Array) -> list[jax.Array]:
        """What the kernel gets of pool or buffer: all of it, and the rest; one of them if the other would be empty."""
        rest = array if self.heads is None else jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)
        rest = rest[..., self.whole :, :]
        rest = jnp.pad(rest, [(0, 0)] * (rest.ndim - 2) + [(0, self.whole + self.tile - self.entries), (0, 0)])
        both = [array] * (self.whole > 0) + [rest] * (self.whole < self.entries)
        return [jnp.swapaxes(x, -1, -2) for x in both] if self.lanes else both


def sources(heads: int, dim: int, itemsize: int, slots: int, width: int) -> list[Source]:
    """The pool, if it has slots, and the buffer."""

    def source(entries, heads):
        lanes = along_lanes(entries, dim)
        tile = LANES if lanes else 32 // itemsize
        most = max(min(BLOCK_BYTES // ((heads or 1) * dim * itemsize), entries), tile)
        return Source(entries, heads, 1 << (most.bit_length() - 1), tile, lanes)

    return ([source(slots, None)] if slots else []) + [source(width, heads)]


def kernel(bounds, buffered, layer, q, k, v, *refs, found, group, shares):
    """One share of the list, all of it where there is one TensorCore.

    bounds [B*(H+1)], buffered [B], layer [1] in SMEM; q, k, v [B,H*G,D], k and v repeated for their G queries. refs: for each source its keys and its
    values in HBM, whole and rest; out [1,B,H*G,D] and, of several shares, its logsumexp [1,B,H*G,1]; for each source DEPTH blocks of keys and of values;
    their semaphores [DEPTH,2]; largest and total [H*G,1], and sums [H*G,D].
    """
    take = iter(refs)
    arrays = [[[next(take) for _ in range((s.whole > 0) + (s.whole < s.entries))] for _ in "kv"] for s in found]
    outs = [next(take) for _ in range(1 + (shares > 1))]
    landings = [[next(take) for _ in "kv"] for _ in found]
    semaphores, largest, total, sums = take
    batch, rows, dim = q.shape
    heads = rows // group
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    dot = functools.partial(jax.lax.dot_general, precision=precision, preferred_element_type=jnp.float32)

    def bound(b, head):
        return bounds[b * (heads + 1) + head]

    def spans(b):
        """Of sequence b, for each source: its number, its first entry and its end, the first of its items and their end."""
        items = 0
        for number, source in enumerate(found):
            begin, end = (bound(b, 0), bound(b, heads)) if source.heads is None else (0, buffered[b])
            first, blocks = source.span(begin, end)
            yield number, first, end, items, items + blocks
            items += blocks

    def count(b):
        """The items of sequence b: its blocks, or a single one without any."""
        return jnp.maximum([items for *_, items in spans(b)][-1], 1)

    def following(b, i):
        last = i + 1 == count(jnp.minimum(b, batch - 1))
        return jnp.where(last, b + 1, b), jnp.where(last, 0, i + 1)

    def each_fetch(b, i, slot, act):
        for number, first, end, items, items_end in spans(b):
            source = found[number]

            def fetch(size, begin, offset, rest=False, source=source, number=number):
                place = (b,) if rest or source.heads is None else (layer[0], b)
                for x in (0, 1):
                    origin = arrays[number][x][-1 if rest else 0].at[(*place, *source.slice(begin, size))]
                    landing = landings[number][x].at[(slot, *source.slice(offset, size))]
                    act(pltpu.make_async_copy(origin, landing, semaphores.at[slot, x]))

            # Branch within branch: what is not needed here still costs the scalar core some cycles where it is only predicated.
            @pl.when((i >= items) & (i < items_end))
            def _(source=source, fetch=fetch, first=first, end=end, items=items):
                at = pl.multiple_of(first + (i - items) * source.block, source.tile)
                whole, rest = source.fetched(at, end)
                if source.block <= source.whole:

                    @pl.when(whole == source.block)
                    def _():
                        fetch(source.block, at, 0)

                @pl.when(whole < source.block)
                def _():
                    for size, offset, needed in source.pieces(whole):

                        @pl.when(needed)
                        def _(size=size, offset=offset):
                            fetch(size, pl.multiple_of(at + offset, source.tile), pl.multiple_of(offset, source.tile))

                    if source.whole < source.entries:

                        @pl.when(rest)
                        def _():
                            fetch(source.tile, 0, pl.multiple_of(whole, source.tile), rest=True)

    def by_head(values):
        """[H*G,1] int32 from a scalar for each kv head."""
        row = jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
        out = jnp.full((rows, 1), values[0])
        for head, value in enumerate(values[1:], 1):
            out = jnp.where(row >= head * group, value, out)
        return out

    def attend(source, number, b, slot, at, end):
        keys, values = (x.at[slot] for x in landings[number])
        if source.heads is None:
            live = bound(b, 0) - at, end - at
            limits = [bound(b, head) - at for head in range(heads + 1)]
            begin, end = by_head(limits[:-1]), by_head(limits[1:])
        else:
            live = 0, end - at
            offsets = [head * source.block for head in range(heads)]
            begin, end = by_head(offsets), by_head([x + jnp.minimum(live[1], source.block) for x in offsets])

        # What else the block holds may be NaN, and 0 * NaN is NaN.
        @pl.when((live[0] > 0) | (live[1] < source.block))
        def _():
            entry = jax.lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - (1 if source.lanes else 2))
            values[...] = jnp.where((entry >= live[0]) & (entry < live[1]), values[...], 0)

        def matrices(ref):
            """The block as matrices [entries,D], or [D,entries] if they lie along lanes."""
            if source.lanes and source.heads is not None:
                return [ref[head] for head in range(heads)]
            return [ref[...].reshape(-1, ref.shape[-1])]

        entries = 1 if source.lanes else 0
        logits = [dot(q[b], x, (((1,), (1 - entries,)), ((), ()))) for x in matrices(keys)]
        logits = logits[0] if len(logits) == 1 else jnp.concatenate(logits, axis=1)
        column = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        logits = jnp.where((column >= begin) & (column < end), logits * dim**-0.5, LOWEST)
        new_largest = jnp.maximum(largest[...], jnp.max(logits, axis=1, keepdims=True))
        decay, weights = jnp.exp(largest[...] - new_largest), jnp.exp(logits - new_largest)
        largest[...] = new_largest
        total[...] = total[...] * decay + jnp.sum(weights, axis=1, keepdims=True)
        update, weights = 0.0, weights.astype(q.dtype)
        for j, x in enumerate(matrices(values)):
            size = x.shape[entries]
            update += dot(weights[:, j * size : (j + 1) * size], x, (((1,), (entries,)), ((), ())))
        sums[...] = sums[...] * decay + update

    def work(t, b, i):
        """The item i of sequence b, t of the list, when its block is there."""
        slot = t % DEPTH

        # The own token starts a sequence, so that there is always a largest logit; another share's part of one counts it only there.
        @pl.when((i == 0) | (t == share_begin))
        def _():
            largest[...] = jnp.sum(q[b].astype(jnp.float32) * k[b].astype(jnp.float32), axis=1, keepdims=True) * dim**-0.5
            own = jnp.where(i == 0, 1.0, 0.0)
            total[...] = jnp.full_like(total, own)
            sums[...] = v[b].astype(jnp.float32) * own

        each_fetch(b, i, slot, lambda copy: copy.wait())
        for number, first, end, items, items_end in spans(b):
            source = found[number]

            @pl.when((i >= items) & (i < items_end))
            def _(source=source, number=number, at=first + (i - items) * source.block, end=end):
                attend(source, number, b, slot, at, end)

        @pl.when((i + 1 == count(b)) | (t + 1 == share_end))
        def _():
            some = jnp.where(total[...] == 0, 1.0, total[...])
            outs[0][0, b] = (sums[...] / some).astype(outs[0].dtype)
            if shares > 1:
                outs[1][0, b] = jnp.where(total[...] == 0, LOWEST, largest[...] + jnp.log(some))

    def step(t, state):
        here, ahead = state
        slot = t % DEPTH

        @pl.when(t < share_end)
        def _():
            each_fetch(*ahead, slot, lambda copy: copy.start())

        worked, begun = t - (DEPTH - 1), t - (DEPTH - 1) >= share_begin

        @pl.when(begun)
        def _():
            work(worked, *here)

        return tuple(jnp.where(begun, new, old) for new, old in zip(following(*here), here, strict=True)), following(*ahead)

    items = jax.lax.fori_loop(0, batch, lambda b, items: items + count(b), 0)
    share_begin, share_end = (items * (pl.program_id(0) + x) // shares for x in (0, 1))
    start = jnp.int32(0), jnp.int32(0)
    if shares > 1:
        outs[0][...] = jnp.zeros_like(outs[0])
        outs[1][...] = jnp.full_like(outs[1], LOWEST)

        def find(b, state):
            items, *start = state
            end = items + count(b)
            here = (share_begin >= items) & (share_begin < end)
            return end, jnp.where(here, b, start[0]), jnp.where(here, share_begin - items, start[1])

        start = jax.lax.fori_loop(0, batch, find, (jnp.int32(0), *start))[1:]
    jax.lax.fori_loop(share_begin, share_end + DEPTH - 1, step, (start, start))


def ragged_decode(q, k, v, pool_keys, pool_values, starts, buffer_keys, buffer_values, buffered, layer, interpret=False, shares=None):
    """As the package's ragged_decode. shares: among how many TensorCores the work is split; None: as many as the chip shows as one device."""
    batch, heads, group, dim = q.shape
    rows = heads * group
    if shares is None:
        shares = pltpu.get_tpu_info().num_cores if pltpu.is_tpu_device() else 1
    found = sources(heads, dim, q.dtype.itemsize, pool_keys.shape[1], buffer_keys.shape[3])
    layer = jnp.asarray(layer, jnp.int32)
    bounds = jax.lax.dynamic_slice_in_dim(starts, layer * heads, heads + 1, axis=1)
    repeated = [jnp.broadcast_to(x[:, :, None], q.shape).reshape(batch, rows, dim) for x in (k, v)]
    inputs = []
    for source in found:
        for array in (pool_keys, pool_values) if source.heads is None else (buffer_keys, buffer_values):
            inputs += source.arrays(array, layer)
    landings = [source.landing(dim, q.dtype) for source in found for _ in "kv"]

    def share_block(last):
        return pl.BlockSpec((1, batch, rows, last), lambda share, *_: (share, 0, 0, 0))

    everything = pl.BlockSpec((batch, rows, dim), lambda *_: (0, 0, 0))
    out_shape = [jax.ShapeDtypeStruct((shares, batch, rows, dim), jnp.float32 if shares > 1 else q.dtype)]
    if shares > 1:
        out_shape.append(jax.ShapeDtypeStruct((shares, batch, rows, 1), jnp.float32))
    out, *logsumexp = pl.pallas_call(
        functools.partial(kernel, found=found, group=group, shares=shares),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(shares,),
            in_specs=[everything] * 3 + [pl.BlockSpec(memory_space=pl.ANY)] * len(inputs),
            out_specs=[share_block(x.shape[-1]) for x in out_shape],
            scratch_shapes=[
                *landings,
                pltpu.SemaphoreType.DMA((DEPTH, 2)),
                pltpu.VMEM((rows, 1), jnp.float32),
                pltpu.VMEM((rows, 1), jnp.float32),
                pltpu.VMEM((rows, dim), jnp.float32),
            ],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="ragged_decode",
    )(bounds.reshape(-1), buffered, layer[None], q.reshape(batch, rows, dim), *repeated, *inputs)
    if shares > 1:
        weights = jax.nn.softmax(logsumexp[0], axis=0)
        out = jnp.sum(weights * out, axis=0).astype(q.dtype)
    return out.reshape(q.shape)
