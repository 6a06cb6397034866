"""What ragged_prefill means, and what it asks of its arguments."""

import jax
import jax.numpy as jnp
import numpy as np


def ragged_prefill(q, k, v, valid, pool_keys, pool_values, starts, buffer_keys, buffer_values, buffered, layer):
    """As the package's ragged_prefill, over all that could be cached: simple, not fast."""
    batch, length, heads = q.shape[:3]
    slots, width = pool_keys.shape[1], buffer_keys.shape[3]
    stream = layer * heads + jnp.arange(heads)
    slot, entry, token = jnp.arange(slots), jnp.arange(width), jnp.arange(length)
    # Everything a kv head could see, [B, H, C + W + T, D], and what each query does see, [B, H, T, C + W + T].
    keys, values = (
        jnp.concatenate([jnp.broadcast_to(pool[:, None], (batch, heads, *pool.shape[1:])), buffer[layer], jnp.moveaxis(chunk, 1, 2)], axis=2)
        for pool, buffer, chunk in ((pool_keys, buffer_keys, k), (pool_values, buffer_values, v))
    )
    visible = jnp.concatenate(
        [
            jnp.broadcast_to(x, (batch, heads, length, x.shape[-1]))
            for x in (
                ((slot >= starts[:, stream, None]) & (slot < starts[:, stream + 1, None]))[:, :, None],
                (entry < buffered[:, None])[:, None, None],
                token <= token[:, None],
            )
        ],
        axis=3,
    )
    # What a padding token sees is of no account, and neither it nor any other entry that nothing sees may spread.
    visible &= (token < valid[:, None])[:, None, :, None]
    seen = jnp.any(visible, axis=2)[..., None]
    keys, values = jnp.where(seen, keys, 0), jnp.where(seen, values, 0)
    logits = jnp.einsum("BTHGD,BHID->BHGTI", q, keys, precision="highest", preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(logits, axis=-1, where=visible[:, :, None])
    out = jnp.einsum("BHGTI,BHID->BTHGD", weights, values.astype(jnp.float32), precision="highest")
    return jnp.where((token < valid[:, None])[:, :, None, None, None], out, 0).astype(q.dtype)


def check(q, k, v, valid, pool_keys, pool_values, starts, buffer_keys, buffer_values, buffered, layer):
    """Raises ValueError naming the first argument that does not fit, what it is and what would fit. Values are looked at where they are known."""
    if q.ndim != 5 or buffer_keys.ndim != 5 or pool_keys.ndim != 3:
        shapes = f"{q.shape}, {pool_keys.shape}, {buffer_keys.shape}"
        raise ValueError(f"q [B,T,H,G,D], pool_keys [B,C,D] and buffer_keys [L,B,H,W,D] have the shapes {shapes}")
    batch, length, heads, _, dim = q.shape
    layers, slots, width = buffer_keys.shape[0], pool_keys.shape[1], buffer_keys.shape[3]
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"q is {q.dtype}: bfloat16 and float32 work")
    if length == 0:
        raise ValueError(f"q has the shape {q.shape}: a chunk has at least one token")
    if width == 0:
        raise ValueError(f"buffer_keys has the shape {buffer_keys.shape}: a write buffer holds at least one token")
    entries = {
        "k": (k, (batch, length, heads, dim)),
        "v": (v, (batch, length, heads, dim)),
        "pool_keys": (pool_keys, (batch, slots, dim)),
        "pool_values": (pool_values, (batch, slots, dim)),
        "buffer_keys": (buffer_keys, (layers, batch, heads, width, dim)),
        "buffer_values": (buffer_values, (layers, batch, heads, width, dim)),
    }
    integers = {
        "valid": (valid, (batch,), length),
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
