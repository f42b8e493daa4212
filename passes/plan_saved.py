"""Decide what is kept for backward: every value once, in the form that backward needs."""

from __future__ import annotations

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from ..formats import FP8_DTYPES
from ..ir import (
    ATTENTION,
    CASTS,
    QUANTIZE,
    args_of,
    aten,
    emit,
    evaluate,
    is_backward,
    is_cast,
    quantize_output,
    takes_slot,
)
from ..regions import hint, is_computable
from .insert_casts import quantize_getitem

COMPUTED_AGAIN = "fp8_computed_again"  # in the meta of what is marked here to be recomputed
_REPEATED = "must_be_in_backward"  # the partitioner's word for a node that forward may not compute


def plan_saved(gm: fx.GraphModule) -> int:
    """Keep the transposed fp8 copy that wgrad needs, or what it can be cast from again.

    Before:
        x_fp8_t     : e4m3[32, 16] = x_q[1]
        x_scale_inv : f32[1] = x_q[2]
    After:
        x_fp8_t     : e4m3[32, 16] = x_q[1]  # saved
        x_scale_inv : f32[1] = x_q[2]  # saved

    Where backward keeps in high precision everything that the cast's value is computed from (the
    input of a norm or of an activation, which their own backwards need), the value is computed and
    cast again in backward, by the kernel that reads these tensors anyway, and nothing more is kept.

    What attention multiplies is kept as forward has cast it.
    A scale_inv must be kept with its tensor: the state's scale may have moved on by then.
    Inside an activation-checkpointed region the cast is recomputed with the rest of the region.

    Requires: share_casts; a joint graph.
    Ensures: only outputs that a backward node takes are marked; no value is kept with its cast.
    Leaves alone: casts in the backward (weights, gradients).
    Numerics: exact.
    """
    sources = _Sources()
    read = _read_by_backward(gm)
    kept_anyway = frozenset().union(*(sources.of(value) for value in read))
    _keep_residual_sums(gm, read)
    rewrites = 0
    for cast in list(gm.graph.nodes):
        if not is_cast(cast) or is_backward(cast):
            continue
        region = checkpointed_region(cast)
        kept = [item for item in cast.users if any(is_backward(user) for user in item.users)]
        copies = any(item.meta["val"].dtype in FP8_DTYPES for item in kept)
        # Attention's sums are of what forward has cast, and its output has the values' scale.
        as_it_was = any(user.target is ATTENTION for item in cast.users for user in item.users)
        again = region is None and copies and not as_it_was
        if again and sources.of(args_of(cast)[0]) <= kept_anyway:
            _compute_again(args_of(cast)[0], read)
            rewrites += _cast_again(gm.graph, cast)
            continue
        for node in (cast, *cast.users) if region else kept:
            plan = region or {"recompute": CheckpointPolicy.MUST_SAVE}
            if node.meta.get("recompute") is not plan["recompute"]:
                node.meta.update(plan)
                rewrites += 1
    return rewrites


class _Sources:
    """The large values that a value can be computed from, by pointwise operators and norms."""

    def __init__(self) -> None:
        self._known: dict[fx.Node, frozenset[fx.Node]] = {}

    def of(self, node: fx.Node) -> frozenset[fx.Node]:
        """What is large: a matrix, not a norm's weight or one number per row."""
        stack = [node]
        while stack:
            current = stack[-1]
            missing = [n for n in self._above(current) if n not in self._known]
            if missing:
                stack += missing
                continue
            stack.pop()
            self._known[current] = self._combined(current)
        return self._known[node]

    def _above(self, node: fx.Node) -> list[fx.Node]:
        return node.all_input_nodes if is_computable(node) else []

    def _combined(self, node: fx.Node) -> frozenset[fx.Node]:
        if not is_computable(node):
            return frozenset([node]) if _is_large(node) else frozenset()
        return frozenset().union(*(self._known[n] for n in node.all_input_nodes))


def _is_large(node: fx.Node) -> bool:
    value = node.meta.get("val")
    sizes = [hint(size) for size in getattr(value, "shape", ())]
    return sum(size > 1 for size in sizes) > 1


def _read_by_backward(gm: fx.GraphModule) -> set[fx.Node]:
    """The forward values that backward computes with, besides those that it casts."""
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if is_backward(node) and not is_cast(node):
            found.update(value for value in node.all_input_nodes if not is_backward(value))
    return found


def _keep_residual_sums(gm: fx.GraphModule, read: set[fx.Node]) -> None:
    """Have a sum of two matrices that forward writes anyway kept, rather than one of its terms.

    To the partitioner both cost the same; backward's kernels read one matrix instead of two.
    """
    for node in gm.graph.nodes:
        if node.target is not aten.add.Tensor or is_backward(node) or len(node.users) < 2:
            continue
        terms = [arg for arg in node.all_input_nodes if _is_large(arg)]
        if len(terms) == 2 and (node in read or any(user in read for user in node.users)):
            node.meta.setdefault("recompute", CheckpointPolicy.MUST_SAVE)


def _compute_again(value: fx.Node, read: set[fx.Node]) -> None:
    """Have the partitioner compute a value in backward, from values that backward reads anyway.

    Left to itself it would keep the value: it takes a cast for something that needs it in memory.
    """
    stack = [value]
    while stack:
        node = stack.pop()
        if node not in read and is_computable(node):
            node.meta.update(recompute=CheckpointPolicy.MUST_RECOMPUTE, ac_graph_id=0)
            node.meta[COMPUTED_AGAIN] = True
            stack += node.all_input_nodes


def _cast_again(graph: fx.Graph, cast: fx.Node) -> int:
    """Let backward's users take the outputs of a second cast, which is made there."""
    outputs = (name for name in CASTS[cast.target] if name not in ("amax", "scale_used"))
    found = {name: quantize_output(cast, name) for name in outputs}
    taken = {name: item for name, item in found.items() if item is not None}
    users = {
        name: [user for user in item.users if is_backward(user)] for name, item in taken.items()
    }
    first = min(user for group in users.values() for user in group)
    with graph.inserting_before(first):
        wanted = (bool(users.get("fp8")), bool(users.get("fp8_t")))
        again = emit(graph, cast.target, (*cast.args[:4], *wanted), f"{cast.name}_again", like=cast)
        again.meta["partitioner_tag"] = _REPEATED
        if cast.target is QUANTIZE and args_of(cast)[1] is not None and not takes_slot(cast):
            args_of(cast)[1].meta["recompute"] = CheckpointPolicy.MUST_SAVE
        for name, group in users.items():
            if group:
                item = quantize_getitem(graph, again, name)
                for user in group:
                    user.replace_input_with(taken[name], item)
    left = tuple(name in taken and bool(taken[name].users) for name in ("fp8", "fp8_t"))
    cast.args = (*cast.args[:4], *left)
    cast.meta["val"] = evaluate(cast)
    return 1


def checkpointed_region(cast: fx.Node) -> dict[str, object] | None:
    """The meta that ties a cast's input to a region to be recomputed, or None outside of one."""
    base = cast.args[0]
    assert isinstance(base, fx.Node)
    keys = ("recompute", "ac_graph_id")
    policy = None if COMPUTED_AGAIN in base.meta else base.meta.get("recompute")
    if policy in (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE):
        return {key: base.meta[key] for key in keys if key in base.meta}
    return None
