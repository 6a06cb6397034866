"""What ragged_decode means."""

import jax
import jax.numpy as jnp


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
