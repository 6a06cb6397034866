"""The form for the CPU: flash attention by XLA alone, in loops as long as what the queries see."""

import jax
import jax.numpy as jnp

QUERIES = 256  # of one tile: fewer make products too small for the CPU, more would work on padding
WHOLE = 512  # entries of a block that needs no mask: a third faster than 128
BLOCK = 128  # of one that does, on the diagonal and at the end, where longer ones would work on what is masked


def ragged_prefill(q, k, v, valid, pool_keys, pool_values, starts, buffer_keys, buffer_values, buffered, layer):
    """As the package's ragged_prefill."""
    batch, length, heads, group, dim = q.shape
    slots, width = pool_keys.shape[1], buffer_keys.shape[3]
    queries = min(QUERIES, length)
    tiles = -(-length // queries)
    # Every tile's rows are in the order (t, g): [B*H*tiles, queries*G, D]
    # In bfloat16 a scaled query would be rounded twice: there the float32 logits are scaled.
    late = 1.0 if q.dtype == jnp.float32 else dim**-0.5
    rows = jnp.pad(jnp.moveaxis(q, 1, 2) * jnp.asarray(dim**-0.5 / late, q.dtype), ((0, 0), (0, 0), (0, -length % queries), (0, 0), (0, 0)))
    rows = rows.reshape(batch * heads * tiles, queries * group, dim)
    # All that can be seen as flat entries [N,D]; of pool and buffer that is no copy.
    chunk, pool, buffer = (
        [x.reshape(-1, dim) for x in pair] for pair in ((jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)), (pool_keys, pool_values), (buffer_keys, buffer_values))
    )

    def attend(rows, state, source, begin, end, query=None):
        """Adds entries begin..end of `source` to the state of the rows' softmax; with `query` [rows], each row sees those up to its own."""
        keys, values = source

        def attend_block(first, state, block, whole):
            largest, total, out = state
            # A block that would run past the last entry is moved back, and what it repeats is masked.
            at = first if whole else jnp.minimum(first, keys.shape[0] - block)
            k, v = (jax.lax.dynamic_slice_in_dim(x, at, block) for x in (keys, values))
            logits = jnp.einsum("ND,ID->NI", rows, k, preferred_element_type=jnp.float32) * late
            if not whole:
                entry = at + jnp.arange(block)
                inside = (entry >= first) & (entry < end)
                logits = jnp.where(inside if query is None else inside & (entry <= query[:, None]), logits, -jnp.inf)
                # Entries outside may be anything, NaN too, and 0 * NaN is NaN.
                v = jnp.where(inside[:, None], v, 0)
            new_largest = jnp.maximum(largest, logits.max(axis=1))
            weights, decay = jnp.exp(logits - new_largest[:, None]), jnp.exp(largest - new_largest)
            update = jnp.einsum("NI,ID->ND", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
            return new_largest, total * decay + weights.sum(axis=1), out * decay[:, None] + update

        if query is None and keys.shape[0] >= WHOLE:
            count = (end - begin) // WHOLE
            state = jax.lax.fori_loop(0, count, lambda i, state: attend_block(begin + i * WHOLE, state, WHOLE, whole=True), state)
            begin += count * WHOLE
        block = min(BLOCK, keys.shape[0])
        return jax.lax.fori_loop(0, -(-(end - begin) // block), lambda i, state: attend_block(begin + i * block, state, block, whole=False), state)

    def attend_tile(inputs):
        item, rows = inputs
        sequence, head, first = item // (heads * tiles), item // tiles % heads, item % tiles * queries
        query = first + jnp.arange(queries * group) // group

        def attention():
            state = jnp.full((queries * group,), -jnp.inf), jnp.zeros((queries * group,)), jnp.zeros((queries * group, dim))
            # The chunk comes first: every query sees its first token, so that from there on no maximum is infinite.
            own = (sequence * heads + head) * length
            state = attend(rows, state, chunk, own, own + first)
            for block in range(0, queries, BLOCK):
                seeing = block * group
                end = jnp.minimum(first + block + BLOCK, valid[sequence])
                later = attend(rows[seeing:], tuple(x[seeing:] for x in state), chunk, own + first + block, own + end, own + query[seeing:])
                state = tuple(jnp.concatenate([x[:seeing], y]) for x, y in zip(state, later, strict=True))
            if slots:
                stream = layer * heads + head
                state = attend(rows, state, pool, *(sequence * slots + starts[sequence, stream + i] for i in (0, 1)))
            at = ((layer * batch + sequence) * heads + head) * width
            _, total, out = attend(rows, state, buffer, at, at + buffered[sequence])
            return jnp.where((query < valid[sequence])[:, None], out / total[:, None], 0).astype(q.dtype)

        return jax.lax.cond(first < valid[sequence], attention, lambda: jnp.zeros((queries * group, dim), q.dtype))

    out = jax.lax.map(attend_tile, (jnp.arange(batch * heads * tiles), rows))
    return jnp.moveaxis(out.reshape(batch, heads, tiles * queries, group, dim)[:, :, :length], 1, 2)
