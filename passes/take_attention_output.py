"""Let a GEMM take the FP8 output of attention as it is."""

from __future__ import annotations

import operator

import torch
from torch import fx

from ..formats import Format
from ..ir import ATTENTION, QUANTIZE, VIEWS, args_of, aten, quantize_output
from ..regions import COL, ROW, Space, reads, shape_of

_CONVERT = torch.ops.prims.convert_element_type.default


def take_attention_output(gm: fx.GraphModule) -> int:
    """Multiply what attention has written in FP8, instead of casting its value once more.

    Before:
        attention_fp8 : e4m3[128, 64] = attention[0]
        y_q           : (e4m3[128, 64], ...) = fp8.quantize(y, scale, 0, e4m3)
        y_fp8         : e4m3[128, 64] = y_q[0]
        y_scale_inv   : f32[1] = y_q[2]
        mm_fp8        : bf16[128, 32] = fp8.scaled_mm(y_fp8, w_fp8, y_scale_inv, w_scale_inv, ...
    After:
        attention_fp8 : e4m3[128, 64] = attention[0]
        mm_fp8        : bf16[128, 32] = fp8.scaled_mm(attention_fp8, w_fp8, v_rows_scale_inv, ...

    A cast for wgrad, which takes a transposed copy, gets the scale of attention's output, with
    which it comes to the same codes.

    Requires: cast_attention; before share_casts, while every GEMM has casts of its own.
    Ensures: no scale is looked for, and no amax is tracked, of what is attention's output.
    Leaves alone: whatever more is computed from the output; E5M2; scales per row or block.
    Numerics: quantizes (once less).
    """
    rewrites = 0
    for cast in list(gm.graph.nodes):
        if cast.target is QUANTIZE and args_of(cast)[3] == Format.E4M3.dtype:
            attention = _attention_of(args_of(cast)[0])
            rewrites += attention is not None and _take(cast, attention)
    gm.graph.eliminate_dead_code()
    return rewrites


def _attention_of(value: fx.Node) -> fx.Node | None:
    """The attention whose output a matrix is, element by element."""
    space, node, position = Space(*shape_of(value)), value, (ROW, COL)
    while node.target in (*VIEWS, aten.clone.default):
        found = reads(node, position, space)
        if found is None:
            return None
        (read,) = found
        node, position = read.node, read.position
    if position != (ROW, COL):
        return None
    for target in (_CONVERT, aten.mul.Tensor, _CONVERT, operator.getitem):
        if node.target is not target:
            return None
        node = args_of(node)[0]
    return node if node.target is ATTENTION else None


def _take(cast: fx.Node, attention: fx.Node) -> bool:
    value, _, _, *how = cast.args
    scale_inv, out_scale = args_of(attention)[5:7]
    copy, transposed, own = (quantize_output(cast, name) for name in ("fp8", "fp8_t", "scale_inv"))
    if copy is not None and own is not None and transposed is None:
        copy.replace_all_uses_with(_output(attention))
        own.replace_all_uses_with(scale_inv)
        return True
    if copy is None and transposed is not None and args_of(cast)[1] is not out_scale:
        cast.args = (value, out_scale, 0, *how)
        return True
    return False


def _output(attention: fx.Node) -> fx.Node:
    """Its FP8 copy."""
    return next(item for item in attention.users if args_of(item)[1] == 0)
