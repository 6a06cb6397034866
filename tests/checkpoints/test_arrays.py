"""Arrays in files, and what tells a model's from others."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from retention.checkpoints.arrays import fingerprint, save


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


def test_a_file_is_there_whole_or_as_it_was(tmp_path, monkeypatch):
    file, write = tmp_path / "gates.safetensors", pathlib.Path.write_bytes
    save(file, {"a": np.ones(3)}, {"kind": "first"})
    before = file.read_bytes()

    def cut_off(path, data):
        write(path, data[: len(data) // 2])
        raise OSError("no space left")

    monkeypatch.setattr(pathlib.Path, "write_bytes", cut_off)
    with pytest.raises(OSError, match="no space left"):
        save(file, {"a": np.zeros(3)}, {"kind": "second"})
    assert file.read_bytes() == before
