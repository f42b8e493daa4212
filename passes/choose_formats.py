"""Choose E4M3 or E5M2 for every edge."""

from __future__ import annotations

from torch import fx

from ..errors import PassError
from ..formats import Format
from ..ir import edge_graph, gemm_info
from ..recipe import Recipe


def choose_formats(gm: fx.GraphModule, *, recipe: Recipe) -> int:
    """Give both edges of every FP8 GEMM a format.

    Before:
        mm : bf16[16, 64] = aten.mm(x, permute)  # w fprop = input x weight^T
    After:
        mm : bf16[16, 64] = aten.mm(x, permute)  # w fprop = input e4m3 x weight^T e4m3

    Requires: choose_precision.
    Ensures: no GEMM multiplies E5M2 with E5M2; a value that several GEMMs take in the same role
        has one format, so that one cast serves them all.
    Leaves alone: GEMMs with a reason to stay in high precision; edges that have a format.
    Numerics: exact.
    """
    edges = edge_graph(gm)
    rewrites = 0
    for node in [n for n in edges if edges.in_degree(n)]:
        info = gemm_info(node)
        assert info is not None
        if info.left.format is not None:
            continue
        left, right = (recipe.format_of(edge.operand) for edge in (info.left, info.right))
        if left is right is Format.E5M2:
            raise PassError("choose_formats", f"{info.gemm} would multiply e5m2 with e5m2", node)
        node.meta["fp8"] = info.with_formats(left, right)
        rewrites += 1
    return rewrites
