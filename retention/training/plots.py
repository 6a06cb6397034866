"""Curves of a training run."""

import pathlib

import matplotlib.pyplot as plt
import numpy as np


def plot_run(records: list[dict], folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes loss.png, retained.png, kept_share.png and speed.png from the records of a run's metrics.jsonl into `folder`; returns their paths."""
    steps = [record["step"] for record in records]

    def curve(axis, name: str) -> None:
        values = np.array([record[name] for record in records])
        (line,) = axis.plot(steps, values, linewidth=0.5, alpha=0.4)
        # One batch says little: the mean of those around it is what is to be read.
        width = max(1, len(values) // 40)
        smooth = np.convolve(values, np.ones(width), "same") / np.convolve(np.ones_like(values), np.ones(width), "same")
        axis.plot(steps, smooth, color=line.get_color(), label=name)

    def finish(figure, name: str) -> pathlib.Path:
        path = folder / name
        figure.savefig(path, dpi=120)
        plt.close(figure)
        return path

    losses, axes = plt.subplots(2, 3, figsize=(13, 6), sharex=True, layout="constrained")
    for axis, name in zip(axes.flat, ("loss", "kl", "ntp", "other_kl", "capacity", "gradient_norm"), strict=True):
        curve(axis, name)
        axis.set(title=name, yscale="log" if name == "gradient_norm" else "linear")
    axes[1, 1].set(xlabel="step")

    retained, (left, right) = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    curve(left, "retained_share")
    left.set(xlabel="step", title="retained mass, of the tokens seen: mean of S_t / (p_t + 1)")
    # [L, steps]
    layers = np.array([record["retained_by_layer"] for record in records]).T
    extent = (steps[0] - 0.5, steps[-1] + 0.5, len(layers) - 0.5, -0.5)
    image = right.imshow(layers, aspect="auto", cmap="viridis", vmin=0, extent=extent, interpolation="nearest")
    right.set(xlabel="step", ylabel="layer", title="the same by layer")
    retained.colorbar(image)

    # The last tenth of the steps: single batches have other documents and budgets.
    last = records[-max(1, len(records) // 10) :]
    # [L, H]
    share = np.mean([record["kept_share"] for record in last], axis=0)
    kept, axis = plt.subplots(figsize=(2.5 + 0.5 * share.shape[1], 1.5 + 0.25 * share.shape[0]), layout="constrained")
    image = axis.imshow(share, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    axis.set(xlabel="kv head", ylabel="layer", title=f"share kept at budget,\nsteps {last[0]['step']} to {last[-1]['step']}", xticks=range(share.shape[1]))
    kept.colorbar(image)

    speed, axes = plt.subplots(1, 2, figsize=(13, 4), layout="constrained")
    for axis, name in zip(axes, ("tokens_per_second", "model_flops_per_second"), strict=True):
        curve(axis, name)
        axis.set(xlabel="step", title=name, ylim=(0, None))

    return [finish(losses, "loss.png"), finish(retained, "retained.png"), finish(kept, "kept_share.png"), finish(speed, "speed.png")]
