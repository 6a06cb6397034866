"""What the implementations share: from a forward and a backward pass to one differentiable function."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.retention_attention.reference import first_of_document


def differentiable(forward: Callable, backward: Callable) -> Callable:
    """The function (q, k, v, log_beta, segment_ids) -> (out, mass) whose gradient `backward` computes.

    forward: (q, k, v, log_beta, segment_ids) -> (out, mass, lse). lse [B,H,G,T] float32, the logits' logsumexp, is all that is kept beside inputs and
      out. mass is None if log_beta is.
    backward: (q, k, v, log_beta, segment_ids, lse, delta, dout, dmass) -> (dq, dk, dv, dlog_beta). delta [B,H,G,T] float32 is each query's out.dout.
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
        return *backward(*inputs, lse, jnp.transpose(delta, (0, 2, 3, 1)), dout, dmass), None

    attention.defvjp(attention_forward, attention_backward)

    def retention_attention(q, k, v, log_beta=None, segment_ids=None):
        out, mass = attention(q, k, v, log_beta, segment_ids)
        if mass is None:
            # Nothing is forgotten: as many as the document has had so far.
            batch, length, heads = k.shape[:3]
            seen = jnp.arange(1, length + 1) - first_of_document(segment_ids, (batch, length))
            mass = jnp.broadcast_to(seen.astype(jnp.float32)[:, :, None], (batch, length, heads))
        return out, mass

    return retention_attention
