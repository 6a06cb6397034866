"""H2O (arXiv 2306.14048): heavy hitters, by the attention they have received so far, and as many newest tokens."""

import jax

from retention.policies.base import Policy


def score(stat: jax.Array, position: jax.Array, seen: jax.Array) -> jax.Array:
    """The attention that all tokens so far have paid the entry, its own included."""
    return stat


def half(budget):
    return budget // 2


def policy() -> Policy:
    return Policy(score, attended=True, window=half, scope="head")
