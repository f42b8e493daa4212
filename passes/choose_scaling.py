"""Choose delayed or current scaling for every edge, by what current scaling would cost."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from ..cost import Device
from ..ir import Edge, GemmInfo, edge_graph, gemm_info
from ..recipe import Granularity, Recipe, Scaling
from .site_costs import current_costs

CHEAP = 0.02  # of the time of its GEMMs; as much as FP8 must gain to be chosen at all


def choose_scaling(
    gm: fx.GraphModule, *, recipe: Recipe, device: Device, weights_cast_once: bool = False
) -> int:
    """Give delayed edges current scaling where finding the amax first takes next to no time.

    Before:
        mm : bf16[16, 64] = aten.mm(x, permute)  # w fprop = input e4m3 x weight^T e4m3
    After:
        mm : bf16[16, 64] = aten.mm(x, permute)  # w fprop = input e4m3:delayed x weight^T ...

    A current scale is never out of date, but the value is read once more to find it. Beside wide
    GEMMs, or several that take the value, that is little; where the value is written only by its
    cast, or is as large as what the GEMMs do with it is small, a delayed scale saves more. Current
    is chosen where it adds less than ``CHEAP`` to the predicted time of all the GEMMs that take the
    value on ``device``, forward and backward; what it would add is kept with the edge. Weights that
    are cast once, as in inference, cost nothing.

    Requires: choose_formats.
    Ensures: all GEMMs take a value with one scaling, which every edge under a recipe of delayed
        scaling says.
    Leaves alone: edges whose recipe (the site's own, or else ``recipe``) is not delayed; those of
        sizes that nothing is predicted for; edges that have a scaling.
    Numerics: quantizes with the scale of the value, where a delayed one is that of steps before.
    """
    edges = edge_graph(gm)
    costs = current_costs(gm, device, recipe=recipe, weights_cast_once=weights_cast_once)
    rewrites = 0
    for node in [n for n in edges if edges.in_degree(n)]:
        info = gemm_info(node)
        assert info is not None
        if (info.site.recipe or recipe).scaling is not Scaling.DELAYED or info.left.scaling:
            continue
        node.meta["fp8"] = _chosen(info, costs.get(node))
        rewrites += 1
    return rewrites


def _chosen(info: GemmInfo, costs: tuple[float, float] | None) -> GemmInfo:
    left, right = costs or (float("inf"), float("inf"))
    return replace(info, left=_by_cost(info.left, left), right=_by_cost(info.right, right))


def _by_cost(edge: Edge, costs: float) -> Edge:
    assert edge.granularity is Granularity.TENSOR
    scaling = Scaling.CURRENT if costs < CHEAP else Scaling.DELAYED
    return replace(edge, scaling=scaling, costs=costs)
