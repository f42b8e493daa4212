"""The rules of the IR, checked after every pass."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from .errors import PassError
from .formats import FP8_DTYPES, Format
from .ir import (
    CASTS,
    SCALED_MMS,
    TRACK_AMAX,
    args_of,
    constant_factor,
    format_type,
    format_value,
    is_backward,
    is_cast,
    is_given_in_fp8,
    quantize_output,
    result_types,
    scale_of,
)


class Verifier:
    """Checks a graph after each of several passes, and every node only once with its arguments.

    1. The graph lints: topologically sorted, no dangling names.
    2. Every fp8 tensor is an output of a cast and has exactly one scale_inv: the same node's.
       Only a scaled_mm takes it, with that scale_inv, a constant times it, or none (what reads
       the product scales it), or the graph returns it. Or it was given to the graph: what forward
       has cast, or frozen weights.
    3. Every ``meta["val"]`` of an ``fp8::`` node equals the re-evaluated fake (shape and dtype).
    4. Nothing is mutated but amax, by at most one ``fp8::track_amax`` per direction.
    """

    def __init__(self) -> None:
        self._right: dict[fx.Node, Any] = {}  # with which arguments a node's value was found right

    def check(self, gm: fx.GraphModule, pass_name: str) -> None:
        """Raise a PassError that names the pass, and the node that breaks a rule."""
        try:
            gm.graph.lint()
        except RuntimeError as error:
            raise PassError(pass_name, f"the graph does not lint: {error}") from error
        tracked = set()
        for node in gm.graph.nodes:
            if node.target in (*CASTS, *SCALED_MMS) and self._right.get(node) != node.args:
                _verify_value(node, pass_name)
                self._right[node] = node.args
            if node.target in SCALED_MMS:
                _verify_scaled_mm(node, pass_name)
            elif node.target is TRACK_AMAX:
                if is_backward(node) in tracked:
                    raise PassError(pass_name, "amax is tracked twice in one direction", node)
                tracked.add(is_backward(node))
            elif node.op == "call_function":
                _verify_takes_no_fp8(node, pass_name)


def verify(gm: fx.GraphModule, pass_name: str = "verify") -> None:
    """Check the rules of the IR once, see Verifier."""
    Verifier().check(gm, pass_name)


def _is_quantized(node: Any) -> bool:
    return (
        isinstance(node, fx.Node) and node.target is operator.getitem and is_cast(args_of(node)[0])
    )


def _is_scale_of(scale_inv: Any, value: fx.Node) -> bool:
    """Whether it is the scale_inv of a cast's copy ``value``, or a constant times it."""
    scaled = constant_factor(scale_inv) if isinstance(scale_inv, fx.Node) else None
    scale_inv = scaled[0] if scaled else scale_inv
    if not _is_quantized(scale_inv) or value.args[0] is not scale_inv.args[0]:
        return False
    cast, copy = args_of(value)
    return quantize_output(cast, scale_of(CASTS[cast.target][copy], cast)) is scale_inv


def _verify_scaled_mm(node: fx.Node, pass_name: str) -> None:
    a, b, a_scale_inv, b_scale_inv = args_of(node)[:4]
    for value, scale_inv in ((a, a_scale_inv), (b, b_scale_inv)):
        if not _is_quantized(value):
            if is_given_in_fp8(value):
                continue
            raise PassError(pass_name, f"operand {value} is not an output of a cast", node)
        if scale_inv is not None and not _is_scale_of(scale_inv, value):
            raise PassError(pass_name, f"{value} is used with {scale_inv}, not its own", node)
    formats = {value.meta["val"].dtype for value in (a, b)}
    if formats == {Format.E5M2.dtype}:
        raise PassError(pass_name, "e5m2 x e5m2: no tensor core multiplies these", node)


def _verify_takes_no_fp8(node: fx.Node, pass_name: str) -> None:
    if node.target is operator.getitem:
        return
    for arg in node.all_input_nodes:
        if _is_quantized(arg) and arg.meta["val"].dtype in FP8_DTYPES:
            raise PassError(pass_name, f"takes the fp8 tensor {arg}; only fp8 ops may", node)


def _verify_value(node: fx.Node, pass_name: str) -> None:
    held = node.meta["val"] if node.target in CASTS else (node.meta["val"],)
    for value, (shape, dtype) in zip(held, result_types(node), strict=True):
        if value.dtype != dtype or tuple(value.shape) != tuple(shape):
            raise PassError(
                pass_name,
                f"meta['val'] is {format_value(value)}, not {format_type(shape, dtype)}",
                node,
            )
