"""What the compiler decided about a graph, as rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from .ir import SCALED_MM, GemmInfo, gemms, op_name


@dataclass(frozen=True)
class Row:
    """One GEMM of one site. Sizes are ``out[M, N] = left[M, K] @ right[K, N]``, as text where they
    are symbolic; ``megabytes`` counts each operand read once, in its format, and the output written
    once. ``decision`` is "fp8" or the high-precision dtype; ``reason`` says why the latter.
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

    @property
    def is_fp8(self) -> bool:
        return self.decision == "fp8"


def gemm_rows(gm: fx.GraphModule, kernel_of: Callable[[fx.Node], str]) -> list[Row]:
    """A row for every GEMM of a graph after the passes; ``kernel_of`` names what runs a node."""
    return [_row(node, info, kernel_of) for node, info in gemms(gm)]


def _row(node: fx.Node, info: GemmInfo, kernel_of: Callable[[fx.Node], str]) -> Row:
    fp8 = node.target is SCALED_MM
    left, right = info.left, info.right
    return Row(
        fqn=info.site.fqn,
        gemm=str(info.gemm),
        m=_number(info.m),
        n=_number(info.n),
        k=_number(info.k),
        gflops=_scaled(info.flops, 1e9),
        megabytes=_scaled(info.bytes(1 if fp8 else info.dtype.itemsize), 1e6),
        formats=f"{left.format} x {right.format}" if fp8 else "",
        decision="fp8" if fp8 else _dtype_text(info),
        kernel=kernel_of(node) if fp8 else "",
        reason=info.reason or "",
    )


def _dtype_text(info: GemmInfo) -> str:
    return str(info.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "f")


def _scaled(cost: Any, unit: float) -> float | str:
    return float(cost) / unit if cost.is_number else str(cost)


def _number(size: Any) -> int | str:
    return int(size) if size.is_number else str(size)


def other_rows(others: Sequence[tuple[fx.Node, str]]) -> list[Row]:
    """A row for each kind of matmul that belongs to no site, with how many there are."""
    counts = Counter((op_name(node.target), reason) for node, reason in others)
    return [
        Row(f"(other: {count} x {op})", "", "", "", "", "", "", "", "", "", reason)
        for (op, reason), count in counts.items()
    ]
