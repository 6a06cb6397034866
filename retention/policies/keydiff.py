"""KeyDiff (arXiv 2504.15364): keys that differ from the others are those that get attention."""

import jax
import jax.numpy as jnp

from retention.policies.base import Policy, Streams


def score(streams: Streams) -> jax.Array:
    """-cos(k, mean of the stream's keys, each at unit length)."""
    keys = streams.keys.astype(jnp.float32)
    # Dead entries are zeros and stay so.
    keys = keys / jnp.maximum(jnp.linalg.norm(keys, axis=-1, keepdims=True), 1e-12)
    anchor = keys.sum(axis=2)
    anchor = anchor / jnp.maximum(jnp.linalg.norm(anchor, axis=-1, keepdims=True), 1e-12)
    # A TPU would round to bfloat16, and keys that differ little would tie.
    return -jnp.einsum("BHND,BHD->BHN", keys, anchor, precision=jax.lax.Precision.HIGHEST)


def policy() -> Policy:
    return Policy(score, streams=True, scope="head")
