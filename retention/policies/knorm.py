"""Knorm (arXiv 2406.11430): keys of small norm are those that get attention."""

import jax
import jax.numpy as jnp

from retention.policies.base import Policy, Written


def stat(written: Written) -> jax.Array:
    """-||k||."""
    return -jnp.linalg.norm(written.keys.astype(jnp.float32), axis=-1)


def score(stat: jax.Array, position: jax.Array, seen: jax.Array) -> jax.Array:
    return stat


def policy() -> Policy:
    return Policy(score, stat, scope="head")
