"""Pictures of what caches kept and of what that was worth."""

import pathlib
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np

from retention.evaluation.dilution import mass_bound


def plot_kept(kept: Sequence[Sequence[np.ndarray]], tokens: int, path: str | pathlib.Path, title: str) -> None:
    """One row a stream, (layer, head) from the top; dark where the position is kept."""
    streams = [positions for layer in kept for positions in layer]
    image = np.zeros((len(streams), tokens))
    for stream, positions in enumerate(streams):
        image[stream, positions] = 1
    # A pixel stands for several positions: its darkness is the share of them that is kept.
    bins = min(tokens, 400)
    edges = np.linspace(0, tokens, bins + 1).astype(int)
    shares = np.add.reduceat(image, edges[:-1], axis=1) / np.diff(edges)
    figure, (axis, side) = plt.subplots(1, 2, figsize=(12, 6), width_ratios=(5, 1), sharey=True, layout="constrained")
    axis.imshow(shares, aspect="auto", cmap="Greys", vmin=0, vmax=1, extent=(0, tokens, len(streams), 0), interpolation="nearest")
    heads = len(kept[0])
    axis.set_yticks(np.arange(0, len(streams), heads * 5), [f"layer {i}" for i in range(0, len(kept), 5)])
    axis.set(xlabel="position", title=title)
    side.barh(np.arange(len(streams)) + 0.5, [len(positions) / tokens for positions in streams], height=1.0, color="0.4")
    side.set(xlabel="share kept")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_results(rows: Sequence[dict], records: Sequence[dict], folder: pathlib.Path) -> None:
    """accuracy.png, lengths.png (if there are several), kept_by_head.png and kept_by_distance.png, of an evaluation's rows and records.

    See harness.evaluate.
    """
    plot_scores(rows, folder / "accuracy.png")
    plot_lengths(rows, folder / "lengths.png")
    kept = [record for record in records if "kept_by_stream" in record and record["cell"]["policy"] != "full"]
    if kept:
        plot_heads(kept, folder / "kept_by_head.png")
        plot_distance(kept, folder / "kept_by_distance.png")


def label(cell: dict) -> str:
    return "full cache" if cell["policy"] == "full" else f"{cell['policy']} ({cell['scope']})"


def measure_of(row: dict) -> str:
    """What a row's task is judged by: "score", or "kl" of prose."""
    return "score" if "score" in row else "kl"


def panels(rows: Sequence[dict]) -> list[list[dict]]:
    """The rows of each panel or table: one model, where rows tell it, task and length, and the question known or not when the context is compressed."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(title(row), []).append(row)
    return list(found.values())


def title(row: dict) -> str:
    parts = [row["task"], f"{row['length']} tokens" if row["length"] else "", row.get("model", "")]
    return ", ".join([part for part in parts if part] + ["question known when the context is compressed"] * (str(row["question_seen"]) == "True"))


def lines_of(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """The rows of each line, by its name: of a policy and scope, and where several runs have the same in one panel, of each run."""
    runs: dict[tuple[str, str], set] = {}
    for row in rows:
        runs.setdefault((title(row), label(row)), set()).add(row.get("run"))
    several = any(len(names) > 1 for names in runs.values())
    lines: dict[str, list[dict]] = {}
    for row in rows:
        lines.setdefault(f"{label(row)}, {row['run']}" if several else label(row), []).append(row)
    return lines


def plot_scores(rows: Sequence[dict], path: pathlib.Path) -> None:
    """A panel a task and length: score (of prose KL) against budget, a line a policy and scope with 95 % intervals; the full cache as a band.

    Where several runs have the same policy in the same panel, each run has lines of its own.
    """
    lines, own = lines_of(rows), panels(rows)
    names = list(lines)
    figure, axes = grid(len(own))
    for axis, panel in zip(axes, own, strict=True):
        for name, line in lines.items():
            mine = sorted((row for row in line if title(row) == title(panel[0])), key=lambda row: row["budget"] or 0)
            if mine and mine[0]["policy"] == "full":
                axis.axhline(mine[0][measure_of(mine[0])], color="0.3", linestyle="--", linewidth=1, label=name)
                if "low" in mine[0]:
                    axis.axhspan(mine[0]["low"], mine[0]["high"], color="0.3", alpha=0.08)
            elif mine:
                draw_line(axis, "budget", mine, name, names)
        budgets = sorted({row["budget"] for row in panel if row["budget"] is not None})
        axis.set_xscale("log", base=2)
        axis.set_xticks(budgets, [f"{budget:.4g}" for budget in budgets])
        axis.set(xlabel="budget", ylabel=measure_of(panel[0]))
        axis.set_title(title(panel[0]), fontsize=9, wrap=True)
    close_with_legend(figure, path)


def plot_lengths(rows: Sequence[dict], path: pathlib.Path) -> None:
    """A panel a task and budget: score (of prose KL) against the context's length, a line a policy and scope with 95 % intervals, the full cache in each.

    Of tasks and budgets that rows have at several lengths; without one there is no picture, and an earlier one goes. Runs as in `plot_scores`.
    """
    tasks: dict[str, list[dict]] = {}
    for row in rows:
        tasks.setdefault(title({**row, "length": None}), []).append(row)
    own = {
        (name, budget): lines_of(sorted((row for row in task if row["budget"] in (budget, None)), key=lambda row: row["length"]))
        for name, task in tasks.items()
        for budget in sorted({row["budget"] for row in task if row["budget"] is not None}, reverse=True)
        if len({row["length"] for row in task if row["budget"] == budget}) > 1
    }  # fmt: skip
    if not own:
        path.unlink(missing_ok=True)
        return
    figure, axes = grid(len(own))
    drawn = list(dict.fromkeys(policy for lines in own.values() for policy in lines))
    for axis, ((name, budget), lines) in zip(axes, own.items(), strict=True):
        for policy, line in lines.items():
            draw_line(axis, "length", line, policy, drawn)
        lengths = sorted({row["length"] for row in tasks[name]})
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.set(xlabel="tokens of context", ylabel=measure_of(tasks[name][0]))
        axis.set_title(f"{name}, budget {budget:.4g}", fontsize=9, wrap=True)
    close_with_legend(figure, path)


def grid(panels: int) -> tuple:
    """A figure and the axes of so many panels, up to three side by side."""
    columns = min(panels, 3)
    down = -(-panels // columns)
    figure, axes = plt.subplots(down, columns, figsize=(1.5 + 5 * columns, 0.5 + 4.5 * down), squeeze=False, layout="constrained")
    for axis in axes.flat[panels:]:
        axis.set_axis_off()
    return figure, axes.flat[:panels]


def draw_line(axis, at: str, rows: Sequence[dict], name: str, names: Sequence[str]) -> None:
    """What the rows measure, with 95 % intervals if they have some, against their budget or length, whichever `at` names.

    names: the lines of the whole figure, so that each looks the same in all its panels.
    """
    number = names.index(name)
    y = np.array([row[measure_of(row)] for row in rows])
    # Apart by a little, so that intervals do not cover each other.
    x = np.array([row[at] for row in rows]) * (1 + 0.1 * (number / len(names) - 0.5))
    errors = [y - [row["low"] for row in rows], [row["high"] for row in rows] - y] if "low" in rows[0] else None
    axis.errorbar(x, y, errors, marker="o", markersize=3, elinewidth=0.6, label=name, **style(name, names))


def close_with_legend(figure, path: pathlib.Path) -> None:
    """Writes the figure with one legend for all its panels."""
    handles = {name: handle for axis in figure.axes for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), fontsize=7, loc="outside right center")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def style(name: str, names: Sequence[str]) -> dict:
    """How one line among those of `names` looks. The learned policy stands out, each line of it with dashes of its own, and the full cache stays behind."""
    if name.split()[0] == "full":
        return dict(color="0.3", linestyle="--", linewidth=1)
    if name.split()[0] == "retention":
        rank = [one for one in names if one.split()[0] == "retention"].index(name)
        return dict(linewidth=2.5, color="tab:red", zorder=3, linestyle=("-", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))[rank % 4])
    others = plt.cm.tab20.colors[:6] + plt.cm.tab20.colors[7:]  # without that red
    return dict(linewidth=1, color=others[names.index(name) % len(others)])


def plot_heads(records: Sequence[dict], path: pathlib.Path) -> None:
    """A map a policy and scope: the share of the context's entries that each layer and head keeps, at the smallest budget, mean over the records."""
    smallest = min(record["cell"]["budget"] for record in records)
    shares: dict[str, list] = {}
    for record in records:
        if record["cell"]["budget"] == smallest:
            shares.setdefault(label(record["cell"]), []).append(np.array(record["kept_by_stream"]) / record["context_tokens"])
    figure, axes = plt.subplots(1, len(shares), figsize=(1 + 1.3 * len(shares), 5), sharey=True, squeeze=False, layout="constrained")
    most = max(np.mean(share, axis=0).max() for share in shares.values())
    for axis, (name, share) in zip(axes[0], shares.items(), strict=True):
        image = axis.imshow(np.mean(share, axis=0), aspect="auto", cmap="viridis", vmin=0, vmax=most, interpolation="nearest")
        axis.set_title(name.replace(" ", "\n"), fontsize=7)
        axis.set_xlabel("head", fontsize=7)
    axes[0][0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label=f"share kept at budget {smallest:g}")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_distance(records: Sequence[dict], path: pathlib.Path) -> None:
    """A line a policy and scope: the share of entries kept against their distance from the newest token, as a share of the context, at the smallest budget."""
    smallest = min(record["cell"]["budget"] for record in records)
    shares: dict[str, list] = {}
    for record in records:
        if record["cell"]["budget"] == smallest:
            shares.setdefault(label(record["cell"]), []).append(record["kept_by_distance"])
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, share in shares.items():
        share = np.mean(share, axis=0)
        axis.plot((np.arange(len(share)) + 0.5) / len(share), share, label=name, **style(name, list(shares)))
    axis.set(xlabel="distance from the newest token, share of the context", ylabel=f"share kept at budget {smallest:g}")
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_dilution(rows: Sequence[dict], budget: int, margin: float, path: pathlib.Path) -> None:
    """Attention on the evidence, with the full cache's bound, and recall against the number of distractors, a line a cache. See experiments/dilution.py."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for name in dict.fromkeys(row["cache"] for row in rows):
        own = [row for row in rows if row["cache"] == name]
        x, mass, error = (np.array([row[field] for row in own]) for field in ("distractors", "mass", "mass_error"))
        axes[0].plot(x, mass, marker="o", markersize=3, label=name)
        axes[0].fill_between(x, mass - 2 * error, mass + 2 * error, alpha=0.2)
        axes[1].plot(x, [row["accuracy"] for row in own], marker="o", markersize=3, label=name)
    x = np.geomspace(*(pick(row["distractors"] for row in rows) for pick in (min, max)), 100)
    axes[0].plot(x, mass_bound(1, x, margin), color="0.3", linestyle="--", label="bound of the full cache")
    axes[0].set(title=f"attention on the evidence, budget {budget}", xlabel="distractors", xscale="log", ylim=(0, 1))
    axes[1].set(title="recall", xlabel="distractors", xscale="log", ylim=(0, 1.02))
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_streams(rows: Sequence[dict], path: pathlib.Path) -> None:
    """Loss above and KL to the full cache below, against the place in the stream: a column a budget, a line a policy. See experiments/stream.py."""
    budgets = sorted({row["budget"] for row in rows if row["budget"] is not None})
    policies = list(dict.fromkeys(row["policy"] for row in rows if row["policy"] != "full"))
    figure, axes = plt.subplots(2, len(budgets), figsize=(1.5 + 4 * len(budgets), 7), squeeze=False, sharex=True, sharey="row", layout="constrained")
    for column, budget in enumerate(budgets):
        for axis, measure in zip(axes[:, column], ("loss", "kl"), strict=True):
            for policy in ("full", *policies):
                own = [row for row in rows if row["policy"] == policy and row["budget"] in (budget, None)]
                if policy != "full" or measure == "loss":
                    middle = [(row["from"] + row["to"]) / 2 for row in own]
                    axis.plot(middle, [row[measure] for row in own], marker="o", markersize=3, label=policy, **style(policy, ["full", *policies]))
            axis.set_ylabel({"loss": "next-token loss, nats", "kl": "KL to the full cache, nats"}[measure])
        axes[0, column].set_title(f"{budget} tokens per stream", fontsize=9)
        axes[1, column].set(xlabel="token of the stream", yscale="log")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside right center")
    figure.savefig(path, dpi=130)
    plt.close(figure)
