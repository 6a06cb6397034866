"""Pictures of what a cache kept."""

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
