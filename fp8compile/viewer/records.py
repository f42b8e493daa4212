"""A node of a graph as the viewer keeps it: plain text, without anything of PyTorch."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from ..cost import GemmCost
from ..ir import (
    CASTS,
    QUANTIZE,
    QUANTIZE_BLOCKS,
    QUANTIZE_GROUPS,
    RESHAPES,
    Edge,
    GemmInfo,
    args_of,
    aten,
    format_args,
    format_value,
    gemm_info,
    is_backward,
    is_cast,
    op_name,
    takes_slot,
)
from ..recipe import Gemm

# They move nothing: the picture leaves them out, unless it is asked for them.
VIEWS = (
    *RESHAPES,
    *(aten.permute.default, aten.t.default, aten.transpose.int, aten.alias.default),
    *(aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.expand.default),
    *(aten.slice.Tensor, aten.select.int, aten.detach.default),
)

REASON = "stays in high precision"
DECISIONS = ("GEMM", "left", "right", REASON)  # the notes that tell what was decided about a GEMM
Notes = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Input:
    """An edge: the record that the value comes from, its type as text, and whether it is drawn.

    Scales and amax, of which every cast has some, are ``small``: said, but not drawn.
    """

    name: str
    type: str
    small: bool = False


@dataclass(frozen=True)
class Record:
    """One node. ``kind``: input, parameter, gemm, cast, region, view or op. ``path``: the module
    that it belongs to. ``region``: the record of the region that it is in, or "". ``notes``: what
    there is to say about it, each with a label. ``source``: the key of a region's Triton source.
    """

    name: str
    kind: str
    op: str
    type: str
    path: str
    backward: bool
    inputs: tuple[Input, ...] = ()
    notes: Notes = ()
    region: str = ""
    source: str = ""
    label: str = ""


@dataclass(frozen=True)
class Names:
    """What a graph's nodes are called: ``inputs``: the names of its inputs, in order; ``modules``:
    the modules of those that are parameters or buffers; ``path_of``: the module that a node belongs
    to, or None where nobody knows; ``slots``: the operands whose scaling state is in each slot;
    ``costs``: what was predicted.
    """

    inputs: Sequence[str]
    modules: Mapping[str, str]
    path_of: Callable[[fx.Node], str | None]
    slots: dict[int, str] = field(default_factory=dict)
    costs: dict[tuple[int, Gemm], GemmCost] = field(default_factory=dict)


def kind_of(node: fx.Node) -> str:
    """What the picture draws a node as."""
    if is_cast(node) or node.target is QUANTIZE_GROUPS:
        return "cast"
    if gemm_info(node) is not None:
        return "gemm"
    return "view" if node.target in VIEWS else "op"


def is_small(node: fx.Node) -> bool:
    """Whether a value is a scale, an amax or a single number."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        if value.numel() == 1:
            return True
        if node.target is operator.getitem and is_cast(args_of(node)[0]):
            cast, index = args_of(node)
            return not CASTS[cast.target][index].startswith("fp8")
    return not isinstance(value, torch.Tensor | list | tuple)


def notes_of(node: fx.Node, names: Names) -> Notes:
    """What a click shows besides op, type and module."""
    notes = [("call", _call(node))]
    info = gemm_info(node)
    if info is not None:
        notes += _gemm_notes(info, names)
    if is_cast(node):
        notes += _cast_notes(node, names)
    if "amax" in node.meta:
        notes.append(("amax, derived", str(node.meta["amax"].evalf(3))))
    if node.meta.get("recompute") is CheckpointPolicy.MUST_SAVE:
        notes.append(("planned", "to be kept for backward"))
    notes.append(("size", _bytes(node.meta.get("val"))))
    trace = str(node.meta.get("stack_trace") or "")
    return (*((k, v) for k, v in notes if v), *_source_line(trace))


def _call(node: fx.Node) -> str:
    if node.op == "placeholder":
        return ""
    kwargs = [f"{key}={format_args(value)}" for key, value in node.kwargs.items()]
    return f"{op_name(node.target)}({', '.join([format_args(a) for a in node.args] + kwargs)})"


def _gemm_notes(info: GemmInfo, names: Names) -> list[tuple[str, str]]:
    recipe = info.site.recipe
    return [
        ("site", info.name),
        ("GEMM", f"{info.gemm}, M {info.m}, N {info.n}, K {info.k}, {count_of(info.flops)} FLOPs"),
        ("left", _edge(info.left)),
        ("right", _edge(info.right)),
        (REASON, info.reason or ""),
        ("recipe of its own", recipe.name if recipe else ""),
        ("predicted", _predicted([names.costs.get((s.index, info.gemm)) for s in info.sites])),
    ]


def _predicted(found: Sequence[GemmCost | None]) -> str:
    """The times of a GEMM, which may do for several sites."""
    costs = [cost for cost in found if cost is not None]
    if not costs or len(costs) < len(found):
        return ""
    fp8 = [cost.fp8_us for cost in costs if cost.fp8_us is not None]
    high = f"{sum(cost.high_us for cost in costs):.1f} us in high precision"
    low = f", {sum(fp8):.1f} us in FP8 with its casts" if len(fp8) == len(costs) else ""
    return f"{high}{low}, on {costs[0].device}"


def _edge(edge: Edge) -> str:
    return f"{edge.operand}{', transposed' if edge.transposed else ''}: {edge.cast or 'as it is'}"


def _cast_notes(node: fx.Node, names: Names) -> list[tuple[str, str]]:
    copies = [
        CASTS[node.target][args_of(user)[1]]
        for user in node.users
        if user.target is operator.getitem
    ]
    written = [{"fp8": "row-major", "fp8_t": "transposed"}.get(c, "") for c in copies]
    notes = [("copies", ", ".join(sorted(filter(None, written))))]
    if node.target is QUANTIZE:
        notes.append(("scale", _tensor_scale(node, names)))
    elif node.target is QUANTIZE_BLOCKS:
        high, wide = (str(size or "all") for size in args_of(node)[1])
        notes.append(("scale", f"current, one per {high} x {wide}"))
    return notes


def _tensor_scale(cast: fx.Node, names: Names) -> str:
    scale, slot = args_of(cast)[1:3]
    if takes_slot(cast):
        return f"slot {slot}, of {names.slots.get(slot, '')}"
    return "current" if scale is None else "current, found in forward"


@functools.cache
def _source_line(trace: str) -> Notes:
    """The line of the model's source that a stack trace ends in."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in .*\n\s*(.*)', trace)
    if not frames:
        return ()
    file, line, code = frames[-1]
    return (("line", f"{Path(file).name}:{line}  {code.strip()}"),)


def _bytes(value: Any) -> str:
    tensors = value if isinstance(value, list | tuple) else (value,)
    sizes = [t.numel() * t.dtype.itemsize for t in tensors if isinstance(t, torch.Tensor)]
    if not sizes or not all(isinstance(size, int) for size in sizes):
        return ""
    return f"{count_of(sum(sizes))}B"


def count_of(number: Any) -> str:
    """``1.5 G`` for 1.5e9; an expression as it is."""
    if not getattr(number, "is_number", True):
        return str(number)
    value, units = float(number), ["", "k", "M", "G", "T", "P"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.3g} {units[0]}"


def record_of(node: fx.Node, names: Names, inputs: tuple[Input, ...], path: str) -> Record:
    """The record of an operator, whose inputs and path are known."""
    return Record(
        name=node.name,
        kind=kind_of(node),
        op=op_name(node.target) if node.op == "call_function" else str(node.target),
        type=format_value(node.meta.get("val")),
        path=path,
        backward=is_backward(node),
        inputs=inputs,
        notes=notes_of(node, names),
        label=_label(node),
    )


def _label(node: fx.Node) -> str:
    """What is written in its box."""
    info = gemm_info(node)
    if info is not None:
        return str(info.gemm)
    name = getattr(node.target, "_opname", None) or op_name(node.target)
    return {"convert_element_type": f"to {format_value(node.meta.get('val')).split('[')[0]}"}.get(
        name, name
    )
