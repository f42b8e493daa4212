"""Pictures of what a Monitor has recorded. They need matplotlib, which nothing else here does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from ..errors import MonitorError
from ..formats import Format
from ..recipe import Operand
from ..records import Record
from .measured import BINS, BINS_PER_OCTAVE, OCTAVES, Measured

COLORS = {"input": "#0072B2", "weight": "#009E73", "grad_output": "#D55E00"}
SATURATES, REPRESENTABLE, VANISHES = "#CC3311", "#4477AA", "#999999"
_BANDS = (0.0, 0.1, 0.5, 0.9, 1.0)
_MOST_LABELS = 40  # of a heat map's rows

Table = dict[str, dict[str, dict[int, Record]]]  # operand -> site -> step -> record


def draw_bands(
    axes: Any, steps: Sequence[int], bands: Sequence[Sequence[float]], color: str
) -> None:
    """Draw a distribution over steps: ``bands`` are its minimum, 10th percentile, median, 90th
    percentile and maximum at each step.
    """
    low, p10, middle, p90, high = zip(*bands, strict=True)
    if len(steps) > 1:
        axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
        axes.fill_between(steps, p10, p90, color=color, alpha=0.35, linewidth=0)
    else:  # a band of no width
        axes.vlines(steps, low, high, color=color, alpha=0.3, linewidth=3)
        axes.vlines(steps, p10, p90, color=color, alpha=0.5, linewidth=9)
    axes.plot(steps, middle, color=color, marker=".", markersize=4, linewidth=1.2)


def draw_records(records: Sequence[Record]) -> Any:
    """A column per operand role: its scales over the steps, and below them every edge's amax."""
    table = _by_edge(records)
    sites = max(len(found) for found in table.values())
    height = 1.2 + 0.22 * min(max(sites, 6), _MOST_LABELS)
    figure = _new_figure((4.2 * len(table), 3.2 + height))
    grid = figure.subplots(2, len(table), squeeze=False, sharex="col", height_ratios=[3, height])
    for (operand, edges), top, bottom in zip(table.items(), *grid, strict=True):
        formats = sorted({str(r.format) for steps in edges.values() for r in steps.values()})
        top.set_title(f"{operand} ({', '.join(formats)})", fontsize="medium")
        _draw_scales(top, edges, COLORS[operand])
        _draw_heat(figure, bottom, edges, pad=0.15 / height)
        if bottom is not grid[1][0] and list(edges) == list(next(iter(table.values()))):
            bottom.set_yticklabels([])  # as on the left
    grid[0][0].set_ylabel("log2(scale)")
    figure.suptitle(
        "Above: scales, FP8_MAX / amax; line: median of the edges; dark: 10 to 90 %; light: all\n"
        "Below: amax of every edge",
        fontsize="medium",
    )
    return figure


def _by_edge(records: Sequence[Record]) -> Table:
    """Of two records of an edge in one step, that of the training itself counts."""
    roles = [str(operand) for operand in Operand]
    found: Table = {}
    for record in sorted(records, key=lambda r: (roles.index(r.operand), not r.is_measured)):
        found.setdefault(record.operand, {}).setdefault(record.site, {})[record.step] = record
    order = {site: i for i, site in enumerate(dict.fromkeys(r.site for r in records))}
    return {o: dict(sorted(e.items(), key=lambda pair: order[pair[0]])) for o, e in found.items()}


def _draw_scales(axes: Any, edges: Mapping[str, Mapping[int, Record]], color: str) -> None:
    scales: dict[int, list[float]] = {}
    for found in edges.values():
        for step, record in found.items():
            if record.scale is not None:
                scales.setdefault(step, []).append(math.log2(record.scale))
    if scales:
        steps = sorted(scales)
        bands = [np.quantile(scales[step], _BANDS).tolist() for step in steps]
        draw_bands(axes, steps, bands, color)
    else:
        axes.text(0.5, 0.5, "no scale per tensor", transform=axes.transAxes, ha="center")
        axes.set_yticks([])
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_heat(
    figure: Any, axes: Any, edges: Mapping[str, Mapping[int, Record]], pad: float
) -> None:
    steps = sorted({step for found in edges.values() for step in found})
    values = np.full((len(edges), len(steps)), np.nan)
    for row, found in enumerate(edges.values()):
        for column, step in enumerate(steps):
            if step in found and found[step].amax:
                values[row, column] = math.log2(found[step].amax or 1.0)
    if np.isnan(values).all():
        axes.text(0.5, 0.5, "no amax recorded", transform=axes.transAxes, ha="center")
        axes.set_yticks([])
    else:
        rows = np.arange(len(edges) + 1) - 0.5
        axes.set_facecolor("#dddddd")  # where nothing is known
        mesh = axes.pcolormesh(_borders(steps), rows, values, cmap="viridis", rasterized=True)
        figure.colorbar(mesh, ax=axes, label="log2(amax)", location="bottom", aspect=30, pad=pad)
        every = -(-len(edges) // _MOST_LABELS)
        axes.set_yticks(range(0, len(edges), every), list(edges)[::every], fontsize="x-small")
        axes.set_ylim(len(edges) - 0.5, -0.5)
        _mark_events(axes, edges)
    axes.set_xlabel("step")
    if len(steps) > 1:
        axes.xaxis.get_major_locator().set_params(integer=True)
    else:
        axes.set_xticks(steps)


def _mark_events(axes: Any, edges: Mapping[str, Mapping[int, Record]]) -> None:
    """A cross where one of the counts is larger than in the edge's record before."""
    marks = []
    for row, found in enumerate(edges.values()):
        counted = [found[step] for step in sorted(found) if found[step].events is not None]
        counts = [sum(record.events or ()) for record in counted]
        rose = zip(counted, [0, *counts], counts, strict=False)
        marks += [(record.step, row) for record, before, now in rose if now > before]
    if marks:
        x, y = zip(*marks, strict=True)
        label = "events since the record before"
        axes.scatter(x, y, marker="x", s=14, linewidths=1, color=SATURATES, label=label)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), fontsize="x-small", frameon=False)


def _borders(steps: Sequence[int]) -> list[float]:
    """Where the cells of a heat map begin and end."""
    between = [(a + b) / 2 for a, b in pairwise(steps)]
    first = between[0] - steps[0] if between else 0.5
    last = steps[-1] - between[-1] if between else 0.5
    return [steps[0] - first, *between, steps[-1] + last]


# --- one edge -----------------------------------------------------------------------------------


def draw_edge(title: str, edge: Measured) -> Any:
    """The histogram of an edge's magnitudes, above the values that either format has for them."""
    scale = edge.scale if edge.scale is not None else edge.format.max / (edge.amax or 1.0)
    scales = {to: scale * to.max / edge.format.max for to in Format}
    figure = _new_figure((9, 5.2))
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1.3])
    grids = {to: _magnitudes(to) / scales[to] for to in Format}
    _draw_histogram(top, edge, None if edge.scale is None else grids[edge.format])
    for row, (to, values) in enumerate(grids.items()):
        color = REPRESENTABLE if to is edge.format else VANISHES
        bottom.vlines(np.log2(values), row - 0.38, row + 0.38, color=color, linewidth=0.7)
    own = "scales per block (values are drawn for one of all)"
    if edge.scale is not None:
        own = f"scale {edge.scale:.3g}"
    bottom.set_yticks(range(len(grids)), [f"{to} values" for to in grids])
    bottom.set_ylim(len(grids) - 0.5, -0.5)
    bottom.set_xlabel("log2 |value|")
    db = "no SQNR" if edge.sqnr_db is None else f"SQNR {edge.sqnr_db:.1f} dB"
    zeros = 1 - edge.nonzero / max(1, edge.elements)
    figure.suptitle(
        f"{title}: cast to {edge.format}, {own}\n{db}, saturated "
        f"{edge.clipped / max(1, edge.elements):.3%}, underflowed "
        f"{edge.underflowed / max(1, edge.nonzero):.3%}; {zeros:.1%} are zeros",
        fontsize="medium",
    )
    return figure


def _draw_histogram(axes: Any, edge: Measured, grid: np.ndarray | None) -> None:
    """Bars coloured by what becomes of them; ``grid``: the magnitudes that the edge's own format
    has with its scale, None if it has many.
    """
    counts = edge.counts.numpy() / max(1, edge.nonzero)
    there = np.nonzero(counts)[0]
    left = OCTAVES[0] + np.arange(BINS) / BINS_PER_OCTAVE
    centers = left + 0.5 / BINS_PER_OCTAVE
    kinds = {"cast": (centers == centers, REPRESENTABLE)}
    if grid is not None:
        vanishes, saturates = math.log2(grid[0] / 2), math.log2(grid[-1])
        small, large = centers < vanishes, centers > saturates
        kinds = {
            "becomes zero": (small, VANISHES),
            f"representable in {edge.format}": (~small & ~large, REPRESENTABLE),
            "saturates": (large, SATURATES),
        }
        for place in (vanishes, saturates):
            axes.axvline(place, color="black", linewidth=0.8, linestyle="--")
    width = 1 / BINS_PER_OCTAVE
    for label, (which, color) in kinds.items():
        bars = [i for i in there if which[i]]
        if bars:
            axes.bar(left[bars], counts[bars], width, align="edge", color=color, label=label)
    axes.set_yscale("log")
    axes.set_ylabel("share of the values\nthat are not zero")
    if grid is not None:
        axes.legend(loc="upper left", fontsize="small", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _magnitudes(to: Format) -> np.ndarray:
    """Every finite value above zero of a format, in order."""
    values = torch.arange(128, dtype=torch.uint8).view(to.dtype).float()
    return values[values.isfinite() & (values > 0)].numpy()


def _new_figure(size: tuple[float, float]) -> Any:
    """A figure of no window: ``savefig`` writes it, and a notebook shows it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MonitorError(
            "plots need matplotlib, which is not installed: pip install matplotlib"
        ) from error
    return Figure(figsize=size, layout="constrained")
