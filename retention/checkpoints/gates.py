"""Gates as one safetensors file: float32 arrays, and their config and training record as JSON in the header."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import safetensors
import safetensors.numpy

from retention import gates
from retention.model import Config


def save(path: str | pathlib.Path, trained: gates.TrainedGates) -> None:
    """Writes the file whole or not at all."""
    path = pathlib.Path(path)
    metadata = {"gate": json.dumps(dataclasses.asdict(trained.config)), "record": json.dumps(trained.record)}
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(safetensors.numpy.save({name: np.asarray(leaf) for name, leaf in trained.params.items()}, metadata))
    partial.replace(path)


def load(path: str | pathlib.Path, config: Config) -> gates.TrainedGates:
    """Reads a gates file and checks it against the model it is to serve.

    Raises:
      FileNotFoundError: no such file. ValueError: not a gates file, gates for a model of another shape, or NaN or infinity in them.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no gates file {path}")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            params = {name: file.get_tensor(name) for name in file.keys()}
        gate = gates.GateConfig(**json.loads(metadata["gate"]))
        record = dict(json.loads(metadata["record"]))
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a gates file as train_gates or export writes it, or it is damaged: {error}") from error
    wanted = jax.eval_shape(lambda: gates.init(config, gate))
    shapes = {name: leaf.shape for name, leaf in wanted.items()}
    found = {name: leaf.shape for name, leaf in params.items()}
    if found != shapes:
        name = next(name for name in sorted(shapes | found) if shapes.get(name) != found.get(name))
        raise ValueError(
            f"the gates in {path} are for another model: {name} is {found.get(name, 'missing')}, this model needs"
            f" {shapes.get(name, 'no such array')}; use gates trained for it"
        )
    for name, leaf in params.items():
        if not np.isfinite(leaf).all():
            raise ValueError(f"the gates in {path} hold NaN or infinity in {name!r}; train them again or use another file")
    return gates.TrainedGates(gate, {name: jax.numpy.asarray(leaf, jax.numpy.float32) for name, leaf in params.items()}, record)
