"""Gate training from end to end on a tiny model: what it writes, and that an interrupted run ends as if it had not been."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

from configs import smollm2_135m
from retention import checkpoints, gates
from retention.runs import RunFolder
from retention.training import loop
from tests.tiny import write_folder

CHANGES = {
    "steps": 10,
    "checkpoint_every": 3,
    "gate.width": 8,
    "data.length": 256,
    "data.targets": 24,
    "data.batch_size": 2,
    "optimizer.warmup_steps": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(folder):
    return make_config(folder)


def make_config(folder, **changes):
    config = smollm2_135m.get_config()
    config.update_from_flattened_dict({"model": str(folder), **CHANGES, **changes})
    return config


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The run folder of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole")
    loop.train(make_config(folder), workdir)
    return workdir


def metrics(workdir):
    """The records, without what depends on the clock."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "tokens_per_second"} for line in lines]


def checkpoint_steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.is_dir())


def assert_same_end(workdir, whole):
    assert metrics(workdir) == metrics(whole)
    found, wanted = (one / "gates.safetensors" for one in (workdir, whole))
    assert stored(found) == stored(wanted)
    assert checkpoint_steps(workdir) == checkpoint_steps(whole)


def stored(file):
    """The bytes of each array of a gates file (the file itself has times in its header)."""
    with safetensors.safe_open(file, framework="numpy") as opened:
        return {name: opened.get_tensor(name).tobytes() for name in opened.keys()}


class Crash(Exception):
    pass


def crash(monkeypatch, config, workdir, at):
    """Trains up to step `at`, and fails in the middle of writing its record."""
    log = RunFolder.log

    def failing(self, **record):
        if record["step"] == at:
            with open(self.path / "metrics.jsonl", "a") as file:
                file.write('{"step": ')
            raise Crash
        log(self, **record)

    with monkeypatch.context() as patched, pytest.raises(Crash):
        patched.setattr(RunFolder, "log", failing)
        loop.train(config, workdir)


def test_files_of_a_run(whole, folder, config):
    assert {path.name for path in whole.iterdir()} == {"config.json", "metrics.jsonl", "run_meta.json", "gates.safetensors", "checkpoints"}
    assert json.loads((whole / "config.json").read_text()) == config.to_dict()
    assert checkpoint_steps(whole) == [9, 10]  # the last two: every third step, and the end

    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(10))
    names = {"step", "loss", "kl", "ntp", "other_kl", "capacity", "budget", "retained_share", "gradient_norm", "tokens_per_second"}
    assert all(record.keys() == names and np.isfinite(list(record.values())).all() for record in records)
    assert all(record["tokens_per_second"] > 0 for record in records)
    assert len({record["loss"] for record in records}) == 10  # other documents each step
    assert all(0.03 * 0.9 * 256 < record["budget"] < 0.25 * 256 for record in records)

    meta = json.loads((whole / "run_meta.json").read_text())
    assert meta.keys() == {"commit", "versions", "python", "device", "seconds", "seed", "steps", "first_step"}
    assert (meta["seed"], meta["steps"], meta["first_step"]) == (0, 10, 0) and meta["seconds"] > 0 and meta["commit"]
    assert meta["versions"]["jax"] == jax.__version__ and jax.devices()[0].device_kind in meta["device"]

    model = checkpoints.load(folder, gates=whole / "gates.safetensors")
    assert model.gates.config == gates.GateConfig(**config.gate)
    assert model.gates.record["config"] == config.to_dict() and model.gates.record["commit"] == meta["commit"]
    start = gates.init(model.config, model.gates.config, 0, jnp.ones(3))
    assert all(not np.array_equal(leaf, start[name]) for name, leaf in model.gates.params.items())


@pytest.mark.parametrize("at", [7, 1], ids=["after a checkpoint", "before the first"])
def test_crashed_run_resumes_exactly(monkeypatch, config, whole, tmp_path, at):
    crash(monkeypatch, config, tmp_path, at)
    assert (tmp_path / "metrics.jsonl").read_text().endswith('{"step": ')
    assert not (tmp_path / "gates.safetensors").exists()
    trained = loop.train(config, tmp_path)
    assert_same_end(tmp_path, whole)
    assert json.loads((tmp_path / "run_meta.json").read_text())["first_step"] == (6 if at == 7 else 0)
    written = checkpoints.load(config.model, gates=tmp_path / "gates.safetensors").gates
    assert written.config == trained.config and written.record == trained.record
    jax.tree.map(np.testing.assert_array_equal, written.params, trained.params)


def test_run_killed_between_checkpoint_and_gates_is_finished(config, whole, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    (workdir / "gates.safetensors").unlink()
    loop.train(config, workdir)
    assert_same_end(workdir, whole)


def test_finished_run_is_left_alone(config, whole):
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(whole.rglob("*")) if path.is_file()}
    trained = loop.train(config, whole)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(whole.rglob("*")) if path.is_file()} == before
    assert {name: np.asarray(leaf).tobytes() for name, leaf in trained.params.items()} == stored(whole / "gates.safetensors")


@pytest.mark.slow
def test_killed_program_resumes_exactly(folder, tmp_path):
    """The program itself, killed with SIGKILL at whatever it is doing; checkpoints are frequent, so it may be writing one."""
    changes = {"steps": 150, "checkpoint_every": 2}
    flags = {"model": folder, **CHANGES, **changes}
    workdir = tmp_path / "killed"
    command = [sys.executable, "-m", "experiments.train_gates", "--config=configs/smollm2_135m.py", f"--workdir={workdir}"]
    command += [f"--config.{name}={value}" for name, value in flags.items()]
    for records in (12, 60):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            deadline = time.time() + 240
            while process.poll() is None and time.time() < deadline:
                if (workdir / "metrics.jsonl").exists() and (workdir / "metrics.jsonl").read_bytes().count(b"\n") >= records:
                    os.kill(process.pid, signal.SIGKILL)
                time.sleep(0.005)
        finally:
            process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not (workdir / "gates.safetensors").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [f"{workdir}/gates.safetensors"]
    assert "training gates" in done.stderr and "checkpoint_manager" not in done.stderr  # the progress bar without pages of notes by orbax
    assert json.loads((workdir / "run_meta.json").read_text())["first_step"] >= 58
    loop.train(make_config(folder, **changes), tmp_path / "whole")
    assert_same_end(workdir, tmp_path / "whole")


def test_damaged_checkpoint(monkeypatch, config, whole, tmp_path):
    crash(monkeypatch, config, tmp_path, 8)
    assert checkpoint_steps(tmp_path) == [3, 6]
    for file in (tmp_path / "checkpoints" / "6" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"checkpoints/6 cannot be read; delete that folder"):
        loop.train(config, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    loop.train(config, tmp_path)
    assert_same_end(tmp_path, whole)


def test_checkpoint_without_the_place_in_the_data(monkeypatch, config, tmp_path):
    crash(monkeypatch, config, tmp_path, 5)
    for file in (tmp_path / "checkpoints" / "3" / "data").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"checkpoints/3 cannot be read; delete that folder"):
        loop.train(config, tmp_path)


def test_another_config_is_refused(folder, whole):
    before = (whole / "config.json").read_text()
    with pytest.raises(ValueError, match=f"^workdir {whole} holds a run with another config .*; give a new workdir, or that config$"):
        loop.train(make_config(folder, seed=1), whole)
    assert (whole / "config.json").read_text() == before


def test_what_failed_at_the_start_may_be_corrected(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no text file matches source '/nowhere"):
        loop.train(make_config(folder, **{"data.text": "/nowhere/*.txt"}), tmp_path)
    with pytest.raises(FileNotFoundError, match="no model '/nowhere'"):
        loop.train(make_config("/nowhere"), tmp_path)
    with pytest.raises(ValueError, match="gate kind must be"):
        loop.train(make_config(folder, **{"gate.kind": "both"}), tmp_path)
    with pytest.raises(ValueError, match="steps must be more than optimizer.warmup_steps, 2, not 2"):
        loop.train(make_config(folder, steps=2), tmp_path)
    loop.train(make_config(folder, steps=3), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == len(metrics(tmp_path)) == 3


@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
def test_nan_stops_the_run(monkeypatch, config, tmp_path, name):
    def broken(*args):
        def step(state, params, batch, key):
            numbers = dict.fromkeys(("loss", "kl", "retained_share", "gradient_norm"), 1.0)
            return state._replace(step=state.step + 1), numbers | {name: jnp.where(state.step == 4, jnp.nan, 1.0)}

        return step

    monkeypatch.setattr(loop, "make_step", broken)
    with pytest.raises(FloatingPointError, match="^at step 4 the loss is .*nan"):
        loop.train(config, tmp_path)
    assert [record["step"] for record in metrics(tmp_path)] == [0, 1, 2, 3]
    assert checkpoint_steps(tmp_path) == [3] and not (tmp_path / "gates.safetensors").exists()


def test_start_from_other_gates(folder, whole, tmp_path):
    """The first step starts at those gates: at a learning rate of 0 they come out as they went in."""
    start_from = str(whole / "gates.safetensors")
    trained = loop.train(make_config(folder, start_from=start_from, steps=3, **{"optimizer.learning_rate": 0.0}), tmp_path / "same")
    assert {name: np.asarray(leaf).tobytes() for name, leaf in trained.params.items()} == stored(whole / "gates.safetensors")
    for changes in ({"gate.width": 16}, {"gate.kind": "local"}, {"gate.tie_heads": True}):
        with pytest.raises(ValueError, match="^start_from .*gates.safetensors holds a GateConfig"):
            loop.train(make_config(folder, start_from=start_from, **changes), tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="there is no gates file /nowhere"):
        loop.train(make_config(folder, start_from="/nowhere"), tmp_path / "other")


def test_local_gates(folder, tmp_path):
    trained = loop.train(make_config(folder, steps=3, **{"gate.kind": "local"}), tmp_path)
    written = checkpoints.load(folder, gates=tmp_path / "gates.safetensors").gates
    assert written.config == trained.config and written.config.kind == "local" and written.params["bias"].shape == (3, 2)


def test_run_folder_drops_a_line_cut_off(config, tmp_path):
    run = RunFolder(tmp_path, config)
    run.log_all([{"step": 0}, {"step": 1}])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2')
    again = RunFolder(tmp_path, config)
    again.log(step=2)
    assert again.metrics() == [{"step": 0}, {"step": 1}, {"step": 2}]
