"""Keep for backward, in FP8, what its operators other than GEMMs need."""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from ..ir import (
    DEQUANTIZE_GROUPS,
    QUANTIZE_GROUPS,
    args_of,
    aten,
    emit,
    evaluate,
    is_backward,
    is_cast,
)
from ..ops import GROUP
from ..regions import RESHAPES, hint, is_computable
from .plan_saved import COMPUTED_AGAIN

_MIN_NUMEL = 1 << 16  # what is smaller is not worth a cast
_DTYPES = (torch.bfloat16, torch.float16)
_MOVES = (aten.alias.default, aten.permute.default, aten.t.default, aten.transpose.int)
_REPEATED = "must_be_in_backward"
_PLANS = (COMPUTED_AGAIN, "recompute", "ac_graph_id")


def store_activations(gm: fx.GraphModule, *, min_numel: int = _MIN_NUMEL) -> int:
    """Cast what is kept for backward to E4M3, with a scale per 1x128 group, and back there.

    Before:
        exp     : bf16[512, 256] = aten.exp(mm_fp8)
        alias   : bf16[512, 256] = aten.alias(exp)
        alias_1 : bf16[512, 256] = aten.alias(alias)
        mul     : bf16[512, 256] = aten.mul.Tensor(tangents_1, alias_1)
    After:
        mm_fp8_stored : (e4m3[512, 256], f32[512, 2]) = fp8.quantize_groups(mm_fp8)  # saved
        exp           : bf16[512, 256] = aten.exp(mm_fp8)
        mm_fp8_back   : bf16[512, 256] = fp8.dequantize_groups(mm_fp8_stored_0, mm_fp8_stored_1, bf16)
        exp_1         : bf16[512, 256] = aten.exp(mm_fp8_back)
        mul           : bf16[512, 256] = aten.mul.Tensor(tangents_1, alias_1)

    What is kept is found upwards from what backward reads, through pointwise operators and norms:
    the outputs of GEMMs (or the slices of a merged one) and the sums that norms read. The way back
    down is computed again in backward.

    Requires: plan_saved; a joint graph.
    Ensures: forward computes what it did before.
    Leaves alone: graph inputs, which are kept by reference; what attention, or another operator
        that is not pointwise, reads in backward; rows not divisible by 128; small tensors.
    Numerics: quantizes (backward only).
    """  # noqa: E501
    stored = [node for node in _kept_values(gm) if _is_worth_it(node, min_numel)]
    copies = {node: _stored(gm.graph, node) for node in stored}
    again = _Again(gm.graph, copies)
    for user, value in _backward_reads(gm):
        user.replace_input_with(value, again.of(value, user))
    _forget_plans(gm)
    return len(stored)


def _forget_plans(gm: fx.GraphModule) -> None:
    """Forward values that backward no longer reads need not be computed again there."""
    for node in reversed(gm.graph.nodes):
        if COMPUTED_AGAIN in node.meta and not any(
            is_backward(user) or COMPUTED_AGAIN in user.meta for user in node.users
        ):
            for key in _PLANS:
                del node.meta[key]


def _backward_reads(gm: fx.GraphModule) -> list[tuple[fx.Node, fx.Node]]:
    """Every backward node with each forward value that it reads."""
    return [
        (node, value)
        for node in gm.graph.nodes
        if _in_backward(node)
        for value in node.all_input_nodes
        if not _in_backward(value) and value.op != "placeholder"
    ]


def _in_backward(node: fx.Node) -> bool:
    return is_backward(node) and node.op == "call_function"


def _kept_values(gm: fx.GraphModule) -> list[fx.Node]:
    """What the forward values that backward reads are computed from, in graph order."""
    found: set[fx.Node] = set()
    others: set[fx.Node] = set()  # needed as they are
    for user, value in _backward_reads(gm):
        (found if _is_plain(user) else others).update(_origins(value))
    return [node for node in gm.graph.nodes if node in found - others]


def _is_plain(user: fx.Node) -> bool:
    """Whether a backward node is pointwise, a norm's or a cast; of a view, all that read it."""
    if user.target in RESHAPES or user.target in _MOVES:
        return all(_is_plain(reader) for reader in user.users)
    return is_computable(user) or is_cast(user)


def _origins(value: fx.Node) -> set[fx.Node]:
    origins, stack, seen = set(), [value], {value}
    while stack:
        node = stack.pop()
        if _is_origin(node):
            origins.add(node)
            continue
        new = [arg for arg in node.all_input_nodes if arg not in seen]
        seen.update(new)
        stack += new
    return origins


def _is_origin(node: fx.Node) -> bool:
    if not is_computable(node):
        return True
    kept_sum = node.meta.get("recompute") is CheckpointPolicy.MUST_SAVE
    sliced = node.target is aten.slice.Tensor and not is_computable(args_of(node)[0])
    return kept_sum or sliced


def _is_worth_it(node: fx.Node, min_numel: int) -> bool:
    value = node.meta.get("val")
    if node.op == "placeholder" or not isinstance(value, torch.Tensor) or value.dim() < 2:
        return False
    width = value.shape[-1]
    fits = isinstance(width, int) and width % GROUP == 0 and value.dtype in _DTYPES
    return fits and hint(value.numel()) >= min_numel


def _stored(graph: fx.Graph, node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The FP8 form of a value, made right behind it and marked as what is kept."""
    with graph.inserting_after(node):
        cast = emit(graph, QUANTIZE_GROUPS, (node,), f"{node.name}_stored", like=node)
    items = []
    for index in (1, 0):
        with graph.inserting_after(cast):
            item = emit(graph, operator.getitem, (cast, index), f"{cast.name}_{index}", like=node)
        items.append(item)
    for made in (cast, *items):
        made.meta["partitioner_tag"] = "is_forward"
        made.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    scale_inv, q = items
    return q, scale_inv


def _is_large(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, torch.Tensor) or value.dim() == 0 or value.shape[-1] != 1


class _Again:
    """Forward values as backward computes them, from what is stored."""

    def __init__(self, graph: fx.Graph, stored: dict[fx.Node, tuple[fx.Node, fx.Node]]) -> None:
        self._graph = graph
        self._stored = stored
        self._known: dict[fx.Node, fx.Node] = {}

    def of(self, value: fx.Node, user: fx.Node) -> fx.Node:
        """The value for a backward node, made in front of its first user; itself if not stored."""
        if value not in self._known:
            self._known[value] = self._make(value, user)
        made = self._known[value]
        if made is not value and user < made:
            self._move_before(made, user)
        return made

    def _make(self, value: fx.Node, user: fx.Node) -> fx.Node:
        if value in self._stored:
            q, scale_inv = self._stored[value]
            with self._graph.inserting_before(user):
                args = (q, scale_inv, value.meta["val"].dtype)
                node = emit(self._graph, DEQUANTIZE_GROUPS, args, f"{value.name}_back", like=user)
        else:
            if _is_origin(value) or not _is_large(value):  # one number per row is kept as it is
                return value
            operands = {arg: self.of(arg, user) for arg in value.all_input_nodes}
            if all(new is old for old, new in operands.items()):
                return value
            with self._graph.inserting_before(user):
                node = self._graph.node_copy(value, operands.__getitem__)
            if node.target in RESHAPES:  # what is made here has strides of its own
                node.target = aten.reshape.default
            node.meta = {k: v for k, v in value.meta.items() if k not in _PLANS}
            node.meta["val"] = evaluate(node)
        node.meta["partitioner_tag"] = _REPEATED
        return node

    def _move_before(self, node: fx.Node, user: fx.Node) -> None:
        """Move a value, and what it is made from, in front of a user that comes earlier."""
        for arg in node.all_input_nodes:
            if arg.meta.get("partitioner_tag") == _REPEATED and user < arg:
                self._move_before(arg, user)
        user.prepend(node)
