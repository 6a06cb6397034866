"""Trains gates with one thing changed at a time and evaluates them: python -m experiments.ablate --config=configs/ablations.py --workdir=runs/ablations

One seed of all variants after another. Writes VARIANT-SEED/, a training's run folder, with evaluation/ in it, and ablations.csv: each variant's mean and spread
over the seeds that the folder holds. What is finished is not done again, and other variants and seeds may follow in the same folder:
--config.order="('baseline', 'local')" --config.seeds="(1, 2)".
"""

import csv
import pathlib

import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from configs import ablations
from experiments import check_arguments, check_config
from retention.evaluation import cells
from retention.evaluation.harness import evaluate
from retention.evaluation.plots import measure_of
from retention.evaluation.report import typed
from retention.gates import GateConfig
from retention.names import check_name, check_seed
from retention.runs import RunFolder, write_table
from retention.training import text
from retention.training.loop import train

CONFIG = config_flags.DEFINE_config_file("config", None, "Training, its variants and the evaluation, configs/ablations.py.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "The run folder; an interrupted run in it goes on where it stopped.")
CELL = ("task", "length", "policy", "scope", "budget")  # of the evaluations' tables, of which a row is the mean over the seeds
flags.FLAGS.verbosity = logging.FATAL  # as in train_gates
flags.mark_flags_as_required(["config", "workdir"])


def training(config: ConfigDict, variant: str, seed: int) -> ConfigDict:
    """The config of a variant's training. Raises KeyError for an entry that there is not, ValueError for gates that there cannot be."""
    changed = config.train.copy_and_resolve_references()
    changed.update(config.variants[variant])
    changed.seed = seed
    GateConfig(**changed.gate)
    return changed


def gates_and_scores(config: ConfigDict, variant: str, seed: int, folder: pathlib.Path) -> list[dict]:
    """The evaluation's table for one variant's gates of one seed."""
    train(training(config, variant, seed), folder)
    evaluation = config.evaluate.copy_and_resolve_references()
    evaluation.gates = str(folder / "gates.safetensors")
    return evaluate(evaluation, folder / "evaluation")


def main(argv):
    check_arguments(argv)
    config = CONFIG.value
    check_config(config, ablations.get_config(), "one such as configs/ablations.py")
    # Mistakes that show without a model should not wait for what is trained before them.
    if not config.order or not config.seeds:
        raise ValueError("config.order and config.seeds must each name at least one")
    for seed in config.seeds:
        check_seed(seed)
    for variant in config.order:
        check_name("variant", variant, sorted(config.variants))
        training(config, variant, 0)
    cells.table(config.evaluate)
    text.load(config.evaluate.text)
    run = RunFolder(WORKDIR.value, config, free=("order", "seeds"))
    for seed in config.seeds:
        for variant in config.order:
            for row in gates_and_scores(config, variant, seed, run.path / f"{variant}-{seed}"):
                print(variant, seed, row["task"], row["budget"], row[measure_of(row)])
            if (done := {"variant": variant, "seed": seed}) not in run.metrics():
                run.log(**done)
            # As far as it has come: what is not finished may be hours away.
            write_table(run.path / "ablations.csv", table(run.path))
    run.finish()


def table(folder: pathlib.Path) -> list[dict]:
    """Mean and spread over its seeds of each cell of each variant that has been evaluated in the run folder, by this command or another."""
    values: dict[tuple, list[float]] = {}
    for file in sorted(folder.glob("*/evaluation/results.csv")):
        variant = file.parent.parent.name.rpartition("-")[0]
        with open(file, newline="") as opened:
            for row in map(typed, csv.DictReader(opened)):
                cell = (variant, *(row[name] for name in CELL))
                values.setdefault(cell, []).append(row[measure_of(row)])
    return [summary(cell, measured) for cell, measured in values.items()]


def summary(cell: tuple, measured: list[float]) -> dict:
    spread = round(float(np.std(measured, ddof=1)), 4) if len(measured) > 1 else ""
    return {**dict(zip(("variant", *CELL), cell, strict=True)), "mean": round(float(np.mean(measured)), 4), "spread": spread, "seeds": len(measured)}


if __name__ == "__main__":
    app.run(main)
