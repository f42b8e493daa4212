"""What the compiler decided about a graph, and what was seen of it, as rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from .cost import COSTS, GemmCost
from .ir import ATTENTION, ATTENTION_BACKWARD, SCALED_MMS, Edge, GemmInfo, gemms, op_name
from .recipe import Gemm


@dataclass(frozen=True)
class Row:
    """One GEMM of one site, or of several that were merged.

    Sizes are ``out[M, N] = left[M, K] @ right[K, N]``, as text where they are symbolic;
    ``megabytes`` counts each operand read once, in its format, and the output written once.
    ``decision`` is "fp8" or the high-precision dtype; ``reason`` says why the latter. ``sites`` are
    the names of all sites it computes, ``recipe`` that of a recipe of their own. ``scaling`` says
    what current scaling would add to the time of its operands' GEMMs, where the choice between it
    and delayed scaling was made by that. ``high_us`` and
    ``fp8_us`` are the predicted microseconds in high precision and, with its casts, in FP8, on the
    device ``predicted_for``; for a symbolic size, with its value in the traced call. ``pays_from``
    is the predicted number of tokens from which on FP8 is faster. They are None where nothing is
    predicted. ``measured_us``: of the GEMM alone, without casts, where it was measured.
    """

    fqn: str
    gemm: str
    m: int | str
    n: int | str
    k: int | str
    gflops: float | str
    megabytes: float | str
    formats: str
    decision: str
    kernel: str
    reason: str
    sites: tuple[str, ...] = ()
    recipe: str = ""
    scaling: str = ""
    high_us: float | None = None
    fp8_us: float | None = None
    pays_from: int | None = None
    predicted_for: str = ""
    measured_us: float | None = None

    @property
    def is_fp8(self) -> bool:
        return self.decision == "fp8"


# What attention runs in, for which there is no reason not to.
_ATTENTION: dict[Any, str] = {ATTENTION: "FP8 in forward", ATTENTION_BACKWARD: "FP8 in backward"}
WEIGHTS = "weights"  # the direction of kernels that inference launches once, for all calls


@dataclass(frozen=True)
class KernelRow:
    """A fused Triton kernel, and how often a step launches it.

    ``direction``: "forward", "backward" or "weights". ``functions``: the names that its launches
    have in a profile, more than one where sums or scales are found first. ``size``: the matrix that
    it walks over. ``fused``: the operators that it computes, in order, without views; of a bundle,
    those of all its ``regions``. ``writes``: what it leaves in memory. ``feeds``: the GEMMs that
    take it in the same direction, over all ``launches``. ``mb_read`` and ``mb_written``: megabytes
    per launch, as text where sizes are symbolic. ``predicted_us`` and ``measured_us``: microseconds
    per launch, or None.
    """

    name: str
    direction: str
    functions: tuple[str, ...]
    launches: int
    regions: int
    size: str
    fused: tuple[str, ...]
    writes: tuple[str, ...]
    feeds: tuple[str, ...]
    mb_read: float | str
    mb_written: float | str
    source: str
    predicted_us: float | None = None
    measured_us: float | None = None

    @property
    def megabytes(self) -> float | None:
        """Read and written, per launch; None if sizes are symbolic."""
        if isinstance(self.mb_read, str) or isinstance(self.mb_written, str):
            return None
        return self.mb_read + self.mb_written

    @property
    def per_step(self) -> int:
        """How often a step launches it: not at all, if it casts weights that stay."""
        return 0 if self.direction == WEIGHTS else self.launches


@dataclass(frozen=True)
class EdgeRow:
    """An FP8 operand, with what its scaling state holds after training.

    ``site``: the one whose state it is; sites that take the same input share it. ``operand``:
    "input", "weight" or "grad_output". ``cast``: its format, with the granularity where that is
    not tensorwise. ``scale`` multiplies before the cast; ``amax`` is that of the last step. They
    are None where nothing is known. The events are those of ``fp8compile.events``, so far.
    """

    site: str
    operand: str
    cast: str
    scale: float | None = None
    amax: float | None = None
    not_finite: int = 0
    saturated: int = 0
    jumped: int = 0


@dataclass(frozen=True)
class SavedRow:
    """What the forward keeps for the backward in one format, besides its inputs.

    ``bytes`` is text where sizes are symbolic.
    """

    format: str
    tensors: int
    bytes: int | str


@dataclass(frozen=True)
class Measured:
    """Median milliseconds of a step, compiled in its own precision and in FP8."""

    device: str
    high_ms: float
    fp8_ms: float


def gemm_rows(gm: fx.GraphModule, kernel_of: Callable[[fx.Node], str]) -> list[Row]:
    """A row for every GEMM of a graph after the passes; ``kernel_of`` names what runs a node."""
    costs = gm.meta.get(COSTS, {})
    return [_row(node, info, kernel_of, _cost(info, costs)) for node, info in gemms(gm)]


def _cost(info: GemmInfo, costs: Mapping[tuple[int, Gemm], GemmCost]) -> GemmCost | None:
    """What its sites' GEMMs of this role were predicted to cost before they were merged."""
    found = [costs.get((site.index, info.gemm)) for site in info.sites]
    parts = [cost for cost in found if cost is not None]
    if not parts or len(parts) < len(found):
        return None
    fp8 = [cost.fp8_us for cost in parts if cost.fp8_us is not None]
    return replace(
        parts[0],
        high_us=sum(cost.high_us for cost in parts),
        fp8_us=sum(fp8) if len(fp8) == len(parts) else None,
    )


def _row(
    node: fx.Node, info: GemmInfo, kernel_of: Callable[[fx.Node], str], cost: GemmCost | None
) -> Row:
    fp8 = node.target in SCALED_MMS
    left, right = info.left, info.right
    return Row(
        fqn=info.name,
        gemm=str(info.gemm),
        m=_number(info.m),
        n=_number(info.n),
        k=_number(info.k),
        gflops=_scaled(info.flops, 1e9),
        megabytes=_scaled(info.bytes(1 if fp8 else info.dtype.itemsize), 1e6),
        formats=f"{left.cast} x {right.cast}" if fp8 else "",
        decision="fp8" if fp8 else _dtype_text(info),
        kernel=kernel_of(node) if fp8 else "",
        reason=info.reason or "",
        sites=tuple(site.fqn for site in info.sites),
        recipe=info.site.recipe.name if info.site.recipe else "",
        scaling=_scaling(left, right) if fp8 else "",
        high_us=cost.high_us if cost else None,
        fp8_us=cost.fp8_us if cost else None,
        pays_from=int(cost.pays_from) if cost and cost.pays_from is not None else None,
        predicted_for=cost.device if cost else "",
    )


def _scaling(*edges: Edge) -> str:
    costs = (
        f"{e.operand} {e.costs:+.1%}" if math.isfinite(e.costs) else f"{e.operand} unknown"
        for e in edges
        if e.scaling is not None
    )
    found = ", ".join(costs)
    return f"current scaling costs: {found}" if found else ""


def _dtype_text(info: GemmInfo) -> str:
    return str(info.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "f")


def _scaled(cost: Any, unit: float) -> float | str:
    return float(cost) / unit if cost.is_number else str(cost)


def _number(size: Any) -> int | str:
    return int(size) if size.is_number else str(size)


def other_rows(others: Sequence[tuple[fx.Node, str]]) -> list[Row]:
    """A row for each kind of matmul that belongs to no site, with how many there are, and why they
    are not FP8; attention may be, for which there is no reason.
    """
    counts = Counter((node.target, reason) for node, reason in others)
    blank = ("",) * 8
    return [
        Row(
            f"(other: {count} x {op_name(target)})",
            *blank,
            kernel="" if reason else _ATTENTION[target],
            reason=reason,
        )
        for (target, reason), count in counts.items()
    ]


def text_of(rows: Sequence[Row]) -> str:
    """The rows as plain text, a line each: site, GEMM, sizes, what it runs in, kernel or reason."""
    cells = [("site", "GEMM", "M", "N", "K", "runs in", "kernel or reason")]
    for row in rows:
        sizes = (str(row.m), str(row.n), str(row.k))
        runs_in, why = row.formats or row.decision, row.kernel or row.reason
        cells.append((row.fqn, row.gemm, *sizes, runs_in, why))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)
    return "\n".join(lines) + "\n"
