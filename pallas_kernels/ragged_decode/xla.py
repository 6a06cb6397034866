"""The form for the CPU: flash attention by XLA alone, in loops as long as what each kv head keeps."""

import jax
import jax.numpy as jnp

BLOCK = 512  # entries of a block: the loop's steps bound shorter ones, and longer ones leave the second-level cache
LANES = 2  # loops that depend on nothing of each other, which XLA runs on as many cores; the blocks of a kv head take turns among them
LOWEST = -1e30  # stands for -inf, of which differences are NaN


def ragged_decode(q, k, v, pool_keys, pool_values, starts, buffer_keys, buffer_values, buffered, layer):
    """As the package's ragged_decode."""
    batch, heads, group, dim = q.shape
    slots, width = pool_keys.shape[1], buffer_keys.shape[3]
    scale = dim**-0.5
    # One row for each sequence and kv head: [B*H, G, D], [B*H, 1, D]
    row = jnp.arange(batch * heads)
    sequence, head = row // heads, row % heads
    queries = q.reshape(-1, group, dim).astype(jnp.float32)
    own_keys, own_values = (x.reshape(-1, 1, dim).astype(jnp.float32) for x in (k, v))
    # All that can be seen as flat entries [N,D], without a copy, and where each row's begin and end.
    at = ((layer * batch + sequence) * heads + head) * width
    sources = [(buffer_keys.reshape(-1, dim), buffer_values.reshape(-1, dim))]
    spans = [(at, at + buffered[sequence])]
    if slots:
        stream = layer * heads + head
        sources.append((pool_keys.reshape(-1, dim), pool_values.reshape(-1, dim)))
        spans.append(tuple(sequence * slots + starts[sequence, stream + i] for i in (0, 1)))

    def attend_row(lane, row, queries, spans):
        """This lane's blocks of one row: largest logit and total [G], and minus the weighted sum of values [G,D]."""
        state = jnp.full(group, LOWEST), jnp.zeros(group), jnp.zeros((group, dim))
        turn = (lane - row) % LANES
        for (keys, values), (begin, end) in zip(sources, spans, strict=True):
            block = min(BLOCK, keys.shape[0])

            def attend_block(i, state, keys=keys, values=values, begin=begin, end=end, block=block):
                largest, total, sums = state
                # A block that would run past the last entry is moved back, and what it repeats is masked.
                first = begin + (turn + i * LANES) * block
                at = jnp.minimum(first, keys.shape[0] - block)
                entry = at + jnp.arange(block)
                inside = (entry >= first) & (entry < end)
                k, v = (jax.lax.dynamic_slice_in_dim(x, at, block).astype(jnp.float32) for x in (keys, values))
                # XLA copies a block in order to multiply it. With some arithmetic in it (scale, minus) the copy is a vector loop, half as long again
                # without. Entries outside may be anything, NaN too, and 0 * NaN is NaN.
                k, v = k * scale, -jnp.where(inside[:, None], v, 0)
                logits = jnp.where(inside, jnp.einsum("GD,ID->GI", queries, k), LOWEST)
                new_largest = jnp.maximum(largest, logits.max(axis=1))
                weights, decay = jnp.exp(logits - new_largest[:, None]), jnp.exp(largest - new_largest)
                return new_largest, total * decay + weights.sum(axis=1), sums * decay[:, None] + weights @ v

            blocks = (end - begin + block - 1) // block
            state = jax.lax.fori_loop(0, (blocks - turn + LANES - 1) // LANES, attend_block, state)
        return state

    inputs = row, queries, spans
    lanes = [jax.lax.map(lambda inputs, lane=lane: attend_row(lane, *inputs), inputs) for lane in range(LANES)]
    # The token itself is one more lane.
    own = jnp.sum(queries * own_keys, axis=2) * scale, jnp.ones(queries.shape[:2]), -jnp.broadcast_to(own_values, queries.shape)
    largest, total, sums = (jnp.stack(x) for x in zip(own, *lanes, strict=True))
    weights = jnp.exp(largest - largest.max(axis=0))
    out = -jnp.sum(weights[..., None] * sums, axis=0) / jnp.sum(weights * total, axis=0)[..., None]
    return out.reshape(q.shape).astype(q.dtype)
