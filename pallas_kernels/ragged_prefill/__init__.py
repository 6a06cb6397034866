"""A chunk of queries against what their streams keep and against the chunk itself: prefill over the cache."""

import functools

import jax

from pallas_kernels import cached
from pallas_kernels.platforms import choose
from pallas_kernels.ragged_prefill import gpu, reference, tpu, xla

__all__ = ["ragged_prefill"]

_IMPLEMENTATIONS = {"reference": reference.ragged_prefill, "cpu": xla.ragged_prefill, "tpu": tpu.ragged_prefill, "gpu": gpu.ragged_prefill}


def ragged_prefill(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array,
    pool_keys: jax.Array,
    pool_values: jax.Array,
    starts: jax.Array,
    buffer_keys: jax.Array,
    buffer_values: jax.Array,
    buffered: jax.Array,
    layer: jax.Array | int,
    implementation: str | None = None,
) -> jax.Array:
    """Attention of one layer over a chunk of T tokens a sequence, METHOD section 4: nothing but softmax(q.k / sqrt(D)) v over what each query sees.

    Query t of kv head h sees, in one softmax, the pool's slots starts[b,s]..starts[b,s+1] of its stream s = layer*H + h, the first buffered[b]
    entries of its rows in the write buffer, and tokens 0..t of the chunk. Softmax and sums are in float32. What no query sees may be anything, NaN
    too. The cost is that of what is seen, and nothing of pool or buffer is copied; on a TPU a few entries are unless C and W are multiples of 16
    (of 128 where D is below 128).

    Args:
      q: [B,T,H,G,D] float32 or bfloat16, as all that follow but the integers; T at least 1.
      k, v: [B,T,H,D], the chunk's own.
      valid: [B] int32, 0 to T: of sequence b the first valid[b] tokens count, the rest is padding.
      pool_keys, pool_values: [B,C,D]; C may be 0.
      starts: [B,L*H+1] int32, rising, at most C.
      buffer_keys, buffer_values: [L,B,H,W,D], W at least 1.
      buffered: [B] int32, 0 to W.
      layer: int32, 0 to L-1; may be traced, as that of a scan over layers is.
      implementation: "reference", "cpu" (xla.py), "tpu" or "gpu"; None: the platform's own.

    Returns:
      [B,T,H,G,D] in q's dtype; zeros for padding.

    Raises:
      ValueError: wrong shapes, dtypes or, where they are not being traced, values of the integers.
    """
    implementation = choose(implementation, _IMPLEMENTATIONS)
    arguments = q, k, v, valid, pool_keys, pool_values, starts, buffer_keys, buffer_values, buffered, layer
    if q.ndim == 5 and q.shape[1] == 0:
        raise ValueError(f"q has the shape {q.shape}: a chunk has at least one token")
    cached.check("[B,T,H,G,D]", q, k, v, *arguments[4:], valid=(valid, q.shape[1]))
    return _ragged_prefill(*arguments, implementation=implementation)


@functools.partial(jax.jit, static_argnames="implementation")
def _ragged_prefill(*arguments, implementation):
    return _IMPLEMENTATIONS[implementation](*arguments)
