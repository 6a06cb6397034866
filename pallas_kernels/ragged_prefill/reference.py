"""What ragged_prefill means."""

import jax
import jax.numpy as jnp


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
