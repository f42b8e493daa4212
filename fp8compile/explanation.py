"""Say what the compiler does with a model, before or after it is trained."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import fx, nn

from . import internals
from .compile import compile_graph
from .options import parse_options
from .passes.choose_precision import SLOWER
from .recipe import Gemm, Recipe
from .report import Row
from .untouched import fresh, left_as_it_was

_SIZES = ("M", "N", "K")
_PREDICTED = ("high -> fp8 us", "pays from")
_COLUMNS = ("site", "GEMM", *_SIZES, "runs in", *_PREDICTED, "kernel or reason")


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` found: ``rows`` for a program, ``str()`` for a person."""

    rows: tuple[Row, ...]
    recipe: Recipe

    @property
    def fp8_share(self) -> float | None:
        """The share of the GEMMs' FLOPs that is in FP8; None if sizes are symbolic."""
        gflops = [row.gflops for row in self.rows if row.gflops != ""]
        if not gflops or not all(isinstance(value, float) for value in gflops):
            return None
        return sum(float(r.gflops) for r in self.rows if r.is_fp8) / (
            sum(map(float, gflops)) or 1.0
        )

    @property
    def predicted_ratio(self) -> float | None:
        """The predicted time of the GEMMs, with their casts, over that in high precision."""
        high = [row.high_us for row in self.rows if row.high_us is not None]
        chosen = [
            row.fp8_us if row.is_fp8 and row.fp8_us is not None else row.high_us
            for row in self.rows
            if row.high_us is not None
        ]
        return sum(us for us in chosen if us is not None) / sum(high) if high else None

    def summary(self) -> str:
        """One line: how many GEMMs, what share of their FLOPs, and how fast they should be."""
        gemms = [row for row in self.rows if row.k != ""]
        fp8 = [row for row in gemms if row.is_fp8]
        sites = len({site for row in gemms for site in row.sites})
        line = f"{sites} sites, {len(fp8)} of {len(gemms)} GEMMs in FP8"
        if self.fp8_share is not None:
            line += f", {self.fp8_share:.1%} of their FLOPs"
        if self.predicted_ratio is not None:
            device = next(row.predicted_for for row in self.rows if row.predicted_for)
            line += f"; GEMM time {self.predicted_ratio:.2f}x, predicted for {device}"
        own = Counter(row.recipe for row in gemms if row.recipe)
        others = "".join(f", {name} for {count} GEMMs" for name, count in own.items())
        return f"{line}; recipe {self.recipe}{others}"

    def table(self) -> Table:
        """The rows as a rich table; the name of a site stands in the first of its rows."""
        table = Table(caption=self.summary(), caption_justify="left")
        for name in _COLUMNS:
            right = name in (*_SIZES, *_PREDICTED)
            table.add_column(name, justify="right" if right else "left", no_wrap=name == "site")
        shown = None
        for row in self.rows:
            site = "" if row.fqn == shown else row.fqn
            shown = row.fqn
            table.add_row(site, *_cells(row), style=None if row.is_fp8 else "yellow")
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        width = 200  # wide enough for names; a terminal gets its own width through rich
        Console(file=text, width=width, color_system=None).print(self.table())
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())

    def __rich__(self) -> Table:
        return self.table()


def explain(
    model: Callable[..., Any],
    *inputs: Any,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Explanation:
    """What ``torch.compile(model, backend="fp8", options=options)(*inputs)`` would run in FP8.

    One row per GEMM of each site, forward and backward: its name, sizes, formats and kernel, or
    the reason why it stays in high precision; then the matmuls that belong to no site.

    The model is traced and run once, in its own precision. Its parameters, buffers and gradients,
    its scaling state and the random number generators are left as they were.

    Raises OptionError and RecipeError for what is wrong with the options.
    """
    parsed = replace(parse_options(options), strict=False)
    rows: list[Row] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        compile_graph(
            gm,
            example_inputs,
            parsed,
            inner_compile=_no_code,
            on_joint=rows.extend,
            root=target if isinstance(target, nn.Module) else None,
        )
        return gm.forward

    target = internals.uncompiled(model)
    with left_as_it_was(target):
        torch.compile(fresh(target), backend=backend, dynamic=False)(*inputs, **kwargs)
    return Explanation(tuple(_by_site(rows)), parsed.recipe)


def _cells(row: Row) -> list[str]:
    """A row of the table, without its site."""
    sizes = (str(size) for size in (row.m, row.n, row.k))
    # The times of what was declined stand beside it.
    reason = SLOWER if row.reason.startswith(SLOWER) else row.reason
    return [
        row.gemm,
        *sizes,
        row.formats or row.decision,
        _times(row),
        _pays_from(row),
        "; ".join(filter(None, (row.kernel, row.scaling))) if row.is_fp8 else reason,
    ]


def _times(row: Row) -> str:
    times = (us for us in (row.high_us, row.fp8_us) if us is not None)
    return " -> ".join(f"{us:.1f}" if us < 1000 else f"{us:.0f}" for us in times)


def _pays_from(row: Row) -> str:
    if row.fp8_us is None:
        return ""
    return "never" if row.pays_from is None else str(row.pays_from)


def _by_site(rows: Sequence[Row]) -> list[Row]:
    """Sites in the order of their first GEMM, each with fprop, dgrad and wgrad in this order."""
    sites = {row.fqn: i for i, row in reversed(list(enumerate(rows)))}
    roles = {str(gemm): i for i, gemm in enumerate(Gemm)}
    return sorted(rows, key=lambda row: (sites[row.fqn], roles.get(row.gemm, len(roles))))


def _no_code(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
    """In place of Inductor's code generation: the graphs are only looked at."""
    return gm.forward
