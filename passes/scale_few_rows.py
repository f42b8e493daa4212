"""Multiply a few rows before they are scaled: then cuBLASLt can, and who reads the product scales.

Runs on the final graphs, in front of grow_regions.
"""

from __future__ import annotations

import torch
from torch import fx

from ..ir import SCALED_MM, SCALED_MM_BLOCKS, args_of, aten, emit
from ..regions import scales_afterwards


def scale_few_rows(gm: fx.GraphModule) -> int:
    """Make the scales per row of GEMMs of few rows, such as decoding has, factors of the product.

    Before:
        mm_fp8 : bf16[16, 64] = fp8.scaled_mm_blocks(x_fp8, w_fp8, x_scale_inv, w_scale_inv, ...
    After:
        mm_sums      : f32[16, 64] = fp8.scaled_mm(x_fp8, w_fp8, None, None, None, f32, ...
        x_scales     : f32[16, 1] = aten.permute(x_scale_inv, [1, 0])
        mm_by_x      : f32[16, 64] = aten.mul.Tensor(mm_sums, x_scales)
        mm_by_w      : f32[16, 64] = aten.mul.Tensor(mm_by_x, w_scale_inv)
        mm_converted : bf16[16, 64] = prims.convert_element_type(mm_by_w, bf16)

    A bias is added in float32 before the conversion.

    Requires: drop_unused_outputs.
    Ensures: a scaled_mm without scales has outputs in float32, which are multiplied by both.
    Leaves alone: GEMMs of ``FEW_ROWS`` (128) or more rows in the example, which are bound by
        arithmetic; scales of blocks along K; outputs whose rows are no multiple of 16 elements,
        which cuBLASLt does not take.
    Numerics: exact (the scaled GEMM multiplies its float32 sums by the same scales).
    """
    found = gm.graph.find_nodes(op="call_function", target=SCALED_MM_BLOCKS)
    few = [node for node in found if scales_afterwards(node)]
    for node in few:
        _scale_afterwards(node)
    return len(few)


def _scale_afterwards(node: fx.Node) -> None:
    a, b, a_scale_inv, b_scale_inv, bias, out_dtype, *_, fast_accum = args_of(node)
    graph, stem = node.graph, node.name.removesuffix("_fp8")
    with graph.inserting_before(node):
        args = (a, b, None, None, None, torch.float32, fast_accum)
        sums = emit(graph, SCALED_MM, args, f"{stem}_sums", node)
        sums.meta["fp8"] = node.meta.get("fp8")
        left = _named(a_scale_inv)
        column = emit(graph, aten.permute.default, (a_scale_inv, [1, 0]), f"{left}_scales", node)
        out = emit(graph, aten.mul.Tensor, (sums, column), f"{stem}_by_{left}", node)
        by_right = f"{stem}_by_{_named(b_scale_inv)}"
        out = emit(graph, aten.mul.Tensor, (out, b_scale_inv), by_right, node)
        if bias is not None:
            out = emit(graph, aten.add.Tensor, (out, bias), f"{stem}_biased", node)
        if out_dtype is not torch.float32:
            convert = torch.ops.prims.convert_element_type.default
            out = emit(graph, convert, (out, out_dtype), f"{stem}_converted", node)
    node.replace_all_uses_with(out)
    graph.erase_node(node)


def _named(scale_inv: fx.Node) -> str:
    """What it is the scale_inv of."""
    return scale_inv.name.removesuffix("_scale_inv")
