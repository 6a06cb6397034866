"""Learned retention (DBTrimKV, arXiv 2605.09649; with local gates and scope "head", TRIM-KV, arXiv 2512.03324).

An entry written at position p with gate beta is worth beta^(t-p) at time t. METHOD section 4.
"""

import functools
import math

import jax
import jax.numpy as jnp

from retention.policies.base import Policy, Written


def log1mexp(x: jax.Array) -> jax.Array:
    """log(1 - e^x) for x < 0, without cancellation at either end."""
    near = x > -0.6931472
    return jnp.where(near, jnp.log(-jnp.expm1(jnp.where(near, x, -1.0))), jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))))


def score(stat: jax.Array, position: jax.Array, seen: jax.Array, lookahead: int = 1) -> jax.Array:
    """The log of what an entry will be worth; stat is log beta.

    lookahead 1: at the next token, (seen - position) log beta, the distance that training's bias has there (METHOD counts one more).
    lookahead n > 1: the mean over the n tokens after that one, (seen + 1 - position) log beta + log(1 - beta^n) - log(1 - beta) - log n, METHOD's sum but
    for log n, in which a beta near 1 would drown.
    """
    if lookahead == 1:
        return (seen - position) * stat
    # With x = log beta and y = n x it is (n-1) x / 2 + log(sinh(y/2) / (n sinh(x/2))), here as its series.
    near = lookahead * stat > -0.5
    x = jnp.where(near, stat, 0.0)
    y = lookahead * x
    series = (lookahead - 1) / 2 * x + (y**2 - x**2) / 24 - (y**4 - x**4) / 2880
    far = jnp.where(near, -1.0, stat)
    mean = jnp.where(near, series, log1mexp(lookahead * far) - log1mexp(far) - math.log(lookahead))
    return (seen + 1 - position) * stat + mean


def stat(written: Written) -> jax.Array:
    return written.log_beta


def policy(lookahead: int = 1, floor: int = 0, alpha: float = 0.0) -> Policy:
    """floor: entries that every stream keeps. alpha: entries that will be worth less than this go even where there is room (METHOD section 4's
    threshold; with a lookahead, of the worth summed over it).

    Raises ValueError for a lookahead below 1, a negative floor, or an alpha that is negative or as much as an entry can be worth, `lookahead`.
    """
    if lookahead < 1:
        raise ValueError(f"lookahead must be at least 1 token, got {lookahead}")
    if floor < 0:
        raise ValueError(f"floor must be 0 or more entries per stream, got {floor}")
    if not 0 <= alpha < lookahead:
        raise ValueError(f"alpha must be at least 0 and below {lookahead}, which is what an entry can be worth, got {alpha}")
    lowest = math.log(alpha / lookahead) if alpha else -math.inf
    return Policy(score=functools.partial(score, lookahead=lookahead), stat=stat, gated=True, sinks=None, floor=floor, lowest=lowest)
