"""The form for CPUs: blocks of queries, each against the keys up to its own end, so that the upper triangle costs nothing and nothing is T x T.

Unlike the kernels it does not skip other documents: static slices are what makes it fast. Where queries stand is not static if they have a start, and
each block then meets all keys.
"""

import jax.numpy as jnp

from pallas_kernels.retention_attention.common import differentiable, of_queries, times
from pallas_kernels.retention_attention.reference import first_of_document


def blocks(queries: int, keys: int) -> list[tuple[int, int, int]]:
    """Each block of queries, (begin, end), and the end of the keys it meets. Few blocks while they are small, as each is compiled."""
    size = min(max(128, -(-queries // 16)), 1024)
    ends = [(begin, min(begin + size, queries)) for begin in range(0, queries, size)]
    return [(begin, end, end if queries == keys else keys) for begin, end in ends]


def heads_first(x):
    """[B,T,H,..] -> [B,H,T,..]"""
    return jnp.swapaxes(x, 1, 2)


def rows(q, begin, end):
    """[B,Tq,H,G,D] -> [B,H,G*(end-begin),D]: a kv head's G query heads as rows of one product, twice as fast as contracting in place."""
    batch, _, heads, group, dim = q.shape
    return jnp.transpose(q[:, begin:end], (0, 2, 3, 1, 4)).reshape(batch, heads, group * (end - begin), dim)


def product(equation, a, b):
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def first_of_queries(segment_ids, start, queries):
    return None if segment_ids is None else of_queries(first_of_document(segment_ids, segment_ids.shape), start, queries)


def block_bias(log_beta, first, start, begin, end, met):
    """The bias [B,H,end-begin,met] (or with ones for what does not matter), -inf where hidden, and how far keys lie behind, [end-begin,met]."""
    distance = times(start, begin, end)[:, None] - jnp.arange(met)
    visible = distance >= 0
    if first is not None:
        visible = (visible & (jnp.arange(met) >= first[:, begin:end, None]))[:, None]
    bias = 0.0 if log_beta is None else distance * log_beta[:, :, None, :met]
    return jnp.where(visible, bias, -jnp.inf), distance


def forward(q, k, v, log_beta, segment_ids, start):
    batch, length, heads, group, dim = q.shape
    first = first_of_queries(segment_ids, start, length)
    k, v = heads_first(k), heads_first(v)
    log_beta = None if log_beta is None else heads_first(log_beta)
    outs, masses, lses = [], [], []
    for begin, end, met in blocks(length, k.shape[2]):
        bias, _ = block_bias(log_beta, first, start, begin, end, met)
        shape = (batch, heads, group, end - begin)
        logits = product("BHND,BHID->BHNI", rows(q, begin, end), k[:, :, :met]) * dim**-0.5
        logits = logits.reshape(*shape, met) + (bias if bias.ndim == 2 else bias[:, :, None])
        largest = logits.max(axis=-1, keepdims=True)
        weights = jnp.exp(logits - largest)
        total = weights.sum(axis=-1)
        out = product("BHNI,BHID->BHND", weights.astype(v.dtype).reshape(batch, heads, -1, met), v[:, :, :met]).reshape(*shape, dim)
        outs.append(jnp.transpose((out / total[..., None]).astype(q.dtype), (0, 3, 1, 2, 4)))
        lses.append(largest[..., 0] + jnp.log(total))
        if log_beta is not None:
            masses.append(heads_first(jnp.exp(bias).sum(axis=-1)))
    return jnp.concatenate(outs, axis=1), jnp.concatenate(masses, axis=1) if masses else None, jnp.concatenate(lses, axis=3)


def backward(q, k, v, log_beta, segment_ids, start, lse, delta, dout, dmass):
    batch, length, heads, group, dim = q.shape
    first = first_of_queries(segment_ids, start, length)
    k, v = heads_first(k), heads_first(v)
    dk, dv = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    log_beta, dmass = (None if x is None else heads_first(x) for x in (log_beta, dmass))
    dlog_beta = None if log_beta is None else jnp.zeros_like(log_beta)
    dqs = []
    for begin, end, met in blocks(length, k.shape[2]):
        bias, distance = block_bias(log_beta, first, start, begin, end, met)
        queries, gradients = rows(q, begin, end), rows(dout, begin, end)
        shape, flat = (batch, heads, group, end - begin, met), (batch, heads, group * (end - begin), met)
        logits = product("BHND,BHID->BHNI", queries, k[:, :, :met]) * dim**-0.5
        logits = logits.reshape(shape) + (bias if bias.ndim == 2 else bias[:, :, None])
        weights = jnp.exp(logits - lse[:, :, :, begin:end, None])
        dv = dv.at[:, :, :met].add(product("BHNI,BHND->BHID", weights.astype(v.dtype).reshape(flat), gradients))
        dweights = product("BHND,BHID->BHNI", gradients, v[:, :, :met]).reshape(shape)
        dlogits = weights * (dweights - delta[:, :, :, begin:end, None])
        if log_beta is not None:
            dbias = dlogits.sum(axis=2) + dmass[:, :, begin:end, None] * jnp.exp(bias)
            dlog_beta = dlog_beta.at[:, :, :met].add((dbias * distance).sum(axis=2))
        dlogits = dlogits.astype(q.dtype).reshape(flat)
        dq = product("BHNI,BHID->BHND", dlogits, k[:, :, :met]) * dim**-0.5
        dqs.append(jnp.transpose(dq.astype(q.dtype).reshape(*shape[:-1], dim), (0, 3, 1, 2, 4)))
        dk = dk.at[:, :, :met].add(product("BHNI,BHND->BHID", dlogits, queries) * dim**-0.5)
    dlog_beta = None if dlog_beta is None else heads_first(dlog_beta)
    return jnp.concatenate(dqs, axis=1), heads_first(dk.astype(k.dtype)), heads_first(dv.astype(v.dtype)), dlog_beta


retention_attention = differentiable(forward, backward)
