"""The form for the CPU: flash attention by XLA alone, in loops as long as what each kv head keeps."""

import functools

import jax
import jax.numpy as jnp

BLOCK = 256  # entries of a block: shorter ones are bound by the steps of the loop
PARTS = 2  # a last, short block is cut to a multiple of a half: each length is a piece of program of its own


def ragged_decode(q, k, v, pool_keys, pool_values, starts, buffer_keys, buffer_values, buffered, layer):
    """As the package's ragged_decode."""
    batch, heads, group, dim = q.shape
    slots, width = pool_keys.shape[1], buffer_keys.shape[3]
    # One row for each sequence and kv head.
    queries, own_key, own_value = (x.astype(jnp.float32).reshape(batch * heads, *x.shape[2:]) for x in (q, k, v))
    row = jnp.arange(batch * heads, dtype=jnp.int32)
    sequence, head = row // heads, row % heads
    # Pool and buffer as flat entries [N,D], without a copy, and where each row's begin and end. One after the other they would be fewer states to join, but
    # every step of a loop, and every number that it is given, costs as much as some ten entries.
    at = ((layer * batch + sequence) * heads + head) * width
    own = jnp.einsum("RGD,RD->RG", queries, own_key) * dim**-0.5, jnp.ones(queries.shape[:2]), jnp.broadcast_to(-own_value[:, None], queries.shape)
    states = [own, attend(queries, buffer_keys.reshape(-1, dim), buffer_values.reshape(-1, dim), at, at + buffered[sequence])]
    if slots:
        begin, end = (sequence * slots + starts[sequence, layer * heads + head + i] for i in (0, 1))
        states.append(attend(queries, pool_keys.reshape(-1, dim), pool_values.reshape(-1, dim), begin, end))
    largest, total, sums = (jnp.stack(parts) for parts in zip(*states, strict=True))
    weights = jnp.exp(largest - largest.max(axis=0))
    out = -(weights[..., None] * sums).sum(axis=0) / (weights * total).sum(axis=0)[..., None]
    return out.reshape(q.shape).astype(q.dtype)


def attend(queries, keys, values, begin, end):
    """The state of each row's softmax over its entries begin..end of keys, values [N,D]: the largest logit and the total of the weights [R,G], and the
    weighted sum of minus the values [R,G,D]; of no entries -inf and zeros. queries [R,G,D], begin and end [R]."""
    (_, group, dim), block = queries.shape, min(BLOCK, keys.shape[0])
    part = -(-block // PARTS)

    def add(state, queries, first, size, end=None):
        """`state` with entries first..first+size; with `end` those from there on count for nothing."""
        largest, total, sums = state
        # What would run past the last entry is moved back, and what it repeats is masked.
        at = first if end is None else jnp.minimum(first, keys.shape[0] - size)
        k, v = (jax.lax.dynamic_slice_in_dim(x, at, size).astype(jnp.float32) for x in (keys, values))
        # XLA copies a block before it multiplies it. With arithmetic in it (the scale, the minus) the copy is a vector loop and a third
        # faster than a bare one.
        k, v = k * dim**-0.5, -v
        logits = jnp.einsum("GD,ID->GI", queries, k)
        if end is not None:
            entry = at + jnp.arange(size)
            inside = (entry >= first) & (entry < end)
            logits, v = jnp.where(inside, logits, -jnp.inf), jnp.where(inside[:, None], v, 0)  # may be NaN, and 0 * NaN is NaN
        new_largest = jnp.maximum(largest, logits.max(axis=1))
        weights, decay = jnp.exp(logits - new_largest[:, None]), jnp.exp(largest - new_largest)
        return new_largest, total * decay + weights.sum(axis=1), sums * decay[:, None] + weights @ v

    def attend_row(inputs):
        queries, begin, end, whole, last, parts = inputs
        state = jnp.full(group, -jnp.inf), jnp.zeros(group), jnp.zeros((group, dim))
        state = jax.lax.fori_loop(0, whole, lambda i, state: add(state, queries, begin + i * block, block), state)
        cut = [functools.partial(add, queries=queries, first=last, size=min(size, block), end=end) for size in range(part, block + part, part)]
        return jax.lax.switch(parts, [lambda state: state, *cut], state)

    whole = (end - begin) // block
    last = begin + whole * block
    return jax.lax.map(attend_row, (queries, begin, end, whole, last, (end - last + part - 1) // part))
