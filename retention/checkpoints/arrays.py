"""Named arrays, and what is said of them as JSON, in one safetensors file: how gates and sessions are kept. And what tells a model's arrays from others."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from retention.runs import digest


def save(path: str | pathlib.Path, arrays: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Writes the file whole or not at all, in the place of an earlier one.

    Raises FileNotFoundError where there is no such folder, ValueError where something stands there that is no file.
    """
    path = pathlib.Path(path).expanduser()
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file that could be written anew; give the path of a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} into; make it first")
    partial = path.with_name(path.name + ".partial")
    metadata = {name: json.dumps(fact) for name, fact in facts.items()}
    partial.write_bytes(safetensors.numpy.save({name: np.asarray(array) for name, array in arrays.items()}, metadata))
    partial.replace(path)


def load(path: str | pathlib.Path, make: Callable[[dict[str, np.ndarray], dict[str, Any]], Any], kind: str, writer: str) -> Any:
    """What make(arrays, facts) makes of the file.

    Raises FileNotFoundError, and ValueError for what is no `kind` ("gates file") as its `writer` writes it: make's KeyError, TypeError or ValueError too.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no {kind} {path}")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            facts = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
            return make({name: file.get_tensor(name) for name in file.keys()}, facts)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a {kind} as {writer} writes it, or it is damaged: {error}") from error


def fingerprint(params: Any) -> str:
    """16 hexadecimal digits that tell these floats (a pytree of jax arrays, on however many devices and processes) from others of their shapes and dtypes."""
    return digest(int(_checksum(leaf)).to_bytes(4) for leaf in jax.tree.leaves(params))


@jax.jit
def _checksum(array: jax.Array) -> jax.Array:
    """uint32 scalar, computed where the floats lie: their bits, each scrambled together with its place, summed. No change of one number escapes it."""
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}")).astype(jnp.uint32)
    strides = np.cumprod([1, *bits.shape[:0:-1]], dtype=np.uint32)[::-1]
    place = sum(stride * jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) for axis, stride in enumerate(strides))
    return jnp.sum(_scrambled(bits ^ _scrambled(place)))


def _scrambled(x: jax.Array) -> jax.Array:
    """A permutation of the uint32 in which every bit depends on all."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
