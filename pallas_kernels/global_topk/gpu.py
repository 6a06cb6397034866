"""GPU kernels (Pallas in its Triton lowering) of select_keys.

Each of a few rounds finds the next bits of the threshold: every program compares its share of the keys with all values that these bits can have, and
the programs of the next round add up the counts of all and read the bits off. Three passes in slot order follow: what each block keeps, what is kept
before the bounds of all streams, the results. Programs of one launch share nothing, and no two write to one place.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.global_topk.reference import LOWEST, Selection

ROUNDS = ((27, 5), (22, 5), (17, 5), (12, 5), (8, 4), (4, 4), (0, 4))  # each: the lowest of the bits it finds, how many it finds
VALUES = 32  # that the bits of one round can have
TILE = 256  # keys that are compared with all values at once
TILES = 8  # that are loaded together
PROGRAMS = 256  # of a round, at most, a row: each of the next adds up what they counted
PARTIALS = 1024  # blocks whose counts are added up at once


def select_keys(keys: jax.Array, k: jax.Array, starts: jax.Array, width: int, interpret=False) -> Selection:
    """reference.select_keys."""
    batch, entries = keys.shape
    streams = starts.shape[1] - 1
    slots = entries - streams * width

    def call(kernel, programs, outputs, inputs):
        return pl.pallas_call(
            kernel,
            grid=(batch, programs),
            out_shape=[jax.ShapeDtypeStruct((batch, *shape), dtype) for shape, dtype in outputs],
            compiler_params=plgpu.CompilerParams(num_warps=8),
            interpret=interpret,
            name="global_topk" + kernel.func.__name__.removesuffix("_kernel"),
        )(k, keys, *inputs)

    programs = round_programs(entries)
    counts = ((pl.next_power_of_2(programs), VALUES), jnp.int32)
    found, last = [], None
    for this in ROUNDS:
        kernel = functools.partial(_round_kernel, programs=programs, last=last, this=this)
        found, last = call(kernel, programs, [((2,), jnp.int32), counts], found), this
    size = block_size(entries)
    blocks = pl.cdiv(entries, size)
    kernel = functools.partial(_count_kernel, programs=programs, last=last, size=size)
    counts = ((_round_up(blocks, PARTIALS),), jnp.int32)
    found = call(kernel, blocks, [((2,), jnp.int32), counts, counts], found)
    segments = dict(streams=streams, slots=slots, width=width, size=size)
    [before] = call(functools.partial(_before_kernel, **segments), 2 * streams + 2, [((2 * streams + 2,), jnp.int32)], [*found, starts])
    kernel = functools.partial(_place_kernel, **segments)
    keep, destinations = call(kernel, blocks, [((entries,), jnp.bool_), ((entries,), jnp.int32)], [*found, starts, before])
    return Selection(keep, jnp.sum(jnp.diff(before.reshape(batch, 2, streams + 1)), axis=1), destinations)


def round_programs(entries: int) -> int:
    """Programs that share the keys of a row in a round."""
    return min(PROGRAMS, pl.cdiv(entries, TILE * TILES))


def block_size(entries: int) -> int:
    """Keys of a program in slot order: more where there would be too many blocks whose counts each has to add up."""
    return min(max(1024, pl.next_power_of_2(pl.cdiv(entries, PARTIALS))), 4096)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _load(ref, row, begin, length, other):
    """length entries of row `row` of ref [B, N] from `begin` on, `other` where there are none."""
    return plgpu.load(ref.at[row, pl.ds(begin, length)], mask=begin + jnp.arange(length) < ref.shape[1], other=other)


def _refined(k, row, state, counts, programs, last):
    """The threshold as far as its bits are known after round `last`, and how many keys lie above all that it can still be."""
    shift, bits = last
    real = jax.lax.broadcasted_iota(jnp.int32, counts.shape[1:], 0) < programs
    # [VALUES]: keys of at least threshold + (value << shift)
    count = jnp.sum(plgpu.load(counts.at[row], mask=real, other=0), axis=0)
    value = jnp.arange(VALUES)
    possible = (value > 0) & (value < 1 << bits)
    enough = possible & (count >= k[row])
    above = jnp.max(jnp.where(possible & ~enough, count, 0))
    return state[row, 0] + (jnp.sum(enough.astype(jnp.int32)) << shift), jnp.maximum(state[row, 1], above)


def _round_kernel(k, keys, *refs, programs, last, this):
    *found, state, counts = refs
    row, program = pl.program_id(0), pl.program_id(1)
    threshold, above = _refined(k, row, *found, programs, last) if found else (jnp.int32(LOWEST), jnp.int32(0))

    @pl.when(program == 0)
    def _():
        state[row, 0], state[row, 1] = threshold, above

    candidates = threshold + (jnp.arange(VALUES) << this[0])
    share = pl.cdiv(pl.cdiv(keys.shape[1], programs), TILE * TILES)

    def add(i, total):
        begin = (program * share + i) * TILE * TILES
        for tile in [_load(keys, row, begin + j * TILE, TILE, LOWEST) for j in range(TILES)]:
            total += (tile[:, None] >= candidates[None, :]).astype(jnp.int32)
        return total

    total = jax.lax.fori_loop(0, share, add, jnp.zeros((TILE, VALUES), jnp.int32))
    counts[row, program] = jnp.sum(total, axis=0)


def _count_kernel(k, keys, state, counts, found, n_above, n_tied, *, programs, last, size):
    row, program = pl.program_id(0), pl.program_id(1)
    threshold, above = _refined(k, row, state, counts, programs, last)

    @pl.when(program == 0)
    def _():
        found[row, 0] = threshold
        # How many of those tied at the threshold stay; what is at LOWEST never does.
        found[row, 1] = jnp.where(threshold == LOWEST, 0, jnp.maximum(k[row] - above, 0))

    block = _load(keys, row, program * size, size, LOWEST)
    n_above[row, program] = jnp.sum((block > threshold).astype(jnp.int32))
    n_tied[row, program] = jnp.sum((block == threshold).astype(jnp.int32))


def _total(row, counts, block):
    """The sum of counts [B, blocks] before a block."""

    def add(i, total):
        begin = i * PARTIALS
        earlier = begin + jnp.arange(PARTIALS) < block
        return total + jnp.sum(plgpu.load(counts.at[row, pl.ds(begin, PARTIALS)], mask=earlier, other=0))

    return jax.lax.fori_loop(0, pl.cdiv(block, PARTIALS), add, jnp.int32(0))


def _before_kernel(k, keys, found, n_above, n_tied, starts, before, *, streams, slots, width, size):
    row, j = pl.program_id(0), pl.program_id(1)
    entry = jnp.where(j <= streams, starts[row, jnp.minimum(j, streams)], slots + (j - streams - 1) * width)
    threshold, quota = found[row, 0], found[row, 1]
    first = entry // size
    block = _load(keys, row, first * size, size, LOWEST)
    earlier = first * size + jnp.arange(size) < entry
    above = _total(row, n_above, first) + jnp.sum((earlier & (block > threshold)).astype(jnp.int32))
    tied = _total(row, n_tied, first) + jnp.sum((earlier & (block == threshold)).astype(jnp.int32))
    before[row, j] = above + jnp.minimum(tied, quota)


def _place_kernel(k, keys, found, n_above, n_tied, starts, before, keep, destinations, *, streams, slots, width, size):
    row, program = pl.program_id(0), pl.program_id(1)
    threshold, quota = found[row, 0], found[row, 1]
    begin = program * size
    entry = begin + jnp.arange(size)
    block = _load(keys, row, begin, size, LOWEST)
    above, tied = block > threshold, block == threshold
    # Both counts in one scan, as a block has fewer than 2**16 keys.
    scan = jnp.cumsum(above.astype(jnp.int32) + (tied.astype(jnp.int32) << 16))
    above_before = _total(row, n_above, program) + (scan & 0xFFFF) - above.astype(jnp.int32)
    tied_before = _total(row, n_tied, program) + (scan >> 16) - tied.astype(jnp.int32)
    kept = above | (tied & (tied_before < quota))

    # The last stream of the pool that starts at an entry or before it.
    def halve(i, stream):
        further = jnp.minimum(stream + (1 << (streams.bit_length() - 1 - i)), streams)
        return jnp.where(plgpu.load(starts.at[row, further]) <= entry, further, stream)

    stream = jax.lax.fori_loop(0, streams.bit_length(), halve, jnp.zeros(size, jnp.int32))
    buffer_stream = (entry - slots) // max(width, 1)
    # A pool's entry moves by what the buffer keeps of streams before its own, a buffer's by what the pool keeps up to its own stream's end.
    other = jnp.where(entry < slots, streams + 1 + stream, jnp.minimum(buffer_stream + 1, streams))
    shift = plgpu.load(before.at[row, other]) - before[row, streams + 1]
    real = entry < keys.shape[1]
    place = jnp.where(kept, above_before + jnp.minimum(tied_before, quota) + shift, slots)
    at = pl.ds(begin, size)
    plgpu.store(keep.at[row, at], kept, mask=real)
    plgpu.store(destinations.at[row, at], place, mask=real)
