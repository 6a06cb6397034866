"""Writes trained gates for shipping: python -m experiments.export --gates=runs/gates/gates.safetensors --out=FILE.

Of several files, with commas between them, it writes the average: `retention.gates.average` says what they must have in common.

The trunks' matrices go to float16 (half the size; they are read back as float32), biases and the readout stay float32. Only facts about the training
go into the record, no path of the machine that trained.
"""

import dataclasses
import pathlib

import numpy as np
from absl import app, flags

from experiments import check_arguments
from retention import checkpoints, gates
from retention.checkpoints import gates as files

GATES = flags.DEFINE_list("gates", None, "The gates file that train_gates wrote, or several.")
MODEL = flags.DEFINE_string("model", "smollm2-135m", "The model they were trained for.")
OUT = flags.DEFINE_string("out", None, "The file to write.")
flags.mark_flags_as_required(["gates", "out"])


def facts(path: str, record: dict) -> dict:
    """What is told of the training. Raises ValueError for a file whose record has not all of it."""
    names = ("model", "commit", "versions", "device", "seconds", "seed", "steps")
    if missing := [name for name in names if name not in record]:
        raise ValueError(f"--gates {path} does not say of its training the {', '.join(missing)}; give a file that train_gates wrote")
    told = {name: record[name] for name in (*names, "first_step") if name in record}  # which older gates do not say
    return told | {"model": pathlib.Path(record["model"]).name}


def main(argv):
    check_arguments(argv)
    shape = checkpoints.load(MODEL.value, gates=None, dtype="bfloat16").config
    several = [files.load(path, shape) for path in GATES.value]
    several = [dataclasses.replace(one, record=facts(path, one.record)) for path, one in zip(GATES.value, several, strict=True)]
    trained = several[0] if len(several) == 1 else gates.average(several)
    params = {name: np.asarray(leaf, np.float16 if name in ("w1", "w2") else np.float32) for name, leaf in trained.params.items()}
    files.save(OUT.value, dataclasses.replace(trained, params=params))


if __name__ == "__main__":
    app.run(main)
