"""The form for the CPU: flash attention by XLA alone, in loops as long as what each kv head keeps."""

import functools

import jax
import jax.numpy as jnp

BLOCK = 256  # entries of a block: shorter ones are bound by the steps of the loop
PARTS = 4  # the last, cut to quarters of a block, reads few entries that are not there; each length is a piece of program of its own


def ragged_decode(q, k, v, pool_keys, pool_values, starts, buffer_keys, buffer_values, buffered, layer):
    """As the package's ragged_decode."""
    batch, heads, group, dim = q.shape
    slots, width = pool_keys.shape[1], buffer_keys.shape[3]
    scale = dim**-0.5
    # One row for each sequence and kv head.
    row = jnp.arange(batch * heads)
    sequence, head = row // heads, row % heads
    # All that can be seen as flat entries [N,D], without a copy, and where each row's begin and end.
    at = ((layer * batch + sequence) * heads + head) * width
    sources, spans = [(buffer_keys, buffer_values)], [(at, at + buffered[sequence])]
    if slots:
        stream = layer * heads + head
        sources.append((pool_keys, pool_values))
        spans.append(tuple(sequence * slots + starts[sequence, stream + i] for i in (0, 1)))
    sources = [[x.reshape(-1, dim) for x in source] for source in sources]

    def attend(queries, keys, values, state, first, size, end=None):
        """`state` with what entries first..first+size add to it; with `end` those from there on count for nothing."""
        largest, total, sums = state
        # What would run past the last entry is moved back, and what it repeats is masked.
        at = first if end is None else jnp.minimum(first, keys.shape[0] - size)
        k, v = (jax.lax.dynamic_slice_in_dim(x, at, size).astype(jnp.float32) for x in (keys, values))
        # XLA copies a block before it multiplies it. With arithmetic in it (the scale, the minus) the copy is a vector loop and a third
        # faster than a bare one.
        k, v = k * scale, -v
        logits = jnp.einsum("GD,ID->GI", queries, k)
        if end is not None:
            entry = at + jnp.arange(size)
            inside = (entry >= first) & (entry < end)
            logits, v = jnp.where(inside, logits, -jnp.inf), jnp.where(inside[:, None], v, 0)  # may be NaN, and 0 * NaN is NaN
        new_largest = jnp.maximum(largest, logits.max(axis=1))
        weights, decay = jnp.exp(logits - new_largest[:, None]), jnp.exp(largest - new_largest)
        return new_largest, total * decay + weights.sum(axis=1), sums * decay[:, None] + weights @ v

    def attend_row(inputs):
        queries, own_key, own_value, spans = inputs
        # The token itself comes first: from there on no maximum is infinite. The sums are those of minus the values.
        state = queries @ own_key * scale, jnp.ones(group), jnp.broadcast_to(-own_value, queries.shape)
        for (keys, values), (begin, end) in zip(sources, spans, strict=True):
            block = min(BLOCK, keys.shape[0])
            part = -(-block // PARTS)
            whole = (end - begin) // block
            last = begin + whole * block
            read = functools.partial(attend, queries, keys, values)
            state = jax.lax.fori_loop(0, whole, lambda i, state, read=read, begin=begin, block=block: read(state, begin + i * block, block), state)
            cut = [functools.partial(read, first=last, size=min(size, block), end=end) for size in range(part, block + part, part)]
            state = jax.lax.switch((end - last + part - 1) // part, [lambda state: state, *cut], state)
        _, total, sums = state
        return -sums / total[:, None]

    rows = [x.astype(jnp.float32).reshape(batch * heads, *x.shape[2:]) for x in (q, k, v)]
    return jax.lax.map(attend_row, (*rows, spans)).reshape(q.shape).astype(q.dtype)
