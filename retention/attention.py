"""One door for each attention the model needs. The XLA forms here are the reference.

causal_attention    whole sequences: the plain forward pass, the teacher, and gate training with the retention bias.
segments_attention  queries against ragged segments of slots: prefill and decode over the cache.
Softmax is in float32 whatever the storage dtype.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, log_beta: jax.Array | None = None) -> jax.Array:
    """softmax_i(q_t.k_i / sqrt(D) + (t-i) log beta_i) v_i over i <= t. METHOD section 3; without log_beta plain causal attention.

    Queries go in blocks, each against the keys up to its own end: the upper triangle costs nothing, and as a block is recomputed in the backward
    pass, no T x T array is ever alive.

    Args:
      q: [B,T,H,G,D]. k, v: [B,T,H,D]. log_beta: [B,T,H] float32, shared by the G query heads of a kv head.

    Returns:
      [B,T,H,G,D] in q's dtype.
    """
    batch, length, heads, group, dim = q.shape
    # A kv head's G query heads are rows of one matrix product, which on a CPU is twice as fast as contracting them in place.
    # [B, H, G, T, D]
    q = jnp.transpose(q, (0, 2, 3, 1, 4)) * jnp.asarray(dim**-0.5, q.dtype)
    # [B, H, T, D]
    k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)

    @jax.checkpoint
    def attend(q, k, v, log_beta):
        queries, keys = q.shape[3], k.shape[2]
        distance = jnp.arange(keys - queries, keys)[:, None] - jnp.arange(keys)
        # The bias comes after scaling: it multiplies the weight by beta^(t-i), never the logit.
        bias = 0.0 if log_beta is None else (distance * log_beta[:, :, None])[:, :, None]
        logits = jnp.einsum("BHND,BHID->BHNI", q.reshape(batch, heads, -1, dim), k, preferred_element_type=jnp.float32)
        logits = jnp.where(distance >= 0, logits.reshape(batch, heads, group, queries, keys) + bias, -jnp.inf)
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype).reshape(batch, heads, -1, keys)
        return jnp.einsum("BHNI,BHID->BHND", weights, v).reshape(q.shape)

    log_beta = None if log_beta is None else jnp.moveaxis(log_beta, 1, 2)
    block = max(128, -(-length // 16))
    parts = []
    for start in range(0, length, block):
        end = min(start + block, length)
        seen = None if log_beta is None else log_beta[:, :, :end]
        parts.append(attend(q[:, :, :, start:end], k[:, :, :end], v[:, :, :end], seen))
    return jnp.transpose(jnp.concatenate(parts, axis=3), (0, 3, 1, 2, 4))


class Segments(NamedTuple):
    """Where the entries of each (sequence, kv head) lie in one flat array of slots.

    keys, values [N,D]; start [B,H] int32; limit [B,H,T] int32: query t sees the first limit[.., t] entries of its segment.
    """

    keys: jax.Array
    values: jax.Array
    start: jax.Array
    limit: jax.Array


def segments_attention(q: jax.Array, sources: Sequence[Segments]) -> jax.Array:
    """Each query attends to its segments in all sources, in one softmax. q [B,T,H,G,D] -> [B,T,H,G,D].

    Segments are read in blocks by an online softmax, and a segment costs the blocks it fills: what is kept, not what could be. Nothing past a
    segment's end influences the result, whatever the slots hold.
    """
    batch, length, heads, group, dim = q.shape
    # One row for each (sequence, kv head), its queries ordered (g, t): [B*H, G*T, D]
    queries = jnp.transpose(q, (0, 2, 3, 1, 4)).reshape(batch * heads, group * length, dim) * jnp.asarray(dim**-0.5, q.dtype)
    # Few queries are bound by the loop's steps, many by the arithmetic wasted on a last, half-empty block.
    preferred = 512 if length == 1 else 128

    def attend_row(inputs):
        q, bounds = inputs
        state = (
            jnp.full((group * length,), -jnp.inf),
            jnp.zeros((group * length,)),
            jnp.zeros((group * length, dim)),
        )
        for source, (start, limit) in zip(sources, bounds, strict=True):
            slots = source.keys.shape[0]
            block = min(preferred, slots)

            def attend_block(i, state, source=source, start=start, limit=limit, slots=slots, block=block):
                largest, total, out = state
                # A block that would run past the last slot is moved back, and what it then reads twice is masked.
                begin = jnp.minimum(start + i * block, slots - block)
                k = jax.lax.dynamic_slice_in_dim(source.keys, begin, block)
                v = jax.lax.dynamic_slice_in_dim(source.values, begin, block)
                index = begin - start + jnp.arange(block)
                # [T, block]
                visible = (index >= i * block) & (index < limit[:, None])
                # Slots outside the segment may hold anything, NaN too, and 0 * NaN is NaN.
                v = jnp.where(((index >= 0) & (index < jnp.max(limit)))[:, None], v, 0)
                logits = jnp.einsum("ND,ID->NI", q, k, preferred_element_type=jnp.float32)
                logits = jnp.where(jnp.tile(visible, (group, 1)), logits, -jnp.inf)
                new_largest = jnp.maximum(largest, logits.max(axis=-1))
                # A query that has seen nothing yet has -inf for its largest; any finite stand-in keeps exp(-inf) = 0 instead of NaN.
                safe = jnp.where(new_largest == -jnp.inf, 0.0, new_largest)
                weights, decay = jnp.exp(logits - safe[:, None]), jnp.exp(largest - safe)
                update = jnp.einsum("NI,ID->ND", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
                return new_largest, total * decay + weights.sum(axis=-1), out * decay[:, None] + update

            state = jax.lax.fori_loop(0, -(-jnp.max(limit) // block), attend_block, state)
        _, total, out = state
        return (out / jnp.where(total == 0.0, 1.0, total)[:, None]).astype(q.dtype)

    bounds = [(s.start.reshape(-1), s.limit.reshape(-1, length)) for s in sources]
    out = jax.lax.map(attend_row, (queries, bounds))
    return jnp.transpose(out.reshape(batch, heads, group, length, dim), (0, 3, 1, 2, 4))
