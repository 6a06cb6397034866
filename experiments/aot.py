"""Compiles for chips that this machine does not have, and tables what is needed of them: python -m experiments.aot --suite=training --workdir=runs/aot.

kernels: every kernel at real sizes. VMEM is what the TPU compiler says the kernel uses (a GPU's shared memory is checked by its compiler, which does not
report it); temp is the HBM that the program needs beside its arguments and results. training: whole steps of configs/qwen3_4b.py on meshes of up to 512
chips, with the HBM of one chip and what the chips exchange; a step that does not fit, or holds an array of T x T, is an error. serving: reading and decoding
with Qwen3-4B on one chip, full cache and budgets, with the tokens a second that its memory allows at most. Needs the extra `aot`; `make aot` sets that up.
"""

import csv
import functools
import math
import pathlib
import sys
import time

from absl import app, flags
from tqdm import tqdm

from configs import qwen3_4b
from experiments import check_arguments
from pallas_kernels import aot, operations
from retention import compiled as serving
from retention.names import check_name
from retention.training import compiled

WORKDIR = flags.DEFINE_string("workdir", None, "The folder for kernels.csv, training.csv or serving.csv.", required=True)
SUITE = flags.DEFINE_enum("suite", "kernels", ["kernels", "training", "serving"], "What to compile.")
OPERATIONS = flags.DEFINE_list("operations", list(operations.NAMES), "Which operations, of the kernels.")
TARGETS = flags.DEFINE_list("targets", list(aot.TARGETS), "Which chips, for the kernels.")
STEPS = flags.DEFINE_list("steps", [step.label for step in compiled.STEPS], "Which training steps.")

# What names a program of each suite, and what is measured of it.
COLUMNS = {
    "kernels": (("operation", "shape", "target"), ("vmem_bytes", "temp_bytes", "alias_bytes")),
    "training": (
        ("model", "topology", "chips", "mesh", "tokens"),
        ("arguments_bytes", "temp_bytes", "total_bytes", "hbm_bytes", "largest_array", "collectives"),
    ),
    "serving": (
        ("model", "target", "batch", "context", "budget"),
        ("weights_bytes", "cache_bytes", "decode_total_bytes", "read_total_bytes", "hbm_bytes", "tokens_per_second"),
    ),
}


def main(argv):
    check_arguments(argv)
    names, measures = COLUMNS[SUITE.value]
    programs = list({"kernels": kernels, "training": training, "serving": servings}[SUITE.value]())
    path = pathlib.Path(WORKDIR.value).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    failed = 0
    with open(path / f"{SUITE.value}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, (*names, *measures, "seconds", "error"), extrasaction="ignore")
        writer.writeheader()
        for name, measure in tqdm(programs, desc="compiling", unit="program"):
            row, start = dict(zip(names, name, strict=True)), time.perf_counter()
            try:
                row |= measure()
            except Exception as error:  # a compiler's refusal is a result here
                row["error"] = " ".join(str(error).split())[:200]
            row["seconds"] = round(time.perf_counter() - start, 1)
            writer.writerow(row)
            file.flush()
            failed += "error" in row
            tqdm.write("  ".join([*map(str, name), *(readable(column, row[column]) for column in (*measures, "error") if column in row)]))
    print(f"{len(programs) - failed} compile, {failed} do not")
    sys.exit(failed > 0)


def readable(column: str, value) -> str:
    return f"{column.removesuffix('_bytes')} {value / 2**20:,.1f} MiB" if column.endswith("_bytes") else f"{column} {value}"


def require_compilers(targets) -> None:
    for target in targets:
        check_name("target", target, aot.TARGETS)
        if reason := aot.missing(target):
            sys.exit(reason)


def kernels():
    """The name of each kernel's program, a size and a target, and what compiles it."""
    require_compilers(TARGETS.value)
    for operation in OPERATIONS.value:
        check_name("operation", operation, operations.NAMES)
    for program in (program for operation in OPERATIONS.value for program in operations.programs(operation)):
        for target in TARGETS.value:
            name = program.operation, program.label, target
            if operations.fits(program, target):
                yield name, functools.partial(operations.compile_program, program, target)
            else:
                print("  ".join(name), " its arguments do not fit one device")


def training():
    """The name of each training step, and what compiles it."""
    steps = {step.label: step for step in compiled.STEPS}
    for label in STEPS.value:
        check_name("training step", label, steps)
    chosen = [steps[label] for label in STEPS.value]
    require_compilers(step.topology.partition(":")[0] for step in chosen)
    for step in chosen:
        mesh = " ".join(f"{axis}={size}" for axis, size in step.mesh.items())
        yield (step.model, step.topology, math.prod(step.mesh.values()), mesh, step.length), functools.partial(compile_step, step)


def servings():
    """What is served, and what compiles it."""
    require_compilers({one.target for one in serving.SERVINGS})
    for one in serving.SERVINGS:
        yield (*one[:-1], one.budget or "full"), functools.partial(measure_serving, one)


def measure_serving(one: serving.Serving) -> dict:
    row = serving.serve(one) | {"hbm_bytes": aot.HBM_GIB[one.target] * 2**30}
    needed = max(row.get(name, 0) for name in ("decode_total_bytes", "read_total_bytes"))
    # That the full cache does not fit is what the table is there to show.
    if one.budget is not None and not 0 < needed <= row["hbm_bytes"]:
        row["error"] = "does not fit"
    return row | {"tokens_per_second": round(row["tokens_per_second"], 1)}


def compile_step(step: compiled.Step) -> dict:
    program = compiled.compile_step(qwen3_4b.get_config(step.data), serving.MODELS[step.model], step.topology, step.length, step.mesh)
    row, text = serving.memory(program), program.as_text()
    row["hbm_bytes"] = aot.HBM_GIB[step.topology.partition(":")[0]] * 2**30
    size, array = compiled.largest_array(text)
    row["largest_array"] = f"{array} {size / 1e9:.2f} GB"
    row["collectives"] = "; ".join(f"{kind} {count}x {size / 1e9:.3f} GB" for kind, (count, size) in sorted(compiled.collectives(text).items()))
    if row["total_bytes"] > row["hbm_bytes"]:
        row["error"] = "does not fit"
    elif scores := compiled.quadratic(text, step.length, step.mesh.get("context", 1)):
        row["error"] = f"holds T x T: {', '.join(scores)}"
    return row


if __name__ == "__main__":
    app.run(main)
