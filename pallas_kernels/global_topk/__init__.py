"""The entries of all streams of a sequence, pool and write buffer, ranked together: which stay, and where they go."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.global_topk import gpu, reference, tpu, xla
from pallas_kernels.global_topk.reference import Selection, TopK
from pallas_kernels.platforms import choose

__all__ = ["Selection", "TopK", "global_topk", "select_keys"]

_IMPLEMENTATIONS = {"reference": reference.select_keys, "cpu": xla.select_keys, "tpu": tpu.select_keys, "gpu": gpu.select_keys}


def global_topk(
    scores: jax.Array, valid: jax.Array, protected: jax.Array, k: jax.Array, starts: jax.Array, width: int, implementation: str | None = None
) -> TopK:
    """Keeps the k entries of each row that score highest: exactly k, or all valid ones if those are fewer. METHOD section 4's one top-k.

    A row's N = C + S*W entries are C pool slots, of which stream s owns starts[s]..starts[s+1], then the write buffer, [S, W] flattened. Of
    those that tie the first in this order stay. -0.0 ties with +0.0, and -inf is a score like others. NaN ranks with -inf and is reported.

    Args:
      scores: [B, N] float32.
      valid: [B, N] bool. What is not is never kept, whatever its score; slots past starts[:, -1] must not be.
      protected: [B, N] bool. Valid entries that stay before all others; of more than k, the first k.
      k: [B] int32, 0 to N.
      starts: [B, S+1] int32, rising from 0 to at most C.
      width: W, 0 or more.
      implementation: "reference", "cpu" (xla.py), "tpu" or "gpu"; None: the platform's own.

    Returns:
      keep [B, N] bool.
      counts [B, S] int32: how many entries each stream keeps.
      destinations [B, N] int32: the slot that a kept entry goes to so that all streams lie end to end in order, inside a stream first the pool's
        entries, then the buffer's, each in their old order; more than C of them run past the pool's end. C for what is dropped.
      has_nan [B] bool: whether a valid score is NaN.

    Raises:
      ValueError: wrong shapes, dtypes or, where they are not being traced, values of k and starts.
    """
    reference.check(scores, valid, protected, k, starts, width)
    return _global_topk(scores, valid, protected, k, starts, width, choose(implementation, _IMPLEMENTATIONS))


def select_keys(keys: jax.Array, k: jax.Array, starts: jax.Array, width: int, implementation: str | None = None) -> Selection:
    """global_topk for keys [B, N] int32 instead of scores: the largest stay, but never reference.LOWEST, which is what is not valid."""
    reference.check_keys(keys, k, starts, width)
    return _select_keys(keys, k, starts, width, choose(implementation, _IMPLEMENTATIONS))


@functools.partial(jax.jit, static_argnums=(5, 6))
def _global_topk(scores, valid, protected, k, starts, width, implementation):
    keys = reference.ordered_keys(scores, valid, protected)
    return TopK(*_select_keys(keys, k, starts, width, implementation), jnp.any(valid & jnp.isnan(scores), axis=1))


@functools.partial(jax.jit, static_argnums=(3, 4))
def _select_keys(keys, k, starts, width, implementation):
    if implementation == "cpu" and keys.shape[1] > 2**24:
        implementation = "reference"  # float32, in which xla.py counts, skips integers there
    return _IMPLEMENTATIONS[implementation](keys, k, starts, width)
