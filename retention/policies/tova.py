"""TOVA (arXiv 2401.06104): the last token's attention, averaged over all heads of a layer, which so keep the same tokens."""

import jax
import jax.numpy as jnp

from retention.policies import attention
from retention.policies.base import Policy, Streams


def score(streams: Streams) -> jax.Array:
    """The mean over all query heads of the attention that the newest token pays an entry."""
    votes = attention.weights(streams)[:, :, :, 0].mean(axis=(1, 2))
    return jnp.broadcast_to(votes[:, None], streams.stat.shape)


def policy() -> Policy:
    # Under scope head every head of a layer holds the same tokens, and only then does a mean over heads belong to one token.
    return Policy(score, streams=True, queries=1, window=1, scope="head", scopes=("head",))
