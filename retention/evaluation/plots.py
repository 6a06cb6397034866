"""Pictures of what caches kept and of what that was worth."""

import pathlib
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)
import numpy as np  # noqa: E402


def plot_kept(kept: Sequence[Sequence[np.ndarray]], tokens: int, path: str | pathlib.Path, title: str, marks: Sequence[int] = ()) -> None:
    """One row a stream, (layer, head) from the top; dark where the position is kept. marks: positions to point out, such as a needle's."""
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
    for mark in marks:
        axis.axvline(mark, color="tab:red", linewidth=0.8, alpha=0.7)
    heads = len(kept[0])
    axis.set_yticks(np.arange(0, len(streams), heads * 5), [f"layer {i}" for i in range(0, len(kept), 5)])
    axis.set(xlabel="position", title=title)
    side.barh(np.arange(len(streams)) + 0.5, [len(positions) / tokens for positions in streams], height=1.0, color="0.4")
    side.set(xlabel="share kept")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_results(rows: Sequence[dict], records: Sequence[dict], folder: pathlib.Path) -> None:
    """accuracy.png, kept_by_head.png and kept_by_distance.png of an evaluation: its table's rows and its records, see harness.evaluate."""
    plot_scores(rows, folder / "accuracy.png")
    kept = [record for record in records if "kept_by_stream" in record and record["cell"]["policy"] != "full"]
    if kept:
        plot_heads(kept, folder / "kept_by_head.png")
        plot_distance(kept, folder / "kept_by_distance.png")


def label(cell: dict) -> str:
    return f"{cell['policy']} ({cell['scope']})"


def plot_scores(rows: Sequence[dict], path: pathlib.Path) -> None:
    """A panel a task and length: score (of prose KL) against budget, a line a policy and scope with 95 % intervals; the full cache as a band."""
    panels = list(dict.fromkeys((row["task"], row["length"]) for row in rows))
    figure, axes = plt.subplots(1, len(panels), figsize=(1.5 + 5 * len(panels), 5), squeeze=False, layout="constrained")
    names = list(dict.fromkeys(label(row) for row in rows if row["policy"] != "full"))
    for axis, (task, length) in zip(axes[0], panels, strict=True):
        mine = [row for row in rows if (row["task"], row["length"]) == (task, length)]
        measure = "score" if "score" in mine[0] else "kl"
        for row in mine:
            if row["policy"] == "full":
                axis.axhline(row[measure], color="0.3", linestyle="--", linewidth=1, label="full cache")
                if "low" in row:
                    axis.axhspan(row["low"], row["high"], color="0.3", alpha=0.08)
        for number, name in enumerate(names):
            line = sorted((row for row in mine if label(row) == name), key=lambda row: row["budget"])
            x, y = [row["budget"] for row in line], np.array([row[measure] for row in line])
            # Apart by a little, so that intervals do not cover each other.
            x = np.array(x) * (1 + 0.012 * (number - len(names) / 2))
            errors = [y - [row["low"] for row in line], [row["high"] for row in line] - y] if "low" in mine[0] else None
            learned = name.startswith("retention")
            style = dict(linewidth=2.5, color="tab:red", zorder=3) if learned else dict(linewidth=1, color=plt.cm.tab20(number % 20))
            axis.errorbar(x, y, errors, marker="o", markersize=3, elinewidth=0.6, label=name, **style)
        axis.set_xscale("log", base=2)
        axis.set(title=f"{task}{f', {length} tokens' if length else ''}", xlabel="budget", ylabel=measure)
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=130)
    plt.close(figure)


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
    for number, (name, share) in enumerate(shares.items()):
        share = np.mean(share, axis=0)
        style = dict(linewidth=2.5, color="tab:red") if name.startswith("retention") else dict(linewidth=1, color=plt.cm.tab20(number % 20))
        axis.plot((np.arange(len(share)) + 0.5) / len(share), share, label=name, **style)
    axis.set(xlabel="distance from the newest token, share of the context", ylabel=f"share kept at budget {smallest:g}")
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)
