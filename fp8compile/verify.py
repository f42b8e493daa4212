"""The rules of the IR, checked after every pass."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .errors import PassError
from .formats import FP8_DTYPES, Format
from .ir import (
    ATTENTION,
    ATTENTION_BACKWARD,
    CASTS,
    SCALED_MMS,
    TRACK_AMAX,
    GemmInfo,
    args_of,
    aten,
    constant_factor,
    format_type,
    format_value,
    gemm_info,
    is_backward,
    is_cast,
    is_given_in_fp8,
    quantize_output,
    result_types,
    scale_of,
)
from .recipe import GRANULARITIES


class Verifier:
    """Checks a graph after each of several passes, and every node only once with its arguments.

    ``before``: the graph as it was given to the first of them, for 5.

    1. The graph lints: topologically sorted, no dangling names.
    2. Every fp8 tensor is an output of a cast and has exactly one scale_inv: the same node's.
       Only a scaled_mm or attention, forward or backward, takes it, with that scale_inv or a
       constant times it, or the graph returns it; or it is widened and multiplied with it. Or it
       is attention's output, which has the scale_inv of its values. Or it was given to the graph:
       what forward has cast, or frozen weights.
    3. Every ``meta["val"]`` of an ``fp8::`` node equals the re-evaluated fake (shape and dtype).
    4. A GEMM is what it is said to be: one that is cast has no reason to stay in high precision,
       and operands in the formats of its edges; one that will be can be multiplied.
    5. A pass adds nodes with a ``meta["val"]``, and no inputs or outputs. Nothing that it adds
       mutates but ``fp8::track_amax``, at most once per direction, and operators of the user's.
    """

    def __init__(self, before: fx.GraphModule | None = None) -> None:
        self._given = None if before is None else set(before.graph.nodes)
        self._signature = None if before is None else _signature(before)
        self._right: dict[fx.Node, Any] = {}  # with which arguments a node's value was found right

    def check(self, gm: fx.GraphModule, pass_name: str) -> None:
        """Raise a PassError that names the pass, and the node that breaks a rule."""
        try:
            gm.graph.lint()
        except RuntimeError as error:
            raise PassError(pass_name, f"the graph does not lint: {error}") from error
        if self._signature not in (None, _signature(gm)):
            given = "changes what the graph takes or returns, which is what it is called with"
            raise PassError(pass_name, f"{given}: {self._signature} before, {_signature(gm)} now")
        tracked = set()
        for node in gm.graph.nodes:
            if self._given is not None and node not in self._given:
                _verify_added(node, pass_name)
            if node.target in (*CASTS, *SCALED_MMS) and self._right.get(node) != node.args:
                _verify_value(node, pass_name)
                self._right[node] = node.args
            if node.target in SCALED_MMS:
                _verify_scaled_mm(node, pass_name)
            elif node.target is ATTENTION:
                _verify_scales(args_of(node)[:3], args_of(node)[3:6], node, pass_name)
            elif node.target is ATTENTION_BACKWARD:
                inverses = (*args_of(node)[6:10], args_of(node)[9])  # the output has its values'
                _verify_scales(args_of(node)[:5], inverses, node, pass_name)
            elif node.target is TRACK_AMAX:
                if is_backward(node) in tracked:
                    raise PassError(pass_name, "amax is tracked twice in one direction", node)
                tracked.add(is_backward(node))
            elif node.op == "call_function":
                _verify_takes_no_fp8(node, pass_name)
            info = gemm_info(node)
            if info is not None:
                check = _verify_cast_gemm if node.target in SCALED_MMS else _verify_planned_gemm
                check(node, info, pass_name)


def verify(gm: fx.GraphModule, pass_name: str = "verify") -> None:
    """Check the rules of the IR once, see Verifier."""
    Verifier().check(gm, pass_name)


def _signature(gm: fx.GraphModule) -> str:
    """How much a graph takes and returns."""
    returned = gm.graph.output_node().args[0]
    count = len(returned) if isinstance(returned, list | tuple) else 1
    return f"{len(gm.graph.find_nodes(op='placeholder'))} inputs and {count} outputs"


def _verify_added(node: fx.Node, pass_name: str) -> None:
    if node.op != "output" and "val" not in node.meta:
        made = "has no meta['val']; make nodes with fp8compile.ir.emit, which evaluates them"
        raise PassError(pass_name, made, node)
    called = node.target if isinstance(node.target, torch._ops.OpOverload) else None
    if called is not None and called.namespace == "aten" and called._schema.is_mutable:
        how = "writes to a tensor, of which there may be other readers; add what returns a new one"
        raise PassError(pass_name, how, node)


def _verify_cast_gemm(node: fx.Node, info: GemmInfo, pass_name: str) -> None:
    if info.reason is not None:
        late = f"is cast, and has a reason not to be, {info.reason!r}; give it before insert_casts"
        raise PassError(pass_name, late, node)
    for edge, value in zip((info.left, info.right), args_of(node), strict=False):
        found = value.meta["val"]
        if edge.format is None or edge.format.dtype != found.dtype:
            late = f"{edge.operand} is cast to {format_value(found)}, and its edge has"
            late += f" {edge.format}; choose formats before insert_casts"
            raise PassError(pass_name, late, node)


def _verify_planned_gemm(node: fx.Node, info: GemmInfo, pass_name: str) -> None:
    formats = info.left.format, info.right.format
    if not info.is_fp8 or formats == (None, None):
        return
    if not all(isinstance(chosen, Format) for chosen in formats):
        both = f"its operands have the formats {formats}; give both an fp8compile.Format"
        raise PassError(pass_name, both, node)
    if formats == (Format.E5M2, Format.E5M2):
        raise PassError(pass_name, "e5m2 x e5m2: no tensor core multiplies these", node)
    pair = info.left.granularity, info.right.granularity
    if not {pair, pair[::-1]} & set(GRANULARITIES):
        legal = ", ".join(f"{one} x {other}" for one, other in GRANULARITIES)
        raise PassError(
            pass_name, f"{pair[0]} x {pair[1]}: no GEMM takes these, only {legal}", node
        )


def _is_quantized(node: Any) -> bool:
    return (
        isinstance(node, fx.Node) and node.target is operator.getitem and is_cast(args_of(node)[0])
    )


def _is_scale_of(scale_inv: Any, value: fx.Node) -> bool:
    """Whether it is the scale_inv of a cast's copy ``value``, or a constant times it."""
    scale_inv = _unscaled(scale_inv)
    if not _is_quantized(scale_inv) or value.args[0] is not scale_inv.args[0]:
        return False
    cast, copy = args_of(value)
    return quantize_output(cast, scale_of(CASTS[cast.target][copy], cast)) is scale_inv


def _is_output_of_attention(value: Any) -> bool:
    return (
        isinstance(value, fx.Node)
        and value.target is operator.getitem
        and args_of(value)[0].target is ATTENTION
        and args_of(value)[1] == 0
    )


def _unscaled(scale_inv: Any) -> Any:
    """What a constant is multiplied with, if that is what it is."""
    scaled = constant_factor(scale_inv) if isinstance(scale_inv, fx.Node) else None
    return scaled[0] if scaled else scale_inv


def _verify_scaled_mm(node: fx.Node, pass_name: str) -> None:
    a, b, a_scale_inv, b_scale_inv = args_of(node)[:4]
    _verify_scales((a, b), (a_scale_inv, b_scale_inv), node, pass_name)
    formats = {value.meta["val"].dtype for value in (a, b)}
    if formats == {Format.E5M2.dtype}:
        raise PassError(pass_name, "e5m2 x e5m2: no tensor core multiplies these", node)


def _verify_scales(
    values: Sequence[Any], scales: Sequence[Any], node: fx.Node, pass_name: str
) -> None:
    """Every operand is an output of a cast or of attention, or given in FP8, and used with its own
    scale_inv.
    """
    for value, scale_inv in zip(values, scales, strict=True):
        if _is_output_of_attention(value):
            if _unscaled(scale_inv) is not args_of(args_of(value)[0])[5]:
                raise PassError(pass_name, f"{value} is used with {scale_inv}, not v's", node)
        elif not _is_quantized(value):
            if is_given_in_fp8(value):
                continue
            raise PassError(pass_name, f"operand {value} is not an output of a cast", node)
        elif not _is_scale_of(scale_inv, value):
            raise PassError(pass_name, f"{value} is used with {scale_inv}, not its own", node)


def _verify_takes_no_fp8(node: fx.Node, pass_name: str) -> None:
    if node.target is operator.getitem:
        return
    for arg in node.all_input_nodes:
        if _is_quantized(arg) and arg.meta["val"].dtype in FP8_DTYPES:
            if _is_dequantized(node, arg):
                continue
            raise PassError(pass_name, f"takes the fp8 tensor {arg}; only fp8 ops may", node)


def _is_dequantized(node: fx.Node, value: fx.Node) -> bool:
    """Whether a node only widens a copy, for it to be multiplied with its own scale_inv."""
    return node.target is torch.ops.prims.convert_element_type.default and all(
        user.target is aten.mul.Tensor and _is_scale_of(args_of(user)[1], value)
        for user in node.users
    )


def _verify_value(node: fx.Node, pass_name: str) -> None:
    held = node.meta["val"] if node.target in CASTS else (node.meta["val"],)
    for value, (shape, dtype) in zip(held, result_types(node), strict=True):
        if value.dtype != dtype or tuple(value.shape) != tuple(shape):
            raise PassError(
                pass_name,
                f"meta['val'] is {format_value(value)}, not {format_type(shape, dtype)}",
                node,
            )
