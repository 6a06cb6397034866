"""The kept entries of pool and write buffer move to their streams' segments."""

import functools

import jax

from pallas_kernels.compact import gpu, reference, tpu
from pallas_kernels.compact.reference import Buffer, Pool
from pallas_kernels.platforms import choose

__all__ = ["Buffer", "Pool", "compact"]

_IMPLEMENTATIONS = {"cpu": reference.compact, "tpu": tpu.compact, "gpu": gpu.compact}


def compact(pool: Pool, buffer: Buffer, destinations: jax.Array, implementation: str | None = None) -> Pool:
    """Moves every kept entry to the slot that a selection has given it, bit for bit; what is dropped or dead may be anything, NaN too.

    On a TPU in place: a donated pool is never copied. Elsewhere keys and values are gathered one after the other.

    Args:
      pool: keys, values [B,C,D] bfloat16 or float32, stat [B,C] float32, position [B,C] int32.
      buffer: keys, values [L,B,H,W,D] of the same dtype, stat [L,B,H,W] float32, position [B,W] int32.
      destinations: [B, C+S*W] int32, of each slot, then of the buffer's entries as [S,W]: the slot it moves to, C if it is dropped. As global_topk gives
        them: rising over the pool's kept entries and over the buffer's, together 0..n-1, each once.
      implementation: "cpu" (the reference), "tpu" or "gpu"; None: the platform's own.

    Returns:
      The pool; slots from n on hold anything.

    Raises:
      ValueError: wrong shapes, dtypes or, where they are not being traced, destinations.
    """
    implementation = choose(implementation, _IMPLEMENTATIONS)
    reference.check(pool, buffer, destinations)
    return _compact(pool, buffer, destinations, implementation=implementation)


@functools.partial(jax.jit, static_argnames="implementation")
def _compact(pool, buffer, destinations, implementation):
    return _IMPLEMENTATIONS[implementation](pool, buffer, destinations)
