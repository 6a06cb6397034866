"""Trains retention gates: python -m experiments.train_gates --config=configs/smollm2_135m.py --workdir=runs/gates [--config.steps=100]."""

from absl import app, flags, logging
from ml_collections import config_flags

from retention.training.loop import train

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, a file of configs/.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "The run folder; an interrupted run in it goes on where it stopped.")
flags.FLAGS.verbosity = logging.WARNING  # orbax has a page to say about every checkpoint
flags.mark_flags_as_required(["config", "workdir"])


def main(_):
    train(CONFIG.value, WORKDIR.value)
    print(f"{WORKDIR.value}/gates.safetensors")


if __name__ == "__main__":
    app.run(main)
