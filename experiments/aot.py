"""Compiles every kernel at real sizes for chips that this machine does not have, and tables what they need: python -m experiments.aot --workdir=runs/aot.

VMEM is what the TPU compiler says the kernel uses (a GPU's shared memory is checked by its compiler, which does not report it); temp is the HBM that the
program needs beside its arguments and results. Needs the extra `aot`; `make aot` sets that up.
"""

import csv
import pathlib
import sys
import time

from absl import app, flags
from tqdm import tqdm

from pallas_kernels import aot, operations

WORKDIR = flags.DEFINE_string("workdir", None, "The folder for kernels.csv.", required=True)
OPERATIONS = flags.DEFINE_list("operations", list(operations.NAMES), "Which operations.")
TARGETS = flags.DEFINE_list("targets", list(aot.TARGETS), "Which chips.")


def main(_):
    for target in TARGETS.value:
        if reason := aot.missing(target):
            sys.exit(reason)
    programs = [program for name in OPERATIONS.value for program in operations.programs(name)]
    path = pathlib.Path(WORKDIR.value)
    path.mkdir(parents=True, exist_ok=True)
    compiled = failed = 0
    with open(path / "kernels.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ("operation", "shape", "target", "vmem_bytes", "temp_bytes", "alias_bytes", "seconds", "error"))
        writer.writeheader()
        for program in tqdm(programs, desc="compiling", unit="program"):
            for target in TARGETS.value:
                if not operations.fits(program, target):
                    tqdm.write(f"{program.operation:20} {program.label:44} {target:6} its arguments do not fit one device")
                    continue
                start = time.perf_counter()
                try:
                    row = operations.compile_program(program, target)
                    compiled += 1
                    del row["hlo"]
                    measured = f"VMEM {row['vmem_bytes'] / 2**20:6.1f} MiB  temp {row['temp_bytes'] / 2**20:8.2f} MiB"
                except Exception as error:  # a compiler's refusal is a result here
                    measured = " ".join(str(error).split())[:200]
                    row = {"error": measured}
                    failed += 1
                row |= {"operation": program.operation, "shape": program.label, "target": target, "seconds": round(time.perf_counter() - start, 1)}
                writer.writerow(row)
                file.flush()
                tqdm.write(f"{program.operation:20} {program.label:44} {target:6} {measured}")
    print(f"{compiled} compile, {failed} do not")
    sys.exit(failed > 0)


if __name__ == "__main__":
    app.run(main)
