"""What `kernels.py` has found, as tables and as rows of a CSV file."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from gemms import Choice, GemmCase
from rich import box
from rich.console import Console
from rich.table import Table
from training_step import Job

WAYS = ("forward", "backward")
TIMED = ("fp8", "inductor")  # our kernels, Inductor's code
NOT_RUN = "not run"
# What a launch is.
FUSED, OTHER = "fused regions", "other"
SUMS, SEARCH, COLUMNS = "their sums over rows", "search for amax", "sums over columns"
KINDS = (FUSED, SUMS, SEARCH, COLUMNS, "GEMM", "attention", OTHER)
MOVES = "only transposing"


# ---- what is found -------------------------------------------------------------------------------
@dataclass
class Row:
    """What is known of a region; ``us`` by those of TIMED."""

    name: str
    calls: dict[str, float]  # per layer
    bytes: float
    kernels: int
    size: str = ""
    differing: float | None = None
    failed: bool = False
    inductor_kernels: int | None = None
    us: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name} {self.size}".strip()

    @property
    def times(self) -> float:
        """How often a layer calls it."""
        return sum(self.calls.values())

    @property
    def ratio(self) -> float | None:
        """How many times Inductor's time is that of ours."""
        return self.us["inductor"] / self.us["fp8"] if "inductor" in self.us else None


@dataclass(frozen=True)
class GemmSpeed:
    """TFLOP/s of what the compiler launches, and of cuBLASLt."""

    case: GemmCase
    choice: Choice
    chosen: float
    cublaslt: float

    @property
    def ratio(self) -> float:
        return self.chosen / self.cublaslt


@dataclass
class Results:
    """``roof``: bytes per second of a copy; None where nothing is timed."""

    roof: float | None
    launches: dict[str, Counter[str]]
    rows: list[Row]
    gemms: list[GemmSpeed]


# ---- tables --------------------------------------------------------------------------------------
def print_all(results: Results, job: Job, console: Console) -> None:
    say = partial(console.print, highlight=False, soft_wrap=True)
    if results.roof:
        say(f"copy of 1 GiB: {results.roof / 1e12:.2f} TB/s, read and written")
    else:
        say("Nothing is timed: that takes a GPU.")
    say("\nRegions (calls: per layer, forward/backward; ratio: Inductor's time over ours)")
    console.print(regions_table(results))
    if any(verdict(row) == NOT_RUN for row in results.rows):
        say(f"{NOT_RUN}: only the graph was; the kernels take a GPU or Triton's interpreter\n")
    say("Launches per layer")
    console.print(launches_table(results, job.layers))
    if results.gemms:
        say("TFLOP/s per GEMM, " + about_ratios(results.gemms))
        console.print(gemms_table(results.gemms))


def table_with(*columns: str) -> Table:
    """A table whose first column holds names, and the others numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        justify: Literal["left", "right"] = "right" if table.columns else "left"
        table.add_column(name, justify=justify, no_wrap=True)
    return table


def regions_table(results: Results) -> Table:
    table = table_with(
        *("region", "calls", "rows x cols", "MB", "us", "of roof", "kernels"),
        *("Inductor us", "kernels", "ratio", "differing"),
    )
    for row in results.rows:
        calls = "/".join(f"{row.calls[way]:g}" for way in WAYS)
        table.add_row(row.name, calls, row.size, *numbers(row, results.roof), verdict(row))
    table.add_section()
    total = sum_per_layer(results.rows)
    table.add_row("a layer", "", "", *numbers(total, results.roof), "")
    return table


def numbers(row: Row, roof: float | None) -> list[str]:
    us = row.us.get("fp8")
    share = f"{row.bytes / us / roof * 1e6:.0%}" if us and roof else "-"
    return [
        f"{row.bytes / 1e6:.{0 if row.bytes >= 1e7 else 3}f}",
        shown(us, ".1f"),
        share,
        f"{row.kernels}",
        shown(row.us.get("inductor"), ".1f"),
        shown(row.inductor_kernels, "d"),
        shown(row.ratio, ".2f"),
    ]


def shown(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def verdict(row: Row) -> str:
    if row.failed:
        return "failed"
    return NOT_RUN if row.differing is None else f"{row.differing:.1g}"


def sum_per_layer(rows: list[Row]) -> Row:
    """All regions of a layer as one; what is not known of each of them is left out."""

    def total(values: Iterable[float]) -> float:
        return sum(row.times * value for row, value in zip(rows, values, strict=True))

    complete = [who for who in TIMED if rows and all(who in row.us for row in rows)]
    in_inductor = total(row.inductor_kernels or 0 for row in rows)
    return Row(
        name="a layer",
        calls={way: sum(row.calls[way] for row in rows) for way in WAYS},
        bytes=total(row.bytes for row in rows),
        kernels=round(total(row.kernels for row in rows)),
        inductor_kernels=round(in_inductor) if "inductor" in complete else None,
        us={who: total(row.us[who] for row in rows) for who in complete},
    )


def launches_table(results: Results, layers: int) -> Table:
    table = table_with("", *WAYS, "total")
    for kind in [*KINDS, MOVES]:
        counts = [results.launches[way][kind] / layers for way in WAYS]
        if is_counted(results, kind):
            table.add_row(kind, *(f"{count:g}" for count in [*counts, sum(counts)]))
        if kind == KINDS[-1]:
            totals = [sum(results.launches[way][k] for k in KINDS) / layers for way in WAYS]
            table.add_row("all", *(f"{count:g}" for count in [*totals, sum(totals)]))
    return table


def is_counted(results: Results, kind: str) -> bool:
    return results.roof is not None or any(results.launches[way][kind] for way in WAYS)


def about_ratios(gemms: list[GemmSpeed]) -> str:
    least = min(gemm.ratio for gemm in gemms)
    return f"chosen over cuBLASLt: geometric mean {mean_ratio(gemms):.3f}, minimum {least:.3f}"


def mean_ratio(gemms: list[GemmSpeed]) -> float:
    return statistics.geometric_mean(gemm.ratio for gemm in gemms)


def gemms_table(gemms: list[GemmSpeed]) -> Table:
    columns = ("GEMM", "role", "m", "n", "k", "chosen", "cuBLASLt", "ratio", "what was chosen")
    table = table_with(*columns)
    for gemm in gemms:
        case = gemm.case
        speeds = (f"{gemm.chosen:.0f}", f"{gemm.cublaslt:.0f}", f"{gemm.ratio:.2f}")
        sizes = map(str, (case.m, case.n, case.k))
        table.add_row(case.names, case.role, *sizes, *speeds, str(gemm.choice or "cuBLASLt"))
    return table


# ---- records -------------------------------------------------------------------------------------
def csv_rows(results: Results, layers: int) -> Iterator[tuple[str, str, float, str]]:
    if results.roof:
        yield "copy", "1 GiB", results.roof / 1e12, "TB/s"
    for index, row in enumerate(results.rows):
        yield from csv_rows_of(row, f"region {index} {row}")
    yield from csv_rows_of(sum_per_layer(results.rows), "regions of a layer")
    for way in WAYS:
        for kind in [*KINDS, MOVES]:
            if is_counted(results, kind):
                count = results.launches[way][kind] / layers
                yield "fp8", f"launches, {way}, {kind}", count, "per layer"
    for gemm in results.gemms:
        yield "chosen", str(gemm.case), gemm.chosen, "TFLOP/s"
        yield "cublaslt", str(gemm.case), gemm.cublaslt, "TFLOP/s"
    if results.gemms:
        yield "chosen", "geometric mean over cuBLASLt", mean_ratio(results.gemms), "x"


def csv_rows_of(row: Row, name: str) -> Iterator[tuple[str, str, float, str]]:
    yield "fp8", f"{name} calls", row.times, "per layer"
    yield "fp8", f"{name} bytes", row.bytes / 1e6, "MB"
    yield from ((who, name, us, "us") for who, us in row.us.items())
