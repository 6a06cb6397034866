"""The GPU kernel (Pallas in its Triton lowering): flash attention in which a program's loops are as long as what its queries see.

A program has one kv head and a block of rows, each one query head of one query, in the order (t, g): whatever G and T, only the last block has idle rows.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


def tiling(dim: int, dtype) -> tuple[int, int, plgpu.CompilerParams]:
    """Rows of a program, keys of a block, warps and stages. float32 means float32, which tensor cores do not multiply: its blocks fit the registers."""
    if dtype == jnp.float32:
        return 64, 32, plgpu.CompilerParams(num_warps=8, num_stages=2)
    return 128, 64, plgpu.CompilerParams(num_warps=4 if dim <= 64 else 8, num_stages=3 if dim <= 128 else 2)


def kernel(layer, valid, starts, buffered, q, k, v, *refs, rows, block):
    """All arrays whole, as ragged_prefill has them, but layer is [1]. refs: keys and values of pool and buffer, if they have slots at all; the output."""
    *cached, out = refs
    tile, head, batch = (pl.program_id(axis) for axis in range(3))
    _, tokens, heads, group, dim = q.shape
    dtype, length, stream = q.dtype, valid[batch], layer[0] * heads + head
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    first_row = tile * rows
    row = first_row + jnp.arange(rows)
    query = row // group
    place = jnp.broadcast_arrays(batch, query[:, None], head, (row % group)[:, None], jnp.arange(dim))
    inside = jnp.broadcast_to((row < tokens * group)[:, None], (rows, dim))
    queries = plgpu.load(q.at[*place], mask=inside, other=0)

    def attend(keys, values, place, begin, end, first, last, state, diagonal=False):
        """Adds blocks first..last of entries begin..end of keys[place] and values[place]; with `diagonal` query t sees entry t and those before it."""

        def attend_block(i, state):
            largest, total, sums = state
            at = begin + i * block
            entry = at + jnp.arange(block)
            x, y = place
            live = jnp.broadcast_to((entry < end)[:, None], (block, dim))
            # Entries past the end may hold anything, NaN too, and 0 * NaN is NaN.
            key, value = (plgpu.load(ref.at[*x, pl.ds(at, block), *y, :], mask=live, other=0) for ref in (keys, values))
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

    # A program of padding alone has nothing to loop over. The others begin with the chunk, whose first token every query sees: no maximum stays infinite.
    first_query = first_row // group
    alive = first_query < length
    seen = jnp.where(alive, jnp.minimum((first_row + rows - 1) // group + 1, length), 0)
    full = jnp.where(alive, (first_query + 1) // block, 0)
    state = jnp.full((rows,), -jnp.inf, jnp.float32), jnp.zeros((rows,), jnp.float32), jnp.zeros((rows, dim), jnp.float32)
    own = (k, v, ((batch,), (head,)), 0, seen)
    state = attend(*own, 0, full, state)
    state = attend(*own, full, pl.cdiv(seen, block), state, diagonal=True)
    for keys, values in zip(cached[::2], cached[1::2], strict=True):
        if len(keys.shape) == 3:
            outer, begin, end = (batch,), starts[batch, stream], starts[batch, stream + 1]
        else:
            outer, begin, end = (layer[0], batch, head), 0, buffered[batch]
        state = attend(keys, values, (outer, ()), begin, end, 0, jnp.where(alive, pl.cdiv(end - begin, block), 0), state)
    _, total, sums = state
    result = jnp.where((query < length)[:, None], sums / total[:, None], 0)
    plgpu.store(out.at[*place], result.astype(dtype), mask=inside)


def ragged_prefill(q, k, v, valid, pool_keys, pool_values, starts, buffer_keys, buffer_values, buffered, layer, interpret=False):
    """As the package's ragged_prefill."""
    batch, length, heads, group, dim = q.shape
    if dim & (dim - 1) or dim < 16:
        raise NotImplementedError(f"q has the head dimension {dim}: on a GPU powers of 2 from 16 work")
    rows, block, compiler_params = tiling(dim, q.dtype)
    cached = [x for x in (pool_keys, pool_values, buffer_keys, buffer_values) if x.size]
    return pl.pallas_call(
        functools.partial(kernel, rows=rows, block=block),
        grid=(pl.cdiv(length * group, rows), heads, batch),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=compiler_params,
        interpret=interpret,
        name="ragged_prefill",
    )(jnp.asarray(layer, jnp.int32)[None], valid, starts, buffered, q, k, v, *cached)
