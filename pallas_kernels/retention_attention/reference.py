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


def retention_attention(q, k, v, log_beta=None, segment_ids=None, start=None) -> tuple[jax.Array, jax.Array]:
    """As the operation of this name, differentiable by jax."""
    log_beta = jnp.zeros(k.shape[:3], jnp.float32) if log_beta is None else log_beta
    index = jnp.arange(k.shape[1])
    time = jnp.arange(q.shape[1]) + (0 if start is None else start)
    # [Tq, T], [B, Tq, T]
    distance = time[:, None] - index
    visible = (distance >= 0) & (index >= first_of_document(segment_ids, k.shape[:2])[:, time, None])
    # [B, H, Tq, T]
    bias = jnp.where(visible[:, None], distance * jnp.moveaxis(log_beta, 1, 2)[:, :, None], -jnp.inf)
    q, k, values = (x.astype(jnp.float32) for x in (q, k, v))
    logits = jnp.einsum("BTHGD,BIHD->BHGTI", q, k, precision="highest") / q.shape[-1] ** 0.5 + bias[:, :, None]
    out = jnp.einsum("BHGTI,BIHD->BTHGD", jax.nn.softmax(logits, axis=-1), values, precision="highest")
    return out.astype(v.dtype), jnp.moveaxis(jnp.exp(bias).sum(axis=-1), 2, 1)


def check(q, k, v, log_beta, segment_ids, start) -> None:
    """Raises ValueError, naming the argument, for what retention_attention does not take. Values are looked at where they are concrete."""
    if q.ndim != 5 or 0 in q.shape:
        raise ValueError(f"q has shape {q.shape}: it must be [B,Tq,H,G,D], none of them 0")
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"q has dtype {q.dtype}: it must be float32 or bfloat16")
    batch, queries, heads, _, dim = q.shape
    longer = start is not None and k.ndim == 4 and k.shape[1] > queries
    length = k.shape[1] if longer else queries
    for name, x in (("k", k), ("v", v)):
        if x.shape != (batch, length, heads, dim):
            hint = ", or with start a longer T" if start is None else ""
            raise ValueError(f"{name} has shape {x.shape}: beside q {q.shape} it must be [B,T,H,D] = {(batch, length, heads, dim)}{hint}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {x.dtype}: it must be q's, {q.dtype}")
    if log_beta is not None:
        if log_beta.shape != (batch, length, heads):
            raise ValueError(f"log_beta has shape {log_beta.shape}: beside k {k.shape} it must be [B,T,H] = {(batch, length, heads)}")
        if log_beta.dtype != jnp.float32:
            raise ValueError(f"log_beta has dtype {log_beta.dtype}: it must be float32")
        if not isinstance(log_beta, jax.core.Tracer) and not bool(jnp.all((log_beta <= 0) & (log_beta > -jnp.inf))):
            raise ValueError("log_beta holds values that are positive, infinite or NaN: it must be finite and at most 0, as logsigmoid gives it")
    if segment_ids is not None:
        if segment_ids.shape != (batch, length):
            raise ValueError(f"segment_ids has shape {segment_ids.shape}: beside k {k.shape} it must be [B,T] = {(batch, length)}")
        if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
            raise ValueError(f"segment_ids has dtype {segment_ids.dtype}: it must be an integer type")
    if start is not None:
        if jnp.ndim(start) or not jnp.issubdtype(jnp.result_type(start), jnp.integer):
            raise ValueError(f"start has shape {jnp.shape(start)} and dtype {jnp.result_type(start)}: it must be one integer")
        if not isinstance(start, jax.core.Tracer) and not 0 <= start <= length - queries:
            raise ValueError(f"start is {start}: {queries} queries among {length} tokens must start at 0 to {length - queries}")
