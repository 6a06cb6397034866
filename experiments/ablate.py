"""Trains gates with one thing changed at a time and evaluates them: python -m experiments.ablate --config=configs/ablations.py --workdir=runs/ablations

One seed of all variants after another. Writes VARIANT-SEED/, a training's run folder, with evaluation/ in it, and ablations.csv: each variant's mean and spread
over its seeds. What is finished is not done again.
"""

import pathlib

import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from retention.evaluation.harness import evaluate
from retention.runs import RunFolder, write_table
from retention.training.loop import train

CONFIG = config_flags.DEFINE_config_file("config", None, "Training, its variants and the evaluation, configs/ablations.py.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "The run folder; an interrupted run in it goes on where it stopped.")
flags.FLAGS.verbosity = logging.FATAL  # as in train_gates
flags.mark_flags_as_required(["config", "workdir"])


def gates_and_scores(config: ConfigDict, variant: str, seed: int, folder: pathlib.Path) -> list[dict]:
    """The evaluation's table for one variant's gates of one seed."""
    training = config.train.copy_and_resolve_references()
    training.update(config.variants[variant])
    training.seed = seed
    train(training, folder)
    evaluation = config.evaluate.copy_and_resolve_references()
    evaluation.gates = str(folder / "gates.safetensors")
    evaluation.scopes = ("head",) if training.gate.kind == "local" else ()
    return evaluate(evaluation, folder / "evaluation")


def main(_):
    config = CONFIG.value
    run, values = RunFolder(WORKDIR.value, config), {}
    for seed in config.seeds:
        for variant in config.variants:
            for row in gates_and_scores(config, variant, seed, run.path / f"{variant}-{seed}"):
                cell = variant, row["task"], row["budget"]
                values.setdefault(cell, []).append(row["score" if "score" in row else "kl"])
                print(variant, seed, *cell[1:], values[cell][-1])
            # As far as it has come: what is not finished may be hours away.
            write_table(run.path / "ablations.csv", [summary(*cell, measured) for cell, measured in values.items()])
    run.finish()


def summary(variant: str, task: str, budget: float, measured: list[float]) -> dict:
    spread = round(float(np.std(measured, ddof=1)), 4) if len(measured) > 1 else ""
    return {"variant": variant, "task": task, "budget": budget, "mean": round(float(np.mean(measured)), 4), "spread": spread, "seeds": len(measured)}


if __name__ == "__main__":
    app.run(main)
