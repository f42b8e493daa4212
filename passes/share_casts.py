"""Quantize every value once per format."""

from __future__ import annotations

from torch import fx

from ..ir import QUANTIZE, args_of, is_cast, value_key


def share_casts(gm: fx.GraphModule) -> int:
    """Merge the casts of one value to one format into the first of them.

    Before:
        x_q     : (...) = fp8.quantize(x, scale, 0, e4m3)
        x_fp8   : e4m3[16, 32] = x_q[0]
        x_q_1   : (...) = fp8.quantize(x, scale, 0, e4m3)
        x_fp8_t : e4m3[32, 16] = x_q_1[1]
    After:
        x_q     : (...) = fp8.quantize(x, scale, 0, e4m3)
        x_fp8   : e4m3[16, 32] = x_q[0]
        x_fp8_t : e4m3[32, 16] = x_q[1]

    Requires: insert_casts.
    Ensures: two reshapes of a value to one shape count as one value; the merged cast uses the
        first one's slot; each output has one getitem node.
    Leaves alone: the casts of a weight in forward and backward, which stay apart so that no fp8
        weight is kept for backward.
    Numerics: exact (casts of one value in one format and granularity share one amax).
    """
    first: dict[object, fx.Node] = {}
    rewrites = 0
    for node in list(gm.graph.nodes):
        if not is_cast(node):
            continue
        key = cast_key(node)
        if key in first:
            node.replace_all_uses_with(first[key])
            gm.graph.erase_node(node)
            rewrites += 1
        else:
            first[key] = node
    for cast in first.values():
        _merge_outputs(gm.graph, cast)
    return rewrites


def cast_key(cast: fx.Node, value: object = None) -> tuple[object, object, bool]:
    """Equal for two casts that may be one; of another value than its own, if a key is given."""
    repeated = cast.meta.get("partitioner_tag") == "must_be_in_backward"
    return (value or value_key(args_of(cast)[0]), _how(cast), repeated)


def _how(cast: fx.Node) -> object:
    """What makes two casts of one value the same: all but the slot that their amax goes to."""
    _, first, second, fmt = args_of(cast)[:4]
    return (first, fmt) if cast.target is QUANTIZE else (tuple(first), second, fmt)


def _merge_outputs(graph: fx.Graph, cast: fx.Node) -> None:
    """Leave one getitem per output, right behind the cast, so that all users come after it."""
    items: dict[object, fx.Node] = {}
    for user in list(cast.users):
        item = items.setdefault(user.args[1], user)
        if item is not user:
            user.replace_all_uses_with(item)
            graph.erase_node(user)
    for item in reversed(items.values()):
        cast.append(item)
