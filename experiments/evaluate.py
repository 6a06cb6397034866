"""Runs an evaluation: python -m experiments.evaluate --config=configs/eval_needles.py --workdir=runs/needles [--config.samples=8]."""

from absl import app, flags
from ml_collections import config_flags

from configs import eval_needles
from experiments import check_arguments, check_config
from retention.evaluation.harness import evaluate

CONFIG = config_flags.DEFINE_config_file("config", None, "The evaluation, a file of configs/.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "The run folder; an interrupted evaluation in it goes on where it stopped.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv):
    check_arguments(argv)
    check_config(CONFIG.value, eval_needles.get_config(), "one of configs/eval_*.py")
    for row in evaluate(CONFIG.value, WORKDIR.value):
        measured = f"score {row['score']:.3f} ({row['low']:.3f} to {row['high']:.3f})" if "score" in row else f"KL {row['kl']}"
        budget = "all" if row["budget"] is None else f"{row['budget']:g}"
        print(f"{row['task']:12} {row['length'] or '':5} {row['policy']:18} {row['scope']:7} {budget:6} {measured}, {row['samples']} samples")


if __name__ == "__main__":
    app.run(main)
