"""What ragged_decode means, and what it asks of its arguments."""

import jax
import jax.numpy as jnp
import numpy as np


def ragged_decode(q, k, v, pool_keys, pool_values, starts, buffer_keys, buffer_values, buffered, layer):
    """As the package's ragged_decode, over all that could be cached: simple, not fast."""
    batch, heads, _, dim = q.shape
    stream = layer * heads + jnp.arange(heads)
    slot, entry = jnp.arange(pool_keys.shape[1]), jnp.arange(buffer_keys.shape[3])
    # All that a kv head could see, [B, H, C + W + 1, D], and what it does see, [B, H, C + W + 1].
    keys, values = (
        jnp.concatenate([jnp.broadcast_to(pool[:, None], (batch, heads, *pool.shape[1:])), buffer[layer], own[:, :, None]], axis=2)
        for pool, buffer, own in ((pool_keys, buffer_keys, k), (pool_values, buffer_values, v))
    )
    visible = jnp.concatenate(
        [
            (slot >= starts[:, stream, None]) & (slot < starts[:, stream + 1, None]),
            jnp.broadcast_to((entry < buffered[:, None])[:, None], (batch, heads, entry.shape[0])),
            jnp.ones((batch, heads, 1), bool),
        ],
        axis=2,
    )
    logits = jnp.einsum("BHGD,BHID->BHGI", q, keys, precision="highest", preferred_element_type=jnp.float32) * dim**-0.5
    weights = jax.nn.softmax(logits, axis=-1, where=visible[:, :, None])
    # What is not seen may be NaN, and 0 * NaN is NaN.
    values = jnp.where(visible[..., None], values, 0).astype(jnp.float32)
    return jnp.einsum("BHGI,BHID->BHGD", weights, values, precision="highest").astype(q.dtype)


def check(q, k, v, pool_keys, pool_values, starts, buffer_keys, buffer_values, buffered, layer):
    """Raises ValueError naming the first argument that does not fit, what it is and what would fit. Values are looked at where they are known."""
    if q.ndim != 4 or pool_keys.ndim != 3 or buffer_keys.ndim != 5:
        shapes = f"{q.shape}, {pool_keys.shape}, {buffer_keys.shape}"
        raise ValueError(f"q [B,H,G,D], pool_keys [B,C,D] and buffer_keys [L,B,H,W,D] have the shapes {shapes}")
    batch, heads, _, dim = q.shape
    layers, slots, width = buffer_keys.shape[0], pool_keys.shape[1], buffer_keys.shape[3]
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"q is {q.dtype}: bfloat16 and float32 work")
    if width == 0:
        raise ValueError(f"buffer_keys has the shape {buffer_keys.shape}: a write buffer holds at least one token")
    entries = {
        "k": (k, (batch, heads, dim)),
        "v": (v, (batch, heads, dim)),
        "pool_keys": (pool_keys, (batch, slots, dim)),
        "pool_values": (pool_values, (batch, slots, dim)),
        "buffer_keys": (buffer_keys, (layers, batch, heads, width, dim)),
        "buffer_values": (buffer_values, (layers, batch, heads, width, dim)),
    }
    integers = {
        "starts": (starts, (batch, layers * heads + 1), slots),
        "buffered": (buffered, (batch,), width),
        "layer": (layer, (), layers - 1),
    }
    for name, (array, shape) in entries.items():
        if array.shape != shape or array.dtype != q.dtype:
            raise ValueError(f"{name} is {array.dtype}{list(array.shape)}: with this q, pool and buffer it must be {q.dtype}{list(shape)}")
    for name, (array, shape, highest) in integers.items():
        if jnp.shape(array) != shape or jnp.result_type(array) != jnp.int32:
            raise ValueError(f"{name} is {jnp.result_type(array)}{list(jnp.shape(array))}: it must be int32{list(shape)}")
        if not isinstance(array, jax.core.Tracer) and np.size(array) and not (0 <= np.min(array) and np.max(array) <= highest):
            raise ValueError(f"{name} lies in {np.min(array)}..{np.max(array)}: it must lie in 0..{highest}")
    if not isinstance(starts, jax.core.Tracer) and np.any(np.diff(starts) < 0):
        raise ValueError("starts falls along a row: segments lie end to end, so that each row must be sorted")
