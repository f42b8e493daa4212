"""What the compiler decided about a graph, as rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from .errors import source_line
from .ir import SCALED_MM, GemmInfo, format_value, gemms


@dataclass(frozen=True)
class Row:
    """One GEMM of one site. Sizes are ``out[M, N] = left[M, K] @ right[K, N]``, as text where they
    are symbolic. ``decision`` is "fp8" or the high-precision dtype; ``reason`` says why the latter.
    """

    fqn: str
    gemm: str
    m: int | str
    n: int | str
    k: int | str
    gflops: float | str
    formats: str
    decision: str
    kernel: str
    reason: str

    @property
    def is_fp8(self) -> bool:
        return self.decision == "fp8"


def gemm_rows(gm: fx.GraphModule, kernel: str) -> list[Row]:
    """A row for every GEMM of a graph after the passes; ``kernel`` names what runs the FP8 ones."""
    return [_row(node, info, kernel) for node, info in gemms(gm)]


def _row(node: fx.Node, info: GemmInfo, kernel: str) -> Row:
    fp8 = node.target is SCALED_MM
    left, right = info.left, info.right
    return Row(
        fqn=info.site.fqn,
        gemm=str(info.gemm),
        m=_number(info.m),
        n=_number(info.n),
        k=_number(info.k),
        gflops=float(info.flops) / 1e9 if info.flops.is_number else str(info.flops),
        formats=f"{left.format} x {right.format}" if fp8 else "",
        decision="fp8" if fp8 else _dtype_text(info),
        kernel=kernel if fp8 else "",
        reason=info.reason or "",
    )


def _dtype_text(info: GemmInfo) -> str:
    return str(info.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "f")


def _number(size: Any) -> int | str:
    return int(size) if size.is_number else str(size)


def reasons(rows: list[Row]) -> Mapping[str, str]:
    """Site and GEMM -> reason, for those that stay in high precision."""
    return {f"{row.fqn} {row.gemm}": row.reason for row in rows if row.reason}


def other_matmul_row(node: fx.Node, reason: str) -> Row:
    """A row for a matmul that belongs to no site."""
    value = node.meta["val"]
    return Row(
        fqn=source_line(node) or node.name,
        gemm=str(node.target).removeprefix("aten.").removesuffix(".default"),
        m="",
        n="",
        k="",
        gflops="",
        formats="",
        decision=format_value(value),
        kernel="",
        reason=reason,
    )
