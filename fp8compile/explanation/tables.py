"""The tables of an explanation as plain text cells, for a terminal and for a page alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table

from ..report import WEIGHTS, EdgeRow, KernelRow, Row

_SIZES = ("M", "N", "K")
_PREDICTED = ("high -> fp8 us", "pays from")
_SHORT = {"forward": "fwd", "backward": "bwd", WEIGHTS: "once"}


@dataclass(frozen=True)
class Cells:
    """A table. ``right``: the columns that hold numbers; ``marked``: rows that stand out."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: tuple[str, ...] = ()
    marked: frozenset[int] = frozenset()


def rich_table(cells: Cells, caption: str = "", no_wrap: Sequence[str] = ()) -> Table:
    """For a terminal."""
    table = Table(caption=caption or None, caption_justify="left")
    for name in cells.columns:
        table.add_column(
            name,
            justify="right" if name in cells.right else "left",
            no_wrap=name in no_wrap,
            overflow="ellipsis" if name in no_wrap else "fold",
        )
    for i, row in enumerate(cells.rows):
        table.add_row(*row, style="yellow" if i in cells.marked else None)
    return table


# --- GEMMs --------------------------------------------------------------------------------------


def gemm_cells(rows: Sequence[Row], slower: str) -> Cells:
    """A row per GEMM; the name of a site stands in the first of its rows.

    ``slower``: the reason that its times, which stand beside it, need not be repeated in.
    """
    shown, cells = None, []
    for row in rows:
        cells.append(("" if row.fqn == shown else row.fqn, *_gemm(row, slower)))
        shown = row.fqn
    columns = ("site", "GEMM", *_SIZES, "runs in", *_PREDICTED, "kernel or reason")
    marked = frozenset(i for i, row in enumerate(rows) if not row.is_fp8)
    return Cells(columns, tuple(cells), (*_SIZES, *_PREDICTED), marked)


def _gemm(row: Row, slower: str) -> tuple[str, ...]:
    reason = slower if row.reason.startswith(slower) else row.reason
    kernel = row.kernel if row.measured_us is None else f"{row.kernel}, {_us(row.measured_us)} us"
    kernel = "; ".join(filter(None, (kernel, row.scaling)))
    times = (us for us in (row.high_us, row.fp8_us) if us is not None)
    return (
        row.gemm,
        *(str(size) for size in (row.m, row.n, row.k)),
        row.formats or row.decision,
        " -> ".join(map(_us, times)),
        "" if row.fp8_us is None else "never" if row.pays_from is None else str(row.pays_from),
        reason or kernel,
    )


def _us(us: float) -> str:
    return f"{us:.1f}" if us < 1000 else f"{us:.0f}"


# --- kernels ------------------------------------------------------------------------------------


def kernel_cells(kernels: Sequence[KernelRow]) -> Cells:
    """A row per fused kernel: how often it runs, what it computes, moves and writes."""
    measured = any(kernel.measured_us is not None for kernel in kernels)
    right = ("runs", "MB in + out", "predicted, measured us" if measured else "us")
    columns = ("fused kernel", "runs", "size", "computes", "writes", *right[1:], "for")
    rows = tuple(_kernel(kernel) for kernel in kernels)
    return Cells(columns, rows, right)


def _kernel(row: KernelRow) -> tuple[str, ...]:
    times = [us for us in (row.predicted_us, row.measured_us) if us is not None]
    more = f" + {len(row.feeds) - 1} more" if len(row.feeds) > 1 else ""
    return (
        row.name,
        f"{row.launches} {_SHORT[row.direction]}",
        row.size or f"{row.regions} regions",
        _in_short(row.fused) or "cast only",
        ", ".join(row.writes),
        f"{_mb(row.mb_read)} + {_mb(row.mb_written)}",
        ", ".join(map(_us, times)),
        row.feeds[0] + more if row.feeds else "",
    )


def _in_short(names: Iterable[str]) -> str:
    """``mul add mul`` as ``mul x2, add``."""
    counts = Counter(names).items()
    return ", ".join(name if count == 1 else f"{name} x{count}" for name, count in counts)


def _mb(count: float | str) -> str:
    if isinstance(count, str):
        return count
    return f"{count:.0f}" if count >= 100 else f"{count:.3g}"


# --- edges --------------------------------------------------------------------------------------


def edge_cells(edges: Sequence[EdgeRow]) -> Cells:
    """A row per operand: its scale, and what went wrong with it so far."""
    right = ("scale", "amax", "not finite", "saturated", "jumped")
    rows, shown = [], None
    for edge in edges:
        numbers = ("" if value is None else f"{value:.4g}" for value in (edge.scale, edge.amax))
        events = (str(n or "") for n in (edge.not_finite, edge.saturated, edge.jumped))
        site = "" if edge.site == shown else edge.site
        rows.append((site, edge.operand, edge.cast, *numbers, *events))
        shown = edge.site
    marked = frozenset(i for i, e in enumerate(edges) if e.not_finite or e.saturated or e.jumped)
    return Cells(("site", "operand", "cast", *right), tuple(rows), right, marked)
