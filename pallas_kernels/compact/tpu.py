"""The TPU kernel (Mosaic): the pool is compacted in place, block by block in the order of plan.py.

A step makes one block of slots: it goes through the pool's blocks and the streams' buffers that have entries for it, all of them fetched in the order
of need and some time ahead, and moves LANES entries at a time by a matrix product with a one-hot matrix. So that whatever an entry holds arrives bit
for bit (-0.0, NaN), and nothing of a dropped one does (0 * NaN is NaN), it is the bytes of the entries that are multiplied, as whole numbers: bfloat16
has 0..255 exactly, and float32 the sum of a low and a high byte.
"""

import functools
import math
import operator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.compact.plan import LANES, plan
from pallas_kernels.compact.reference import Buffer, Pool

BLOCK_BYTES = 1 << 18  # of a block's keys
RING = 3  # fetched blocks in memory: one in use, the others on their way
DROPPED = 1 << 30


def block_slots(pool: Pool) -> int:
    """Slots of a block: a multiple of LANES."""
    slots, dim = pool.keys.shape[1:]
    # A row fills whole lanes in memory.
    row = pl.cdiv(dim, LANES) * LANES * pool.keys.dtype.itemsize
    return min(max(BLOCK_BYTES // row // LANES, 1), pl.cdiv(slots, LANES)) * LANES


def pad(x: jax.Array, multiple: int) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % multiple)], constant_values=DROPPED)


def grouped(pool: Pool, buffer: Buffer, destinations: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The destinations of the pool [B,N,g,LANES] and of the buffer [B,S,g',LANES], DROPPED where no kept entry is."""
    batch, slots = pool.position.shape
    streams, width = buffer.stat.shape[0] * buffer.stat.shape[2], buffer.stat.shape[3]
    destinations = jnp.where(destinations < slots, destinations, DROPPED)
    block = block_slots(pool)
    from_pool = pad(destinations[:, :slots], block).reshape(batch, -1, block // LANES, LANES)
    return from_pool, pad(destinations[:, slots:].reshape(batch, streams, width), LANES).reshape(batch, streams, -1, LANES)


def compact(pool: Pool, buffer: Buffer, destinations: jax.Array, interpret=False) -> Pool:
    """compact, as reference.py has it."""
    batch, slots, dim = pool.keys.shape
    dtype, block, tiles = pool.keys.dtype, block_slots(pool), pl.cdiv(dim, LANES)
    pool_slots, buffer_slots = grouped(pool, buffer, destinations)
    tables = jax.tree.map(lambda x: x[:, None], plan(pool_slots, buffer_slots))

    # Stats (their bits) and positions as they lie beside destinations: [B, N, 2g, LANES], [B, S, 3g', LANES]
    def words(like, stat, position):
        lengthened = [pad(x, math.prod(like.shape[2:])) for x in (jax.lax.bitcast_convert_type(stat, jnp.int32), position)]
        return [x.reshape(like.shape) for x in lengthened]

    pool_words = jnp.concatenate(words(pool_slots, pool.stat, pool.position), axis=2)
    buffer_stat = jnp.moveaxis(buffer.stat, 1, 0).reshape(*buffer_slots.shape[:2], -1)
    buffer_position = jnp.broadcast_to(buffer.position[:, None], buffer_stat.shape)
    buffer_words = jnp.concatenate([buffer_slots, *words(buffer_slots, buffer_stat, buffer_position)], axis=2)

    in_place = (pool.keys, pool.values, pool_words)
    whole = pl.BlockSpec(memory_space=pl.ANY)
    keys, values, moved = pl.pallas_call(
        functools.partial(kernel, exact=bool(interpret)),
        grid=(batch,),
        in_specs=[jax.tree.map(lambda x: pl.BlockSpec((None, *x.shape[1:]), lambda b: (b, 0, 0), memory_space=pltpu.SMEM), tables), *[whole] * 7],
        out_specs=[whole] * 3,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in in_place],
        input_output_aliases={len(jax.tree.leaves(tables)) + 4 + i: i for i in range(3)},
        scratch_shapes=[
            [pltpu.VMEM((RING, block, dim), dtype)] * 2 + [pltpu.VMEM((RING, *x.shape[2:]), jnp.int32) for x in (pool_words, pool_slots)],
            [pltpu.VMEM((RING, math.prod(buffer_slots.shape[2:]), dim), dtype)] * 2 + [pltpu.VMEM((RING, *buffer_words.shape[2:]), jnp.int32)],
            [pltpu.VMEM((2, block, dim), dtype)] * 2 + [pltpu.VMEM((2, *pool_words.shape[2:]), jnp.int32)],
            [pltpu.VMEM((tiles * dtype.itemsize // 2, block + LANES, dim // tiles), jnp.float32)] * 2,
            pltpu.VMEM((block // LANES + 1, 8, LANES), jnp.float32),
            [pltpu.SemaphoreType.DMA((n,)) for n in (RING, RING, 2)],
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="compact",
    )(tables, pool_slots, buffer.keys, buffer.values, buffer_words, *in_place)
    stat, position = (x.reshape(batch, -1)[:, :slots] for x in jnp.split(moved, 2, axis=2))
    return Pool(keys, values, jax.lax.bitcast_convert_type(stat, jnp.float32), position)


def kernel(tables, pool_slots, buffer_keys, buffer_values, buffer_words, *refs, exact):
    # The pool is read where it is written: through the outputs, whose memory is the inputs'.
    keys, values, words, pool_held, buffer_held, made, sums, word_sums, (pool_ready, buffer_ready, made_ready) = refs[3:]
    row, heads, block = pl.program_id(0), buffer_keys.shape[2], made[0].shape[1]
    groups, buffer_groups = block // LANES, buffer_held[2].shape[1] // 3
    full, rest = divmod(keys.shape[1], block)

    def copy_block(act, number, place, held=pool_held, ready=pool_ready, back=False):
        def with_rows(rows):
            window = pl.ds(pl.multiple_of(number * block, LANES), rows)
            pairs = [(x.at[row, window], y.at[place, pl.ds(0, rows)]) for x, y in zip((keys, values), held[:2], strict=True)]
            # What comes back are no destinations.
            pairs += [(x.at[row, number], y.at[place]) for x, y in zip((words, pool_slots), held[2:], strict=not back)]
            for pair in pairs:
                act(pltpu.make_async_copy(*(pair[::-1] if back else pair), ready.at[place]))

        if full:
            pl.when(number < full)(lambda: with_rows(block))
        if rest:
            pl.when(number == full)(lambda: with_rows(in_tiles(rest, keys, exact)))

    def copy_stream(act, stream, place):
        layer, head = stream // heads, stream % heads
        rows = in_tiles(buffer_keys.shape[3], buffer_keys, exact)
        # A start that is not known to be 0, or the rows that fill the last tile would be refused.
        window = pl.ds(pl.multiple_of(row * 0, LANES), rows)
        pairs = [(x.at[layer, row, head, window], y.at[place, pl.ds(0, rows)]) for x, y in zip((buffer_keys, buffer_values), buffer_held[:2], strict=True)]
        for source, target in [*pairs, (buffer_words.at[row, stream], buffer_held[2].at[place])]:
            act(pltpu.make_async_copy(source, target, buffer_ready.at[place]))

    def move(slots, words, entries, low, high, start):
        """Adds to the sums what goes to the block at `start`, of LANES entries that go to slots [1, LANES] between low and high."""
        first, last = jnp.maximum(low, start), jnp.minimum(high, start + block - 1)

        # Most often all that is kept of them lies within LANES slots.
        @pl.loop(0, jnp.right_shift(last - first + LANES, 7))
        def _(i):
            offset = first - start + i * LANES
            twice = jnp.concatenate([slots, slots], axis=1)
            target = start + offset + jax.lax.broadcasted_iota(jnp.int32, (LANES, 2 * LANES), 0)
            scale = jnp.where(jax.lax.broadcasted_iota(jnp.int32, target.shape, 1) < LANES, 1.0, 256.0)
            # [LANES slots, low bytes of LANES entries and their high bytes]
            chosen = jnp.where(twice == target, scale, 0.0).astype(jnp.bfloat16)
            for x, total in zip(entries, sums, strict=True):
                for part, half in enumerate(halves(x, total.shape[2])):
                    total[part, pl.ds(offset, LANES)] += jnp.dot(chosen, two_bytes(half, 0), preferred_element_type=jnp.float32)
            # Rows: the stats' low and high halves, the positions'. Columns that begin anywhere are rolled into place.
            kind = jax.lax.broadcasted_iota(jnp.int32, (8, LANES), 0)
            word = jnp.where(kind < 2, *words)
            word = jnp.where(kind % 2 == 0, word, jnp.right_shift(word, 16))
            found = jax.lax.dot_general(two_bytes(word, 1), chosen, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
            group, shift = jnp.right_shift(offset, 7), jnp.bitwise_and(offset, LANES - 1)
            found = pltpu.roll(found, shift, 1)
            here = jax.lax.broadcasted_iota(jnp.int32, found.shape, 1) >= shift
            word_sums[group] += jnp.where(here, found, 0.0)
            word_sums[group + 1] += jnp.where(here, 0.0, found)

    def follow(sources, copy, step, seen, use):
        """Waits for what the step needs, as it comes, and has it used; `seen` is how many fetches have come."""

        def one(fetch, seen):
            @pl.when(fetch == seen)
            def _():
                copy(WAIT, sources.fetches[0, fetch], fetch % RING)
                # It is in use from now on, and what was in use before it can be overwritten.
                following = fetch + RING - 1
                pl.when(following < sources.total[0, 0])(lambda: copy(START, sources.fetches[0, following], following % RING))

            use(sources.fetches[0, fetch], fetch % RING)
            return jnp.maximum(seen, fetch + 1)

        first = sources.first[0, step]
        return jax.lax.fori_loop(first, first + sources.count[0, step], one, seen)

    def make_block(step, seen):
        number, place = tables.target[0, step], step % 2
        for total in (*sums, word_sums):
            total[...] = jnp.zeros_like(total)

        def use_block(source, place):
            @pl.loop(0, groups)
            def _(i):
                entries = [x[place, pl.ds(pl.multiple_of(i * LANES, LANES), LANES)] for x in pool_held[:2]]
                words = [pool_held[2][place, pl.ds(i + n, 1)] for n in (0, groups)]
                span = [x[0, source * groups + i] for x in (tables.pool.low, tables.pool.high)]
                move(pool_held[3][place, pl.ds(i, 1)], words, entries, *span, number * block)

        def use_stream(source, place):
            @pl.loop(0, buffer_groups)
            def _(i):
                entries = [x[place, pl.ds(pl.multiple_of(i * LANES, LANES), LANES)] for x in buffer_held[:2]]
                slots, *words = (buffer_held[2][place, pl.ds(i + n * buffer_groups, 1)] for n in range(3))
                span = [x[0, source * buffer_groups + i] for x in (tables.buffer.low, tables.buffer.high)]
                move(slots, words, entries, *span, number * block)

        seen = follow(tables.pool, copy_block, step, seen[0], use_block), follow(tables.buffer, copy_stream, step, seen[1], use_stream)
        # Before this place is filled again it must have been written back.
        written = functools.partial(copy_block, held=made, ready=made_ready, back=True)
        pl.when(step >= 2)(lambda: written(WAIT, tables.target[0, step - 2], place))

        @pl.loop(0, groups)
        def _(i):
            window = pl.ds(pl.multiple_of(i * LANES, LANES), LANES)
            for x, total in zip(made, sums, strict=False):
                x[place, window] = joined([total[part, window] for part in range(total.shape[0])], x.dtype)
            found = word_sums[i].astype(jnp.int32)
            for n in range(2):
                made[2][place, pl.ds(i + n * groups, 1)] = found[2 * n : 2 * n + 1] | jnp.left_shift(found[2 * n + 1 : 2 * n + 2], 16)

        written(START, number, place)
        return seen

    for sources, copy in ((tables.pool, copy_block), (tables.buffer, copy_stream)):
        for fetch in range(RING - 1):
            pl.when(fetch < sources.total[0, 0])(lambda: copy(START, sources.fetches[0, fetch], fetch))
    steps = tables.steps[0, 0]
    jax.lax.fori_loop(0, steps, make_block, (0, 0))
    for back in (2, 1):
        pl.when(steps >= back)(lambda: copy_block(WAIT, tables.target[0, steps - back], (steps - back) % 2, made, made_ready, True))


def in_tiles(rows: int, array, exact: bool) -> int:
    """Rows of [..., N, D] to copy for the last `rows` of the N: in HBM they fill tiles, of which bfloat16 cannot have parts copied."""
    tile = 1 if exact or array.dtype.itemsize == 4 else min(8, pl.next_power_of_2(max(array.shape[-2], 2)))
    return pl.cdiv(rows, tile) * tile


def halves(x: jax.Array, width: int) -> list[jax.Array]:
    """Of each `width` columns the lower 16 bits of every element and, of float32, the upper ones, as int32 (whose own upper bits may be anything)."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint16 if x.dtype.itemsize == 2 else jnp.int32).astype(jnp.int32)
    return [jnp.right_shift(bits[:, i : i + width], 16 * n) for i in range(0, x.shape[1], width) for n in range(x.dtype.itemsize // 2)]


def two_bytes(x: jax.Array, axis: int) -> jax.Array:
    """The lowest byte of each element and, behind them all, the next one, as numbers."""
    return jnp.concatenate([(jnp.right_shift(x, shift) & 255).astype(jnp.float32).astype(jnp.bfloat16) for shift in (0, 8)], axis=axis)


def joined(parts: list[jax.Array], dtype) -> jax.Array:
    """What `halves` took apart, from 16-bit numbers in float32."""
    parts = [x.astype(jnp.int32) for x in parts]
    if dtype.itemsize == 2:
        columns = [jax.lax.bitcast_convert_type(x.astype(jnp.uint16), dtype) for x in parts]
    else:
        columns = [jax.lax.bitcast_convert_type(low | jnp.left_shift(high, 16), dtype) for low, high in zip(parts[::2], parts[1::2], strict=True)]
    return jnp.concatenate(columns, axis=1)


START, WAIT = operator.methodcaller("start"), operator.methodcaller("wait")
