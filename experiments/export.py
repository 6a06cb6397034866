"""Writes trained gates for shipping: python -m experiments.export --gates=runs/gates/gates.safetensors --out=FILE.

The trunks' matrices go to float16 (half the size; they are read back as float32), biases and the readout stay float32. Only facts about the training
go into the record, no path of the machine that trained.
"""

import dataclasses
import pathlib

import numpy as np
from absl import app, flags

from experiments import check_arguments
from retention import checkpoints
from retention.checkpoints import gates

GATES = flags.DEFINE_string("gates", None, "The gates file that train_gates wrote.")
MODEL = flags.DEFINE_string("model", "smollm2-135m", "The model they were trained for.")
OUT = flags.DEFINE_string("out", None, "The file to write.")
flags.mark_flags_as_required(["gates", "out"])


def main(argv):
    check_arguments(argv)
    trained = gates.load(GATES.value, checkpoints.load(MODEL.value, gates=None, dtype="bfloat16").config)
    params = {name: np.asarray(leaf, np.float16 if name in ("w1", "w2") else np.float32) for name, leaf in trained.params.items()}
    facts = ("model", "commit", "versions", "device", "seconds", "seed", "steps", "first_step")
    if missing := [name for name in facts if name not in trained.record]:
        raise ValueError(f"--gates {GATES.value} does not say of its training the {', '.join(missing)}; give a file that train_gates wrote")
    record = {name: trained.record[name] for name in facts} | {"model": pathlib.Path(trained.record["model"]).name}
    gates.save(OUT.value, dataclasses.replace(trained, params=params, record=record))


if __name__ == "__main__":
    app.run(main)
