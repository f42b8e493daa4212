"""Record the amax of every cast in the scaling state."""

from __future__ import annotations

import operator

from torch import fx

from ..ir import (
    ATTENTION_BACKWARD,
    TRACK_AMAX,
    args_of,
    aten,
    emit,
    is_backward,
    is_cast,
    takes_slot,
)
from .insert_casts import quantize_getitem


def track_amax(gm: fx.GraphModule, *, amax_fwd: fx.Node, amax_bwd: fx.Node) -> int:
    """Max-accumulate the amax of every cast into the graph inputs that hold them, and so that of
    what attention's backward rounds.

    Before:
        x_q    : (...) = fp8.quantize(x, scale, 0, e4m3)
    After:
        x_q    : (...) = fp8.quantize(x, scale, 0, e4m3)
        x_amax : f32[1] = x_q[3]
        track_amax_fwd : none = fp8.track_amax(amax_fwd, [x_amax, w_amax], [0, 1])

    Forward and backward write to tensors of their own, so that no graph input is mutated in both.

    Requires: share_casts.
    Ensures: at most one fp8.track_amax per direction; every value is recorded once per step.
    Leaves alone: casts that backward repeats of what forward has recorded; those that find their
        own scale, or take that of another cast.
    Numerics: exact.
    """
    if any(node.target is TRACK_AMAX for node in gm.graph.nodes):
        return 0
    casts = [node for node in gm.graph.nodes if is_cast(node) and takes_slot(node)]
    backwards = gm.graph.find_nodes(op="call_function", target=ATTENTION_BACKWARD)
    recorded: set[tuple[int, fx.Node]] = set()
    tracked = 0
    output = gm.graph.output_node()
    for amax, backward in ((amax_fwd, False), (amax_bwd, True)):
        values, slots = [], []
        for cast in casts:
            held = _held(cast)
            if is_backward(cast) is backward and not held <= recorded:
                recorded |= held
                with gm.graph.inserting_after(cast):
                    values.append(quantize_getitem(gm.graph, cast, "amax"))
                slots.append(args_of(cast)[2])
        for call in backwards if backward else ():
            with gm.graph.inserting_after(call):
                item = emit(gm.graph, operator.getitem, (call, 3), f"{call}_amax", like=call)
            values.append(item)
            slots.append(_slot_of(call))
        if values:
            tracked += len(values)
            direction = "backward" if backward else "forward"
            with gm.graph.inserting_before(output):
                args = (amax, values, slots)
                node = emit(gm.graph, TRACK_AMAX, args, f"track_amax_{direction[0]}wd")
            node.meta["partitioner_tag"] = f"must_be_in_{direction}"
            node.meta["val"] = ()  # of no size: the partitioner asks, where it has a memory budget
    return tracked


def _slot_of(call: fx.Node) -> int:
    """The first of the slots that a backward of attention has its scales from."""
    scales = args_of(args_of(call)[10])[0]
    slot: int = args_of(scales)[1]
    return slot


def _held(cast: fx.Node) -> set[tuple[int, fx.Node]]:
    """The values whose amax is in that of a cast, each with the slot. A slot may hold several."""
    value, _, slot = args_of(cast)[:3]
    parts = args_of(value)[0] if value.target is aten.cat.default else [value]
    return {(slot, part) for part in parts}
