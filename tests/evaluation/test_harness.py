"""The evaluation harness on a tiny model: what it writes, that it goes on where it stopped, and what the numbers mean."""

import csv
import json
import subprocess
import sys

import pytest

from configs import needles as needles_config
from retention.checkpoints import gates as gates_file
from retention.evaluation import harness, prose
from tests import tiny
from tests.conftest import small_config, small_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tiny.write_folder(tmp_path_factory.mktemp("tiny"))
    gates_file.save(folder / "gates.safetensors", small_model(small_config()).gates)
    return folder


def config_of(folder, **changes):
    config = needles_config.get_config()
    values = dict(
        model=str(folder), gates=str(folder / "gates.safetensors"), tasks=("needle", "prose"), lengths=(256,), samples=2, kept=(0.25,),
        policies=("retention", "window"), max_new_tokens=4, continuation=32,
    )  # fmt: skip
    config.update({**values, **changes})
    return config


def test_cells_hold_the_full_cache_once_a_task_and_length(folder):
    table = harness.cells(config_of(folder, lengths=(256, 512), kept=(0.5, 0.25)))
    assert len(table) == len(set(table)) == 2 * 2 * (1 + 2 * 2)
    assert sum(cell.policy == "full" for cell in table) == 4


def test_a_run_writes_its_folder_and_an_interrupted_one_goes_on(folder, tmp_path, monkeypatch):
    config = config_of(folder)
    rows = harness.evaluate(config, tmp_path / "whole")
    assert [(row["task"], row["policy"]) for row in rows] == [(t, p) for t in ("needle", "prose") for p in ("full", "retention", "window")]
    streams = small_config().streams
    assert rows[1]["kept_entries"] == rows[2]["kept_entries"] == 64 * streams and rows[0]["kept_entries"] > 200 * streams
    assert rows[3]["kl"] == 0 and rows[4]["kl"] > 0 and rows[4]["full_loss"] == rows[3]["loss"]
    assert {file.name for file in (tmp_path / "whole").iterdir()} == {"config.json", "metrics.jsonl", "results.csv", "run_meta.json"}
    with open(tmp_path / "whole" / "results.csv") as file:
        assert [row["policy"] for row in csv.DictReader(file)] == [row["policy"] for row in rows]

    calls, answer = [], harness.answer

    def interrupted(*arguments):
        calls.append(arguments[2:])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return answer(*arguments)

    monkeypatch.setattr(harness, "answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        harness.evaluate(config, tmp_path / "cut")
    assert harness.evaluate(config, tmp_path / "cut") == rows
    assert len(calls) == 7, "three samples before the cut, the one cut off, then it and the two that were left"
    records = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 12
    again = harness.evaluate(config, tmp_path / "cut")
    assert again == rows and len(calls) == 7


def test_prose_with_everything_kept_costs_nothing(folder):
    model = harness.checkpoints.load(str(folder), gates=str(folder / "gates.safetensors"))
    ((context, continuation),) = prose.windows([list(range(300))], 200, 40, 1, seed=0)
    assert continuation[0] == context[-1] + 1
    kl, loss, full_loss = prose.divergence(model, context, continuation, budget=250)
    assert abs(kl) < 1e-6 and loss == pytest.approx(full_loss, abs=1e-5)
    with pytest.raises(ValueError, match="no document of 400 tokens"):
        prose.windows([list(range(300))], 300, 100, 1, seed=0)
    with pytest.raises(ValueError, match="continuation has 300 tokens"):
        prose.divergence(model, context, [0] * 300, budget=50)


def test_the_generate_program_streams_and_names_bad_flags(folder, tmp_path):
    def run(*flags):
        command = [sys.executable, "-m", "experiments.generate", f"--model={folder}", f"--gates={folder}/gates.safetensors", *flags]
        return subprocess.run(command, capture_output=True, text=True)

    (tmp_path / "book.txt").write_text("A letter lay on the step, and nobody came. " * 20)
    done = run("--prompt=Who came?", f"--context={tmp_path}/book.txt", "--budget=0.25", "--max_new_tokens=5", "--chat")
    assert done.returncode == 0, done.stderr
    assert "kept_entries=" in done.stdout
    failed = run("--prompt=Who came?", "--budget=half")
    assert failed.returncode != 0 and "--budget must be a whole number, a fraction such as 0.125, or none, got 'half'" in failed.stderr
