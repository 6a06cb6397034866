"""Gate training from end to end on a tiny model: what it writes, and that an interrupted run ends as if it had not been."""

import json
import os
import pathlib
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import tokenizers
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict
from tensorboardX.proto.event_pb2 import Event, SessionLog

from configs import qwen3_1_7b, qwen3_4b, qwen3_8b, smollm2_135m
from retention import checkpoints, gates, runs
from retention.checkpoints import gates as gates_file
from retention.distributed import gather_json, initialize, local_rows
from retention.runs import RunFolder
from retention.training import loop, plots, sharding
from retention.training import metrics as metrics_lib
from retention.training.metrics import CLOCK, step_flops
from tests.conftest import small_config
from tests.tiny import write_folder

CHANGES = {
    "steps": 10,
    "checkpoint_every": 3,
    "keep_checkpoints": 3,
    "gate.width": 8,
    "optimizer.warmup_steps": 2,
}
DATA = {
    "batch_size": 2,
    "length": 256,
    "others": 24,
    "workers": 0,
    "max_chars": 1_000_000,
    "packing_bins": 2,
    "sources": {"facts": {"kind": "facts", "path": "pydoc", "weight": 0.8}, "prose": {"kind": "text", "path": "pydoc", "weight": 0.2}},
}


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """The program is the same again and again, here and in other processes."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path_factory.mktemp("compiled")), 0.0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(folder):
    return make_config(folder)


def make_config(folder, **changes):
    config = smollm2_135m.get_config()
    config.data = ConfigDict(DATA)
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
    return [{name: value for name, value in json.loads(line).items() if name not in CLOCK} for line in lines]


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
    written = {".lock", "config.json", "data.json", "metrics.jsonl", "run_meta.json", "gates.safetensors", "checkpoints", "tensorboard"}
    assert {path.name for path in whole.iterdir()} == written
    assert json.loads((whole / "config.json").read_text()) == config.to_dict()
    assert json.loads((whole / "data.json").read_text()).keys() == DATA["sources"].keys()
    assert checkpoint_steps(whole) == [6, 9, 10]  # the last three: every third step, and the end

    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(10))
    numbers = {"step", "loss", "kl", "ntp", "other_kl", "capacity", "budget", "retained_share", "gradient_norm", "answers", "others", "compared"}
    numbers |= {"documents", "tokens", "seconds", "tokens_per_second", "model_flops_per_second", "peak_memory_bytes"}
    for record in records:
        assert record.keys() == numbers | {"retained_by_layer", "kept_share", "mfu"}
        assert all(np.isfinite(record[name]) for name in numbers)
        assert np.shape(record["retained_by_layer"]) == (3,) and np.shape(record["kept_share"]) == (3, 2)
        assert record["mfu"] is None  # of a CPU the peak is not known
        assert record["tokens_per_second"] * record["seconds"] == pytest.approx(record["tokens"])
        assert 2**20 < record["peak_memory_bytes"] < 2**36
    assert len({record["loss"] for record in records}) == 10  # other documents each step
    assert all(0.02 * 256 < record["budget"] < 0.25 * 256 for record in records)

    meta = json.loads((whole / "run_meta.json").read_text())
    assert meta.keys() == {"commit", "command", "versions", "python", "device", "host", "seconds", "seed", "steps", "first_step"}
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


def test_changed_data_is_refused(monkeypatch, folder, tmp_path):
    """Documents would come in another order: some again, some never."""
    path = tmp_path / "texts.txt"
    path.write_text("It was a dark and stormy night. " * 200)
    config = make_config(folder, **{"data.sources.facts.path": str(path)})
    crash(monkeypatch, config, tmp_path / "run", 7)
    before = (tmp_path / "run" / "data.json").read_text()
    path.write_text("It was a bright and quiet night. " * 200)
    with pytest.raises(ValueError, match="data.sources.facts is not what it was when this run began .data.json.; put its files back, or give a new workdir"):
        loop.train(config, tmp_path / "run")
    assert (tmp_path / "run" / "data.json").read_text() == before


@pytest.mark.parametrize("name", ["weights", "tokenizer"])
def test_changed_model_is_refused(monkeypatch, folder, tmp_path, name):
    """Another teacher, or other labels, under the same path."""
    model = shutil.copytree(folder, tmp_path / "model")
    config = make_config(model)
    crash(monkeypatch, config, tmp_path / "run", 7)
    if name == "weights":
        file = next(model.glob("*.safetensors"))
        content = bytearray(file.read_bytes())
        content[-2] ^= 1
        file.write_bytes(content)
    else:
        file = model / "tokenizer_config.json"
        file.write_text(file.read_text().replace("<|im_start|>assistant", "<|im_start|> assistant"))
    with pytest.raises(ValueError, match=f"checkpoints/6 is of another config: inputs.{name} is '[0-9a-f]{{16}}' there and '[0-9a-f]{{16}}' here; give a"):
        loop.train(config, tmp_path / "run")
    shutil.copytree(folder, model, dirs_exist_ok=True)
    loop.train(config, tmp_path / "run")


def test_more_tokens_than_the_model_knows_are_told(folder, tmp_path):
    config = make_config(folder, **{"data.length": 5000, "steps": 1})
    with pytest.warns(UserWarning, match="data.length 5000 is beyond the 4096 positions"), pytest.raises(ValueError, match="steps must be more than"):
        loop.train(config, tmp_path)


def test_exported_gates_are_the_trained_ones(whole, folder, tmp_path):
    """But for the trunks' matrices, which are written in half precision; and no path of this machine is in the file."""
    file, out = whole / "gates.safetensors", tmp_path / "out.safetensors"
    command = [sys.executable, "-m", "experiments.export", f"--gates={file}", f"--model={folder}", f"--out={out}"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with safetensors.safe_open(out, "numpy") as opened:
        dtypes = {name: str(opened.get_tensor(name).dtype) for name in opened.keys()}
    assert dtypes == {name: "float16" if name in ("w1", "w2") else "float32" for name in stored(file)}
    shape = checkpoints.load(folder, gates=None).config
    before, after = gates_file.load(file, shape), gates_file.load(out, shape)
    assert after.config == before.config and str(folder.parent).encode() not in out.read_bytes()
    facts = ("commit", "versions", "device", "seconds", "seed", "steps", "first_step")
    assert after.record == {"model": folder.name, **{name: before.record[name] for name in facts}}
    for name, leaf in before.params.items():
        np.testing.assert_array_equal(np.asarray(leaf).astype(dtypes[name]).astype(np.float32), after.params[name], err_msg=name)


def test_tokens_that_the_embedding_has_not_are_refused(folder, tmp_path):
    """As an added token is that the chat template writes, in the folder of a model whose embedding was never made longer."""
    other = tmp_path / "model"
    shutil.copytree(folder, other)
    tokenizer = tokenizers.Tokenizer.from_file(str(other / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|turn|>"])
    tokenizer.save(str(other / "tokenizer.json"))
    facts = json.loads((other / "tokenizer_config.json").read_text())
    facts["chat_template"] = facts["chat_template"].replace("'<|im_start|>' + message", "'<|turn|><|im_start|>' + message")
    (other / "tokenizer_config.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="a document of data.sources has a token of id 600, but the model's embedding has 600 rows"):
        loop.train(make_config(other), tmp_path / "run")


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("optimizer.clip_norm", 0.0), ("optimizer.learning_rate", -1e-3), ("optimizer.b1", 1.0), ("optimizer.weight_decay", -1.0), ("optimizer.eps", 0.0),
        ("loss.ntp", -1.0), ("loss.kl", -1.0), ("loss.other_kl", -1.0), ("loss.capacity", -1.0), ("seed", -1),
    ],
)  # fmt: skip
def test_numbers_that_would_teach_nothing_are_refused(folder, tmp_path, entry, value):
    with pytest.raises(ValueError, match=f"^{entry} must be"):
        loop.train(make_config(folder, **{entry: value}), tmp_path)


def test_finished_run_is_left_alone(config, whole):
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(whole.rglob("*")) if path.is_file()}
    trained = loop.train(config, whole)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(whole.rglob("*")) if path.is_file()} == before
    assert {name: np.asarray(leaf).tobytes() for name, leaf in trained.params.items()} == stored(whole / "gates.safetensors")


def start_program(tmp_path, workdir, config, *flags, blocks="unlimited"):
    """The program as a user starts it, with the config in a file. blocks: no file may grow beyond so many times 512 bytes."""
    file = tmp_path / f"config_{workdir.name}.py"
    file.write_text(f"import ml_collections\n\ndef get_config():\n    return ml_collections.ConfigDict({config.to_dict()!r})\n")
    command = ["sh", "-c", 'ulimit -f "$0"; exec "$@"', str(blocks)]
    command += [sys.executable, "-m", "experiments.train_gates", f"--config={file}", f"--workdir={workdir}", *flags]
    cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = os.environ | cache
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


def finish(process):
    """Its status, output and errors; it is killed after two minutes."""
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, out, err


def records(workdir):
    file = workdir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def wait_for(condition, process):
    deadline = time.time() + 120
    while not condition() and process.poll() is None and time.time() < deadline:
        time.sleep(0.002)


@pytest.mark.slow
def test_killed_program_resumes_exactly(folder, tmp_path):
    """The program itself, killed with SIGKILL ten times at whatever it is doing; checkpoints are frequent, so it may be writing one."""
    config = make_config(folder, steps=140, checkpoint_every=2)
    workdir, rng = tmp_path / "killed", random.Random(0)
    firsts = []
    for _ in range(10):
        process = start_program(tmp_path, workdir, config)
        enough = records(workdir) + rng.randrange(1, 14)
        wait_for(lambda enough=enough: records(workdir) >= enough, process)
        time.sleep(rng.random() * 0.1)
        process.kill()
        status, _, err = finish(process)
        assert status == -signal.SIGKILL, err
        assert not (workdir / "gates.safetensors").exists()
        firsts.append(records(workdir))
    assert firsts == sorted(firsts)  # a run that began again would have fewer
    status, out, err = finish(start_program(tmp_path, workdir, config))
    assert status == 0 and f"{workdir}/gates.safetensors" in out.split()
    assert "training gates" in err and "checkpoint_manager" not in err  # the progress bar without pages of notes by orbax
    assert json.loads((workdir / "run_meta.json").read_text())["first_step"] >= firsts[-1] - 4
    loop.train(config, tmp_path / "whole")
    assert_same_end(workdir, tmp_path / "whole")


@pytest.mark.slow
def test_program_stopped_by_sigterm_resumes_exactly(folder, tmp_path):
    config = make_config(folder, steps=60, checkpoint_every=50)
    workdir = tmp_path / "stopped"
    process = start_program(tmp_path, workdir, config)
    wait_for(lambda: records(workdir) >= 5, process)
    seen = records(workdir)
    process.send_signal(signal.SIGTERM)
    status, _, err = finish(process)
    (done,) = checkpoint_steps(workdir)
    assert status == 143 and f"SIGTERM: stopped after {done} steps; start the same command again" in err
    assert "Traceback" not in err
    assert records(workdir) == done <= seen + 4  # one step in flight, one begun, and those between the look and the signal
    assert finish(start_program(tmp_path, workdir, config))[0] == 0
    assert json.loads((workdir / "run_meta.json").read_text())["first_step"] == done
    loop.train(config, tmp_path / "whole")
    assert metrics(workdir) == metrics(tmp_path / "whole")
    assert stored(workdir / "gates.safetensors") == stored(tmp_path / "whole" / "gates.safetensors")


def test_sigterm_leaves_a_checkpoint_within_one_step(monkeypatch, config, whole, tmp_path):
    log = RunFolder.log

    def terminated(self, **record):
        log(self, **record)
        if record["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched, pytest.raises(loop.Preempted, match="SIGTERM: stopped after 5 steps; .* goes on from .*checkpoints/5$"):
        patched.setattr(RunFolder, "log", terminated)
        loop.train(config, tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before
    assert checkpoint_steps(tmp_path) == [3, 5] and len(metrics(tmp_path)) == 5
    loop.train(config, tmp_path)
    assert metrics(tmp_path) == metrics(whole)


def test_training_in_another_thread(config, whole, tmp_path):
    """There Python lets no signal handler be set."""
    thread = threading.Thread(target=loop.train, args=(config, tmp_path))
    thread.start()
    thread.join()
    assert_same_end(tmp_path, whole)


@pytest.mark.parametrize("data", ["math", "instruct"])
def test_published_configs_train(folder, tmp_path, data):
    """That of Qwen3-4B with a tiny model, short rows and few steps trains on chat records and books; the others are the same but for model, batch and, of
    instruct, the length that their models know."""
    chat, books = tmp_path / "chat.jsonl", tmp_path / "book.txt"
    turns = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "It is 4."}]
    chat.write_text("".join(json.dumps({"messages": turns * n}) + "\n" for n in range(1, 6)))
    books.write_text("It was a dark and stormy night. " * 50)
    config = qwen3_4b.get_config(data)
    for name, source in config.data.sources.items():
        source.path = str(books if name == "books" else chat)
    config.update_from_flattened_dict({"model": str(folder), "data.length": 64, "data.batch_size": 2, "mesh.context": 1, "gate.width": 8})
    config.update_from_flattened_dict({"steps": 3, "optimizer.warmup_steps": 1, "data.workers": 0})
    loop.train(config, tmp_path / "run")
    found = metrics(tmp_path / "run")
    assert [record["budget"] for record in found] == [pytest.approx(128 if data == "math" else 512)] * 3
    assert sum(record["answers"] for record in found) > 0 and (sum(record["others"] for record in found) > 0) == (data == "instruct")
    for other in (qwen3_1_7b.get_config(data), qwen3_8b.get_config(data)):
        expected = qwen3_4b.get_config(data)
        assert other.data.length <= 40_960 and other.data.batch_size % other.mesh.context == 0
        expected.data.length, expected.mesh.context = other.data.length, other.mesh.context
        other.model, other.data.batch_size = expected.model, expected.data.batch_size
        assert other.to_dict() == expected.to_dict()


@pytest.mark.slow
def test_no_room_for_a_checkpoint(monkeypatch, folder, tmp_path):
    """No file may grow beyond 40 KB. Wide gates and their moments are 220 KB, in two or three files; no other file of the run reaches 10."""
    workdir, config = tmp_path / "run", make_config(folder, **{"gate.width": 64})
    crash(monkeypatch, config, workdir, 5)
    status, _, err = finish(start_program(tmp_path, workdir, config, blocks=80))
    assert status == 1 and [line for line in err.splitlines() if line.startswith("OSError")] == [
        f"OSError: the checkpoint {workdir}/checkpoints/6 cannot be written (File too large); put that right and start again, and the run goes on from"
        f" {workdir}/checkpoints/3"
    ]
    loop.train(config, workdir)
    assert checkpoint_steps(workdir) == [6, 9, 10] and [record["step"] for record in metrics(workdir)] == list(range(10))


@pytest.mark.parametrize("name", ["config.json", "data.json", "metrics.jsonl", "gates.safetensors"])
def test_no_room_for_another_file(config, tmp_path, name):
    (tmp_path / f"{name}.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match=rf"{tmp_path / name} cannot be written \(No space left on device\); put that right and start again"):
        loop.train(config, tmp_path)


def test_no_room_for_a_record(config, tmp_path):
    run = RunFolder(tmp_path, config)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"metrics.jsonl cannot be written \(No space left on device\); put that right and start again"):
        run.log(step=0)


@pytest.mark.slow
def test_full_disk(folder, tmp_path):
    """A file system of 700 KB that holds two checkpoints and a half."""
    disk = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]
    mounted = tmp_path / "disk"
    mounted.mkdir()
    mount = f"mount -t tmpfs -o size=700k tmpfs {mounted}"
    if subprocess.run([*disk, mount], capture_output=True).returncode:
        pytest.skip("a user may not mount a file system here")
    config = make_config(folder, **{"gate.width": 64})
    file = tmp_path / "config.py"
    file.write_text(f"import ml_collections\n\ndef get_config():\n    return ml_collections.ConfigDict({config.to_dict()!r})\n")
    train = f"{sys.executable} -m experiments.train_gates --config={file} --workdir={mounted}/run"
    script = f"{mount}; ! {train} 2> {tmp_path}/err; cp -r {mounted}/run {tmp_path}/full"
    script += f"; mount -o remount,size=9m {mounted}; {train}; cp -r {mounted}/run {tmp_path}/finished"
    subprocess.run([*disk, script], check=True, capture_output=True, timeout=120)
    assert [line for line in (tmp_path / "err").read_text().splitlines() if line.startswith("OSError")] == [
        f"OSError: the checkpoint {mounted}/run/checkpoints/9 cannot be written (No space left on device); put that right and start again, and the run goes"
        f" on from {mounted}/run/checkpoints/6"
    ]
    assert {"3", "6"} <= {path.name for path in (tmp_path / "full" / "checkpoints").iterdir()}
    loop.train(config, tmp_path / "whole")
    assert_same_end(tmp_path / "finished", tmp_path / "whole")


def start_two(tmp_path, workdir, config):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = ["--distributed", f"--coordinator_address=localhost:{port}", "--num_processes=2"]
    return [start_program(tmp_path, workdir, config, *flags, f"--process_id={i}") for i in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["data", "fsdp"])
def test_two_processes_are_one(folder, tmp_path, axis):
    """Two processes, one of them told to stop; two go on from there to the end, and so does one."""
    changes = {"steps": 24, "checkpoint_every": 50, "gate.bias": 2.0}
    loop.train(make_config(folder, **changes), tmp_path / "whole")
    workdir, config = tmp_path / "two", make_config(folder, **changes, **{"mesh.data": 1, f"mesh.{axis}": 2})
    pair = start_two(tmp_path, workdir, config)
    wait_for(lambda: records(workdir) >= 3, pair[0])
    pair[1].send_signal(signal.SIGTERM)
    for status, _, err in map(finish, pair):
        assert status == 143 and "SIGTERM: stopped after" in err, err
    (done,) = checkpoint_steps(workdir)
    assert records(workdir) == done < 24
    shutil.copytree(workdir, tmp_path / "one")
    for status, _, err in map(finish, start_two(tmp_path, workdir, config)):
        assert status == 0, err
    assert json.loads((workdir / "run_meta.json").read_text())["first_step"] == done
    assert len(list((workdir / "tensorboard").iterdir())) == 2  # of process 0 alone, for each start
    loop.train(make_config(folder, **changes), tmp_path / "one")
    wanted = metrics(tmp_path / "whole")
    for found in (metrics(workdir), metrics(tmp_path / "one")):
        assert len(found) == 24
        for a, b in zip(found, wanted, strict=True):
            for name in a.keys() - {"kept_share"}:
                np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-6 if "kl" in name else 0, err_msg=f"{name} at step {a['step']}")
            np.testing.assert_allclose(a["kept_share"], b["kept_share"], atol=5e-3)  # ranks of almost equal entries may change places
    for file in (workdir, tmp_path / "one"):
        a, b = (checkpoints.load(folder, gates=one / "gates.safetensors").gates.params for one in (file, tmp_path / "whole"))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), a, b)


def test_processes_are_given_whole_or_not_at_all():
    with pytest.raises(ValueError, match="^give coordinator_address, num_processes and process_id all three, or none"):
        initialize("localhost:1234", 2)
    for address in ("localhost", "localhost:", "localhost:abc", ":9911"):
        with pytest.raises(ValueError, match=f"^coordinator_address must be host:port, as in localhost:9911, got '{address}'"):
            initialize(address, 1, 0)


def test_gather_json_of_one_process():
    assert gather_json({"3": {"ü": [1, None]}}) == [{"3": {"ü": [1, None]}}]


def test_local_rows_of_all_devices():
    mesh = sharding.make_mesh({})
    assert local_rows(jax.sharding.NamedSharding(mesh, sharding.BATCH), (4, 8)) == [0, 1, 2, 3]


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
    with pytest.raises(ValueError, match=f"^workdir {whole} holds a run with another config .*") as refused:
        loop.train(make_config(folder, seed=1, **{"gate.width": 16}), whole)
    assert str(refused.value).endswith(": gate.width is 8 there and 16 here, seed is 0 there and 1 here; give a new workdir, or that config")
    assert (whole / "config.json").read_text() == before


def test_checkpoint_of_another_config_or_model(monkeypatch, config, whole, tmp_path):
    """The folder of a run, but its checkpoints are another run's."""
    crash(monkeypatch, config, tmp_path / "run", 7)
    (tmp_path / "run" / "config.json").unlink()
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match=r"^the checkpoint .*checkpoints/6 is of another config: gate.width is 8 there and 16 here; give"):
        loop.train(make_config(config.model, **{"gate.width": 16}), tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "checkpoints" / "6" / "config" / "metadata").read_text())
    stored["gate"]["width"] = 16
    (tmp_path / "run" / "checkpoints" / "6" / "config" / "metadata").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"^the checkpoint .*checkpoints/6 is of other gates: b1 is \(3, 8\), this run needs \(3, 16\); give a new workdir"):
        loop.train(make_config(config.model, **{"gate.width": 16}), tmp_path / "run")
    assert checkpoint_steps(tmp_path / "run") == [3, 6]


def test_run_goes_on_with_other_free_entries(monkeypatch, folder, config, whole, tmp_path):
    crash(monkeypatch, config, tmp_path, 7)
    changed = make_config(folder, keep_checkpoints=1, checkpoint_every=5, **{"mesh.data": -1})
    loop.train(changed, tmp_path)
    assert metrics(tmp_path) == metrics(whole)
    assert stored(tmp_path / "gates.safetensors") == stored(whole / "gates.safetensors")
    assert checkpoint_steps(tmp_path) == [10]
    assert json.loads((tmp_path / "config.json").read_text()) == changed.to_dict()


def test_what_failed_at_the_start_may_be_corrected(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="/nowhere"):
        loop.train(make_config(folder, **{"data.sources.prose.path": "/nowhere/*.txt"}), tmp_path)
    with pytest.raises(ValueError, match="mesh .*data=3.* does not fit 1 devices"):
        loop.train(make_config(folder, **{"mesh.data": 3}), tmp_path)
    with pytest.raises(ValueError, match="keep_checkpoints must be at least 1, not 0"):
        loop.train(make_config(folder, keep_checkpoints=0), tmp_path)
    with pytest.raises(FileNotFoundError, match="no model '/nowhere'"):
        loop.train(make_config("/nowhere"), tmp_path)
    with pytest.raises(ValueError, match="gate kind must be"):
        loop.train(make_config(folder, **{"gate.kind": "both"}), tmp_path)
    with pytest.raises(ValueError, match="steps must be more than optimizer.warmup_steps, 2, not 2"):
        loop.train(make_config(folder, steps=2), tmp_path)
    prose_alone = {"data.sources.facts.weight": 0.0}
    for nothing in ({"loss.kl": 0.0, "loss.ntp": 0.0}, prose_alone, {**prose_alone, "loss.other_kl": 1.0, "data.others": 0}):
        with pytest.raises(ValueError, match="no token would ever be compared: give loss.kl or loss.ntp .*, or loss.other_kl a weight and data.others"):
            loop.train(make_config(folder, **{"loss.other_kl": 0.0, **nothing}), tmp_path)
    loop.train(make_config(folder, steps=3), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == len(metrics(tmp_path)) == 3


@pytest.mark.parametrize("name,at", [("loss", 4), ("gradient_norm", 5)], ids=["between checkpoints", "just before one"])
def test_nan_stops_the_run(monkeypatch, config, tmp_path, name, at):
    def broken(*args):
        def step(state, params, batch, key):
            numbers = dict.fromkeys(("loss", "kl", "retained_share", "gradient_norm", "tokens", "answers", "others", "compared"), jnp.ones(()))
            return state._replace(step=state.step + 1), numbers | {name: jnp.where(state.step == at, jnp.nan, 1.0)}

        return step

    monkeypatch.setattr(loop, "make_step", broken)
    with pytest.raises(FloatingPointError, match=f"^at step {at} the loss is .*nan"):
        loop.train(config, tmp_path)
    assert [record["step"] for record in metrics(tmp_path)] == list(range(at))
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


def test_run_folder_is_a_folder_of_one_program(config, tmp_path):
    RunFolder(tmp_path, config, program="evaluate").log(step=0)
    with pytest.raises(ValueError, match="inputs.program is 'evaluate' there and 'hindsight' here; give a new workdir"):
        RunFolder(tmp_path, config, program="hindsight")
    with pytest.raises(ValueError, match=": inputs.text is 'nothing' there and 'abcd' here; give a new workdir, or put back the files that it began"):
        RunFolder(tmp_path, config, program="evaluate", text="abcd")
    with pytest.raises(FileExistsError, match="metrics.jsonl is a file; give the path of a folder"):
        RunFolder(tmp_path / "metrics.jsonl", config)


def test_a_models_folder_is_no_runs(folder, config, tmp_path):
    """Its config.json is the model's, which would be lost; and gates that stand there are no run's."""
    theirs = shutil.copytree(folder, tmp_path / "model")
    before = (theirs / "config.json").read_bytes()
    for _ in range(2):
        with pytest.raises(FileExistsError, match="model holds a config.json that is no run's; give another folder"):
            loop.train(config, theirs)
    assert (theirs / "config.json").read_bytes() == before
    (tmp_path / "gates.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="workdir holds gates.safetensors, which no run here has written"):
        loop.train(config, tmp_path)


def test_data_that_differ_between_hosts_are_refused(tmp_path, monkeypatch):
    run, pipeline = types.SimpleNamespace(path=tmp_path, metrics=list), types.SimpleNamespace(digests={"facts": "a", "prose": "b"})
    loop.check_data(run, pipeline)
    monkeypatch.setattr(loop, "gather_json", lambda own: [own, own | {"prose": "c"}])
    with pytest.raises(ValueError, match="data.sources.prose is not the same on all hosts; give them the same files"):
        loop.check_data(run, pipeline)


def test_a_commit_of_changed_files_is_marked(monkeypatch):
    top = pathlib.Path(runs.__file__).resolve().parents[1]
    for changed, commit in (("", "1234567"), (" M retention/runs.py\n", "1234567+")):
        told = {"rev-parse": f"{top}\n1234567\n", "status": changed}
        monkeypatch.setattr(runs.subprocess, "run", lambda command, told=told, **_: types.SimpleNamespace(stdout=told[command[1]]))
        assert runs.commit() == commit


def test_a_run_names_the_commits_of_its_records(monkeypatch, config, tmp_path):
    def finished(commit, *, anew):
        monkeypatch.setattr(runs, "commit", lambda: commit)
        run = RunFolder(tmp_path, config)
        if anew:
            run.keep_metrics([])
        run.log(step=0)
        return run.finish()["commit"]

    assert [finished("a", anew=True), finished("b", anew=False), finished("c", anew=True)] == ["a", "a, b", "c"]


def test_the_commit_is_this_checkouts_or_unknown(tmp_path):
    """Installed inside of a repository of the user's, the package does not take that one's commit for its own."""
    site = tmp_path / ".venv" / "site-packages"
    shutil.copytree(pathlib.Path(runs.__file__).parent, site / "retention", ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    told = subprocess.run([sys.executable, "-c", "from retention import runs; print(runs.__file__, runs.commit())"], cwd=site, capture_output=True, text=True)
    assert told.stdout.split() == [str(site / "retention" / "runs.py"), "unknown"]


def test_a_run_belongs_to_one_process(config, tmp_path):
    open_it = f"from ml_collections import ConfigDict; from retention.runs import RunFolder; RunFolder({str(tmp_path)!r}, ConfigDict({config.to_dict()!r}))"
    run = RunFolder(tmp_path, config)
    again = RunFolder(tmp_path, config)  # by the same process, as in a notebook
    (link := tmp_path.with_name("link")).symlink_to(tmp_path)
    RunFolder(link, config)  # and by another name; what ends with it is not the lock
    refused = subprocess.run([sys.executable, "-c", open_it], capture_output=True, text=True)
    assert f"RuntimeError: another process is at the run in {tmp_path}; let it end, or give a new workdir" in refused.stderr
    del run, again
    assert not subprocess.run([sys.executable, "-c", open_it], capture_output=True, text=True).returncode


def test_run_folder_drops_a_line_cut_off(config, tmp_path):
    run = RunFolder(tmp_path, config)
    run.log_all([{"step": 0}, {"step": 1}])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2')
    again = RunFolder(tmp_path, config)
    again.log(step=2)
    assert again.metrics() == [{"step": 0}, {"step": 1}, {"step": 2}]


def events(workdir):
    """TensorBoard's events of a run, with what a later start withdrew taken out."""
    kept = []
    for file in sorted((workdir / "tensorboard").iterdir(), key=lambda file: file.stat().st_mtime_ns):
        data = file.read_bytes()
        while data:
            (size,) = struct.unpack("Q", data[:8])
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            if event.session_log.status == SessionLog.START:
                kept = [earlier for earlier in kept if earlier.step < event.step]
            elif event.HasField("summary"):
                kept.append(event)
    return kept


def test_tensorboard_has_the_records(monkeypatch, config, tmp_path):
    crash(monkeypatch, config, tmp_path, 7)
    loop.train(config, tmp_path)
    found = events(tmp_path)
    wanted = metrics(tmp_path)
    assert [event.step for event in found] == [record["step"] for record in wanted]
    for event, record in zip(found, wanted, strict=True):
        values = {value.tag: value.simple_value for value in event.summary.value}
        assert "kept_share" in values and values["loss"] == pytest.approx(record["loss"])
        assert [values[f"retained_by_layer/0{layer}"] for layer in range(3)] == pytest.approx(record["retained_by_layer"])


@pytest.mark.parametrize("kind", ["global", "local", "linear"])
def test_step_flops_count_the_weights(folder, kind):
    """P and G of the formula are the sizes of the matrices there are."""
    model = checkpoints.load(folder, gates=None)
    gate = gates.GateConfig(kind, width=8)
    weights = sum(leaf.size for leaf in model.params["layers"].values() if leaf.ndim == 3)
    trunk = sum(leaf.size for name, leaf in gates.init(model.config, gate).items() if name in ("w1", "w2") or kind != "global" and name == "readout")
    if kind == "global":  # its one readout runs in each layer
        trunk += 3 * 8 * 2
    assert step_flops(model.config, gate, False, 1, 0, 0) == 3 * 2 * weights + 3 * 2 * trunk
    assert step_flops(model.config, gate, True, 1, 0, 0) == 4 * 2 * weights + 4 * 2 * trunk
    # 3 layers of 4 heads of 8; scores and values; teacher, student, again, and backward twice
    assert step_flops(model.config, gate, True, 0, 10, 0) == 5 * 3 * (4 * 8) * 2 * 2 * 10
    assert step_flops(model.config, gate, True, 0, 0, 7) == 3 * 2 * model.params["embed"].size * 7


@pytest.mark.parametrize("given", [True, False])
def test_gates_start_from_the_configs_seed_and_the_datas_scale(folder, tmp_path, monkeypatch, given):
    class Started(Exception):
        pass

    def init(shape, gate, seed=0, rms=None):
        if seed == 5:
            raise Started(rms)
        return start(shape, gate, seed, rms)  # for its shapes alone

    def measure(shape, mesh, params, batch):
        assert params["embed"].dtype == "bfloat16", "the config's"
        return rms_of(shape, mesh, params, batch)

    start, rms_of = gates.init, loop.gate_input_rms
    monkeypatch.setattr(loop.gates, "init", init)
    monkeypatch.setattr(loop, "gate_input_rms", measure)
    with pytest.raises(Started) as started:
        loop.train(make_config(folder, seed=5, dtype="bfloat16", init_from_data=given), tmp_path)
    [rms] = started.value.args
    assert (rms is not None) == given and (not given or rms.shape == (3,) and bool((rms > 0).all()))


def test_the_rates_of_a_step(monkeypatch):
    batch = {"segment_ids": np.array([[1, 1, 1, 2, 2, 0]]), "positions": np.array([[0, 1, 2, 0, 1, 0]])}
    assert float(loop.attended_pairs(batch)) == 1 + 2 + 3 + 1 + 2
    clock = iter((10.0, 12.0))
    monkeypatch.setattr(metrics_lib.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(metrics_lib.jax, "devices", lambda: [types.SimpleNamespace(device_kind="TPU v5")] * 4)
    monkeypatch.setattr(metrics_lib.jax, "device_count", lambda: 4)
    config, gate = small_config(), gates.GateConfig(width=8)
    record = metrics_lib.Meter(config, gate, True).record({"tokens": 5, "compared": 3}, 9)
    rate = step_flops(config, gate, True, 5, 9, 3) / 2
    assert record["model_flops_per_second"] == pytest.approx(rate) and record["mfu"] == pytest.approx(rate / (4 * 459e12))  # of a v5p, as published


def test_plots(whole, tmp_path):
    written = plots.plot_run(RunFolder(whole, ConfigDict(json.loads((whole / "config.json").read_text()))).metrics(), tmp_path)
    assert [path.name for path in written] == ["loss.png", "retained.png", "kept_share.png", "speed.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 10_000 for path in written)
