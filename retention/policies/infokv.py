"""InfoKV (arXiv 2606.26875): attention received, and tokens that follow an uncertain prediction and that the late layers transform."""

import functools

import jax
import jax.numpy as jnp

from retention.policies import attention, snapkv
from retention.policies.base import Policy, Streams, Written


def stat(written: Written) -> jax.Array:
    """E = (1 + D) H. H: entropy of the prediction before the token; D: 1 - cos between the block's output and the last block's. METHOD section 6."""
    hidden = written.hidden.astype(jnp.float32)
    unit = hidden / jnp.maximum(jnp.linalg.norm(hidden, axis=-1, keepdims=True), 1e-12)
    depth = 1 - jnp.einsum("LBTE,BTE->LBT", unit, unit[-1], precision=jax.lax.Precision.HIGHEST)
    information = (1 + depth) * written.entropy
    return jnp.broadcast_to(information[..., None], (*information.shape, written.stream.shape[-1]))


def score(streams: Streams, kernel: int, alpha: float) -> jax.Array:
    """alpha A + (1 - alpha) softmax(E); A is the mean attention of the noted queries over the `kernel` neighbours of an entry, scaled to sum to 1.

    The queries' own tokens take part in both, which the paper leaves open; SnapKV leaves them out.
    """
    votes = attention.mean_over_queries(attention.weights(streams), streams)
    votes = jnp.where(streams.live, attention.pool(votes, kernel).mean(axis=2), 0)
    votes = votes / jnp.maximum(votes.sum(axis=-1, keepdims=True), 1e-12)
    return alpha * votes + (1 - alpha) * jax.nn.softmax(streams.stat, axis=-1, where=streams.live)


def policy(window: int = 64, kernel: int = 9, alpha: float = 0.9) -> Policy:
    """window: the queries that vote, and the newest tokens protected. Raises ValueError as `snapkv.policy`, and for an alpha outside [0, 1]."""
    snapkv.check(window, kernel)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    rank = functools.partial(score, kernel=kernel, alpha=alpha)
    return Policy(rank, stat, streams=True, queries=window, window=window, scope="head", hidden=all_blocks, entropy=True)


def all_blocks(layers: int) -> tuple[int, ...]:
    return tuple(range(layers))
