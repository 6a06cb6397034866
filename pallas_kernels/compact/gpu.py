"""The GPU kernel (Pallas in its Triton lowering): every program makes a block of slots from the entries that come to them.

Programs run in any order, so they cannot write where others still read: a field is gathered into memory of its own. Keys and values follow one another,
so that only one of them is alive twice: half a pool more at the peak. Only the rows that are kept are read.
"""


import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.compact.reference import Buffer, Pool, gather, sources

ROWS = 64  # slots of a program


def kernel(source, pool, buffer, out):
    """source [B,C] in the order of pool slots, then [S,W]; pool, out [B,C,D]; buffer [L,B,H,W,D]."""
    row, begin = pl.program_id(0), pl.program_id(1) * ROWS
    slots, dim = pool.shape[1:]
    heads, width = buffer.shape[2:4]
    lanes = pl.next_power_of_2(dim)
    slot, column = begin + jnp.arange(ROWS), jnp.arange(lanes)
    entry = plgpu.load(source.at[row, pl.ds(begin, ROWS)], mask=slot < slots, other=0)
    some = (slot < slots)[:, None] & (column < dim)
    old = entry < slots
    new = jnp.maximum(entry - slots, 0)
    stream = jax.lax.div(new, width)
    from_pool = jnp.broadcast_arrays(row, jnp.minimum(entry, slots - 1)[:, None], column)
    layer, head, token = jax.lax.div(stream, heads), jax.lax.rem(stream, heads), jax.lax.rem(new, width)
    from_buffer = jnp.broadcast_arrays(layer[:, None], row, head[:, None], token[:, None], column)
    kept = plgpu.load(pool.at[*from_pool], mask=some & old[:, None], other=0)
    fresh = plgpu.load(buffer.at[*from_buffer], mask=some & ~old[:, None], other=0)
    place = jnp.broadcast_arrays(row, slot[:, None], column)
    plgpu.store(out.at[*place], jnp.where(old[:, None], kept, fresh), mask=some)


def compact(pool: Pool, buffer: Buffer, destinations: jax.Array, interpret=False) -> Pool:
    """As the package's compact."""
    batch, slots = pool.position.shape
    source = sources(destinations, slots)
    call = pl.pallas_call(
        kernel,
        grid=(batch, pl.cdiv(slots, ROWS)),
        out_shape=jax.ShapeDtypeStruct(pool.keys.shape, pool.keys.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="compact",
    )
    keys = call(source, pool.keys, buffer.keys)
    # Values wait for the keys, whose old memory they can then have.
    keys, old_values, new_values = jax.lax.optimization_barrier((keys, pool.values, buffer.values))
    values = call(source, old_values, new_values)
    stat, position = gather(source, pool, buffer)
    return Pool(keys, values, stat, position)
