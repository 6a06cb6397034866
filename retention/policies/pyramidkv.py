"""PyramidKV (arXiv 2406.02069): SnapKV under layer budgets that fall with depth."""

import functools

import jax
import jax.numpy as jnp

from retention.policies import snapkv
from retention.policies.base import Policy


def falling(most: jax.Array, mean: jax.Array, layers: int) -> jax.Array:
    """[B, L] int32: an arithmetic sequence that begins with `most` [B], of this `mean` [B]. Sums of its first n terms are rounded, not the terms: the
    total is L * mean exactly."""
    most, slope = most[:, None], 2 * (most - mean)[:, None] / max(layers - 1, 1)
    n = jnp.arange(layers + 1)
    total = jnp.round(n * most - slope * n * (n - 1) / 2).astype(jnp.int32)
    return jnp.diff(total.at[:, -1].set(layers * mean), axis=1)


def budgets(budget: jax.Array, seen: jax.Array, layers: int, protected: jax.Array, beta: float) -> jax.Array:
    """[B, L] int32: what is protected and an arithmetic sequence of mean M - protected whose last term is 1/beta of its mean. Sums to L*M exactly.

    No layer has more than was seen: then the sequence falls more slowly, and not at all where all entries fit.
    """
    least = jnp.minimum(budget, protected)
    mean = budget - least
    most = jnp.clip(2 * mean - mean / beta, mean, jnp.maximum(seen - protected, mean))
    return least[:, None] + falling(most, mean, layers)


def kvpress_budgets(budget: jax.Array, seen: jax.Array, layers: int, protected: jax.Array, beta: float) -> jax.Array:
    """As kvpress has them, but for an entry or two, by which theirs miss the budget: the sequence's mean is M, what is protected (theirs: the window)
    included; where its end falls below that, every layer gets M."""
    most = jnp.minimum(2 * budget - budget / beta, seen - protected)
    least = 2 * budget - most
    fits = (most >= least) & (least >= protected)
    return jnp.where(fits[:, None], falling(most, budget, layers), budget[:, None])


def policy(window: int = 32, kernel: int = 7, beta: float = 20.0, kvpress: bool = False) -> Policy:
    """As `snapkv.policy`; beta: the mean budget over the last layer's. kvpress: budgets as that library computes them. Raises ValueError for beta < 1."""
    snapkv.check(window, kernel)
    if not beta >= 1:
        raise ValueError(f"beta must be at least 1, at which all layers have the same budget, got {beta}")
    shares = functools.partial(kvpress_budgets if kvpress else budgets, beta=beta)
    rank = functools.partial(snapkv.score, kernel=kernel)
    return Policy(rank, streams=True, queries=window, window=window, scope="head", scopes=("head",), layer_budgets=shares)
