"""Record the amax of every cast in the scaling state."""

from __future__ import annotations

from torch import fx

from ..ir import QUANTIZE, TRACK_AMAX, args_of, emit, is_backward
from .insert_casts import quantize_getitem


def track_amax(gm: fx.GraphModule, *, amax_fwd: fx.Node, amax_bwd: fx.Node) -> int:
    """Max-accumulate the amax of every cast into the graph inputs that hold them.

    Before:
        x_q    : (...) = fp8.quantize(x, scale, 0, e4m3)
    After:
        x_q    : (...) = fp8.quantize(x, scale, 0, e4m3)
        x_amax : f32[1] = x_q[3]
        track_amax_fwd : none = fp8.track_amax(amax_fwd, [x_amax, w_amax], [0, 1])

    Forward and backward write to tensors of their own, so that no graph input is mutated in both.

    Requires: share_casts.
    Ensures: at most one fp8.track_amax per direction; every slot is recorded once per step.
    Leaves alone: casts that backward repeats of what forward has recorded.
    Numerics: exact.
    """
    if any(node.target is TRACK_AMAX for node in gm.graph.nodes):
        return 0
    casts = [node for node in gm.graph.nodes if node.target is QUANTIZE]
    recorded: set[int] = set()
    output = gm.graph.output_node()
    for amax, backward in ((amax_fwd, False), (amax_bwd, True)):
        values: dict[int, fx.Node] = {}
        for cast in casts:
            slot = args_of(cast)[2]
            if is_backward(cast) is backward and slot not in recorded:
                with gm.graph.inserting_after(cast):
                    values[slot] = quantize_getitem(gm.graph, cast, "amax")
        if values:
            recorded |= values.keys()
            direction = "backward" if backward else "forward"
            with gm.graph.inserting_before(output):
                args = (amax, list(values.values()), list(values))
                node = emit(gm.graph, TRACK_AMAX, args, f"track_amax_{direction[0]}wd")
            node.meta["partitioner_tag"] = f"must_be_in_{direction}"
    return len(recorded)
