"""SnapKV (arXiv 2404.14469): what the newest queries look at, each head by itself."""

import functools

import jax
import jax.numpy as jnp

from retention.policies import attention
from retention.policies.base import Policy, Streams


def score(streams: Streams, kernel: int) -> jax.Array:
    """The mean attention that the noted queries pay an entry, averaged over its `kernel` neighbours and over the query heads that share it.

    The queries' own tokens take no part in the neighbourhoods: they are protected.
    """
    votes = attention.mean_over_queries(attention.weights(streams), streams)
    older = attention.before_queries(streams)
    pooled = attention.pool(jnp.where(older[:, :, None], votes, 0), kernel).mean(axis=2)
    return jnp.where(older, pooled, votes.mean(axis=2))


def policy(window: int = 32, kernel: int = 7) -> Policy:
    """window: the queries that vote, and the newest tokens protected. kernel: odd.

    Raises ValueError for a window below 1 or a kernel that is not odd.
    """
    check(window, kernel)
    return Policy(functools.partial(score, kernel=kernel), streams=True, queries=window, window=window, scope="head")


def check(window: int, kernel: int) -> None:
    if window < 1:
        raise ValueError(f"window must be at least 1 query, got {window}")
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel must be odd, so that an entry stands in the middle of its neighbours, got {kernel}")
