"""The pictures of `recipe_study.py`, drawn from what it has kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import train_gpt
from recipe_results import ORDER, OWN, ROLES, Run, load

from fp8compile.monitoring.plots import draw_bands

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8C6D31", "#882255")
# The model's own precision is black; a recipe looks the same in every picture.
STYLES = {name: {"color": "black", "marker": "_"} for name in OWN} | {
    name: {"color": color, "marker": marker}
    for name, color, marker in zip(ORDER[len(OWN) :], COLORS, "osD^vPX*", strict=True)
}


def draw(folder: Path) -> None:
    """Draw all pictures of the runs in a folder into it."""
    runs = load(folder)
    if not runs:
        raise SystemExit(f"{folder} has no runs to draw; run without --draw first")
    title = f"{runs[0].place}; {runs[0].place.device}"
    draw_losses(runs, folder / "loss.png", title)
    draw_gradients(runs, folder / "gradients.png", title)
    if any(run.scales for run in runs):
        draw_scales(runs, folder / "scales.png", title)


def draw_losses(runs: Sequence[Run], path: Path, title: str) -> None:
    own, *others = runs
    window = max(1, len(own.losses) // 20)
    means = {run.name: train_gpt.running_mean(run.losses, window) for run in runs}
    figure, (top, bottom) = new_figure(title, 2, 1, (9, 6.5), sharex=True, height_ratios=[3, 2])
    for run in runs:
        color = STYLES[run.name]["color"]
        time = f", {run.step_ms:.1f} ms/step" if run.step_ms is not None else ""
        label = f"{run.name}: {run.final_loss:.4f}{time}"
        top.plot(means[run.name], color=color, linewidth=1.6, label=label)
    for run in others:
        pairs = zip(means[own.name], means[run.name], strict=True)
        color = STYLES[run.name]["color"]
        bottom.plot([100 * (b / a - 1) for a, b in pairs], color=color, linewidth=1.2)
    bottom.axhline(0, color="black", linewidth=0.8)
    smoothed = f",\nmean of {window} steps" if window > 1 else ""
    top.set_ylabel(f"training loss (nats per byte){smoothed}")
    bottom.set(xlabel="step", ylabel=f"against {own.name} (%)")
    figure.legend(loc="outside right center", title="loss at the end", frameon=False)
    figure.savefig(path, dpi=150)


def draw_gradients(runs: Sequence[Run], path: Path, title: str) -> None:
    # A run in float32 differs from float32 by nothing but the order of sums.
    shown = [run for run in runs if run.name != "fp32"]
    layers = list(runs[0].sqnr[0])
    height = max(4.5, 1.5 + 0.26 * len(layers))
    figure, (left, right) = new_figure(title, 1, 2, (11, height), width_ratios=[3, 2])
    for index, run in enumerate(shown):
        style = {**STYLES[run.name], "markersize": 5}
        means = [mean([layers[name] for layers in run.sqnr.values()]) for name in layers]
        offset = 0.5 * (index / max(1, len(shown) - 1) - 0.5)
        places = [row + offset for row in range(len(layers))]
        left.plot(means, places, linestyle="", label=run.name, **style)
        medians = {step: median(list(layers.values())) for step, layers in run.sqnr.items()}
        right.plot(list(medians), list(medians.values()), linewidth=1.2, **style)
    left.set_yticks(range(len(layers)), layers)
    left.set_ylim(len(layers) - 0.5, -0.5)
    left.set_xlabel("SQNR of the weight's gradient (dB), mean of the samples")
    right.set(xlabel="step", ylabel="SQNR (dB), median of the layers")
    figure.legend(loc="outside lower center", ncols=len(shown), frameon=False)
    figure.savefig(path, dpi=150)


def draw_scales(runs: Sequence[Run], path: Path, title: str) -> None:
    shown = [run for run in runs if run.scales]
    size = (10, 1.5 + 1.6 * len(shown))
    title += "\nscale = FP8_MAX / amax; line: median; dark: 10 to 90 %; light: smallest to largest"
    figure, grid = new_figure(title, len(shown), 3, size, sharex=True, sharey="col", squeeze=False)
    for run, row in zip(shown, grid, strict=True):
        color = STYLES[run.name]["color"]
        for role, axes in zip(ROLES.values(), row, strict=True):
            steps = list(run.scales)
            draw_bands(axes, steps, [run.scales[step][role] for step in steps], color)
            axes.text(1, 0.97, run.formats[role], transform=axes.transAxes, ha="right", va="top")
        row[0].set_ylabel(f"{run.name}\nlog2(scale)")
    for role, axes in zip(ROLES.values(), grid[0], strict=True):
        axes.set_title(role, fontsize="medium")
    for axes in grid[-1]:
        axes.set_xlabel("step")
    figure.savefig(path, dpi=150)


def new_figure(
    title: str, rows: int, columns: int, size: tuple[float, float], **kwargs: Any
) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", **kwargs)
    figure.suptitle(title, fontsize="medium")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid
