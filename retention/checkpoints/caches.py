"""A cache, and the logits behind its last tokens, in one safetensors file: how sessions and long streams are kept."""

import json
import pathlib
from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from retention.cache import Cache
from retention.checkpoints import arrays
from retention.runs import digest

_NOTED = "noted."  # before the names of Cache.noted


def save(path: str | pathlib.Path, cache: Cache, logits: jax.Array, facts: Mapping[str, dict]) -> None:
    """Writes the file whole or not at all. facts: what JSON can hold, by name."""
    fields = cache._asdict()
    noted = {_NOTED + name: array for name, array in fields.pop("noted").items()}
    written = {name: np.asarray(array) for name, array in {**fields, **noted, "logits": logits}.items()}
    arrays.save(path, written, {**facts, "digest": _digest(written, facts)})


def _digest(written: Mapping[str, np.ndarray], facts: Mapping[str, dict]) -> str:
    said = json.dumps(facts, sort_keys=True).encode()
    return digest([said, *(part for name in sorted(written) for part in (f"{name} {written[name].shape} ".encode(), written[name].tobytes()))])


def load(path: str | pathlib.Path, facts: Collection[str], kind: str, writer: str) -> tuple[Cache, jax.Array, dict[str, dict]]:
    """The cache, the logits, and the facts of these names. Raises as `arrays.load`, to which kind and writer are told."""

    def parts(found, said):
        if said.pop("digest") != _digest(found, said):
            raise ValueError("what it holds is not what was written")
        found = {name: jnp.asarray(array) for name, array in found.items()}
        logits = found.pop("logits")
        noted = {name.removeprefix(_NOTED): found.pop(name) for name in list(found) if name.startswith(_NOTED)}
        return Cache(**found, noted=noted), logits, {name: dict(said[name]) for name in facts}

    return arrays.load(path, parts, kind, writer)
