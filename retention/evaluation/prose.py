"""How far a compressed context changes what the model says next: KL to the full cache on unseen prose."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from retention import cache as cache_lib
from retention import programs
from retention.model import bind
from retention.rows import Rows


@functools.partial(jax.jit, static_argnums=0)
def _logits(plan, params, gates, cache, tokens, logits):
    hidden, *_ = programs.forward(plan, params, gates, cache, tokens, jnp.full(tokens.shape[0], tokens.shape[1]), logits)
    return bind(plan.config, params).logits(hidden)


def continuation_logits(rows: Rows, continuations: Sequence[Sequence[int]]) -> jax.Array:
    """[B, T-1, V]: what is predicted of the tokens 1 to T-1 of each sequence's continuation, read as written behind what the rows hold, which stay as
    they are. Nothing is evicted meanwhile."""
    tokens = jnp.asarray(continuations)[:, :-1]
    cache = cache_lib.with_buffer(rows.cache, max(tokens.shape[1], rows.cache.buffer_position.shape[1]))
    return _logits(rows.plan, rows.model.params, rows.gates, cache, tokens, rows.logits)


def divergence(full: jax.Array, compressed: jax.Array, continuations: Sequence[Sequence[int]]) -> list[dict[str, float]]:
    """For each sequence, from both `continuation_logits`: kl, the mean KL(full cache || compressed) over the continuation's tokens, loss and full_loss,
    the mean next-token losses; nats."""
    labels = jnp.asarray(continuations)[:, 1:]
    kl = optax.losses.kl_divergence_with_log_targets(jax.nn.log_softmax(compressed), jax.nn.log_softmax(full)).mean(axis=1)
    loss, full_loss = (optax.losses.softmax_cross_entropy_with_integer_labels(one, labels).mean(axis=1) for one in (compressed, full))
    return [{"kl": float(a), "loss": float(b), "full_loss": float(c)} for a, b, c in zip(kl, loss, full_loss, strict=True)]


def windows(texts: Sequence[Sequence[int]], context: int, continuation: int, count: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """`count` random (context, continuation) pairs from token lists, each from within one text. Raises ValueError if no text is long enough."""
    long = [tokens for tokens in texts if len(tokens) >= context + continuation]
    if not long:
        raise ValueError(f"text holds no document of {context + continuation} tokens; give longer texts or a shorter length")
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        tokens = long[rng.integers(len(long))]
        start = int(rng.integers(len(tokens) - context - continuation + 1))
        pairs.append((list(tokens[start : start + context]), list(tokens[start + context : start + context + continuation])))
    return pairs
