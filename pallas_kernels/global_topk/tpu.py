"""TPU kernels (Mosaic) of select_keys: a threshold search by counting, then prefix counts by triangular matrices.

A row that fits into VMEM is read once: all steps of the search, the ranks and the destinations happen there in place. One that does not is streamed:
each sweep over it leaves the next bits of every key in VMEM, packed, and the search goes on through those; while 16 bits fit (up to 5M
entries on a v4, 28M on a v5p), two sweeps find the threshold. One more ranks, and a pass over the ranks makes destinations of them.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.global_topk.reference import HIGHEST, LOWEST, Selection

LANES = 128
BLOCK = 256  # rows of 128 entries that are counted or ranked at once
PLACED = 64  # rows that are given destinations at once: few, for each stream in them costs a pass over them
CHUNK = 4096  # most rows that one copy of the streamed search brings
STAGE = 1024  # rows of one stage in the pipelines of the streamed passes


def select_keys(keys: jax.Array, k: jax.Array, starts: jax.Array, width: int, interpret=False, vmem: int | None = None) -> Selection:
    """reference.select_keys. vmem: bytes of VMEM to do with; None: what the chip has."""
    batch, entries = keys.shape
    streams = starts.shape[1] - 1
    if vmem is None:
        # Where there is no TPU, in interpret mode, a size that all have.
        vmem = usable(pltpu.get_tpu_info().vmem_capacity_bytes if pltpu.is_tpu_device() else 1 << 24)
    rows = row_count(entries)
    bits = digit_bits(rows, streams, vmem)
    keys = jnp.pad(keys, ((0, 0), (0, rows * LANES - entries)), constant_values=LOWEST).reshape(batch, rows, LANES)

    def call(kernel, semantics, scratch=(), **options):
        params = pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=min(vmem, _bytes(scratch) + (4 << 20)))
        return pl.pallas_call(kernel, compiler_params=params, interpret=interpret, **options)

    select = _resident if bits == 32 else functools.partial(_streamed, bits=bits)
    keep, destinations, before = select(call, keys, k, starts[:, None], slots=entries - streams * width, width=width)
    before = before.reshape(batch, 2, streams + 1)
    return Selection(
        keep.reshape(batch, -1)[:, :entries].astype(bool),
        jnp.sum(jnp.diff(before), axis=1),
        destinations.reshape(batch, -1)[:, :entries],
    )


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def usable(capacity: int) -> int:
    """What a kernel may take of a chip's VMEM."""
    return capacity * 15 // 16


def row_count(entries: int) -> int:
    """Rows of 128 lanes that N entries fill, in whole tiles."""
    return _round_up(entries, 8 * LANES) // LANES


def _bytes(scratch) -> int:
    return sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in scratch)


def resident_scratch(rows: int, streams: int) -> list[tuple[tuple[int, ...], type]]:
    """Shapes and dtypes of the keys, the flags and the prefix counts at the bounds of streams."""
    held = _round_up(rows + 1, BLOCK)  # a count stands behind the last entry too
    return [((held, LANES), jnp.int32), ((held, LANES), jnp.int8), ((_round_up(2 * streams + 2, LANES), LANES), jnp.int32)]


def search_scratch(rows: int, bits: int) -> list[tuple[tuple[int, ...], type]]:
    """Shapes and dtypes of the packed digits and of two chunks of keys."""
    chunk = min(CHUNK, rows // BLOCK * BLOCK)
    words = pl.cdiv(pl.cdiv(rows, chunk), 32 // bits) * chunk
    return [((words, LANES), jnp.int32), ((2, chunk, LANES), jnp.int32)]


def digit_bits(rows: int, streams: int, vmem: int) -> int:
    """How many bits of every key of a row VMEM can hold: 32 if nothing has to be streamed; else the search sweeps over the keys 32 // bits times."""

    # Half a MiB is left to the compiler, which keeps the intermediate values of a block in VMEM.
    if rows < BLOCK or _bytes(resident_scratch(rows, streams)) + (1 << 19) <= vmem:
        return 32
    for bits in (16, 8, 4, 2, 1):
        if _bytes(search_scratch(rows, bits)) + (1 << 19) <= vmem:
            return bits
    raise NotImplementedError(f"keys: a row of {rows * LANES} entries is more than {vmem} bytes of VMEM can search; keep fewer, or read smaller chunks")


def _search(words, k, bits):
    """The k-th largest field and how many fields lie above it. A word of [rows, 128] int32 is a signed key or 32 // bits unsigned digits."""

    def count(candidate):
        def add(i, total):
            word = words[pl.ds(pl.multiple_of(i * BLOCK, BLOCK), BLOCK)]
            for shift in range(0, 32, bits):
                field = word if bits == 32 else _digit(word, shift, bits)
                total += jnp.sum(jnp.where(field >= candidate, 1, 0).reshape(-1, 8, LANES), axis=0)
            return total

        return jnp.sum(jax.lax.fori_loop(0, words.shape[0] // BLOCK, add, jnp.zeros((8, LANES), jnp.int32)))

    def refine(state):
        i, threshold, reached, above = state
        candidate = threshold + jnp.left_shift(jnp.int32(1), bits - 1 - i)
        n = count(candidate)
        enough = n >= k
        return i + 1, jnp.where(enough, candidate, threshold), jnp.where(enough, n, reached), jnp.where(enough, above, n)

    # Once exactly k reach the threshold, more bits change nothing.
    start = (jnp.int32(0), jnp.int32(LOWEST if bits == 32 else 0), jnp.int32(-1), jnp.int32(0))
    _, threshold, _, above = jax.lax.while_loop(lambda state: (state[0] < bits) & (state[2] != k), refine, start)
    return threshold, above


def _digit(word, shift, bits):
    return jax.lax.shift_right_logical(word, jnp.int32(shift)) & ((1 << bits) - 1)


def _quota(threshold, k, above):
    """How many of the entries tied at the threshold stay: none of them at LOWEST."""
    return jnp.where(threshold == LOWEST, 0, jnp.maximum(k - above, 0))


def _iota(shape, axis):
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _rank(ref, out, threshold, quota, carry):
    """Writes to out [rows, 128] how many entries before each of ref's keys are kept, ~ of it where the entry itself is not.

    carry: the counts [1, 128] before the first row, of keys above the threshold and of keys at it. Returns those behind the last row.
    """

    def matrix(mask):
        return jnp.where(mask, 1.0, 0.0).astype(jnp.bfloat16)

    dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
    lanes, block = (LANES, LANES), (BLOCK, BLOCK)
    earlier_lane, any_lane = matrix(_iota(lanes, 0) < _iota(lanes, 1)), jnp.ones(lanes, jnp.bfloat16)
    earlier_row = matrix(_iota(block, 1) < _iota(block, 0))

    def before(mask, carry):
        mask = matrix(mask)
        # No row of 128 counts more than bfloat16 holds exactly.
        in_row = dot(mask, any_lane)
        in_rows = dot(earlier_row, in_row.astype(jnp.bfloat16))
        count = (dot(mask, earlier_lane) + in_rows).astype(jnp.int32)
        return carry + count, carry + (in_row + in_rows)[-1:].astype(jnp.int32)

    def rank_block(i, carry):
        rows = pl.ds(pl.multiple_of(i * BLOCK, BLOCK), BLOCK)
        keys = ref[rows]
        above, tied = keys > threshold, keys == threshold
        n_above, carry_above = before(above, carry[0])
        n_tied, carry_tied = before(tied, carry[1])
        count = n_above + jnp.minimum(n_tied, quota)
        out[rows] = jnp.where(above | (tied & (n_tied < quota)), count, ~count)
        return carry_above, carry_tied

    return jax.lax.fori_loop(0, ref.shape[0] // BLOCK, rank_block, carry)


def _place(ref, keep, destinations, rows, first, segment, bound, offset, slots):
    """Moves counts as _rank writes them by what their segment asks for. Segments: the pool's streams, its dead end, the buffer's streams.

    first: the first row's index among all; segment: the one it lies in. Returns the segment that the next row lies in.
    """
    shape = (PLACED, LANES)
    entry = _iota(shape, 0) * LANES + _iota(shape, 1)

    def place_block(i, state):
        segment, end = state
        begin = (first + i * PLACED) * LANES

        def enter(state):
            segment, end, shift = state
            segment += 1
            return segment, bound(segment + 1), jnp.where(begin + entry >= end, offset(segment), shift)

        state = (segment, end, jnp.broadcast_to(offset(segment), shape))
        segment, end, shift = jax.lax.while_loop(lambda state: state[1] < begin + PLACED * LANES, enter, state)
        at = pl.ds(pl.multiple_of(i * PLACED, PLACED), PLACED)
        count = ref[at]
        destinations[at] = jnp.where(count < 0, slots, count + shift)
        keep[at] = jnp.where(count < 0, 0, 1).astype(jnp.int8)
        return segment, end

    return jax.lax.fori_loop(0, rows // PLACED, place_block, (segment, bound(segment + 1)))[0]


def _bounds(starts, streams, slots, width):
    """bound(j): the entry with which segment j begins; there is no end to the last."""

    def bound(j):
        buffer = jnp.where(j <= 2 * streams, slots + (j - streams - 1) * width, HIGHEST)
        return jnp.where(j <= streams, starts[0, 0, jnp.minimum(j, streams)], buffer)

    return bound


def _resident_kernel(k, starts, keys, keep, destinations, before, words, flags, table, *, slots, width):
    row, rows, streams = pl.program_id(0), keys.shape[1], starts.shape[2] - 1
    pltpu.sync_copy(keys.at[row], words.at[pl.ds(0, rows)])
    words[rows:] = jnp.full((words.shape[0] - rows, LANES), LOWEST, jnp.int32)
    threshold, above = _search(words, k[row], 32)
    nothing = jnp.zeros((1, LANES), jnp.int32)
    _rank(words, words, threshold, _quota(threshold, k[row], above), (nothing, nothing))

    # The counts before the bounds of all streams, each in a row of the table, over all its lanes.
    bound, lane = _bounds(starts, streams, slots, width), _iota((1, LANES), 1)

    def look_up(i, _):
        for j in range(8):
            entry = jnp.minimum(bound(i * 8 + j), slots + streams * width)
            count = words[pl.ds(entry >> 7, 1)]
            table[pl.ds(i * 8 + j, 1)] = jnp.where(lane == (entry & 127), jnp.where(count < 0, ~count, count), 0)
        return 0

    jax.lax.fori_loop(0, table.shape[0] // 8, look_up, 0)
    diagonal = _iota((LANES, LANES), 0) == _iota((LANES, LANES), 1)

    def spread(i, _):
        at = pl.ds(pl.multiple_of(i * LANES, LANES), LANES)
        table[at] = jnp.broadcast_to(jnp.sum(table[at], axis=1, keepdims=True), (LANES, LANES))
        before[0, pl.ds(i, 1)] = jnp.sum(jnp.where(diagonal, table[at], 0), axis=0, keepdims=True)
        return 0

    jax.lax.fori_loop(0, before.shape[1], spread, 0)

    def offset(j):
        return table[pl.ds(jnp.where(j <= streams, streams + 1 + j, j - streams), 1)] - table[pl.ds(streams + 1, 1)]

    _place(words, flags, words, keep.shape[1], 0, jnp.int32(0), bound, offset, slots)
    pltpu.sync_copy(words.at[pl.ds(0, rows)], destinations.at[row])
    pltpu.sync_copy(flags.at[pl.ds(0, keep.shape[1])], keep.at[row])


_SMEM = functools.partial(pl.BlockSpec, memory_space=pltpu.SMEM)
_HBM = pl.BlockSpec(memory_space=pl.ANY)


def _row_spec(n):
    """One row of an array [B, 1, n] of scalars."""
    return _SMEM((1, 1, n), lambda b, *_: (b, 0, 0))


def _resident(call, keys, k, starts, slots, width):
    batch, rows, _ = keys.shape
    streams = starts.shape[2] - 1
    scratch = resident_scratch(rows, streams)
    table = scratch[2][0][0] // LANES
    keep, destinations, before = call(
        functools.partial(_resident_kernel, slots=slots, width=width),
        ("parallel",),
        scratch,
        grid=(batch,),
        in_specs=[_SMEM(), _row_spec(streams + 1), _HBM],
        out_specs=[_HBM, _HBM, pl.BlockSpec((1, table, LANES), lambda b: (b, 0, 0))],
        out_shape=[
            jax.ShapeDtypeStruct((batch, _round_up(rows, PLACED), LANES), jnp.int8),
            jax.ShapeDtypeStruct((batch, rows, LANES), jnp.int32),
            jax.ShapeDtypeStruct((batch, table, LANES), jnp.int32),
        ],
        scratch_shapes=[pltpu.VMEM(*shape) for shape in scratch],
        name="global_topk",
    )(k, starts, keys)
    return keep, destinations, before.reshape(batch, -1)[:, : 2 * streams + 2]


def _search_kernel(k, keys, found, words, chunks, semaphores, *, bits):
    row, rows, chunk = pl.program_id(0), keys.shape[1], chunks.shape[1]
    steps, fields = pl.cdiv(rows, chunk), 32 // bits

    def begin(step):
        # The last chunk is moved back, and what it reads a second time is masked.
        return pl.multiple_of(jnp.minimum(step * chunk, rows - chunk), 8)

    def copy(step):
        return pltpu.make_async_copy(keys.at[row, pl.ds(begin(step), chunk)], chunks.at[step % 2], semaphores.at[step % 2])

    # In unsigned order, which that of the digits is: the keys with their sign bit flipped.
    prefix, above = jnp.int32(0), jnp.int32(0)
    for shift in range(32 - bits, -1, -bits):

        def pack(step, _, shift=shift, prefix=prefix):
            @pl.when(step + 1 < steps)
            def _():
                copy(step + 1).start()

            copy(step).wait()

            def pack_block(i, _):
                key = chunks[step % 2, pl.ds(pl.multiple_of(i * BLOCK, BLOCK), BLOCK)] ^ LOWEST
                inside = begin(step) + i * BLOCK + _iota(key.shape, 0) >= step * chunk
                if shift + bits < 32:
                    inside &= jax.lax.shift_right_logical(key ^ prefix, jnp.int32(shift + bits)) == 0
                # Digit 0 is never counted.
                digit = jnp.where(inside, _digit(key, shift, bits), 0) << (step % fields * bits)
                at = pl.ds(pl.multiple_of(step // fields * chunk + i * BLOCK, BLOCK), BLOCK)
                words[at] = digit | jnp.where(step % fields == 0, 0, words[at])
                return 0

            return jax.lax.fori_loop(0, chunk // BLOCK, pack_block, 0)

        copy(0).start()
        jax.lax.fori_loop(0, steps, pack, 0)
        digit, beyond = _search(words, k[row] - above, bits)
        prefix, above = prefix | digit << shift, above + beyond
    threshold = prefix ^ LOWEST
    found[0, 0, 0] = threshold
    found[0, 0, 1] = _quota(threshold, k[row], above)


def _rank_kernel(found, keys, counts, carry):
    @pl.when(pl.program_id(1) == 0)
    def _():
        carry[...] = jnp.zeros_like(carry)

    behind = _rank(keys.at[0], counts.at[0], found[0, 0, 0], found[0, 0, 1], (carry[0:1], carry[1:2]))
    carry[0:1], carry[1:2] = behind


def _place_kernel(starts, offsets, counts, keep, destinations, segment, *, slots, width):
    stage = pl.program_id(1)

    @pl.when(stage == 0)
    def _():
        segment[0] = 0

    bound = _bounds(starts, starts.shape[2] - 1, slots, width)
    first = stage * STAGE
    segment[0] = _place(counts.at[0], keep.at[0], destinations.at[0], STAGE, first, segment[0], bound, lambda j: offsets[0, 0, j], slots)


def _streamed(call, keys, k, starts, slots, width, bits):
    batch, rows, _ = keys.shape
    streams = starts.shape[2] - 1
    scratch = search_scratch(rows, bits)
    found = call(
        functools.partial(_search_kernel, bits=bits),
        ("parallel",),
        scratch,
        grid=(batch,),
        in_specs=[_SMEM(), _HBM],
        out_specs=_row_spec(2),
        out_shape=jax.ShapeDtypeStruct((batch, 1, 2), jnp.int32),
        scratch_shapes=[*(pltpu.VMEM(*shape) for shape in scratch), pltpu.SemaphoreType.DMA((2,))],
        name="global_topk_search",
    )(k, keys)
    grid = (batch, pl.cdiv(rows, STAGE))
    stage = pl.BlockSpec((1, STAGE, LANES), lambda b, i: (b, i, 0))
    counts = call(
        _rank_kernel,
        ("parallel", "arbitrary"),
        grid=grid,
        in_specs=[_row_spec(2), stage],
        out_specs=stage,
        out_shape=jax.ShapeDtypeStruct(keys.shape, jnp.int32),
        scratch_shapes=[pltpu.VMEM((8, LANES), jnp.int32)],
        name="global_topk_rank",
    )(found, keys)
    # What is kept before each stream, in the pool and in the buffer, is what is kept up to the entry before it.
    buffers = jnp.broadcast_to(slots + width * jnp.arange(streams + 1, dtype=jnp.int32), (batch, streams + 1))
    bounds = jnp.concatenate([starts[:, 0], buffers], axis=1)
    before = jnp.take_along_axis(counts.reshape(batch, -1), jnp.maximum(bounds - 1, 0), axis=1)
    before = jnp.where(bounds == 0, 0, jnp.where(before < 0, ~before, before + 1))
    pool, buffer = before[:, : streams + 1], before[:, streams + 1 :]
    offsets = jnp.concatenate([buffer, pool[:, 1:]], axis=1) - buffer[:, :1]
    keep, destinations = call(
        functools.partial(_place_kernel, slots=slots, width=width),
        ("parallel", "arbitrary"),
        grid=grid,
        in_specs=[_row_spec(streams + 1), _row_spec(2 * streams + 1), stage],
        out_specs=[stage, stage],
        out_shape=[jax.ShapeDtypeStruct(keys.shape, jnp.int8), jax.ShapeDtypeStruct(keys.shape, jnp.int32)],
        scratch_shapes=[pltpu.SMEM((1,), jnp.int32)],
        name="global_topk_place",
    )(starts, offsets[:, None], counts)
    return keep, destinations, before
