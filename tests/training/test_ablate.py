"""experiments.ablate on a tiny model: every variant is trained and evaluated as itself, and what is finished stays."""

import csv
import os
import subprocess
import sys

import numpy as np
import pytest

from experiments import ablate
from retention import checkpoints
from retention.checkpoints import gates as gates_file
from retention.runs import write_table
from tests import tiny

CONFIG = """
from configs import ablations


def get_config():
    config = ablations.get_config()
    config.seeds = (0, 1)
    config.order = ("baseline", "local", "no_kl")
    config.train.model = config.evaluate.model = FOLDER
    config.train.steps = 3
    config.train.gate.width = 8
    config.train.data.length = 256
    config.train.optimizer.warmup_steps = 1
    config.evaluate.lengths = (310,)
    config.evaluate.samples = 2
    config.evaluate.budgets = (0.25,)
    config.evaluate.prefill_chunk = 64
    config.evaluate.max_new_tokens = 5
    return config
"""


def test_a_row_is_the_mean_and_the_spread_over_its_seeds(tmp_path):
    for seed, score in ((0, 0.5), (1, 0.8)):
        row = {"task": "needle", "length": 310, "policy": "retention", "scope": "global", "budget": 0.25, "score": score}
        (tmp_path / f"no_kl-{seed}" / "evaluation").mkdir(parents=True)
        write_table(tmp_path / f"no_kl-{seed}" / "evaluation" / "results.csv", [row])
    [row] = ablate.table(tmp_path)
    assert (row["variant"], row["mean"], row["spread"], row["seeds"]) == ("no_kl", 0.65, round(0.3 / 2**0.5, 4), 2)


@pytest.mark.slow
def test_variants_are_trained_and_evaluated_each_as_itself(tmp_path):
    folder, file, runs = tiny.write_folder(tmp_path / "tiny"), tmp_path / "config.py", tmp_path / "runs"
    file.write_text(CONFIG.replace("FOLDER", repr(str(folder))))
    command = [sys.executable, "-m", "experiments.ablate", f"--config={file}", f"--workdir={runs}"]
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}

    def table(*some):
        subprocess.run([*command, *some], env=environment, check=True, capture_output=True, timeout=900)
        with open(runs / "ablations.csv", newline="") as opened:
            return list(csv.DictReader(opened))

    rows = table()
    assert [(row["variant"], row["task"]) for row in rows] == [(v, t) for v in ("baseline", "local", "no_kl") for t in ("needle", "prose")]
    assert all(row["seeds"] == "2" and float(row["spread"]) >= 0 for row in rows)
    model = checkpoints.load(str(folder), gates=None)
    trained = {name: gates_file.load(runs / name / "gates.safetensors", model.config) for name in ("baseline-0", "baseline-1", "local-0", "no_kl-0")}
    assert [gates.config.kind for gates in trained.values()] == ["global", "global", "local", "global"]
    same = trained["baseline-0"].params["readout"]
    assert not any(np.array_equal(same, trained[name].params["readout"]) for name in ("baseline-1", "no_kl-0"))
    for variant, scope in (("local", "head"), ("no_kl", "global")):
        with open(runs / f"{variant}-0" / "evaluation" / "results.csv", newline="") as opened:
            assert {row["scope"] for row in csv.DictReader(opened) if row["policy"] == "retention"} == {scope}
    before = {path: path.stat().st_mtime for path in runs.glob("*/gates.safetensors")}
    assert table("--config.order=('local',)", "--config.seeds=(1,)") == rows, "what the folder holds, whichever of it a command asks for"
    assert table() == rows and before == {path: path.stat().st_mtime for path in runs.glob("*/gates.safetensors")}
