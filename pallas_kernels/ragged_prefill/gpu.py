"""The GPU kernel (Pallas in its Triton lowering): flash attention in which a program's loops are as long as what its queries see.

A program has one kv head and a block of rows, each one query head of one query, in the order (t, g): whatever G and T, only the last has idle rows.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

MULTIPROCESSORS = 132  # of an H100


def tiling(batch: int, heads: int, rows: int, dim: int, dtype) -> tuple[int, int, plgpu.CompilerParams]:
    """For so many rows of each kv head: rows of a program, keys of a block, warps and stages, such that an H100's registers hold it all.

    float32 means float32, which tensor cores do not multiply.
    """
    if dtype == jnp.float32:
        return 64, 32 if dim <= 64 else 16, plgpu.CompilerParams(num_warps=8, num_stages=2)
    block_rows = 128 if batch * heads * pl.cdiv(rows, 128) >= MULTIPROCESSORS else 64
    return block_rows, 64 if dim <= 128 else 32, plgpu.CompilerParams(num_warps=block_rows // 16, num_stages=3)


def kernel(layer, valid, starts, buffered, q, k, v, *refs, rows, block):
    """All arrays whole, as ragged_prefill has them, but layer is [1]. refs: keys and values of pool, if it has slots, and buffer; the output."""
    *cached, out = refs
    tile, head, batch = (pl.program_id(axis) for axis in range(3))
    _, tokens, heads, group, dim = q.shape
    dtype, length, stream = q.dtype, valid[batch], layer[0] * heads + head
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    # Tensors have powers of 2, and products 16 or more, for sides.
    lane = jnp.arange(max(pl.next_power_of_2(dim), 16))
    first_row = tile * rows
    row = first_row + jnp.arange(rows)
    query = row // group
    place = jnp.broadcast_arrays(batch, query[:, None], head, (row % group)[:, None], lane)
    inside = (row < tokens * group)[:, None] & (lane < dim)
    queries = plgpu.load(q.at[*place], mask=inside, other=0)

    def attend(source, begin, end, first, last, state, diagonal=False):
        """Adds blocks first..last of entries begin..end; with `diagonal` query t sees entry t and those before it.

        source: keys, values, and what the place of an entry in them is.
        """
        *arrays, place_of = source

        def attend_block(i, state):
            largest, total, sums = state
            entry = begin + i * block + jnp.arange(block)
            # Entries past the end may be anything, NaN too, and 0 * NaN is NaN.
            live = (entry < end)[:, None] & (lane < dim)
            place = jnp.broadcast_arrays(*place_of(entry[:, None]), lane)
            key, value = (plgpu.load(array.at[*place], mask=live, other=0) for array in arrays)
            logits = jax.lax.dot_general(queries, key, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
            visible = (entry < end)[None, :]
            if diagonal:
                visible &= entry[None, :] <= query[:, None]
            logits = jnp.where(visible, logits * (dim**-0.5 * math.log2(math.e)), -jnp.inf)
            new_largest = jnp.maximum(largest, jnp.max(logits, axis=1))
            weights, decay = jnp.exp2(logits - new_largest[:, None]), jnp.exp2(largest - new_largest)
            update = jnp.dot(weights.astype(dtype), value, precision=precision, preferred_element_type=jnp.float32)
            return new_largest, total * decay + jnp.sum(weights, axis=1), sums * decay[:, None] + update

        return jax.lax.fori_loop(first, last, attend_block, state)

    # A program of padding alone has nothing to loop over. The others begin with the chunk, whose first token every query sees: from there on no
    # maximum is infinite.
    first_query = first_row // group
    alive = first_query < length
    seen = jnp.where(alive, jnp.minimum((first_row + rows - 1) // group + 1, length), 0)
    before = jnp.where(alive, (first_query + 1) // block, 0)
    state = jnp.full((rows,), -jnp.inf, jnp.float32), jnp.zeros((rows,), jnp.float32), jnp.zeros((rows, lane.size), jnp.float32)
    chunk = k, v, lambda entry: (batch, entry, head)
    state = attend(chunk, 0, seen, 0, before, state)
    state = attend(chunk, 0, seen, before, pl.cdiv(seen, block), state, diagonal=True)
    for keys, values in zip(cached[::2], cached[1::2], strict=True):
        if len(keys.shape) == 3:
            source, begin, end = (keys, values, lambda entry: (batch, entry)), starts[batch, stream], starts[batch, stream + 1]
        else:
            source, begin, end = (keys, values, lambda entry: (layer[0], batch, head, entry)), 0, buffered[batch]
        state = attend(source, begin, end, 0, jnp.where(alive, pl.cdiv(end - begin, block), 0), state)
    _, total, sums = state
    result = jnp.where((query < length)[:, None], sums / total[:, None], 0)
    plgpu.store(out.at[*place], result.astype(dtype), mask=inside)


def ragged_prefill(q, k, v, valid, pool_keys, pool_values, starts, buffer_keys, buffer_values, buffered, layer, interpret=False):
    """As the package's ragged_prefill."""
    batch, length, heads, group, dim = q.shape
    rows, block, compiler_params = tiling(batch, heads, length * group, dim, q.dtype)
    cached = [x for x in (pool_keys, pool_values, buffer_keys, buffer_values) if x.size]
    return pl.pallas_call(
        functools.partial(kernel, rows=rows, block=block),
        grid=(pl.cdiv(length * group, rows), heads, batch),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=compiler_params,
        interpret=interpret,
        name="ragged_prefill",
    )(jnp.asarray(layer, jnp.int32)[None], valid, starts, buffered, q, k, v, *cached)
