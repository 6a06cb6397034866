"""The TPU kernel (Mosaic): the pool is compacted in place, block by block in the order of plan.py.

A step makes one block of slots. It goes through the pool's blocks and the streams' buffers that have entries for it, all of them fetched in the order
of need and some time ahead, and moves LANES entries at a time by a matrix product with a one-hot matrix. So that whatever an entry holds arrives bit
for bit (-0.0, NaN), and nothing of a dropped one does (0 * NaN is NaN), it is the entries' bits that are multiplied, 16 at a time and as whole
numbers: each is the sum of two that bfloat16 has exactly.
"""

import functools
import math
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.compact.plan import LANES, Fetches, Spans, plan, scratch, tables
from pallas_kernels.compact.reference import Buffer, Pool

BLOCK_BYTES = 1 << 18  # of a block's keys
RING = 3  # fetched blocks in memory: one in use, the others on their way
TOGETHER = 4  # times LANES entries whose matrix products overlap: one alone takes 1.4 times as long on v5e and v6e
DROPPED = 1 << 30
START, WAIT = operator.methodcaller("start"), operator.methodcaller("wait")


class Arrays(NamedTuple):
    """Pool or buffer, in HBM, or what of it is in VMEM: sources (blocks of slots, streams) of g groups of LANES entries."""

    keys: jax.Array
    values: jax.Array
    words: jax.Array  # [.., 2g, LANES] int32: the stats' bits, then the positions
    slots: jax.Array | None = None  # [.., g, LANES] int32: the slots that they move to


class Kind(NamedTuple):
    """All there is to know about the sources of one kind."""

    held: Arrays
    spans: Spans
    fetches: Fetches
    total: jax.Array  # fetches in all
    copy: object  # (START or WAIT, source, place in held) -> None


def block_slots(pool: Pool) -> int:
    """Slots of a block: a multiple of LANES."""
    slots, dim = pool.keys.shape[1:]
    # A row fills whole lanes in memory.
    row = pl.cdiv(dim, LANES) * LANES * pool.keys.dtype.itemsize
    return min(max(BLOCK_BYTES // row // LANES, 1), pl.cdiv(slots, LANES)) * LANES


def pad(x: jax.Array, multiple: int) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % multiple)], constant_values=DROPPED)


def grouped(pool: Pool, buffer: Buffer, destinations: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The destinations of the pool [B,N,g,LANES] and of the buffer [B,n,g',LANES], DROPPED where no kept entry is.

    A stream of the buffer is one source, or several of a block's size.
    """
    batch, slots = destinations.shape[0], pool.keys.shape[1]
    layers, _, heads, width = buffer.stat.shape
    destinations = jnp.where(destinations < slots, destinations, DROPPED)
    block = block_slots(pool)
    rows = min(block, pl.cdiv(width, LANES) * LANES)
    new = destinations[:, slots:].reshape(batch, layers * heads, width)
    return tuple(pad(x, size).reshape(batch, -1, size // LANES, LANES) for x, size in ((destinations[:, :slots], block), (new, rows)))


def words(stat: jax.Array, position: jax.Array, slots: jax.Array) -> jax.Array:
    """Arrays.words of what `slots` are the slots of: [B,n,g,LANES] -> [B,n,2g,LANES]."""
    bits = jax.lax.bitcast_convert_type(stat, jnp.int32)
    return jnp.concatenate([pad(x, math.prod(slots.shape[2:])).reshape(slots.shape) for x in (bits, position)], axis=2)


def compact(pool: Pool, buffer: Buffer, destinations: jax.Array, interpret=False) -> Pool:
    """compact, as reference.py has it."""
    batch, slots, dim = pool.keys.shape
    dtype, tiles = pool.keys.dtype, pl.cdiv(dim, LANES)
    if dim % LANES and tiles > 1:
        raise ValueError(f"pool.keys has rows of {dim}: on a TPU up to {LANES}, or a multiple of it, would work")
    pool_slots, buffer_slots = grouped(pool, buffer, destinations)
    blocks, groups = pool_slots.shape[1:3]
    known = tables(pool_slots, buffer_slots)
    buffer_stat = jnp.moveaxis(buffer.stat, 1, 0).reshape(batch, -1, buffer.stat.shape[3])
    buffer_words = words(buffer_stat, jnp.broadcast_to(buffer.position[:, None], buffer_stat.shape), buffer_slots)
    read = pool_slots, Arrays(buffer.keys, buffer.values, buffer_words, buffer_slots)
    written = Arrays(pool.keys, pool.values, words(pool.stat, pool.position, pool_slots))

    def memory(count, slots):
        keys = pltpu.VMEM((count, math.prod(slots.shape[2:]), dim), dtype)
        groups = slots.shape[2]
        return Arrays(keys, keys, *(pltpu.VMEM((count, n * groups, LANES), jnp.int32) for n in (2, 1)))

    whole = pl.BlockSpec(memory_space=pl.ANY)
    [new] = pl.pallas_call(
        functools.partial(kernel, exact=bool(interpret)),
        grid=(batch,),
        in_specs=[
            jax.tree.map(lambda x: pl.BlockSpec((None, *x.shape[1:]), lambda b: (b, 0, 0), memory_space=pltpu.SMEM), known),
            *jax.tree.map(lambda x: whole, (read, written)),
        ],
        out_specs=[jax.tree.map(lambda x: whole, written)],
        out_shape=[jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), written)],
        input_output_aliases={len(jax.tree.leaves((known, read))) + i: i for i in range(3)},
        scratch_shapes=[
            scratch(blocks, blocks, buffer_slots.shape[1]),
            memory(RING, pool_slots),
            memory(RING, buffer_slots),
            memory(2, pool_slots)._replace(slots=None),
            [pltpu.VMEM((tiles * dtype.itemsize // 2, (groups + 1) * LANES, dim // tiles), jnp.float32)] * 2,
            pltpu.VMEM((groups + 2, 8, LANES), jnp.float32),
            [pltpu.SemaphoreType.DMA((n,)) for n in (RING, RING, 2)],
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="compact",
    )(known, read, written)
    stat, position = (x.reshape(batch, -1)[:, :slots] for x in jnp.split(new.words, 2, axis=2))
    return Pool(new.keys, new.values, jax.lax.bitcast_convert_type(stat, jnp.float32), position)


def kernel(known, read, _, pool, planned, held, held_buffer, made, sums, word_sums, ready, *, exact):
    # The pool is read where it is written: `pool` are the outputs, whose memory is the inputs'.
    (changes, spans), (pool_slots, buffer), (target, down, *fetches) = known, read, planned
    row, (heads, width), slots = pl.program_id(0), buffer.keys.shape[2:4], pool.keys.shape[1]
    block, piece = made.keys.shape[1], held_buffer.keys.shape[1]

    def copy_block(act, number, place, local=held, ready=ready[0], back=False):
        def copy_rows(rows):
            window = pl.ds(pl.multiple_of(number * block, LANES), rows)
            pairs = [(x.at[row, window], y.at[place, pl.ds(0, rows)]) for x, y in zip(pool[:2], local[:2], strict=True)]
            pairs.append((pool.words.at[row, number], local.words.at[place]))
            if not back:
                pairs.append((pool_slots.at[row, number], local.slots.at[place]))
            for pair in pairs:
                act(pltpu.make_async_copy(*(pair[::-1] if back else pair), ready.at[place]))

        whole_or_rest(number, block, slots, pool.keys, copy_rows)

    def copy_piece(act, number, place):
        stream, start = number // pl.cdiv(width, piece), number % pl.cdiv(width, piece)

        def copy_rows(rows):
            window = stream // heads, row, stream % heads, pl.ds(pl.multiple_of(start * piece, LANES), rows)
            pairs = [(x.at[window], y.at[place, pl.ds(0, rows)]) for x, y in zip(buffer[:2], held_buffer[:2], strict=True)]
            pairs += [(x.at[row, number], y.at[place]) for x, y in zip(buffer[2:], held_buffer[2:], strict=True)]
            for source, local in pairs:
                act(pltpu.make_async_copy(source, local, ready[1].at[place]))

        whole_or_rest(start, piece, width, buffer.keys, copy_rows)

    def whole_or_rest(number, size, total, array, act):
        """Acts on the rows that part `number` of array's `total` has: `size`, or if it is the last those left (interpreted, exactly those)."""
        whole, rest = divmod(total, size)
        if whole:
            pl.when(number < whole)(lambda: act(size))
        if rest:
            pl.when(number == whole)(lambda: act(rest if exact else in_tiles(rest, array)))

    steps, totals = plan(changes, spans, target, down, fetches)
    kinds = list(map(Kind, (held, held_buffer), spans, fetches, totals, (copy_block, copy_piece)))
    for kind in kinds:
        for i in range(RING - 1):
            pl.when(i < kind.total)(functools.partial(kind.copy, START, kind.fetches.source[i], i))

    def write(act, step):
        copy_block(act, target[step], step % 2, made, ready[2], back=True)

    def make(step, seen):
        start = target[step] * block
        for total in (*sums, word_sums):
            total[...] = jnp.zeros_like(total)
        seen = tuple(gather(kind, target[step], start, *n, sums, word_sums) for kind, *n in zip(kinds, seen, strict=True))
        # What was here must have been written before it is made anew.
        pl.when(step >= 2)(lambda: write(WAIT, step - 2))

        @pl.loop(0, block // LANES)
        def _(i):
            rows = pl.ds(pl.multiple_of(i * LANES, LANES), LANES)
            for x, total in zip(made[:2], sums, strict=True):
                x[step % 2, rows] = joined([total[part, rows] for part in range(total.shape[0])], x.dtype)
            found = whole_numbers(word_sums[i])
            for n in range(2):
                word = found[2 * n : 2 * n + 1] & 0xFFFF | jnp.left_shift(found[2 * n + 1 : 2 * n + 2], 16)
                made.words[step % 2, pl.ds(i + n * (block // LANES), 1)] = word

        write(START, step)
        return seen

    jax.lax.fori_loop(0, steps, make, (0, 0))
    for back in (2, 1):
        pl.when(steps >= back)(functools.partial(write, WAIT, steps - back))


def in_tiles(rows: int, array) -> int:
    """Rows to copy for the last `rows` of [..., n, D]: in HBM they fill tiles, of which only those of a single column of 32 bits can be copied in part."""
    size = array.dtype.itemsize
    tile = 1 if size == 4 and array.shape[-1] <= LANES else min(8, pl.next_power_of_2(max(array.shape[-2], 4 // size)))
    return pl.cdiv(rows, tile) * tile


def gather(kind: Kind, block, start, seen, sums, word_sums):
    """Adds to the sums all that `kind` has for the block of slots at `start`. `seen` is how many fetches have come before; returns how many have now."""

    def one(fetch, seen):
        source = kind.fetches.source[fetch]

        @pl.when(fetch == seen)
        def _():
            kind.copy(WAIT, source, fetch % RING)
            # From here on this one is in use, and what was in use before it can be overwritten.
            later = fetch + RING - 1
            pl.when(later < kind.total)(lambda: kind.copy(START, kind.fetches.source[later], later % RING))

        groups = kind.held.slots.shape[1]
        several = math.gcd(groups, TOGETHER)
        held = jax.tree.map(lambda x: x.at[fetch % RING], kind.held)

        @pl.loop(0, groups, step=several)
        def _(i):
            move([(held, i + n, *(x[0, source * groups + i + n] for x in kind.spans[:2])) for n in range(several)], start, sums, word_sums)

        return jnp.maximum(seen, fetch + 1)

    first = kind.fetches.first[block]
    return jax.lax.fori_loop(first, first + kind.fetches.count[block], one, seen)


def move(groups, start, sums, word_sums):
    """Adds to the sums what several groups, each (held, its number there, low, high), have for the block of slots at `start`."""
    block = sums[0].shape[1] - LANES
    firsts = [jnp.maximum(low, start) for *_, low, _ in groups]
    spans = [jnp.minimum(high, start + block - 1) - first for first, (*_, high) in zip(firsts, groups, strict=True)]

    # What is kept of a group most often lies within LANES slots.
    @pl.loop(0, jnp.right_shift(functools.reduce(jnp.maximum, spans) + LANES, 7))
    def _(i):
        for first, (held, group, *_) in zip(firsts, groups, strict=True):
            # What lies behind the block is not looked at.
            offset = jnp.minimum(first - start + i * LANES, block)
            slots = held.slots[pl.ds(group, 1)] - (start + offset)
            chosen = jnp.concatenate([slots, slots], axis=1) == jax.lax.broadcasted_iota(jnp.int32, (LANES, 2 * LANES), 0)
            # [LANES slots, twice LANES entries]
            chosen = jnp.where(chosen, 1.0, 0.0).astype(jnp.bfloat16)
            rows = pl.ds(pl.multiple_of(group * LANES, LANES), LANES)
            for x, total in zip(held[:2], sums, strict=True):
                for part, summands in enumerate(taken_apart(x[rows], total.shape[2])):
                    total[part, pl.ds(offset, LANES)] += jnp.dot(chosen, summands, preferred_element_type=jnp.float32)
            # Of stats and positions the rows are their halves, and the columns, which begin anywhere, are rolled into place.
            row = jax.lax.broadcasted_iota(jnp.int32, (8, LANES), 0)
            stat, position = (held.words[pl.ds(group + n, 1)] for n in (0, held.slots.shape[0]))
            word = jnp.where(row < 2, stat, position)
            summands = two_summands(jnp.where(row % 2 == 0, word, jnp.right_shift(word, 16)), axis=1)
            found = jax.lax.dot_general(summands, chosen, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
            shift = jnp.bitwise_and(offset, LANES - 1)
            found = pltpu.roll(found, shift, 1)
            here = jax.lax.broadcasted_iota(jnp.int32, found.shape, 1) >= shift
            word_sums[jnp.right_shift(offset, 7)] += jnp.where(here, found, 0.0)
            word_sums[jnp.right_shift(offset, 7) + 1] += jnp.where(here, 0.0, found)


def two_summands(bits: jax.Array, axis: int) -> jax.Array:
    """The lower 16 bits of int32 elements as sums: all the first summands and, behind them along `axis`, all the second."""
    number = (bits & 0xFFFF).astype(jnp.float32)
    high = number.astype(jnp.bfloat16)
    return jnp.concatenate([high, (number - high.astype(jnp.float32)).astype(jnp.bfloat16)], axis=axis)


def taken_apart(x: jax.Array, width: int) -> list[jax.Array]:
    """Of each `width` columns of x [LANES,D] the elements' bits as two_summands, 16 at a time: [2*LANES,width] each."""
    parts = []
    for column in range(0, x.shape[1], width):
        bits = pltpu.bitcast(x[:, column : column + width], jnp.int32)
        if x.dtype.itemsize == 4:
            parts += [two_summands(jnp.right_shift(bits, shift), axis=0) for shift in (0, 16)]
            continue
        # Two rows share a word. They get their summands, 8 bits each, and share words again without ever changing places, which would take longer.
        numbers = [x.astype(jnp.float32) for x in (bits & 0xFFFF, jax.lax.shift_right_logical(bits, 16))]
        highs = [pltpu.bitcast(x, jnp.int32) & -0x10000 for x in numbers]
        lows = [pltpu.bitcast(x - pltpu.bitcast(high, jnp.float32), jnp.int32) for x, high in zip(numbers, highs, strict=True)]
        shared = [pltpu.bitcast(jax.lax.shift_right_logical(even, 16) | odd, jnp.bfloat16) for even, odd in (highs, lows)]
        parts.append(jnp.concatenate(shared, axis=0))
    return parts


def whole_numbers(x: jax.Array) -> jax.Array:
    """0..65535 in float32 -> int32 whose lower 16 bits they are; the others are not 0."""
    return pltpu.bitcast(x + 2.0**23, jnp.int32)


def joined(parts: list[jax.Array], dtype) -> jax.Array:
    """The inverse of taken_apart: the sums [LANES,width] -> [LANES,D]."""
    parts = [whole_numbers(x) for x in parts]
    if dtype.itemsize == 2:
        columns = [jax.lax.bitcast_convert_type(x.astype(jnp.int16), dtype) for x in parts]
    else:
        columns = [pltpu.bitcast(low & 0xFFFF | jnp.left_shift(high, 16), dtype) for low, high in zip(parts[::2], parts[1::2], strict=True)]
    return jnp.concatenate(columns, axis=1)
