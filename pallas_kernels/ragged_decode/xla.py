"""The form for the CPU: flash attention by XLA alone, in loops as long as what each kv head keeps."""

import jax
import jax.numpy as jnp

BLOCK = 512  # entries of a block: the loop's steps bound shorter ones, and longer ones are masked work at a segment's end


def ragged_decode(q, k, v, pool_keys, pool_values, starts, buffer_keys, buffer_values, buffered, layer):
    """As the package's ragged_decode."""
    batch, heads, group, dim = q.shape
    slots, width = pool_keys.shape[1], buffer_keys.shape[3]
    queries = (q * jnp.asarray(dim**-0.5, q.dtype)).reshape(batch * heads, group, dim)
    own = [x.reshape(batch * heads, dim) for x in (k, v)]
    # All that can be seen as flat entries [N,D], without a copy.
    pool, buffer = ([x.reshape(-1, dim) for x in pair] for pair in ((pool_keys, pool_values), (buffer_keys, buffer_values)))

    def attend(queries, state, source, begin, end):
        """Adds entries begin..end of `source` to the state of the queries' softmax."""
        keys, values = source

        block = min(BLOCK, keys.shape[0])

        def attend_block(i, state):
            largest, total, out = state
            # A block that would run past the last entry is moved back, and what it repeats is masked.
            first = begin + i * block
            at = jnp.minimum(first, keys.shape[0] - block)
            k, v = (jax.lax.dynamic_slice_in_dim(x, at, block) for x in (keys, values))
            entry = at + jnp.arange(block)
            inside = (entry >= first) & (entry < end)
            logits = jnp.einsum("GD,ID->GI", queries, k, preferred_element_type=jnp.float32)
            logits = jnp.where(inside, logits, -jnp.inf)
            new_largest = jnp.maximum(largest, logits.max(axis=1))
            weights, decay = jnp.exp(logits - new_largest[:, None]), jnp.exp(largest - new_largest)
            # Entries outside may be anything, NaN too, and 0 * NaN is NaN.
            v = jnp.where(inside[:, None], v, 0)
            update = jnp.einsum("GI,ID->GD", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
            return new_largest, total * decay + weights.sum(axis=1), out * decay[:, None] + update

        return jax.lax.fori_loop(0, -(-(end - begin) // block), attend_block, state)

    def attend_head(inputs):
        item, queries, k, v = inputs
        sequence, head = item // heads, item % heads
        # The token itself comes first: from there on no maximum is infinite.
        state = queries.astype(jnp.float32) @ k.astype(jnp.float32), jnp.ones(group), jnp.broadcast_to(v.astype(jnp.float32), (group, dim))
        if slots:
            stream = layer * heads + head
            state = attend(queries, state, pool, *(sequence * slots + starts[sequence, stream + i] for i in (0, 1)))
        at = ((layer * batch + sequence) * heads + head) * width
        _, total, out = attend(queries, state, buffer, at, at + buffered[sequence])
        return (out / total[:, None]).astype(q.dtype)

    return jax.lax.map(attend_head, (jnp.arange(batch * heads), queries, *own)).reshape(q.shape)
