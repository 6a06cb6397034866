"""Runs an evaluation: python -m experiments.evaluate --config=configs/needles.py --workdir=runs/needles [--config.samples=8]."""

from absl import app, flags
from ml_collections import config_flags

from retention.evaluation.harness import evaluate

CONFIG = config_flags.DEFINE_config_file("config", None, "The evaluation, a file of configs/.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "The run folder; an interrupted evaluation in it goes on where it stopped.")
flags.mark_flags_as_required(["config", "workdir"])


def main(_):
    for row in evaluate(CONFIG.value, WORKDIR.value):
        measured = f"KL {row['kl']}" if row["task"] == "prose" else f"accuracy {row['accuracy']}"
        print(f"{row['task']:8} {row['length']:5} {row['policy']:10} kept {row['kept']:.4f}: {measured} ({row['samples']} samples)")


if __name__ == "__main__":
    app.run(main)
