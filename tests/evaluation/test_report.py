"""Leaderboards from run folders, as experiments.evaluate writes them, and the pictures."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest

from retention.evaluation import kept_text, plots
from retention.evaluation.report import leaderboard

SECONDS = {"prefill_seconds": 1.5, "evict_seconds": 0.25, "decode_seconds": 2.0}


def row_of(policy, budget, score, task="needle", length=1024, **changes):
    measured = {"score": score, "low": score - 0.1, "high": score + 0.1} if task != "prose" else {"kl": score, "loss": 3.0}
    scope = "head" if policy == "snapkv" else "global"
    return {
        "task": task, "length": length, "policy": policy, "scope": scope, "budget": budget, "prefill": "one-shot", "question_seen": False, "samples": 32,
        "questions": 32, "kept_entries": 100, "allocated_bytes": 2_500_000, **SECONDS, **measured, **changes,
    }  # fmt: skip


def write_run(folder, rows, model="tiny", seed=3):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model": model}))
    meta = {"commit": "abc1234", "seed": seed, "device": "1 x cpu", "host": "2 x Some CPU", "command": f"python -m experiments.evaluate --workdir={folder}"}
    (folder / "run_meta.json").write_text(json.dumps(meta))
    with open(folder / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    return str(folder), json.loads((folder / "config.json").read_text()), meta, list(csv.DictReader(open(folder / "results.csv")))


def cells(text, start):
    """The table's line that begins so, in cells."""
    [line] = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


FIRST = [
    row_of("full", None, 0.7),
    row_of("window", 0.25, 0.2), row_of("window", 0.125, 0.1),
    row_of("retention", 0.25, 0.8), row_of("retention", 0.125, 0.75, decode_seconds=1.0, above_full=5, below_full=2),
    row_of("full", None, 0.0, "prose"), row_of("window", 0.25, 0.12, "prose"), row_of("retention", 0.25, 0.04, "prose"),
    row_of("full", None, 0.3, "gsm8k", None), row_of("window", 128, 0.2, "gsm8k", None),
]  # fmt: skip


def test_a_table_for_each_model_task_and_length(tmp_path):
    first = write_run(tmp_path / "a", FIRST)
    second = write_run(tmp_path / "b", [row_of("full", None, 0.71), row_of("snapkv", 0.25, 0.3), row_of("window", 0.25, 0.2, question_seen=True)], seed=4)
    other = write_run(tmp_path / "c", [row_of("full", None, 0.9)], model="large")
    text, rows = leaderboard([first, second, other])
    titles = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert titles == [
        "needle, 1024 tokens, tiny", "prose, 1024 tokens, tiny", "gsm8k, tiny",
        "needle, 1024 tokens, tiny, question known when the context is compressed", "needle, 1024 tokens, large",
    ]  # fmt: skip
    needle, prose, reasoning, *_ = text.split("## ")[1:]
    order = [line.split("|")[1].strip() for line in needle.splitlines() if line.startswith("| ")][2:]
    ranked = ["full cache: 0.70 (0.60-0.80)", "full cache: 0.71 (0.61-0.81)", "retention (global)", "window (global)", "snapkv (head)"]
    assert order == ranked, "best at the smallest budget first; who has not run there comes last"
    cost = ["1.75", "1.00", "2.5", "32", str(tmp_path / "a")]
    assert cells(needle, "retention") == ["retention (global)", "one-shot", "0.80 (0.70-0.90)", "0.75 (0.65-0.85) +5 -2", *cost]
    assert "above (+) and below (-) the full cache's" in needle and "above" not in reasoning + prose
    assert cells(needle, "snapkv")[2:4] == ["0.30 (0.20-0.40)", ""]
    assert cells(prose, "retention")[2] == "0.0400" and prose.index("retention") < prose.index("window"), "the less KL the better"
    assert cells(reasoning, "window")[2] == "0.20 (0.10-0.30)" and "128" in cells(reasoning, "policy")
    assert cells(text, str(tmp_path / "b"))[1:4] == ["abc1234", "4", "2 x Some CPU"] and f"--workdir={tmp_path / 'b'}" in text
    assert len(rows) == len(FIRST) + 4 and {row["run"] for row in rows} == {first[0], second[0], other[0]}


def test_one_table_of_all_tasks(tmp_path):
    first = write_run(tmp_path / "a", [*FIRST[:8], row_of("full", None, 0.3, "vt"), row_of("window", 0.25, 0.2, "vt")])
    more = (("full", None, 0.7), ("snapkv", 0.25, 0.3), ("window", 0.25, 0.9), ("kvzip", 0.25, 0.4, "needle", 4096))
    second = write_run(tmp_path / "b", [row_of(*row) for row in more])
    text, _ = leaderboard([first, second], ["retention", "kvzip"])
    head, _, *lines = [line for line in text.split("## ")[0].splitlines() if line.startswith("| ")]
    assert head == "| scores at budgets 0.25 | full cache | retention | kvzip | best of the others | others |", "0.125 is not of all tasks"
    # prose has no score; of two runs of the window the first counts
    assert lines == [
        "| needle, 1024 tokens | 0.700 | 0.800 | - | 0.300 | 2 |",
        "| needle, 4096 tokens |  | - | 0.400 | - | 0 |",
        "| vt, 1024 tokens | 0.300 | - | - | 0.200 | 1 |",
    ]
    assert "scores at" not in leaderboard([first, second])[0]
    assert leaderboard([first, second], ["retention"], "Runs differ.")[0].startswith("# Leaderboard\n\nRuns differ.\n\n| scores at")
    other = write_run(tmp_path / "c", [row_of("window", 0.5, 0.1, "cwe")])
    for runs in ([first, other], [write_run(tmp_path / "d", [row_of("window", 0.5, 0.1, "prose")])]):
        with pytest.raises(ValueError, match="--columns asks for a table of all tasks, but these runs have no budget in common"):
            leaderboard(runs, ["retention"])
    for name in ("retension", "full"):
        with pytest.raises(ValueError, match=f"unknown policy in these runs '{name}': .*retention"):
            leaderboard([first, second], [name])


def test_fractions_and_tokens_are_not_put_into_one_order(tmp_path):
    runs = [write_run(tmp_path / name, [row_of("full", None, 0.7), row_of("window", budget, 0.2)]) for name, budget in (("a", 0.25), ("b", 64))]
    with pytest.raises(ValueError, match="^needle, 1024 tokens, tiny: these runs have fractions of a context and tokens per stream"):
        leaderboard(runs)


def test_the_program(tmp_path):
    write_run(tmp_path / "a", FIRST)
    write_run(tmp_path / "b", FIRST[:3], seed=4)
    command = [sys.executable, "-m", "experiments.report", f"--out={tmp_path / 'out'}"]
    done = subprocess.run([*command, f"--runs={tmp_path / 'a'},{tmp_path / 'b'}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "leaderboard.md").read_text() == done.stdout.removesuffix("\n")
    assert (tmp_path / "out" / "leaderboard.png").stat().st_size > 10_000
    (tmp_path / "b" / "run_meta.json").write_text('{"commit": "aaaaaaa"}')  # as it is while a run goes on
    failed = subprocess.run([*command, f"--runs={tmp_path / 'a'},{tmp_path / 'b'}"], capture_output=True, text=True)
    assert failed.returncode != 0 and f"{tmp_path / 'b'} has not come to its end" in failed.stderr
    (tmp_path / "b" / "results.csv").unlink()
    failed = subprocess.run([*command, f"--runs={tmp_path / 'a'},{tmp_path / 'b'}"], capture_output=True, text=True)
    assert failed.returncode != 0 and f"{tmp_path / 'b'} has no results.csv; give --runs folders in which" in failed.stderr
    # as a shell makes it of a pattern without quotes
    failed = subprocess.run([*command, "--runs", str(tmp_path / "a"), str(tmp_path / "b")], capture_output=True, text=True)
    assert failed.returncode != 0 and f"{tmp_path / 'b'} belongs to no flag: put a pattern" in failed.stdout + failed.stderr


@pytest.fixture
def drawn(monkeypatch):
    """The figures, in order, still open."""
    figures = []
    monkeypatch.setattr(plots.plt, "close", figures.append)
    yield figures
    monkeypatch.undo()
    for figure in figures:
        plots.plt.close(figure)


def test_scores_against_budgets(tmp_path, drawn):
    plots.plot_scores(FIRST, tmp_path / "accuracy.png")
    needle, prose, _ = drawn[0].axes
    assert [axis.get_title() for axis in drawn[0].axes] == ["needle, 1024 tokens", "prose, 1024 tokens", "gsm8k"]
    lines = {container.get_label(): container for container in needle.containers}
    assert set(lines) == {"window (global)", "retention (global)"}
    line, _, [bars] = lines["retention (global)"]
    assert line.get_ydata().tolist() == [0.75, 0.8] and line.get_xdata() == pytest.approx([0.125, 0.25], rel=0.05)
    assert sorted(segment[:, 1].tolist() for segment in bars.get_segments()) == [pytest.approx([0.65, 0.85]), pytest.approx([0.7, 0.9])]
    assert [line.get_ydata()[0] for line in needle.lines if line.get_label() == "full cache"] == [0.7]
    assert prose.get_ylabel() == "kl" and not any(container.has_yerr for container in prose.containers)


def test_runs_have_lines_of_their_own(tmp_path, drawn):
    rows = [row_of("window", 0.25, 0.1 * i, length=length, run=run) for i, (run, length) in enumerate((r, n) for r in "ab" for n in (1024, 4096))]
    plots.plot_lengths(rows, tmp_path / "lengths.png")
    lines = {container.get_label(): container[0].get_ydata().tolist() for container in drawn[0].axes[0].containers}
    assert lines == {"window (global), a": [0.0, 0.1], "window (global), b": pytest.approx([0.2, 0.3])}
    # of runs that share no panel each length has one value
    plots.plot_lengths([rows[0], rows[3]], tmp_path / "lengths.png")
    assert [container.get_label() for container in drawn[1].axes[0].containers] == ["window (global)"]


def test_scores_against_lengths(tmp_path, drawn):
    """One picture for what several runs have at several lengths; none where every task has one, also no earlier one."""
    (tmp_path / "lengths.png").write_bytes(b"of other runs")
    plots.plot_lengths(FIRST, tmp_path / "lengths.png")
    assert not drawn and not (tmp_path / "lengths.png").exists()
    longer = [row_of("retention", 0.25, 0.6, length=4096), row_of("retention", 0.125, 0.5, length=4096), row_of("full", None, 0.4, length=4096)]
    longer += [row_of("full", None, 0.5, question_seen=True), row_of("retention", 0.0625, 0.3)]  # the latter at one length alone
    plots.plot_lengths([*FIRST, *longer], tmp_path / "lengths.png")
    assert [axis.get_title() for axis in drawn[0].axes] == ["needle, budget 0.25", "needle, budget 0.125"]
    lines = [{container.get_label(): container[0] for container in axis.containers} for axis in drawn[0].axes]
    assert [set(own) for own in lines] == 2 * [{"full cache", "window (global)", "retention (global)"}]
    assert lines[0]["retention (global)"].get_ydata().tolist() == [0.8, 0.6] and lines[1]["retention (global)"].get_ydata().tolist() == [0.75, 0.5]
    assert lines[0]["retention (global)"].get_xdata() == pytest.approx([1024, 4096], rel=0.05)
    assert lines[1]["full cache"].get_ydata().tolist() == [0.7, 0.4], "of those who did not know the question"


def test_a_line_looks_the_same_in_every_panel(tmp_path, drawn):
    """The legend stands once for all panels: also for those of tasks that fewer policies did."""
    rows = [row_of(policy, 0.25, 0.5, "needle", length) for policy in ("knorm", "tova", "window") for length in (1024, 4096)]
    rows += [row_of("window", 0.25, 0.5, "vt", length) for length in (1024, 4096)]
    plots.plot_lengths(rows, tmp_path / "lengths.png")
    plots.plot_scores(rows, tmp_path / "accuracy.png")
    for figure in drawn:
        colors = {}
        for axis in figure.axes:
            for container in axis.containers:
                colors.setdefault(container.get_label(), set()).add(container[0].get_color())
        assert len(colors) == 3 and all(len(own) == 1 for own in colors.values()) and len(set.union(*colors.values())) == 3


def test_each_line_of_retention_is_told_from_its_others(tmp_path, drawn):
    rows = [row_of("retention", budget, 0.5, scope=scope) for scope in ("global", "layer", "head") for budget in (0.125, 0.25)]
    plots.plot_scores([*rows, row_of("window", 0.25, 0.5)], tmp_path / "accuracy.png")
    looks = {c.get_label(): (c[0].get_color(), c[0].get_linestyle()) for c in drawn[0].axes[0].containers}
    assert len(set(looks.values())) == 4 and len({color for name, (color, _) in looks.items() if name.startswith("retention")}) == 1


def test_what_was_kept(tmp_path, drawn):
    def record(policy, budget, kept, near):
        cell = {"task": "needle", "length": 100, "policy": policy, "scope": "global", "budget": budget}
        return {"cell": cell, "context_tokens": 100, "kept_by_stream": kept, "kept_by_distance": [near, 0.0]}

    records = [
        record("window", 0.5, [[50, 50]], 1.0), record("window", 0.25, [[25, 25]], 0.5), record("retention", 0.25, [[40, 10]], 0.1),
        record("retention", 0.25, [[20, 10]], 0.3), record("full", None, [[100, 100]], 1.0), {"cell": {"policy": "window"}},
    ]  # fmt: skip
    plots.plot_results([row_of("full", None, 0.7)], records, tmp_path)
    _, heads, distance = drawn
    maps = {axis.get_title(): axis.images[0].get_array().tolist() for axis in heads.axes if axis.images}
    assert maps == {"window\n(global)": [[0.25, 0.25]], "retention\n(global)": [[pytest.approx(0.3), pytest.approx(0.1)]]}, "at the smallest budget, the mean"
    lines = {line.get_label(): line for line in distance.axes[0].lines}
    assert lines["retention (global)"].get_ydata() == pytest.approx([0.2, 0.0]) and lines["window (global)"].get_xdata().tolist() == [0.25, 0.75]


def lines_of(axis):
    return {line.get_label(): (line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axis.lines}


def test_streams(tmp_path, drawn):
    """Of two parts, 10 and 30 tokens long: a column a budget, loss above and KL below, the full cache's loss in each column."""
    losses = {("full", None): [1.0, 2.0], ("window", 8): [3.0, 4.0], ("retention", 8): [5.0, 6.0], ("window", 4): [7.0, 8.0], ("retention", 4): [9.0, 10.0]}
    rows = [
        {"policy": policy, "budget": budget, "from": first, "to": last, "loss": loss, "kl": loss / 100}
        for (policy, budget), own in losses.items() for (first, last), loss in zip(((0, 10), (10, 40)), own, strict=True)
    ]  # fmt: skip
    plots.plot_streams(rows, tmp_path / "stream.png")
    loss_4, loss_8, kl_4, kl_8 = map(lines_of, drawn[0].axes)
    middle = [5.0, 25.0]
    assert loss_4 == {"full": (middle, [1.0, 2.0]), "window": (middle, [7.0, 8.0]), "retention": (middle, [9.0, 10.0])}
    assert loss_8 == {"full": (middle, [1.0, 2.0]), "window": (middle, [3.0, 4.0]), "retention": (middle, [5.0, 6.0])}
    assert kl_4 == {"window": (middle, [0.07, 0.08]), "retention": (middle, [0.09, 0.1])}
    assert kl_8 == {"window": (middle, [0.03, 0.04]), "retention": (middle, [0.05, 0.06])}


def test_dilution(tmp_path, drawn):
    """Attention with two standard errors and the bound e^4 / (e^4 + distractors) on the left, recall on the right."""
    fields = ("cache", "distractors", "mass", "mass_error", "accuracy")
    rows = [("full cache", 16, 0.5, 0.1, 1.0), ("window", 16, 0.4, 0.05, 0.3), ("full cache", 64, 0.2, 0.01, 0.9), ("window", 64, 0.1, 0.02, 0.0)]
    plots.plot_dilution([dict(zip(fields, row, strict=True)) for row in rows], 8, 4.0, tmp_path / "dilution.png")
    (mass, recall), shades = map(lines_of, drawn[0].axes), drawn[0].axes[0].collections
    bound_x, bound = mass.pop("bound of the full cache")
    assert mass == {"full cache": ([16, 64], [0.5, 0.2]), "window": ([16, 64], [0.4, 0.1])}
    assert recall == {"full cache": ([16, 64], [1.0, 0.9]), "window": ([16, 64], [0.3, 0.0])}
    assert (bound_x[0], bound[0], bound_x[-1], bound[-1]) == pytest.approx((16, np.e**4 / (np.e**4 + 16), 64, np.e**4 / (np.e**4 + 64)))
    corners = [{(x, round(y, 4)) for x, y in shade.get_paths()[0].vertices.tolist()} for shade in shades]
    assert corners == [{(16, 0.3), (16, 0.7), (64, 0.18), (64, 0.22)}, {(16, 0.3), (16, 0.5), (64, 0.06), (64, 0.14)}]


def test_positions_kept(tmp_path, drawn):
    """Of a layer of two heads and four tokens, as a picture of streams and as text."""
    kept = [[np.array([0, 1, 3]), np.array([3])]]
    plots.plot_kept(kept, 4, tmp_path / "kept.png", "kept")
    kept_text.plot(kept_text.mask(kept, 4), ["One", " two", " six\n", "end"], "kept", tmp_path / "text.png")
    (image, share), [text] = drawn[0].axes, drawn[1].axes
    assert image.images[0].get_array().tolist() == [[1, 1, 0, 1], [0, 0, 0, 1]]
    assert [bar.get_width() for bar in share.patches] == [0.75, 0.25]
    assert [(one.get_position(), one.get_text()) for one in text.texts] == [((0, 0), "One"), ((3, 0), " two"), ((7, 0), " six↵"), ((0, 1), "end")]
    assert [(box.get_xy(), box.get_width()) for box in text.patches] == [((0, -0.5), 3), ((3, -0.5), 4), ((7, -0.5), 5), ((0, 0.5), 3)]
    red = [box.get_facecolor() for box in text.patches]
    assert [plots.plt.cm.Reds(0.85 * share) for share in (0.5, 0.5, 0, 1)] == red
