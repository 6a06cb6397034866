"""What the implementations share: from a forward and a backward pass to one differentiable function, and the arithmetic of tiles."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.retention_attention.reference import first_of_document, last_of_document

# In the kernels logits, and log_beta with them, are in base 2: the hardware's exponential.
LOG2E = math.log2(math.e)
# What a hidden entry's bias is. Not -inf: a row may meet hidden entries alone before its first visible one, and has them for its maximum till then.
HIDDEN = -1e30


def product(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """a.b over one axis of each, in float32; what is float32 stays it."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


def biased(logits: jax.Array, bias: jax.Array | None) -> jax.Array:
    return logits if bias is None else logits + bias


def grow(x: jax.Array, axis: int, size: int) -> jax.Array:
    """x with zeros behind, up to `size` along axis."""
    return jnp.pad(x, [(0, size - n if i == axis % x.ndim else 0) for i, n in enumerate(x.shape)])


def document_bounds(segment_ids: jax.Array | None, batch: int, length: int, padded: int) -> tuple[jax.Array, jax.Array]:
    """first_of_document and last_of_document, [B,padded] each. Padding belongs to the last document, in which nothing sees what comes later."""
    if segment_ids is not None:
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padded - length)), mode="edge")
    return first_of_document(segment_ids, (batch, padded)), last_of_document(segment_ids, (batch, padded))


def times(start: jax.Array | None, begin: int, end: int) -> jax.Array:
    """When the queries begin..end stand, [end-begin]."""
    return jnp.arange(begin, end) + (0 if start is None else start)


def of_queries(x: jax.Array, start: jax.Array | None, size: int) -> jax.Array:
    """What [B,T] numbers are at the times of `size` queries, [B,size]; the last one at a time after T."""
    if start is None:
        return x[:, :size]
    return jax.lax.dynamic_slice_in_dim(jnp.pad(x, ((0, 0), (0, size)), mode="edge"), start, size, axis=1)


def differentiable(forward: Callable, backward: Callable) -> Callable:
    """The function (q, k, v, log_beta, segment_ids, start) -> (out, mass) whose gradient `backward` computes.

    In both passes start is a traced scalar, or None where there are queries for the whole sequence.
    forward: (q, k, v, log_beta, segment_ids, start) -> (out, mass, lse). lse [B,H,G,Tq] float32, the logits' logsumexp, is all that is kept beside inputs
      and out. mass is None if log_beta is.
    backward: (q, k, v, log_beta, segment_ids, start, lse, delta, dout, dmass) -> (dq, dk, dv, dlog_beta). delta [B,H,G,Tq] float32 is each query's
      out.dout.
    """

    @jax.custom_vjp
    def attention(*inputs):
        return forward(*inputs)[:2]

    def attention_forward(*inputs):
        out, mass, lse = forward(*inputs)
        return (out, mass), (inputs, out, lse)

    def attention_backward(kept, cotangents):
        inputs, out, lse = kept
        dout, dmass = cotangents
        delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)
        return *backward(*inputs, lse, jnp.transpose(delta, (0, 2, 3, 1)), dout, dmass), None, None

    attention.defvjp(attention_forward, attention_backward)

    def retention_attention(q, k, v, log_beta=None, segment_ids=None, start=None):
        batch, length, heads = q.shape[:3]
        # As many queries as keys can only start at 0, and what is known beforehand need not be computed.
        start = None if length == k.shape[1] else jnp.asarray(start, jnp.int32)
        out, mass = attention(q, k, v, log_beta, segment_ids, start)
        if mass is None:
            # Nothing is forgotten: as many as the document has had so far.
            seen = times(start, 1, length + 1) - of_queries(first_of_document(segment_ids, k.shape[:2]), start, length)
            mass = jnp.broadcast_to(seen.astype(jnp.float32)[:, :, None], (batch, length, heads))
        return out, mass

    return retention_attention
