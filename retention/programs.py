"""The compiled programs of generation: one prefill chunk, a piece of decoding, an eviction.

Shapes depend on budget and chunk, and on the prompt in few steps alone: a last chunk is cut to a power of two, and sizes that must follow the text (slots
of a fractional budget, buffers that hold everything) are rounded up (`rows.roomy`). Nothing in a piece of decoding goes back to the host.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from retention import cache as cache_lib
from retention import gates as gates_lib
from retention import observations, policies
from retention.attention import cached_attention
from retention.cache import Cache
from retention.model import Config, bind


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that a compiled program depends on but shapes: hashable, one compilation each.

    longest: of all pool segments, for policies that ask. beside: policies whose stat is wanted too, of a reading that serves them all.
    """

    config: Config
    gate: gates_lib.GateConfig | None
    policy: policies.Policy
    scope: str
    sinks: int
    window: int | None
    longest: int = 0
    beside: tuple[policies.Policy, ...] = ()

    @property
    def streams(self) -> jax.Array:
        """[L,1,1,H] int32, the streams' numbers."""
        return jnp.arange(self.config.streams, dtype=jnp.int32).reshape(self.config.layers, 1, 1, self.config.kv_heads)

    def evict(self, cache: Cache, due: jax.Array | None = None) -> Cache:
        policy, layer_budgets = self.policy, None
        window = self.window if self.window is not None else policy.window(cache.budget)
        if policy.streams:
            scores = observations.stream_scores(self.config, policy, self.sinks, window, self.longest, cache)
        else:
            scores = cache_lib.entry_scores(cache, policy.score_of)
        if policy.layer_budgets is not None:
            layer_budgets = policy.layer_budgets_of(cache.budget, cache.seen, self.config.layers, self.sinks + window)
        return cache_lib.select(cache, scores, self.scope, self.sinks, window, policy.floor, layer_budgets, policy.lowest, due)


class Fed(NamedTuple):
    """What `forward` returns."""

    hidden: jax.Array  # [B, T, E], of the last layer
    cache: Cache
    beside: list[jax.Array]  # [L, B, H, T] for each policy of plan.beside, its stat; none where the gates wait
    unrated: jax.Array | None  # [L, B, T, E], what the gates are to read where they wait


def forward(
    plan: Plan, params: dict, gates: dict | None, cache: Cache, tokens: jax.Array, valid: jax.Array, logits: jax.Array, gates_wait: bool = False
) -> Fed:
    """Feeds each sequence its next valid[b] of tokens [B,T]; they attend to pool, buffer and themselves.

    logits [B,V]: what predicted the first of them. gates_wait: the new entries' stat is left to `rate`.
    """
    config, policy, noted = plan.config, plan.policy, cache.noted
    decoder = bind(config, params)
    positions = cache.seen[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    pool, buffer = (cache.keys, cache.values, cache.starts), (cache.buffer_keys, cache.buffer_values, cache.buffered)
    # Arrays of `noted` that belong to one layer each.
    by_layer = {name: x for name, x in noted.items() if name != "hidden"}

    # The layers only read the cache, and the new entries join it once, after the last: an array that a loop both writes and reads piecewise is one that
    # XLA copies in every round.
    def attend(carry, layer_input, q, k, v, h):
        layer, gate, noted = layer_input
        log_beta = None if gate is None else gates_lib.log_beta(gate, h, config.kv_heads)
        out = cached_attention(q, k, v, valid, *pool, *buffer, layer)
        paid = observations.received(cache, layer, plan.longest, q, k, valid) if policy.attended else None
        newly_noted = observations.note_queries(config, policy, noted, q, positions, valid)
        return carry, out, (k, v, log_beta, newly_noted, paid, h if gates_wait else None)

    layer_gates = gates_lib.per_layer(gates, config, plan.gate) if policy.gated and not gates_wait else None
    layer_inputs = (jnp.arange(config.layers, dtype=jnp.int32), layer_gates, by_layer)
    hidden, _, new = decoder(tokens, positions, attend, layer_inputs=layer_inputs, outputs=policy.hidden is not None)
    outputs = None
    if policy.hidden is not None:
        new, outputs = new
        outputs = outputs[jnp.asarray(policy.hidden(config.layers))]
    keys, values, log_beta, newly_noted, paid, unrated = new
    if policy.past:
        newly_noted["hidden"] = jax.vmap(functools.partial(observations.newest, valid=valid))(noted["hidden"], outputs)
        outputs = jnp.concatenate([noted["hidden"], outputs.astype(noted["hidden"].dtype)], axis=2)
    entropy = observations.entropy_before(decoder, hidden, logits, positions) if policy.entropy else None
    if gates_wait:
        stat, beside = jnp.zeros(keys.shape[:-1], jnp.float32), []
    else:
        written = policies.Written(positions, plan.streams, keys, log_beta, outputs, entropy)
        stat = policy.stat_of(written)
        beside = [jnp.swapaxes(other.stat_of(observations.written_for(config, other, policy, written)), 2, 3) for other in plan.beside]
    if policy.attended:
        old, new_buffer = cache_lib.scatter_streams(cache, paid[0])
        new_buffer = jnp.moveaxis(new_buffer.reshape(new_buffer.shape[0], config.layers, config.kv_heads, -1), 0, 1)
        cache = cache._replace(stat=cache.stat + old, buffer_stat=cache.buffer_stat + new_buffer)
        stat = stat + jnp.swapaxes(paid[1], 2, 3)
    return Fed(hidden, cache_lib.append(cache, keys, values, stat, valid)._replace(noted=newly_noted), beside, unrated)


def rate(plan: Plan, gates: dict, cache: Cache, first: jax.Array, unrated: jax.Array) -> Cache:
    """Adds the stat of T tokens, in the write buffer's rows from first[b] on, whose gates waited: unrated [L,B,T,E], as `forward` has it."""
    config = plan.config
    layer_gates = gates_lib.per_layer(gates, config, plan.gate)
    log_beta = jax.vmap(gates_lib.log_beta, in_axes=(0, 0, None))(layer_gates, unrated, config.kv_heads)
    rows = first[:, None] + jnp.arange(unrated.shape[2])
    # [L, B, T, H, D]
    keys = jnp.swapaxes(jnp.take_along_axis(cache.buffer_keys, rows[None, :, None, :, None], axis=3), 2, 3)
    written = policies.Written(jnp.take_along_axis(cache.buffer_position, rows, axis=1), plan.streams, keys, log_beta, None, None)
    stat = jnp.swapaxes(plan.policy.stat_of(written), 2, 3)
    added = jax.vmap(lambda buffer, new, rows: buffer.at[..., rows].add(new), in_axes=(1, 1, 0), out_axes=1)(cache.buffer_stat, stat, rows)
    return cache._replace(buffer_stat=added)


@functools.partial(jax.jit, static_argnames="plan")
def reread(plan: Plan, params, cache: Cache, tokens, valid, skipped, first, count) -> jax.Array:
    """Reads part of the write buffer once more: the most attention that a query pays an entry of it becomes the entry's stat. Returns `buffer_stat`.

    tokens [B,T], of which valid[b] count: what asks for the part, and the part again. first, count [B]: the part's rows of the buffer; the rows from
    `skipped` to there get 0. As in KVzip, a query's attention is over the first `sinks` entries, the part, and the tokens read with it.
    """
    config = plan.config
    positions = cache.seen[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    pool, buffer = (cache.keys, cache.values, cache.starts), (cache.buffer_keys, cache.buffer_values, cache.buffered)
    row = jnp.arange(cache.buffer_stat.shape[3])
    looked_at = (row >= skipped[:, None]) & (row < (first + count)[:, None])  # [B, W]

    def attend(carry, layer, q, k, v, h):
        out = cached_attention(q, k, v, valid, *pool, *buffer, layer)
        paid = observations.most_received(cache, layer, plan.sinks, first, count, q, k, valid)
        return carry, out, jnp.where(looked_at[:, None], paid, cache.buffer_stat[layer])

    return bind(config, params)(tokens, positions, attend, layer_inputs=jnp.arange(config.layers, dtype=jnp.int32))[2]


@functools.partial(jax.jit, static_argnames=("plan", "evict"), donate_argnames="cache")
def prefill(plan: Plan, params, gates, cache: Cache, tokens, valid, logits, evict: bool) -> tuple[Cache, jax.Array, list[jax.Array]]:
    """One chunk: tokens [B,T], of which valid[b] count, then a selection if asked. logits [B,V] of the last token so far are carried along.

    Returns cache, logits and `Fed.beside`.
    """
    hidden, cache, beside, _ = forward(plan, params, gates, cache, tokens, valid, logits)
    last = jnp.take_along_axis(hidden, jnp.maximum(valid - 1, 0)[:, None, None], axis=1)[:, 0]
    logits = jnp.where(valid[:, None] > 0, bind(plan.config, params).logits(last), logits)
    return (plan.evict(cache) if evict else cache), logits, beside


@functools.partial(jax.jit, static_argnames=("plan", "evict"), donate_argnames="cache")
def score(plan: Plan, params, gates, cache: Cache, tokens, logits, evict: bool) -> tuple[Cache, jax.Array, jax.Array]:
    """As `prefill`, of tokens [B,T] that all count. Returns cache, what was predicted of each token [B,T,V], and what is of the next [B,V]."""
    hidden, cache, *_ = forward(plan, params, gates, cache, tokens, jnp.full(tokens.shape[0], tokens.shape[1]), logits)
    after = bind(plan.config, params).logits(hidden)
    return (plan.evict(cache) if evict else cache), jnp.concatenate([logits[:, None], after[:, :-1]], axis=1), after[:, -1]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def evict(plan: Plan, cache: Cache) -> Cache:
    return plan.evict(cache)


@functools.partial(jax.jit, static_argnames="plan", donate_argnames="opened")
def compress(plan: Plan, opened: Cache, full: Cache) -> Cache:
    """What an eviction leaves of a full cache, which stays as it is, in a cache that is empty yet, with its own write buffer."""
    arrays = [name for name in Cache._fields if name.startswith("buffer_")]
    read = opened._replace(**{name: getattr(full, name) for name in (*arrays, "buffered", "seen", "noted")})
    return plan.evict(read)._replace(**{name: getattr(opened, name) for name in arrays})


def sample(logits: jax.Array, keys: jax.Array, temperature: jax.Array, top_p: jax.Array) -> jax.Array:
    """Next tokens [B] from logits [B,V]: the likeliest at temperature 0, else from the fewest tokens whose probabilities reach top_p."""

    def likeliest(logits):
        ranked = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
        before = jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1) - jax.nn.softmax(ranked, axis=-1)
        # The last rank that still begins below top_p; the first always does.
        count = jnp.maximum(jnp.sum(before < top_p, axis=-1, keepdims=True), 1)
        lowest = jnp.take_along_axis(ranked, count - 1, axis=-1)
        return jnp.where(logits >= lowest, logits, -jnp.inf)

    def draw(logits):
        # Sorting a vocabulary takes ten times as long as drawing from it.
        logits = jax.lax.cond(top_p < 1, likeliest, lambda logits: logits, logits / temperature)
        return jax.vmap(jax.random.categorical)(keys, logits)

    return jax.lax.cond(temperature > 0, draw, lambda logits: jnp.argmax(logits, axis=-1), logits).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("plan", "piece", "evicts"), donate_argnames="cache")
def decode(plan: Plan, params, gates, cache: Cache, logits, done, due, keys, steps, temperature, top_p, stop, piece: int, evicts: bool):
    """Decodes up to `steps` <= piece tokens per sequence, after a selection of the sequences that are `due` [B]: whose write buffer has no room for a piece.

    A sequence ends with the first token in `stop`, which is fed too: the cache then holds the whole turn. Returns cache, logits, done [B] and tokens
    [B, piece], -1 after a sequence's end.
    """
    if evicts:
        cache = jax.lax.cond(jnp.any(due), lambda cache: plan.evict(cache, due), lambda cache: cache, cache)

    # Nothing looks at a stat before the next selection. So the gates wait for the piece's end, and read their weights once for all its tokens; unless
    # their policy's stat takes more of each step than the cache holds.
    policy, first = plan.policy, cache.buffered
    gates_wait = policy.gated and policy.hidden is None and not policy.entropy

    def step(state):
        i, cache, logits, done, out, unrated = state
        position_keys = jax.vmap(jax.random.fold_in)(keys, cache.seen)
        token = sample(logits, position_keys, temperature, top_p)
        active = ~done
        out = out.at[:, i].set(jnp.where(active, token, -1))
        hidden, cache, _, new = forward(plan, params, gates, cache, token[:, None], active.astype(jnp.int32), logits, gates_wait)
        if gates_wait:
            unrated = jax.lax.dynamic_update_slice(unrated, new, (0, 0, i, 0))
        logits = jnp.where(active[:, None], bind(plan.config, params).logits(hidden[:, 0]), logits)
        return i + 1, cache, logits, done | jnp.isin(token, stop), out, unrated

    def going(state):
        return (state[0] < steps) & ~jnp.all(state[3])

    batch = logits.shape[0]
    out = jnp.full((batch, piece), -1, jnp.int32)
    unrated = jnp.zeros((plan.config.layers, batch, piece, plan.config.embed_dim), params["embed"].dtype) if gates_wait else None
    _, cache, logits, done, out, unrated = jax.lax.while_loop(going, step, (0, cache, logits, done, out, unrated))
    return (rate(plan, gates, cache, first, unrated) if gates_wait else cache), logits, done, out
