"""One door for each attention the model needs; each picks a kernel or its XLA form by the platform it is compiled for.

retention_attention  whole sequences: the plain forward pass, the teacher, and gate training with the retention bias and the retained mass.
cached_attention     new tokens against pool, write buffer and themselves: prefill and decode over the cache.
"""

import jax

from pallas_kernels.cached import check_gpu
from pallas_kernels.platforms import platform
from pallas_kernels.ragged_decode import ragged_decode
from pallas_kernels.ragged_prefill import ragged_prefill
from pallas_kernels.retention_attention import retention_attention

__all__ = ["cached_attention", "retention_attention"]


def cached_attention(q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array, *cached) -> jax.Array:
    """The next tokens of each sequence, q [B,T,H,G,D], k, v [B,T,H,D], of which valid [B] count -> [B,T,H,G,D].

    cached: pool_keys, pool_values, starts, buffer_keys, buffer_values, buffered, layer, as ragged_prefill takes them. Raises NotImplementedError for a head
    dimension that cannot be decoded: a prompt should not be read whole before that is found.
    """
    if platform() == "gpu":
        check_gpu(q.shape[-1])
    if q.shape[1] > 1:
        return ragged_prefill(q, k, v, valid, *cached)
    return ragged_decode(q[:, 0], k[:, 0], v[:, 0], *cached)[:, None]
