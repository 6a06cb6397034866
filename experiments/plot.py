"""Draws the curves of a training run into its folder: python -m experiments.plot --workdir=runs/gates."""

import json
import pathlib

from absl import app, flags

from experiments import check_arguments
from retention.training.plots import plot_run

WORKDIR = flags.DEFINE_string("workdir", None, "The run folder that train_gates wrote, or still writes.")
flags.mark_flag_as_required("workdir")


def main(argv):
    check_arguments(argv)
    folder = pathlib.Path(WORKDIR.value).expanduser()
    file = folder / "metrics.jsonl"
    if not file.exists():
        raise FileNotFoundError(f"there is no {file}; give the --workdir of a training run")
    # A run that goes on may have written half of its last line.
    lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    if not lines:
        raise ValueError(f"{file} has no record yet; wait for the first steps")
    records = [json.loads(line) for line in lines]
    if "step" not in records[0]:
        raise ValueError(f"{file} is not of a training run; give the --workdir of experiments.train_gates")
    for path in plot_run(records, folder):
        print(path)


if __name__ == "__main__":
    app.run(main)
