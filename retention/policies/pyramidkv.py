"""PyramidKV (arXiv 2406.02069): SnapKV under layer budgets that fall with depth."""

import functools

import jax
import jax.numpy as jnp

from retention.policies import snapkv
from retention.policies.base import Policy


def budgets(budget: jax.Array, seen: jax.Array, layers: int, protected: jax.Array, beta: float) -> jax.Array:
    """[B, L] int32: what is protected and an arithmetic sequence of mean M - protected whose last term is 1/beta of its mean. Sums to L*M exactly."""
    # The first n terms, as a share of the whole: sum of (2 - 1/beta) - i (2 - 2/beta) / (L - 1) over i < n, divided by L.
    n = jnp.arange(layers + 1)
    step = (2 - 2 / beta) / max(layers - 1, 1)
    first = 2 - 1 / beta if layers > 1 else 1.0
    share = (first * n - step * n * (n - 1) / 2) / layers
    total = jnp.round(share * (layers * jnp.maximum(budget - protected, 0))[:, None].astype(jnp.float32)).astype(jnp.int32)
    return jnp.minimum(budget, protected)[:, None] + jnp.diff(total, axis=1)


def kvpress_budgets(budget: jax.Array, seen: jax.Array, layers: int, protected: jax.Array, beta: float) -> jax.Array:
    """As kvpress has them: the sequence's mean is M, what is protected (theirs: the window) included; where its end falls below that, every layer gets M."""
    m, room = budget.astype(jnp.float32), (seen - protected).astype(jnp.float32)
    most = jnp.minimum(2 * m - m / beta, room)
    least = 2 * m - most
    slope = (most - least) / max(layers - 1, 1)
    fits = (most >= least) & (least >= protected)
    # The sums of the first n terms are rounded, where kvpress rounds each term: the total is the budget, which theirs misses by an entry or two.
    n = jnp.arange(layers + 1)
    total = jnp.round(most[:, None] * n - slope[:, None] * n * (n - 1) / 2).astype(jnp.int32).at[:, -1].set(layers * budget)
    return jnp.where(fits[:, None], jnp.diff(total, axis=1), budget[:, None])


def policy(window: int = 32, kernel: int = 7, beta: float = 20.0, kvpress: bool = False) -> Policy:
    """As `snapkv.policy`; beta: the mean budget over the last layer's. kvpress: budgets as that library computes them. Raises ValueError for beta < 1."""
    snapkv.check(window, kernel)
    if not beta >= 1:
        raise ValueError(f"beta must be at least 1, at which all layers have the same budget, got {beta}")
    shares = functools.partial(kvpress_budgets if kvpress else budgets, beta=beta)
    rank = functools.partial(snapkv.score, kernel=kernel)
    return Policy(rank, streams=True, queries=window, window=window, scope="head", scopes=("head",), layer_budgets=shares)
