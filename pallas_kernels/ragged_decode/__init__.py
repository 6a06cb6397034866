"""One query token a sequence against what its streams keep: decoding over the cache."""

import functools

import jax

from pallas_kernels import cached
from pallas_kernels.platforms import choose
from pallas_kernels.ragged_decode import gpu, reference, tpu, xla

__all__ = ["ragged_decode"]

_IMPLEMENTATIONS = {"reference": reference.ragged_decode, "cpu": xla.ragged_decode, "tpu": tpu.ragged_decode, "gpu": gpu.ragged_decode}


def ragged_decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pool_keys: jax.Array,
    pool_values: jax.Array,
    starts: jax.Array,
    buffer_keys: jax.Array,
    buffer_values: jax.Array,
    buffered: jax.Array,
    layer: jax.Array | int,
    implementation: str | None = None,
) -> jax.Array:
    """Attention of one layer for one token a sequence, METHOD section 4: nothing but softmax(q.k / sqrt(D)) v over what the token sees.

    The query heads of kv head h see, in one softmax, the pool's slots starts[b,s]..starts[b,s+1] of its stream s = layer*H + h, the first buffered[b]
    entries of its rows in the write buffer, and the token itself. Softmax and sums are in float32. What is not seen may be anything, NaN too. The cost
    is that of what is kept; pool and buffer are not copied.

    Args:
      q: [B,H,G,D] float32 or bfloat16, as all that follow but the integers.
      k, v: [B,H,D], the token's own.
      pool_keys, pool_values: [B,C,D]; C may be 0.
      starts: [B,L*H+1] int32, rising, at most C.
      buffer_keys, buffer_values: [L,B,H,W,D], W at least 1.
      buffered: [B] int32, 0 to W.
      layer: int32, 0 to L-1; may be traced, as that of a scan over layers is.
      implementation: "reference", "cpu" (xla.py), "tpu" or "gpu"; None: the platform's own.

    Returns:
      [B,H,G,D] in q's dtype.

    Raises:
      ValueError: wrong shapes, dtypes or, where they are not being traced, values of the integers.
      NotImplementedError: on a GPU, a head dimension that is no power of 2 from 16 on.
    """
    implementation = choose(implementation, _IMPLEMENTATIONS)
    arguments = q, k, v, pool_keys, pool_values, starts, buffer_keys, buffer_values, buffered, layer
    cached.check("[B,H,G,D]", *arguments)
    return _ragged_decode(*arguments, implementation=implementation)


@functools.partial(jax.jit, static_argnames="implementation")
def _ragged_decode(*arguments, implementation):
    return _IMPLEMENTATIONS[implementation](*arguments)
