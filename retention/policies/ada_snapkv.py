"""Ada-SnapKV (Ada-KV, arXiv 2407.11550): SnapKV's scores, one budget a layer for which its heads compete."""

import functools

import jax
import jax.numpy as jnp

from retention.policies import snapkv
from retention.policies.base import Policy, Streams


def score(streams: Streams, kernel: int, floor: float) -> jax.Array:
    """SnapKV's; each stream's best `floor` of the budget, its protected entries counted, outrank all that is not protected.

    So in kvpress; the authors' own code takes `floor` of what is left beside the window, so that at small budgets more of a stream is safe there.
    """
    scores = snapkv.score(streams, kernel)
    protected = (streams.position < streams.sinks) | (streams.position >= (streams.seen - streams.window)[:, None, None])
    ranked = jnp.where(streams.live, jnp.where(protected, jnp.inf, scores), -jnp.inf)
    rank = jnp.argsort(jnp.argsort(-ranked, axis=-1), axis=-1)
    safe = jnp.maximum(1, jnp.floor(floor * streams.budget))[:, None, None]
    return jnp.where(rank < safe, jnp.inf, scores)


def policy(window: int = 32, kernel: int = 7, floor: float = 0.2) -> Policy:
    """As `snapkv.policy`; floor: the share of M that every stream keeps. Raises ValueError for one outside [0, 1]."""
    snapkv.check(window, kernel)
    if not 0 <= floor <= 1:
        raise ValueError(f"floor must be a share of the budget in [0, 1], got {floor}")
    rank = functools.partial(score, kernel=kernel, floor=floor)
    return Policy(rank, streams=True, queries=window, window=window, scope="layer", scopes=("layer", "global"))
