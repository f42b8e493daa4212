"""Put a quantize node on every FP8 edge and turn the GEMM into a scaled one."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from ..errors import PassError
from ..ir import (
    CASTS,
    QUANTIZE,
    QUANTIZE_BLOCKS,
    SCALED_MM,
    SCALED_MM_BLOCKS,
    Edge,
    GemmInfo,
    aten,
    base_of,
    edge_graph,
    emit,
    gemm_info,
    is_backward,
    operands,
    scale_of,
)
from ..recipe import Granularity, Operand, Recipe, Scaling


def insert_casts(gm: fx.GraphModule, *, recipe: Recipe, scale: fx.Node | None = None) -> int:
    """Quantize both operands of every FP8 GEMM and multiply them with ``fp8.scaled_mm``.

    Before:
        permute : bf16[32, 64] = aten.permute(w, [1, 0])
        mm      : bf16[16, 64] = aten.mm(x, permute)  # w fprop = input e4m3 x weight^T e4m3
    After:
        x_q         : (e4m3[16, 32], e4m3[32, 16], ...) = fp8.quantize(x, scale, 0, e4m3)
        x_fp8       : e4m3[16, 32] = x_q[0]
        x_scale_inv : f32[1] = x_q[2]
        w_q         : (e4m3[64, 32], e4m3[32, 64], ...) = fp8.quantize(w, scale, 1, e4m3)
        w_fp8       : e4m3[64, 32] = w_q[0]
        w_scale_inv : f32[1] = w_q[2]
        mm_fp8      : bf16[16, 64] = fp8.scaled_mm(x_fp8, w_fp8, x_scale_inv, w_scale_inv, ...

    ``scale`` is the graph input that holds known scales, or None if there is none: then, and
    where the edge, or else the recipe (the site's own, or else ``recipe``) says so, scaling is
    current. Edges that
    are not tensorwise get ``fp8.quantize_blocks`` and ``fp8.scaled_mm_blocks``, and a
    scale_inv for either copy.

    Requires: choose_formats.
    Ensures: both operands of a scaled_mm are K-major: the row-major or the transposed copy of
        their base, whichever that is. A weight that backward needs is quantized again there, so
        that no fp8 weight is kept.
    Leaves alone: GEMMs with a reason to stay in high precision.
    Numerics: quantizes.
    """
    edges = edge_graph(gm)
    nodes = [node for node in gm.graph.nodes if node in edges and edges.in_degree(node)]
    for node in nodes:
        info = gemm_info(node)
        assert info is not None
        _replace(gm.graph, node, info, info.site.recipe or recipe, scale)
    gm.graph.eliminate_dead_code()
    return len(nodes)


def _replace(
    graph: fx.Graph, node: fx.Node, info: GemmInfo, recipe: Recipe, scale: fx.Node | None
) -> None:
    left, right = operands(node)
    with graph.inserting_before(node):
        # a = left is [m, k]; b is right^T, [n, k]: both K-major.
        cast = _cast(graph, node, left, info, info.left, recipe, scale)
        a, a_scale_inv = _taken(graph, cast, left, k_major=False)
        cast = _cast(graph, node, right, info, info.right, recipe, scale)
        b, b_scale_inv = _taken(graph, cast, right, k_major=True)
        bias = node.args[0] if node.target is aten.addmm.default else None
        fused = bias if isinstance(bias, fx.Node) and bias.meta["val"].dim() == 1 else None
        args: tuple[Any, ...] = (a, b, a_scale_inv, b_scale_inv, fused, info.dtype)
        fast = recipe.fast_accum_of(info.gemm)
        if not _is_tensorwise(info.left):
            args = (*args, *(list(edge.granularity.block) for edge in (info.left, info.right)))
        target = SCALED_MM if _is_tensorwise(info.left) else SCALED_MM_BLOCKS
        out = emit(graph, target, (*args, fast), f"{node.name}_fp8", like=node)
        out.meta["fp8"] = info
        if bias is not None and fused is None:
            out = emit(graph, aten.add.Tensor, (out, bias), f"{node.name}_bias", like=node)
    # The same fake tensor, of which there may be views: the partitioner asks it which values are
    # returned, and must not take two of them for one.
    out.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(out)
    graph.erase_node(node)


def _is_tensorwise(edge: Edge) -> bool:
    return edge.granularity is Granularity.TENSOR


def _cast(
    graph: fx.Graph,
    gemm: fx.Node,
    value: fx.Node,
    info: GemmInfo,
    edge: Edge,
    recipe: Recipe,
    scale: fx.Node | None,
) -> fx.Node:
    """Quantize an operand's base."""
    assert edge.format is not None
    base, _ = base_of(value)
    known = None if (edge.scaling or recipe.scaling) is Scaling.CURRENT else scale
    if known is not None and edge.format is not recipe.format_of(edge.operand):
        raise PassError(
            "insert_casts",
            f"{edge.operand} shall be {edge.format}, but the scale that is kept for it is one of "
            f"{recipe.format_of(edge.operand)}; change the recipe, with overrides for some sites",
            gemm,
        )
    how: tuple[Any, ...] = (known, info.site.slot(edge.operand))
    if not _is_tensorwise(edge):
        how = (list(edge.granularity.block), recipe.power_of_two)
    target = QUANTIZE if _is_tensorwise(edge) else QUANTIZE_BLOCKS
    args = (base, *how, edge.format.dtype)
    cast = emit(graph, target, args, f"{base.name}_q", like=gemm)
    if edge.operand is Operand.WEIGHT and is_backward(gemm):
        cast.meta["partitioner_tag"] = "must_be_in_backward"
    elif edge.operand is Operand.INPUT:
        # The input is a value of the forward, whichever GEMM asks for its cast.
        inherited = {k: base.meta[k] for k in ("partitioner_tag",) if k in base.meta}
        cast.meta["partitioner_tag"] = inherited.get("partitioner_tag", "is_forward")
    return cast


def _taken(
    graph: fx.Graph, cast: fx.Node, value: fx.Node, k_major: bool
) -> tuple[fx.Node, fx.Node]:
    """The copy that the GEMM takes, and its scale_inv."""
    copy = "fp8" if base_of(value)[1] == k_major else "fp8_t"
    outputs = (quantize_getitem(graph, cast, name) for name in (copy, scale_of(copy, cast)))
    return next(outputs), next(outputs)


def quantize_getitem(graph: fx.Graph, cast: fx.Node, output: str) -> fx.Node:
    """The getitem node for one output of a cast, at the insertion point."""
    index = CASTS[cast.target].index(output)
    item = emit(graph, operator.getitem, (cast, index), f"{cast.args[0]}_{output}", like=cast)
    item.meta["partitioner_tag"] = cast.meta.get("partitioner_tag", "is_forward")
    return item
