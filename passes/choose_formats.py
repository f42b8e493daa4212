"""Choose E4M3 or E5M2 for every edge, and how many elements share a scale."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from ..errors import PassError
from ..formats import Format
from ..ir import Edge, edge_graph, gemm_info
from ..recipe import Recipe


def choose_formats(gm: fx.GraphModule, *, recipe: Recipe) -> int:
    """Give both edges of every FP8 GEMM the format and the granularity of their role.

    Before:
        mm : bf16[16, 64] = aten.mm(x, permute)  # w fprop = input x weight^T
    After:
        mm : bf16[16, 64] = aten.mm(x, permute)  # w fprop = input e4m3 x weight^T e4m3

    They are those of the site's own recipe, or else of ``recipe``.

    Requires: choose_precision.
    Ensures: no GEMM multiplies E5M2 with E5M2; a value that several GEMMs take in the same role
        has one format under one recipe, so that one cast serves them all.
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
        own = info.site.recipe or recipe
        left, right = (_chosen(edge, own) for edge in (info.left, info.right))
        if left.format is right.format is Format.E5M2:
            raise PassError("choose_formats", f"{info.gemm} would multiply e5m2 with e5m2", node)
        node.meta["fp8"] = replace(info, left=left, right=right)
        rewrites += 1
    return rewrites


def _chosen(edge: Edge, recipe: Recipe) -> Edge:
    operand = edge.operand
    return replace(
        edge, format=recipe.format_of(operand), granularity=recipe.granularity_of(operand)
    )
