"""The meaning of retention_attention, T x T arrays and all, and what may be asked of it."""

import jax
import jax.numpy as jnp


def first_of_document(segment_ids: jax.Array | None, shape: tuple[int, int]) -> jax.Array:
    """The index of the first token of each token's document, [B,T] int32. A document is a maximal run of equal ids; without ids each row is one."""
    if segment_ids is None:
        return jnp.zeros(shape, jnp.int32)
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return jax.lax.cummax(jnp.where(starts, jnp.arange(shape[1], dtype=jnp.int32), 0), axis=1)


def last_of_document(segment_ids: jax.Array | None, shape: tuple[int, int]) -> jax.Array:
    """The index of the last token of each token's document, [B,T] int32."""
    flipped = None if segment_ids is None else segment_ids[:, ::-1]
    return shape[1] - 1 - first_of_document(flipped, shape)[:, ::-1]


def retention_attention(q, k, v, log_beta=None, segment_ids=None) -> tuple[jax.Array, jax.Array]:
    """As the operation of this name, differentiable by jax."""
    batch, length, heads, _, dim = q.shape
    log_beta = jnp.zeros((batch, length, heads), jnp.float32) if log_beta is None else log_beta
    time = jnp.arange(length)
    # [T, T], [B, T, T]
    distance = time[:, None] - time
    visible = (distance >= 0) & (time >= first_of_document(segment_ids, (batch, length))[:, :, None])
    # [B, H, T, T]
    bias = jnp.where(visible[:, None], distance * jnp.moveaxis(log_beta, 1, 2)[:, :, None], -jnp.inf)
    q, k, values = (x.astype(jnp.float32) for x in (q, k, v))
    logits = jnp.einsum("BTHGD,BIHD->BHGTI", q, k, precision="highest") / dim**0.5 + bias[:, :, None]
    out = jnp.einsum("BHGTI,BIHD->BTHGD", jax.nn.softmax(logits, axis=-1), values, precision="highest")
    return out.astype(v.dtype), jnp.moveaxis(jnp.exp(bias).sum(axis=-1), 2, 1)


def check(q, k, v, log_beta, segment_ids) -> None:
    """Raises ValueError, naming the argument, for what retention_attention does not take. Values are looked at where they are concrete."""
    if q.ndim != 5 or 0 in q.shape:
        raise ValueError(f"q has shape {q.shape}: it must be [B,T,H,G,D], none of them 0")
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"q has dtype {q.dtype}: it must be float32 or bfloat16")
    batch, length, heads, _, dim = q.shape
    for name, x in (("k", k), ("v", v)):
        if x.shape != (batch, length, heads, dim):
            raise ValueError(f"{name} has shape {x.shape}: beside q {q.shape} it must be [B,T,H,D] = {(batch, length, heads, dim)}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {x.dtype}: it must be q's, {q.dtype}")
    if log_beta is not None:
        if log_beta.shape != (batch, length, heads):
            raise ValueError(f"log_beta has shape {log_beta.shape}: beside q {q.shape} it must be [B,T,H] = {(batch, length, heads)}")
        if log_beta.dtype != jnp.float32:
            raise ValueError(f"log_beta has dtype {log_beta.dtype}: it must be float32")
        if not isinstance(log_beta, jax.core.Tracer) and not bool(jnp.all((log_beta <= 0) & (log_beta > -jnp.inf))):
            raise ValueError("log_beta holds values that are positive, infinite or NaN: it must be finite and at most 0, as logsigmoid gives it")
    if segment_ids is not None:
        if segment_ids.shape != (batch, length):
            raise ValueError(f"segment_ids has shape {segment_ids.shape}: beside q {q.shape} it must be [B,T] = {(batch, length)}")
        if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
            raise ValueError(f"segment_ids has dtype {segment_ids.dtype}: it must be an integer type")
