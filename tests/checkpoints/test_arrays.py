"""What tells a model's arrays from others."""

import jax.numpy as jnp
import numpy as np
import pytest

from retention.checkpoints.arrays import fingerprint


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fingerprint_tells_every_change(dtype):
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 6)), dtype)
    bits = np.asarray(weights).view(f"uint{8 * weights.dtype.itemsize}")
    others = [weights[::-1], weights[:, ::-1], weights[:, :, ::-1], -weights, weights * 2]
    for bit in range(8 * weights.dtype.itemsize):
        changed = bits.copy()
        changed[bit % 3, bit % 8, bit % 6] ^= 1 << bit
        others.append(jnp.asarray(changed.view(weights.dtype)))
    for i, j in ((0, 1), (5, 69), (16, 80)):  # two numbers that change places
        swapped = bits.reshape(-1).copy()
        swapped[[i, j]] = swapped[[j, i]]
        others.append(jnp.asarray(swapped.view(weights.dtype).reshape(weights.shape)))
    found = [fingerprint({"a": weights, "b": jnp.ones(3)}), *(fingerprint({"a": other, "b": jnp.ones(3)}) for other in others)]
    assert len(set(found)) == len(found)
    assert fingerprint({"a": weights + 0, "b": jnp.ones(3)}) == found[0]
