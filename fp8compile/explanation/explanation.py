"""What the compiler does with a model, as a value: rows for a program, text for a person."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..backends import REFERENCE
from ..passes.choose_precision import SLOWER
from ..recipe import Recipe
from ..report import EdgeRow, KernelRow, Measured, Row, SavedRow
from .page import page
from .tables import Cells, edge_cells, gemm_cells, kernel_cells, rich_table

SCHEMA, VERSION = "fp8compile.explanation", 1
PathLike = str | os.PathLike[str]
_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` found: ``rows`` and the like for a program, ``str()`` for a person.

    ``rows``: a Row per GEMM. ``kernels``: a KernelRow per fused kernel, which runs, or would run,
    on the device that times are predicted for. ``saved``: what forward keeps for backward, by
    format. ``edges``: an EdgeRow per FP8 operand, with its scale after training. ``measured``: the
    times of a step, or None.
    """

    rows: tuple[Row, ...]
    recipe: Recipe
    kernels: tuple[KernelRow, ...] = ()
    saved: tuple[SavedRow, ...] = ()
    edges: tuple[EdgeRow, ...] = ()
    measured: Measured | None = None

    # --- numbers --------------------------------------------------------------------------------

    @property
    def fp8_share(self) -> float | None:
        """The share of the GEMMs' FLOPs that is in FP8; None if sizes are symbolic."""
        if self.gflops is None:
            return None
        return sum(float(r.gflops) for r in self.rows if r.is_fp8) / (self.gflops or 1.0)

    @property
    def gflops(self) -> float | None:
        """All GEMMs' 10^9 FLOPs per step; None if sizes are symbolic or there are no GEMMs."""
        return _sum(row.gflops for row in self.rows if row.gflops != "")

    @property
    def megabytes(self) -> float | None:
        """What all GEMMs and fused kernels move per step; None like ``gflops``."""
        gemms = _sum(row.megabytes for row in self.rows if row.megabytes != "")
        fused = [(row.megabytes, row.per_step) for row in self.kernels]
        if gemms is None or any(moved is None for moved, _ in fused):
            return None
        return gemms + sum(moved * launches for moved, launches in fused if moved is not None)

    @property
    def saved_bytes(self) -> int | None:
        """Bytes that forward keeps for backward; None if sizes are symbolic."""
        known = [row.bytes for row in self.saved if isinstance(row.bytes, int)]
        return sum(known) if len(known) == len(self.saved) else None

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

    @property
    def predicted_for(self) -> str:
        """The device that times are predicted for, or ""."""
        return next((row.predicted_for for row in self.rows if row.predicted_for), "")

    # --- text -----------------------------------------------------------------------------------

    def summary(self) -> str:
        """One line: how many GEMMs, what share of their FLOPs, and how fast they should be."""
        gemms = [row for row in self.rows if row.k != ""]
        fp8 = [row for row in gemms if row.is_fp8]
        sites = len({site for row in gemms for site in row.sites})
        line = f"{sites} sites, {len(fp8)} of {len(gemms)} GEMMs in FP8"
        if self.fp8_share is not None:
            line += f", {self.fp8_share:.1%} of their FLOPs"
        if self.predicted_ratio is not None:
            line += f"; GEMM time {self.predicted_ratio:.2f}x, predicted for {self.predicted_for}"
        own = Counter(row.recipe for row in gemms if row.recipe)
        others = "".join(f", {name} for {count} GEMMs" for name, count in own.items())
        return f"{line}; recipe {self.recipe}{others}"

    def notes(self) -> list[str]:
        """Lines about work, kernels, memory and, if it was measured, time."""
        lines = []
        if self.gflops is not None and self.megabytes is not None:
            flop, moved = _short(1e9 * self.gflops), _short(1e6 * self.megabytes)
            fused = " and the fused kernels" * bool(self.kernels)
            lines.append(f"{flop}FLOP in GEMMs, {moved}B moved by them{fused}")
        if self.kernels:
            launches = sum(row.per_step for row in self.kernels)
            kernels = sum(row.per_step > 0 for row in self.kernels)
            line = f"{launches} launches of {kernels} fused kernels"
            emulated = any(row.kernel == REFERENCE for row in self.rows)
            lines.append(line + " on a GPU; here FP8 is emulated" * emulated)
        if self.saved:
            total = "" if self.saved_bytes is None else f" {_short(self.saved_bytes)}B"
            parts = (f"{_short(r.bytes)}B {r.format} in {r.tensors}" for r in self.saved)
            lines.append(f"kept for backward:{total} ({', '.join(parts)} tensors)")
        if any(edge.scale is not None for edge in self.edges):
            wrong = sum(bool(e.not_finite or e.saturated or e.jumped) for e in self.edges)
            lines.append(f"{len(self.edges)} FP8 operands, {wrong} with events")
        return lines + ([self._speed(self.measured)] if self.measured else [])

    def _speed(self, found: Measured) -> str:
        """What was measured beside what was predicted for it: the GEMMs' saving, of the step."""
        line = (
            f"measured on {found.device}: a step takes {found.high_ms:.2f} ms in its own precision,"
            f" {found.fp8_ms:.2f} in FP8, {found.high_ms / found.fp8_ms:.2f}x"
        )
        high = sum(row.high_us or 0.0 for row in self.rows)
        saved = high * (1 - self.predicted_ratio) / 1e3 if self.predicted_ratio else 0.0
        return f"{line} (predicted {found.high_ms / (found.high_ms - saved):.2f}x)"

    def table(self) -> Table:
        """The GEMMs as a rich table; the name of a site stands in the first of its rows."""
        return rich_table(gemm_cells(self.rows, SLOWER), self.summary(), no_wrap=("site",))

    def __rich__(self) -> RenderableType:
        more = [rich_table(cells) for _, cells in self._tables()[1:]]
        return Group(self.table(), *more, *map(Text, self.notes()))

    def __str__(self) -> str:
        text = io.StringIO()
        width = 200  # wide enough for names; a terminal gets its own width through rich
        Console(file=text, width=width, color_system=None).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())

    def _tables(self) -> list[tuple[str, Cells]]:
        tables = [("GEMMs", gemm_cells(self.rows, SLOWER))]
        if self.kernels:
            tables.append(("Fused kernels", kernel_cells(self.kernels)))
        if any(edge.scale is not None for edge in self.edges):
            tables.append(("Scales", edge_cells(self.edges)))
        return tables

    # --- files ----------------------------------------------------------------------------------

    def to_json(self, path: PathLike | None = None) -> str:
        """As JSON text, which is also written to ``path``.

        Version 1 of the schema, in which fields may be added but not changed: ``schema``,
        ``version``, ``recipe`` (``name``, ``text``), ``summary``
        (``text``, ``notes``, and ``fp8_share``, ``gflops``, ``megabytes``, ``saved_bytes``,
        ``predicted_ratio``, ``predicted_for`` as the properties of that name), and the lists
        ``gemms``, ``kernels``, ``saved``, ``edges`` with the fields of Row, KernelRow, SavedRow and
        EdgeRow; ``measured`` has those of Measured, or is null.
        """
        numbers = ("fp8_share", "gflops", "megabytes", "saved_bytes", "predicted_ratio")
        found = {
            "schema": SCHEMA,
            "version": VERSION,
            "recipe": {"name": self.recipe.name, "text": str(self.recipe)},
            "summary": {
                "text": self.summary(),
                "notes": self.notes(),
                **{name: getattr(self, name) for name in (*numbers, "predicted_for")},
            },
            "gemms": [asdict(row) for row in self.rows],
            "kernels": [asdict(row) for row in self.kernels],
            "saved": [asdict(row) for row in self.saved],
            "edges": [asdict(row) for row in self.edges],
            "measured": asdict(self.measured) if self.measured else None,
        }
        return _written(json.dumps(found, indent=1), path)

    def to_html(self, path: PathLike | None = None) -> str:
        """As one HTML page that needs no network: summary, tables, and the kernels' source, folded
        away. It is also written to ``path``.
        """
        lines = [self.summary(), *self.notes()]
        return _written(
            page("FP8: what the compiler does", lines, self._tables(), self.kernels), path
        )


def _sum(values: Iterable[float | str]) -> float | None:
    """The sum; None of nothing, or if one is symbolic."""
    numbers = [value for value in values if value != ""]
    known = [float(value) for value in numbers if not isinstance(value, str)]
    return sum(known) if known and len(known) == len(numbers) else None


def _short(count: float | str) -> str:
    """A number with the prefix of its unit: ``5.76 G``."""
    if isinstance(count, str):
        return f"({count}) "
    unit, prefix = next(((u, p) for u, p in _PREFIXES if count >= u), (1, ""))
    return f"{count / unit:.3g} {prefix}"


def _written(text: str, path: PathLike | None) -> str:
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text
