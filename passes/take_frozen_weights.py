"""Give GEMMs the weights that are FP8 already as they are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from ..ir import (
    CAT_ROWS,
    DEQUANTIZE,
    QUANTIZE,
    args_of,
    aten,
    emit,
    is_cast,
    quantize_output,
    scale_of,
)


def take_frozen_weights(gm: fx.GraphModule) -> int:
    """Replace the cast of a dequantized weight by what was dequantized.

    Before:
        w           : bf16[64, 32] = fp8.dequantize(w_frozen, w_scale, [1, 0], bf16)
        w_q         : (e4m3[64, 32], ...) = fp8.quantize_blocks(w, [1, 0], False, e4m3)
        w_fp8       : e4m3[64, 32] = w_q[0]
        w_scale_inv : f32[1, 64] = w_q[2]
        mm_fp8      : bf16[16, 64] = fp8.scaled_mm_blocks(x_fp8, w_fp8, x_scale_inv, w_scale_inv, ...
    After:
        w_frozen_scale_inv : f32[1, 64] = aten.view(w_scale, [1, 64])
        mm_fp8             : bf16[16, 64] = fp8.scaled_mm_blocks(x_fp8, w_frozen, x_scale_inv, w_frozen_scale_inv, ...

    Of several weights that one GEMM takes, the FP8 rows are put together, and so are the scales.

    Requires: insert_casts.
    Ensures: what backward still casts, the transposed weight, is dequantized again there, so that
        it is not kept in high precision.
    Leaves alone: casts to another format, with other blocks, whose rows are padded, or of the
        transposed copy, whose blocks lie otherwise; several weights that cannot be put together.
    Numerics: exact (the weight is what it is; casting it anew could only round it again).
    """  # noqa: E501
    rewrites = 0
    for cast in [node for node in gm.graph.nodes if is_cast(node)]:
        parts = _frozen(args_of(cast)[0])
        if parts and _is_in_backward(cast):
            if not all(map(_is_in_backward, parts)):
                _dequantize_there(cast, parts)
        elif parts and _is_like(cast, parts):
            _take(gm.graph, cast, parts)
            rewrites += 1
    gm.graph.eliminate_dead_code()
    return rewrites


def _frozen(value: fx.Node) -> list[fx.Node]:
    """The nodes that dequantize the weights of which a value is made, or nothing."""
    parts = args_of(value)[0] if value.target is aten.cat.default else [value]
    return parts if all(part.target is DEQUANTIZE for part in parts) else []


def can_be_joined(weights: Sequence[fx.Node]) -> bool:
    """Whether frozen weights, by the nodes that dequantize them, may be put below each other with
    their scales: not with one scale each, nor if a block would begin in one and end in another.
    """
    if len(weights) == 1:
        return True
    block = args_of(weights[0])[2]
    whole = block[0] > 0 and all(w.meta["val"].shape[0] % block[0] == 0 for w in weights[:-1])
    return whole and all(args_of(weight)[2] == block for weight in weights)


def _is_in_backward(node: fx.Node) -> bool:
    return node.meta.get("partitioner_tag") == "must_be_in_backward"


def _is_like(cast: fx.Node, parts: list[fx.Node]) -> bool:
    """Whether it makes of the weights, in forward, what they were made of."""
    block = [0, 0] if cast.target is QUANTIZE else args_of(cast)[1]
    fmt = args_of(cast)[3]
    same = all(
        list(args_of(part)[2]) == list(block) and args_of(part)[0].meta["val"].dtype is fmt
        for part in parts
    )
    fp8 = quantize_output(cast, "fp8")
    is_padded = fp8 is not None and fp8.meta["val"].shape[1] != parts[0].meta["val"].shape[1]
    row_major = quantize_output(cast, "fp8_t") is None
    return same and row_major and not is_padded and can_be_joined(parts)


def _take(graph: fx.Graph, cast: fx.Node, parts: list[fx.Node]) -> None:
    weights, scales = ([args_of(part)[i] for part in parts] for i in range(2))
    fp8, scale_inv = (quantize_output(cast, name) for name in ("fp8", scale_of("fp8", cast)))
    with graph.inserting_before(cast):
        weight, scale = weights[0], scales[0]
        if len(parts) > 1:
            name = f"{args_of(cast)[0].name}_frozen"
            weight = emit(graph, CAT_ROWS, (weights,), name, like=cast)
            scale = emit(graph, aten.cat.default, (scales,), f"{name}_scale", like=cast)
        if scale_inv is not None:
            shape = list(scale_inv.meta["val"].shape)
            name = f"{weight.name}_scale_inv"
            view = emit(graph, aten.view.default, (scale, shape), name, like=cast)
            scale_inv.replace_all_uses_with(view)
    if fp8 is not None:
        fp8.replace_all_uses_with(weight)


def _dequantize_there(cast: fx.Node, parts: list[fx.Node]) -> None:
    graph, value = cast.graph, args_of(cast)[0]
    with graph.inserting_before(cast):
        new = [emit(graph, DEQUANTIZE, p.args, f"{p.name}_again", like=cast) for p in parts]
        if value.target is aten.cat.default:
            args = (list(new), *args_of(value)[1:])
            new.append(emit(graph, aten.cat.default, args, f"{value.name}_again", like=cast))
    for node in new:
        node.meta["partitioner_tag"] = "must_be_in_backward"
    cast.replace_input_with(value, new[-1])
