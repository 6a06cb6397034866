"""How far a compressed context changes what the model says next: KL to the full cache on unseen prose."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from retention import programs
from retention.generation import CHUNK, Rows
from retention.model import Model, bind


@functools.partial(jax.jit, static_argnums=0)
def _continuation_logits(plan, params, gates, cache, tokens, logits):
    hidden, _ = programs.forward(plan, params, gates, cache, tokens, jnp.full(tokens.shape[0], tokens.shape[1]), logits)
    return bind(plan.config, params).logits(hidden)


def divergence(model: Model, context: Sequence[int], continuation: Sequence[int], **options) -> tuple[float, float, float]:
    """Reads the context under a budget, then scores the continuation, token by token as written.

    Args:
      context, continuation: token ids; the context is compressed before the continuation is seen. The continuation stays whole in the write
        buffer, so it may have CHUNK tokens at most.
      options: of `Session`: budget, policy, scope, prefill_chunk, sinks, window.

    Returns:
      Mean KL(full cache || budget) over the continuation's tokens, and the mean next-token losses of the budget and of the full cache; nats.
    """
    if len(continuation) > CHUNK:
        raise ValueError(f"continuation has {len(continuation)} tokens; the write buffer takes {CHUNK}")
    logits = []
    for settings in ({"budget": None}, options):
        rows = Rows(model, 1, **settings)
        rows.append([context])
        logits.append(_continuation_logits(rows.plan, model.params, rows.gates, rows.cache, jnp.asarray([continuation[:-1]]), rows.logits))
    full, compressed = logits
    kl = optax.losses.kl_divergence_with_log_targets(jax.nn.log_softmax(compressed), jax.nn.log_softmax(full))
    labels = jnp.asarray([continuation[1:]])
    loss, full_loss = (optax.losses.softmax_cross_entropy_with_integer_labels(one, labels) for one in (compressed, full))
    return float(kl.mean()), float(loss.mean()), float(full_loss.mean())


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
