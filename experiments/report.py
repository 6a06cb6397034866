"""A leaderboard from run folders: python -m experiments.report --runs=runs/leaderboard,runs/other --out=experiments/leaderboard.

Writes leaderboard.md, a table for each model, task and length, and the runs that they come from, leaderboard.png, and lengths.png if a task was run at
several. With --columns=retention,kvzip a table of all tasks stands first, with a column for each of these policies and one for the best of the others.
"""

import csv
import json
import pathlib

from absl import app, flags

from experiments import check_arguments, policy_names
from retention.evaluation.plots import plot_lengths, plot_scores
from retention.evaluation.report import leaderboard

RUNS = flags.DEFINE_list("runs", None, "Run folders of experiments.evaluate, finished ones.")
OUT = flags.DEFINE_string("out", None, "The folder to write into.")
COLUMNS = flags.DEFINE_string("columns", "", "Policies with columns of their own in one table of all tasks; none: no such table.")
NOTE = flags.DEFINE_string("note", "", "A sentence under the title, such as in what runs differ.")
flags.mark_flags_as_required(["runs", "out"])


def main(argv):
    check_arguments(argv)
    if not RUNS.value:
        raise ValueError("--runs names no folder; give those of finished runs, with commas between them")
    runs = []
    for folder in (pathlib.Path(name).expanduser() for name in RUNS.value):
        missing = [name for name in ("config.json", "results.csv", "run_meta.json") if not (folder / name).exists()]
        if missing:
            raise FileNotFoundError(f"{folder} has no {' and no '.join(missing)}; give --runs folders in which experiments.evaluate has come to its end")
        config, meta = (json.loads((folder / name).read_text()) for name in ("config.json", "run_meta.json"))
        if "command" not in meta:  # which is there from a run's first record on, and whole at its end
            raise ValueError(f"{folder} has not come to its end; give its command of experiments.evaluate again")
        with open(folder / "results.csv", newline="") as file:
            runs.append((str(folder), config, meta, list(csv.DictReader(file))))
    out = pathlib.Path(OUT.value).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    text, rows = leaderboard(runs, policy_names(COLUMNS.value), NOTE.value)
    (out / "leaderboard.md").write_text(text)
    plot_scores(rows, out / "leaderboard.png")
    plot_lengths(rows, out / "lengths.png")
    print(text)


if __name__ == "__main__":
    app.run(main)
