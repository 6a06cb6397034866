"""Trains retention gates: python -m experiments.train_gates --config=configs/smollm2_135m.py --workdir=runs/gates [--config.steps=100].

On several machines the same line runs on each, with --distributed; see the README for a TPU pod. On SIGTERM (preemption) a checkpoint is written and the
program ends with status 143; the same line goes on from it.
"""

import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from configs import smollm2_135m
from experiments import check_arguments, check_config
from retention import distributed
from retention.training.loop import Preempted, train

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, a file of configs/.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "The run folder, seen by all processes; an interrupted run in it goes on where it stopped.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "This is one of several processes (found out on TPU pods, under SLURM, GKE).")
COORDINATOR = flags.DEFINE_string("coordinator_address", None, "Where they are not found out: host:port of process 0.")
PROCESSES = flags.DEFINE_integer("num_processes", None, "And how many there are.")
PROCESS = flags.DEFINE_integer("process_id", None, "And which this one is, from 0.")
flags.FLAGS.verbosity = logging.FATAL  # orbax has a page to say about every checkpoint, and two about one that fails, which raises as well
flags.mark_flags_as_required(["config", "workdir"])


def main(argv):
    check_arguments(argv)
    check_config(CONFIG.value, smollm2_135m.get_config(), "one such as configs/smollm2_135m.py")
    if DISTRIBUTED.value:
        distributed.initialize(COORDINATOR.value, PROCESSES.value, PROCESS.value)
    elif (COORDINATOR.value, PROCESSES.value, PROCESS.value) != (None, None, None):
        raise ValueError("--coordinator_address, --num_processes and --process_id do nothing without --distributed; add it")
    try:
        train(CONFIG.value, WORKDIR.value)
    except Preempted as stop:
        print(stop, file=sys.stderr)
        sys.exit(143)  # as a shell has it for a process that SIGTERM ended
    if distributed.is_primary():
        print(pathlib.Path(WORKDIR.value).expanduser() / "gates.safetensors")


if __name__ == "__main__":
    app.run(main)
