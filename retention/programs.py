"""The compiled programs of generation: one prefill chunk, a piece of decoding, an eviction.

Shapes depend on budget and chunk alone, never on the prompt, and nothing in a piece of decoding goes back to the host.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from retention import cache as cache_lib
from retention import gates as gates_lib
from retention import policies
from retention.attention import cached_attention
from retention.cache import Cache
from retention.model import Config, bind, rope_frequencies
from retention.rope import apply_rope

TOP = 256  # predictions over which the entropy is summed (METHOD section 6, InfoKV)
QUERIES = 128  # of a second reading whose attention is held at a time


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that a compiled program depends on but shapes: hashable, one compilation each. longest: of all pool segments, for policies that ask."""

    config: Config
    gate: gates_lib.GateConfig | None
    policy: policies.Policy
    scope: str
    sinks: int
    window: int | None
    longest: int = 0

    def evict(self, cache: Cache) -> Cache:
        policy, layer_budgets = self.policy, None
        scores = stream_scores(self, cache) if policy.streams else cache_lib.entry_scores(cache, policy.score)
        window = self.window if self.window is not None else policy.window(cache.budget)
        if policy.layer_budgets is not None:
            layer_budgets = policy.layer_budgets(cache.budget, cache.seen, self.config.layers)
        return cache_lib.select(cache, scores, self.scope, self.sinks, window, policy.floor, layer_budgets)


def stream_scores(plan: Plan, cache: Cache) -> tuple[jax.Array, jax.Array]:
    """The scores of a policy that looks at whole streams, a layer at a time: of the pool's entries [B, C] and the buffer's [B, S, W]."""
    noted, query_position, moments = cache.noted, None, plan.policy.moments
    if plan.policy.queries:
        query_position = cache.seen[:, None] - plan.policy.queries + jnp.arange(plan.policy.queries)

    def score(layer):
        streams = cache_lib.streams_of(cache, layer, plan.longest)
        mean = covariance = None
        if moments is not None:
            count = jnp.maximum(cache.seen - moments, 1)[:, None, None, None]
            mean = noted["query_sum"][layer] / count
            covariance = noted["query_outer"][layer] / count[..., None] - mean[..., None] * mean[..., None, :]
        return plan.policy.score(
            policies.Streams(
                **streams._asdict(), seen=cache.seen, budget=cache.budget, frequency=rope_frequencies(plan.config)[0],
                queries=noted["queries"][layer] if plan.policy.queries else None, query_position=query_position,
                query_mean=mean, query_covariance=covariance,
            )
        )  # fmt: skip

    return cache_lib.scatter_streams(cache, jax.lax.map(score, jnp.arange(plan.config.layers)))


def nothing_noted(config: Config, policy: policies.Policy, batch: int, dtype) -> dict:
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


def newest(before: jax.Array, new: jax.Array, valid: jax.Array) -> jax.Array:
    """The last P of before [B, P, ...] and the first valid[b] of new [B, T, ...]."""
    both = jnp.concatenate([before, new.astype(before.dtype)], axis=1)
    return jax.vmap(lambda row, first: jax.lax.dynamic_slice_in_dim(row, first, before.shape[1]))(both, valid)


def entropy_before(decoder, hidden: jax.Array, logits: jax.Array, positions: jax.Array) -> jax.Array:
    """[B,T] float32 nats: of the prediction that each token followed, over its likeliest TOP. hidden [B,T,E]; logits [B,V] preceded the first token.

    The first token of all followed none: 0.
    """

    def entropy(logits):
        probability = jnp.exp(jax.lax.top_k(jax.nn.log_softmax(logits), min(TOP, logits.shape[-1]))[0])
        return jnp.sum(jax.scipy.special.entr(probability), axis=-1)

    later = jax.lax.map(lambda h: entropy(decoder.logits(h)), jnp.moveaxis(hidden[:, :-1], 1, 0), batch_size=16)
    return jnp.where(positions > 0, jnp.concatenate([entropy(logits)[:, None], jnp.moveaxis(later, 0, 1)], axis=1), 0.0)


def received(plan: Plan, cache: Cache, layer, q: jax.Array, k: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The attention that the new tokens' queries pay, summed over them, mean over query heads: to cached entries [B,H,N], to themselves [B,H,T]."""
    streams = cache_lib.streams_of(cache, layer, plan.longest)
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


def forward(
    plan: Plan, params: dict, gates: dict | None, cache: Cache, tokens: jax.Array, valid: jax.Array, logits: jax.Array
) -> tuple[jax.Array, Cache]:
    """Feeds each sequence its next valid[b] of tokens [B,T]; they attend to pool, buffer and themselves. Returns hidden [B,T,E] and the new cache.

    logits [B,V]: what predicted the first of them.
    """
    config, policy, noted = plan.config, plan.policy, cache.noted
    decoder = bind(config, params)
    positions = cache.seen[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    pool, buffer = (cache.keys, cache.values, cache.starts), (cache.buffer_keys, cache.buffer_values, cache.buffered)
    counted = jnp.arange(tokens.shape[1]) < valid[:, None]
    # Arrays of `noted` that belong to one layer each.
    by_layer = {name: x for name, x in noted.items() if name != "hidden"}

    def note(noted, q):
        new = {}
        if policy.queries:
            new["queries"] = newest(noted["queries"], q, valid)
        if policy.moments is not None:
            angle = positions[..., None] * rope_frequencies(config)[0]
            plain = apply_rope(q.astype(jnp.float32), jnp.cos(angle), -jnp.sin(angle))
            plain = jnp.where((counted & (positions >= policy.moments))[..., None, None, None], plain, 0)
            new["query_sum"] = noted["query_sum"] + plain.sum(axis=1)
            new["query_outer"] = noted["query_outer"] + jnp.einsum("BTHGC,BTHGD->BHGCD", plain, plain)
        return new

    # The layers only read the cache, and the new entries join it once, after the last: an array that a loop both writes and reads piecewise is one that
    # XLA copies in every round.
    def attend(carry, layer_input, q, k, v, h):
        layer, gate, noted = layer_input
        log_beta = None if gate is None else gates_lib.log_beta(gate, h, config.kv_heads)
        out = cached_attention(q, k, v, valid, *pool, *buffer, layer)
        paid = received(plan, cache, layer, q, k, valid) if policy.attended else None
        return carry, out, (k, v, log_beta, note(noted, q), paid)

    layer_gates = gates_lib.per_layer(gates, config, plan.gate) if policy.gated else None
    layer_inputs = (jnp.arange(config.layers, dtype=jnp.int32), layer_gates, by_layer)
    hidden, _, new = decoder(tokens, positions, attend, layer_inputs=layer_inputs, outputs=policy.hidden is not None)
    outputs = None
    if policy.hidden is not None:
        new, outputs = new
        outputs = outputs[jnp.asarray(policy.hidden(config.layers))]
    keys, values, log_beta, newly_noted, paid = new
    if policy.past:
        newly_noted["hidden"] = jax.vmap(functools.partial(newest, valid=valid))(noted["hidden"], outputs)
        outputs = jnp.concatenate([noted["hidden"], outputs.astype(noted["hidden"].dtype)], axis=2)
    entropy = entropy_before(decoder, hidden, logits, positions) if policy.entropy else None
    stream = jnp.arange(config.streams, dtype=jnp.int32).reshape(config.layers, 1, 1, config.kv_heads)
    stat = policy.stat(policies.Written(positions, stream, keys, log_beta, outputs, entropy))
    if policy.attended:
        old, new_buffer = cache_lib.scatter_streams(cache, paid[0])
        new_buffer = jnp.moveaxis(new_buffer.reshape(new_buffer.shape[0], config.layers, config.kv_heads, -1), 0, 1)
        cache = cache._replace(stat=cache.stat + old, buffer_stat=cache.buffer_stat + new_buffer)
        stat = stat + jnp.swapaxes(paid[1], 2, 3)
    return hidden, cache_lib.append(cache, keys, values, stat, valid)._replace(noted=newly_noted)


@functools.partial(jax.jit, static_argnames="plan", donate_argnames="cache")
def reread(plan: Plan, params, cache: Cache, tokens, valid, skipped, first, count) -> Cache:
    """Reads part of the write buffer once more: the most attention that a query pays an entry of it becomes the entry's stat. Nothing joins the cache.

    tokens [B,T], of which valid[b] count: what asks for the part, and the part again. first, count [B]: the part's rows of the buffer; the rows from
    `skipped` to there get 0. As in KVzip, a query's attention is over the first `sinks` entries, the part, and the tokens read with it.
    """
    config, sinks = plan.config, plan.sinks
    batch, length = tokens.shape
    heads, width = config.kv_heads, cache.buffer_stat.shape[3]
    positions = cache.seen[:, None] + jnp.arange(length, dtype=jnp.int32)
    row, token = jnp.arange(width), jnp.arange(length)
    pool, buffer = (cache.keys, cache.values, cache.starts), (cache.buffer_keys, cache.buffer_values, cache.buffered)
    # [B, W]: the part, and what else of the buffer is seen, its first positions.
    part = (row >= first[:, None]) & (row < (first + count)[:, None])
    unasked = (row >= skipped[:, None]) & (row < first[:, None])
    visible = part | ((cache.buffer_position < sinks) & (row < cache.buffered[:, None]))
    blocks = -(-length // QUERIES)

    def attend(carry, layer, q, k, v, h):
        out = cached_attention(q, k, v, valid, *pool, *buffer, layer)
        stream = layer * heads + jnp.arange(heads)
        slots = cache.starts[:, stream, None] + jnp.arange(sinks)
        # The pool's first entries, if they are the first of all. [B, H, sinks]
        leading = jax.vmap(lambda keys, i: keys[i])(cache.keys, jnp.minimum(slots, cache.keys.shape[1] - 1)) if cache.keys.shape[1] else None
        keys = [cache.buffer_keys[layer], jnp.swapaxes(k, 1, 2)]
        seen = [jnp.broadcast_to(visible[:, None], (batch, heads, width))]
        if leading is not None:
            there = slots < cache.starts[:, stream + 1, None]
            there &= jax.vmap(lambda position, i: position[i])(cache.position, jnp.minimum(slots, cache.keys.shape[1] - 1)) < sinks
            keys, seen = [leading, *keys], [there, *seen]
        keys, seen = jnp.concatenate(keys, axis=2), jnp.concatenate(seen, axis=2)
        begin = keys.shape[2] - length - width
        keys = jnp.where(jnp.pad(seen, ((0, 0), (0, 0), (0, length)), constant_values=True)[..., None], keys, 0)

        def most(most, block):
            q, number = block
            query = number * QUERIES + jnp.arange(QUERIES)
            logits = jnp.einsum("BTHGD,BHND->BHGTN", q, keys, preferred_element_type=jnp.float32) * config.head_dim**-0.5
            causal = jnp.broadcast_to(token <= query[:, None], (batch, heads, QUERIES, length))
            shown = jnp.concatenate([jnp.broadcast_to(seen[:, :, None], (batch, heads, QUERIES, seen.shape[-1])), causal], axis=-1)
            weights = jax.nn.softmax(logits, axis=-1, where=shown[:, :, None])[..., begin : begin + width]
            asks = (query < valid[:, None])[:, None, None, :, None]
            return jnp.maximum(most, jnp.where(asks, weights, 0).max(axis=(2, 3))), None

        padded = jnp.pad(q, ((0, 0), (0, blocks * QUERIES - length), (0, 0), (0, 0), (0, 0)))
        padded = jnp.moveaxis(padded.reshape(batch, blocks, QUERIES, *q.shape[2:]), 1, 0)
        paid, _ = jax.lax.scan(most, jnp.zeros((batch, heads, width)), (padded, jnp.arange(blocks)))
        return carry, out, jnp.where(part[:, None], paid, jnp.where(unasked[:, None], 0, cache.buffer_stat[layer]))

    _, _, stat = bind(config, params)(tokens, positions, attend, layer_inputs=jnp.arange(config.layers, dtype=jnp.int32))
    return cache._replace(buffer_stat=stat)


@functools.partial(jax.jit, static_argnames=("plan", "evict"), donate_argnames="cache")
def prefill(plan: Plan, params, gates, cache: Cache, tokens, valid, logits, evict: bool) -> tuple[Cache, jax.Array]:
    """One chunk: tokens [B,T], of which valid[b] count, then a selection if asked. logits [B,V] of the last token so far are carried along."""
    hidden, cache = forward(plan, params, gates, cache, tokens, valid, logits)
    last = jnp.take_along_axis(hidden, jnp.maximum(valid - 1, 0)[:, None, None], axis=1)[:, 0]
    logits = jnp.where(valid[:, None] > 0, bind(plan.config, params).logits(last), logits)
    return (plan.evict(cache) if evict else cache), logits


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def evict(plan: Plan, cache: Cache) -> Cache:
    return plan.evict(cache)


def sample(logits: jax.Array, keys: jax.Array, temperature: jax.Array, top_p: jax.Array) -> jax.Array:
    """Next tokens [B] from logits [B,V]: the likeliest at temperature 0, else from the fewest tokens whose probabilities reach top_p."""

    def draw(logits):
        logits = logits / temperature
        ranked = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
        before = jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1) - jax.nn.softmax(ranked, axis=-1)
        # The last rank that still begins below top_p; the first always does.
        count = jnp.maximum(jnp.sum(before < top_p, axis=-1, keepdims=True), 1)
        lowest = jnp.take_along_axis(ranked, count - 1, axis=-1)
        return jax.vmap(jax.random.categorical)(keys, jnp.where(logits >= lowest, logits, -jnp.inf))

    return jax.lax.cond(temperature > 0, draw, lambda logits: jnp.argmax(logits, axis=-1), logits).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("plan", "piece", "evicts"), donate_argnames="cache")
def decode(plan: Plan, params, gates, cache: Cache, logits, done, keys, steps, temperature, top_p, stop, piece: int, evicts: bool):
    """Decodes up to `steps` <= piece tokens per sequence, after a selection if the write buffer has no room for a piece.

    A sequence ends with the first token in `stop`, which is fed too: the cache then holds the whole turn. Returns cache, logits, done [B] and tokens
    [B, piece], -1 after a sequence's end.
    """
    width = cache.buffer_position.shape[1]
    if evicts:
        cache = jax.lax.cond(jnp.max(cache.buffered) + piece > width, plan.evict, lambda cache: cache, cache)

    def step(state):
        i, cache, logits, done, out = state
        position_keys = jax.vmap(jax.random.fold_in)(keys, cache.seen)
        token = sample(logits, position_keys, temperature, top_p)
        active = ~done
        out = out.at[:, i].set(jnp.where(active, token, -1))
        hidden, cache = forward(plan, params, gates, cache, token[:, None], active.astype(jnp.int32), logits)
        logits = jnp.where(active[:, None], bind(plan.config, params).logits(hidden[:, 0]), logits)
        return i + 1, cache, logits, done | jnp.isin(token, stop), out

    def going(state):
        return (state[0] < steps) & ~jnp.all(state[3])

    out = jnp.full((logits.shape[0], piece), -1, jnp.int32)
    _, cache, logits, done, out = jax.lax.while_loop(going, step, (0, cache, logits, done, out))
    return cache, logits, done, out
