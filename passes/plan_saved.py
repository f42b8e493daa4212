"""Tell the partitioner what to keep for backward."""

from __future__ import annotations

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from ..ir import QUANTIZE, is_backward


def plan_saved(gm: fx.GraphModule) -> int:
    """Mark the fp8 copy that backward uses, and its scale_inv, as what is kept.

    Before:
        x_fp8_t     : e4m3[32, 16] = x_q[1]
        x_scale_inv : f32[1] = x_q[2]
    After:
        x_fp8_t     : e4m3[32, 16] = x_q[1]  # saved
        x_scale_inv : f32[1] = x_q[2]  # saved

    The scale_inv must be kept with its tensor: the state's scale may have moved on by then.
    Inside an activation-checkpointed region the cast is recomputed with the rest of the region.

    Requires: share_casts; a joint graph.
    Ensures: only outputs that a backward node takes are marked.
    Leaves alone: casts in the backward (weights, gradients).
    Numerics: exact.
    """
    rewrites = 0
    for cast in gm.graph.nodes:
        if cast.target is not QUANTIZE or is_backward(cast):
            continue
        region = checkpointed_region(cast)
        kept = [item for item in cast.users if any(is_backward(user) for user in item.users)]
        for node in (cast, *cast.users) if region else kept:
            plan = region or {"recompute": CheckpointPolicy.MUST_SAVE}
            if node.meta.get("recompute") is not plan["recompute"]:
                node.meta.update(plan)
                rewrites += 1
    return rewrites


def checkpointed_region(cast: fx.Node) -> dict[str, object] | None:
    """The meta that ties a cast's input to a region to be recomputed, or None outside of one."""
    base = cast.args[0]
    assert isinstance(base, fx.Node)
    keys = ("recompute", "ac_graph_id")
    policy = base.meta.get("recompute")
    if policy in (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE):
        return {key: base.meta[key] for key in keys if key in base.meta}
    return None
