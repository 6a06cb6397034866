"""Knorm (arXiv 2406.11430): keys of small norm are those that get attention."""

import jax
import jax.numpy as jnp

from retention.policies.base import Policy, Written, as_stored


def stat(written: Written) -> jax.Array:
    """-||k||."""
    return -jnp.linalg.norm(written.keys.astype(jnp.float32), axis=-1)


def policy() -> Policy:
    return Policy(as_stored, stat, scope="head")
