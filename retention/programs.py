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
from retention.model import Config, bind


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that a compiled program depends on but shapes: hashable, one compilation each."""

    config: Config
    gate: gates_lib.GateConfig | None
    policy: policies.Policy
    scope: str
    sinks: int
    window: int

    def evict(self, cache: Cache) -> Cache:
        return cache_lib.select(cache, self.policy.score, self.scope, self.sinks, self.window, self.policy.floor)


def forward(plan: Plan, params: dict, gates: dict | None, cache: Cache, tokens: jax.Array, valid: jax.Array) -> tuple[jax.Array, Cache]:
    """Feeds each sequence its next valid[b] of tokens [B,T]; they attend to pool, buffer and themselves. Returns hidden [B,T,E] and the new cache."""
    config = plan.config
    positions = cache.seen[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    head = jnp.arange(config.kv_heads, dtype=jnp.int32)

    # The layers only read the cache, and the new entries join it once, after the last: an array that a loop both writes and reads piecewise is one that
    # XLA copies in every round.
    def attend(carry, layer_input, q, k, v, h):
        layer, gate = layer_input
        log_beta = None if gate is None else gates_lib.log_beta(gate, h, config.kv_heads)
        pool, buffer = (cache.keys, cache.values, cache.starts), (cache.buffer_keys, cache.buffer_values, cache.buffered)
        out = cached_attention(q, k, v, valid, *pool, *buffer, layer)
        return carry, out, (k, v, plan.policy.stat(log_beta, positions, layer * config.kv_heads + head))

    layer_gates = gates_lib.per_layer(gates, config, plan.gate) if plan.policy.gated else None
    layer_inputs = (jnp.arange(config.layers, dtype=jnp.int32), layer_gates)
    hidden, _, new = bind(config, params)(tokens, positions, attend, layer_inputs=layer_inputs)
    return hidden, cache_lib.append(cache, *new, valid)


@functools.partial(jax.jit, static_argnames=("plan", "evict"), donate_argnames="cache")
def prefill(plan: Plan, params, gates, cache: Cache, tokens, valid, logits, evict: bool) -> tuple[Cache, jax.Array]:
    """One chunk: tokens [B,T], of which valid[b] count, then a selection if asked. logits [B,V] of the last token so far are carried along."""
    hidden, cache = forward(plan, params, gates, cache, tokens, valid)
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
        hidden, cache = forward(plan, params, gates, cache, token[:, None], active.astype(jnp.int32))
        logits = jnp.where(active[:, None], bind(plan.config, params).logits(hidden[:, 0]), logits)
        return i + 1, cache, logits, done | jnp.isin(token, stop), out

    def going(state):
        return (state[0] < steps) & ~jnp.all(state[3])

    out = jnp.full((logits.shape[0], piece), -1, jnp.int32)
    _, cache, logits, done, out = jax.lax.while_loop(going, step, (0, cache, logits, done, out))
    return cache, logits, done, out
