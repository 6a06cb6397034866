"""Times what this project is fast at, as ratios within one run: python -m experiments.benchmark --suite=kernels --workdir=runs/benchmark.

kernels: each operation at real sizes on whatever device jax finds, beside the rival that its issue names, and beside the bandwidth of a plain copy.
Where a row takes not many times as long as calling a program (of_call), an accelerator's time hides behind the host's.
end_to_end: SmolLM2-135M reading and decoding with the full cache and under a budget, and in transformers and kvpress where they are installed (extra
`compare`); reading 32K tokens in bounded memory. decoding: its part that decodes, alone.
compression: what each policy adds to the seconds and the memory of reading 1K and 4K tokens.
serving: decoding in bfloat16 with --model (of Qwen3 the shape alone, with random weights and gates) behind 8K to 128K tokens, full cache and budgets, as fast
as an accelerator does it; some ten minutes a model.
training: a training step of SmolLM2-135M over 1,024 tokens, in plain forward passes; and the memory it takes.
The times of a busy machine are worth nothing; the ratios hold as long as both sides were equally disturbed.
"""

import importlib.util
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from absl import app, flags

from configs import smollm2_135m
from experiments import check_arguments, policy_names
from pallas_kernels import operations
from retention import bench, checkpoints, compiled, gates, policies
from retention import model as model_lib
from retention.checkpoints import download
from retention.model import Model
from retention.names import check_name
from retention.runs import commit, write_table
from retention.training import bench as training_bench

SUITE = flags.DEFINE_enum("suite", "kernels", ["kernels", "end_to_end", "decoding", "compression", "serving", "training"], "What to time.")
MODEL = flags.DEFINE_enum("model", "smollm2-135m", ["smollm2-135m", *compiled.MODELS], "The model of suite serving.")
WORKDIR = flags.DEFINE_string("workdir", None, "The folder for the suite's CSV.", required=True)
OPERATIONS = flags.DEFINE_list("operations", list(operations.NAMES), "Which operations, of suite kernels.")
POLICIES = flags.DEFINE_string("policies", ",".join(policies.names()), "Which policies, of suite compression.")


def seconds(function, *arguments) -> float:
    """Median seconds of a call of jit(function), compiled and warm."""
    function = jax.jit(function)
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    jax.block_until_ready(function(*arguments))
    # On an accelerator calls are queued, so that the host's own time hides behind the device's. A CPU would run them side by side.
    queued = 1 if jax.default_backend() == "cpu" else 10
    samples = []
    while len(samples) < 5 or (len(samples) < 21 and time.perf_counter() - start < 10):
        begin = time.perf_counter()
        for _ in range(queued):
            out = function(*arguments)
        jax.block_until_ready(out)
        samples.append((time.perf_counter() - begin) / queued)
    return statistics.median(samples)


def copy_bandwidth() -> float:
    """Bytes a second that a copy of a large array reads and writes."""
    x = jnp.zeros((64 if jax.default_backend() == "cpu" else 512) << 20, jnp.int8)
    return 2 * x.nbytes / seconds(lambda x: x ^ jnp.int8(1), x)


def read_bandwidth() -> float:
    """Bytes a second that the sum of a large float32 array reads."""
    x = jnp.zeros((64 if jax.default_backend() == "cpu" else 256) << 20, jnp.float32)
    return x.nbytes / seconds(jnp.sum, x)


def kernels() -> Iterator[dict]:
    for name in OPERATIONS.value:
        check_name("operation", name, operations.NAMES)
    platform = jax.default_backend()
    copy, read = copy_bandwidth(), read_bandwidth()
    call = seconds(jnp.negative, jnp.zeros(8))
    print(f"a copy moves {copy / 1e9:.1f} GB/s, a sum reads {read / 1e9:.1f} GB/s, calling a program takes {1e6 * call:.1f} us")
    for name in OPERATIONS.value:
        for row in importlib.import_module(f"pallas_kernels.{name}.bench").rows(platform, seconds):
            rivals = row.pop("rivals", {})
            if "bytes" in row:
                row["of_copy"] = round(row["bytes"] / row["seconds"] / copy, 3)
            if "flops" in row:
                row["tflops"] = round(row["flops"] / row["seconds"] / 1e12, 2)
            row["of_call"] = round(row["seconds"] / call, 1)
            row["against"] = "; ".join(f"{rival} {s / row['seconds']:.2f}x as long" for rival, s in rivals.items())
            yield row


def beside_theirs(rows: Callable) -> Iterator[dict]:
    compare = importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")
    if compare and jax.default_backend() != "cpu":  # where it would run
        print("transformers and kvpress are left out: beside jax on an accelerator they would be slow for being on the CPU")
        compare = None
    return rows(checkpoints.load("smollm2-135m"), theirs=bench.Theirs(download.smollm2_135m()) if compare else None)


def serving() -> Iterator[dict]:
    name = MODEL.value
    if name in compiled.MODELS:
        config, gate = compiled.MODELS[name], gates.GateConfig()
        model = Model(config, model_lib.init(config, dtype=jnp.bfloat16), gates.TrainedGates(gate, gates.init(config, gate)))
    else:
        model = checkpoints.load(name, dtype="bfloat16")
    bandwidth = read_bandwidth()
    print(f"a sum reads {bandwidth / 1e9:.1f} GB/s")
    return ({"model": name, **row} for row in bench.serving_rows(model, bandwidth))


SUITES = {
    "kernels": kernels,
    "end_to_end": lambda: beside_theirs(bench.rows),
    "decoding": lambda: beside_theirs(bench.decoding_rows),
    "compression": lambda: bench.compression_rows("smollm2-135m", policy_names(POLICIES.value)),
    "serving": serving,
    "training": lambda: training_bench.rows(smollm2_135m.get_config("long")),
}


def main(argv):
    check_arguments(argv)
    device, version = jax.devices()[0].device_kind, commit()
    print(device, version)
    path = pathlib.Path(WORKDIR.value).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in SUITES[SUITE.value]():
        rows.append({"device": device, "commit": version, **row})
        print("  ".join(f"{key} {value}" for key, value in row.items() if value != ""), flush=True)
        # Again after every row, as rows differ in their columns and a long run may be cut short.
        write_table(path / f"{SUITE.value}.csv", rows)


if __name__ == "__main__":
    app.run(main)
