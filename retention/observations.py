"""What policies ask of the model as it reads (`policies.Policy` declares it): queries, hidden states, entropy, attention received; nothing else is computed.

B sequences, T new tokens, H key-value heads with G query heads each, D the head size, N cached entries of a stream, W rows of the write buffer.
"""

import jax
import jax.numpy as jnp

from retention import cache as cache_lib
from retention.cache import Cache
from retention.model import Config, rope_frequencies
from retention.policies import Policy, Streams, Written
from retention.policies.base import check_shape
from retention.rope import apply_rope

TOP = 256  # predictions over which the entropy is summed (METHOD section 6, InfoKV)
QUERIES = 128  # of a second reading whose attention is held at a time


def nothing_noted(config: Config, policy: Policy, batch: int, dtype) -> dict:
    """What `Cache.noted` begins with for this policy."""
    heads, noted = (config.layers, batch, config.kv_heads, config.group, config.head_dim), {}
    if policy.queries:
        noted["queries"] = jnp.zeros((*heads[:2], policy.queries, *heads[2:]), dtype)
    if policy.moments is not None:
        noted["query_sum"] = jnp.zeros(heads, jnp.float32)
        noted["query_outer"] = jnp.zeros((*heads, config.head_dim), jnp.float32)
    if policy.past:
        noted["hidden"] = jnp.zeros((len(policy.hidden(config.layers)), batch, policy.past, config.embed_dim), dtype)
    return noted


def hidden_for(config: Config, policy: Policy, reader: Policy, hidden: jax.Array) -> jax.Array:
    """The blocks that `policy` sees, with as many tokens before as it asks for, of the reader's hidden [n, B, past (+ T), E]."""
    blocks = reader.hidden(config.layers)
    return hidden[jnp.asarray([blocks.index(block) for block in policy.hidden(config.layers)]), :, reader.past - policy.past :]


def written_for(config: Config, policy: Policy, reader: Policy, written: Written) -> Written:
    """What `policy` is shown of what was written for `reader`, which has declared at least as much."""
    return written._replace(
        log_beta=written.log_beta if policy.gated else None,
        hidden=None if policy.hidden is None else hidden_for(config, policy, reader, written.hidden),
        entropy=written.entropy if policy.entropy else None,
    )


def noted_for(config: Config, policy: Policy, reader: Policy, noted: dict) -> dict:
    """What would have been noted for `policy`, of what was noted for `reader`, which has declared at least as much."""
    own = {}
    if policy.queries:
        own["queries"] = noted["queries"][:, :, reader.queries - policy.queries :]
    if policy.moments is not None:
        own |= {name: noted[name] for name in ("query_sum", "query_outer")}
    if policy.past:
        own["hidden"] = hidden_for(config, policy, reader, noted["hidden"])
    return own


def newest(before: jax.Array, new: jax.Array, valid: jax.Array) -> jax.Array:
    """The last P of before [B, P, ...] and the first valid[b] of new [B, T, ...]."""
    both = jnp.concatenate([before, new.astype(before.dtype)], axis=1)
    return jax.vmap(lambda row, first: jax.lax.dynamic_slice_in_dim(row, first, before.shape[1]))(both, valid)


def note_queries(config: Config, policy: Policy, noted: dict, q: jax.Array, positions: jax.Array, valid: jax.Array) -> dict:
    """One layer's noted queries after those of the first valid[b] of new tokens: q [B,T,H,G,D] at positions [B,T]."""
    new = {}
    if policy.queries:
        new["queries"] = newest(noted["queries"], q, valid)
    if policy.moments is not None:
        angle = positions[..., None] * rope_frequencies(config)[0]
        plain = apply_rope(q.astype(jnp.float32), jnp.cos(angle), -jnp.sin(angle))  # as before RoPE
        counted = (jnp.arange(q.shape[1]) < valid[:, None]) & (positions >= policy.moments)
        plain = jnp.where(counted[..., None, None, None], plain, 0)
        new["query_sum"] = noted["query_sum"] + plain.sum(axis=1)
        new["query_outer"] = noted["query_outer"] + jnp.einsum("BTHGC,BTHGD->BHGCD", plain, plain, precision=jax.lax.Precision.HIGHEST)
    return new


def entropy_before(decoder, hidden: jax.Array, logits: jax.Array, positions: jax.Array) -> jax.Array:
    """[B,T] float32 nats: of the prediction that each token followed, over its likeliest TOP. hidden [B,T,E]; logits [B,V] preceded the first token.

    The first token of all followed none: 0.
    """

    def entropy(logits):
        probability = jnp.exp(jax.lax.top_k(jax.nn.log_softmax(logits), min(TOP, logits.shape[-1]))[0])
        return jnp.sum(jax.scipy.special.entr(probability), axis=-1)

    later = jax.lax.map(lambda h: entropy(decoder.logits(h)), jnp.moveaxis(hidden[:, :-1], 1, 0), batch_size=16)
    return jnp.where(positions > 0, jnp.concatenate([entropy(logits)[:, None], jnp.moveaxis(later, 0, 1)], axis=1), 0.0)


def received(cache: Cache, layer, longest: int, q: jax.Array, k: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The attention that the new tokens' queries pay, summed over them, mean over query heads: to cached entries [B,H,N], to themselves [B,H,T]."""
    streams = cache_lib.streams_of(cache, layer, longest)
    keys = jnp.concatenate([streams.keys, jnp.swapaxes(k, 1, 2)], axis=2)
    logits = jnp.einsum("BTHGD,BHND->BHGTN", q, keys, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    token = jnp.arange(q.shape[1])
    # [B, H, 1, T, N + T]
    shape = (*streams.live.shape[:2], token.shape[0])
    cached = jnp.broadcast_to(streams.live[:, :, None], (*shape, streams.live.shape[-1]))
    own = jnp.broadcast_to(token <= token[:, None], (*shape, token.shape[0]))
    weights = jax.nn.softmax(logits, axis=-1, where=jnp.concatenate([cached, own], axis=-1)[:, :, None])
    asks = (token < valid[:, None])[:, None, None, :, None]
    total = jnp.sum(jnp.where(asks, weights, 0), axis=3).mean(axis=2)
    return total[..., : -token.shape[0]], total[..., -token.shape[0] :]


def most_received(cache: Cache, layer, sinks: int, first: jax.Array, count: jax.Array, q: jax.Array, k: jax.Array, valid: jax.Array) -> jax.Array:
    """[B,H,W]: the most attention that one of the new tokens' queries pays a row of the buffer, of the part of it that begins at row first[b] and has
    count[b] <= T rows; 0 elsewhere. A query looks at the part, at the first `sinks` entries of all, and at the new tokens up to its own (KVzip, METHOD
    section 6).
    """
    length, heads, width = q.shape[1], q.shape[2], cache.buffer_position.shape[1]
    rows, leading = min(length, width), min(sinks, width)  # that may hold the part, and the first entries of all
    queries = min(QUERIES, length)
    blocks = -(-length // queries)

    # A stream and a block of queries at a time: what they pay then stays in a CPU's cache.
    def of_stream(item):
        b, h = item // heads, item % heads
        at = jnp.minimum(first[b], width - rows)
        row, before = at + jnp.arange(rows), jnp.arange(leading)
        part = (row >= first[b]) & (row < first[b] + count[b])
        opening = (cache.buffer_position[b, :leading] < sinks) & (before < cache.buffered[b]) & ((before < first[b]) | (before >= first[b] + count[b]))
        buffer_keys = cache.buffer_keys[layer, b, h]
        keys, seen = [jax.lax.dynamic_slice_in_dim(buffer_keys, at, rows), buffer_keys[:leading]], [part, opening]
        if cache.keys.shape[1]:  # the pool's first entries, where they are the first of all
            slots = cache.starts[b, layer * heads + h] + jnp.arange(sinks)
            held = jnp.minimum(slots, cache.keys.shape[1] - 1)
            keys.append(cache.keys[b, held])
            seen.append((slots < cache.starts[b, layer * heads + h + 1]) & (cache.position[b, held] < sinks))
        # [N, D], [N - T]: the part, then the entries beside it, then the new tokens
        keys, seen = jnp.concatenate([*keys, k[b, :, h]]), jnp.concatenate(seen)

        def most(most, block):
            q, number = block
            query = number * queries + jnp.arange(queries)
            logits = jnp.einsum("GTD,ND->GTN", q, keys, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
            causal = jnp.arange(length) <= query[:, None]
            shown = jnp.concatenate([jnp.broadcast_to(seen, (queries, seen.shape[0])), causal], axis=1)
            logits = jnp.where(shown, logits, -jnp.inf)
            weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
            weights = weights[..., :rows] / weights.sum(axis=-1, keepdims=True)
            return jnp.maximum(most, jnp.where((query < valid[b])[:, None], weights, 0).max(axis=(0, 1))), None

        # [blocks, G, queries, D]
        padded = jnp.pad(q[b, :, h], ((0, blocks * queries - length), (0, 0), (0, 0))).reshape(blocks, queries, *q.shape[3:]).swapaxes(1, 2)
        paid = jax.lax.scan(most, jnp.zeros(rows), (padded, jnp.arange(blocks)))[0]
        return jax.lax.dynamic_update_slice_in_dim(jnp.zeros(width), jnp.where(part, paid, 0), at, axis=0)

    return jax.lax.map(of_stream, jnp.arange(q.shape[0] * heads)).reshape(-1, heads, width)


def stream_scores(config: Config, policy: Policy, sinks: int, window: int | jax.Array, longest: int, cache: Cache) -> tuple[jax.Array, jax.Array]:
    """The scores of a policy that looks at whole streams, a layer at a time: of the pool's entries [B, C] and the buffer's [B, S, W]."""
    noted, query_position, moments = cache.noted, None, policy.moments
    if policy.queries:
        query_position = cache.seen[:, None] - policy.queries + jnp.arange(policy.queries)

    def score(layer):
        streams = cache_lib.streams_of(cache, layer, longest)
        mean = covariance = None
        if moments is not None:
            count = jnp.maximum(cache.seen - moments, 1)[:, None, None, None]
            mean = noted["query_sum"][layer] / count
            covariance = noted["query_outer"][layer] / count[..., None] - mean[..., None] * mean[..., None, :]
        score = policy.score(
            Streams(
                **streams._asdict(), seen=cache.seen, sinks=sinks, window=jnp.broadcast_to(window, cache.seen.shape), budget=cache.budget,
                frequency=rope_frequencies(config)[0],
                queries=noted["queries"][layer] if policy.queries else None, query_position=query_position,
                query_mean=mean, query_covariance=covariance,
            )
        )  # fmt: skip
        check_shape("score", score, streams.live.shape)
        return score

    return cache_lib.scatter_streams(cache, jax.lax.map(score, jnp.arange(config.layers)))
