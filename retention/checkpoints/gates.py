"""Gates as one safetensors file: float32 arrays, and their config and training record as JSON in the header."""

import dataclasses
import pathlib

import jax
import numpy as np

from retention import gates
from retention.checkpoints import arrays
from retention.model import Config


def save(path: str | pathlib.Path, trained: gates.TrainedGates) -> None:
    """Writes the file whole or not at all."""
    arrays.save(path, trained.params, {"gate": dataclasses.asdict(trained.config), "record": trained.record})


def load(path: str | pathlib.Path, config: Config) -> gates.TrainedGates:
    """Reads a gates file and checks it against the model it is to serve.

    Raises:
      FileNotFoundError: no such file. ValueError: not a gates file, gates for a model of another shape, or NaN or infinity in them.
    """

    def parts(params, facts):
        return params, gates.GateConfig(**facts["gate"]), dict(facts["record"])

    params, gate, record = arrays.load(path, parts, "gates file", "train_gates or export")
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
