"""Merge the GEMMs that share an input, such as q, k and v: one each for fprop, dgrad and wgrad."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import networkx as nx
import torch
from torch import fx

from ..ir import (
    DEQUANTIZE,
    RESHAPES,
    GemmInfo,
    Site,
    args_of,
    aten,
    base_of,
    emit,
    evaluate,
    gemm_info,
    gemms,
    is_backward,
    operands,
    size_expr,
    value_key,
)
from ..ops import ALIGNMENT
from ..recipe import Gemm, Operand
from .take_frozen_weights import can_be_joined

# Which operands a GEMM takes, and which of them transposed: how nn.Linear and x @ w.t() are traced.
_LAYOUTS = {
    Gemm.FPROP: [((Operand.INPUT, False), (Operand.WEIGHT, True))],
    Gemm.DGRAD: [((Operand.GRAD_OUTPUT, False), (Operand.WEIGHT, False))],
    Gemm.WGRAD: [
        ((Operand.GRAD_OUTPUT, True), (Operand.INPUT, False)),
        ((Operand.INPUT, True), (Operand.GRAD_OUTPUT, False)),
    ],
}


def merge_gemms(gm: fx.GraphModule) -> int:
    """Let one GEMM compute what several compute from one input.

    Before:
        permute   : bf16[32, 64] = aten.permute(w1, [1, 0])
        mm        : bf16[16, 64] = aten.mm(x, permute)  # w1 fprop = input x weight^T
        permute_1 : bf16[32, 48] = aten.permute(w2, [1, 0])
        mm_1      : bf16[16, 48] = aten.mm(x, permute_1)  # w2 fprop = input x weight^T
    After:
        w1_cat    : bf16[112, 32] = aten.cat([w1, w2])
        w1_cat_t  : bf16[32, 112] = aten.permute(w1_cat, [1, 0])
        mm_merged : bf16[16, 112] = aten.mm(x, w1_cat_t)  # {w1,w2} fprop = input x weight^T
        mm_slice  : bf16[16, 64] = aten.slice.Tensor(mm_merged, 1, 0, 64)
        mm_1_slice : bf16[16, 48] = aten.slice.Tensor(mm_merged, 1, 64, 112)

    The wgrads become one GEMM whose output has the rows of all weights; the dgrads, which were
    summed, become one with all output features as its K.

    Requires: choose_precision.
    Ensures: a group is merged in all directions or in none; ``meta["val"]`` is right behind the
        slices, which are strided; the weights are concatenated again in backward, so that no copy
        of them is kept.
    Leaves alone: a group of which a GEMM stays in high precision, uses another's result, or has an
        output whose width is not a multiple of 16; whose dgrads are not summed in one place; of
        which a view of an output is returned; whose gradients come from different outputs of the
        model, and so may differ by any factor; or of which some weights are frozen, unless all are,
        with scales that can stand below each other.
    Numerics: reorders (dgrad adds its parts in the GEMM).
    """
    changed: set[fx.Node] = set()
    merged = 0
    for sites in _groups(gm):
        if _may_merge(sites):
            changed |= _merge_fprop(gm.graph, sites)
            changed |= _merge_backward(gm.graph, sites)
            merged += 1
    _refresh(gm.graph, changed)
    return merged


@dataclass(frozen=True)
class _SiteGemms:
    """The GEMMs of a site. A backward one is missing where nothing asks for that gradient."""

    site: Site
    weight: fx.Node
    fprop: fx.Node
    dgrads: tuple[fx.Node, ...]
    wgrads: tuple[fx.Node, ...]

    @property
    def features(self) -> int:
        return int(self.weight.meta["val"].shape[0])

    @property
    def backward(self) -> tuple[fx.Node, ...]:
        return (*self.dgrads, *self.wgrads)

    @property
    def grads(self) -> list[fx.Node]:
        """The base of grad_output, once for each backward GEMM."""
        return [_operand(node, Operand.GRAD_OUTPUT) for node in self.backward]


def _info(node: fx.Node) -> GemmInfo:
    info = gemm_info(node)
    assert info is not None
    return info


def _operand(node: fx.Node, operand: Operand) -> fx.Node:
    """The base of a GEMM's operand with this role."""
    left, right = operands(node)
    return base_of(left if _info(node).left.operand is operand else right)[0]


# --- which may be merged ------------------------------------------------------------------------


def _groups(gm: fx.GraphModule) -> list[list[_SiteGemms]]:
    """The sites whose fprop takes the same input, where there are several."""
    training = any(is_backward(node) for node, _ in gemms(gm))
    backward: dict[tuple[int, Gemm], tuple[fx.Node, ...]] = {}
    groups: dict[object, list[fx.Node]] = {}
    for node, info in gemms(gm):
        if info.gemm is not Gemm.FPROP:
            key = (info.site.index, info.gemm)
            backward[key] = (*backward.get(key, ()), node)
        elif _is_plain(node):
            groups.setdefault(_shared_by(node, training=training), []).append(node)

    def site_gemms(node: fx.Node) -> _SiteGemms:
        site, weight = _info(node).site, _operand(node, Operand.WEIGHT)
        found = (backward.get((site.index, gemm), ()) for gemm in (Gemm.DGRAD, Gemm.WGRAD))
        return _SiteGemms(site, weight, node, *found)

    return [[site_gemms(node) for node in nodes] for nodes in groups.values() if len(nodes) > 1]


def _shared_by(fprop: fx.Node, *, training: bool) -> object:
    """What is equal for GEMMs that may be one."""
    info = _info(fprop)
    region = tuple(fprop.meta.get(key) for key in _REGION)
    # The leader: what shares no scaling state in one graph must not share it in another.
    leader = info.site.grad_leader if training else info.site.leader
    value = value_key(_operand(fprop, Operand.INPUT)), leader
    return value, fprop.target, info.dtype, info.left, region


# Activation checkpointing marks with these what backward computes again.
_REGION = ("recompute", "ac_graph_id")


def _is_plain(node: fx.Node) -> bool:
    """Whether it is a GEMM in FP8 with its operands the way round that we know, of fixed width."""
    info = _info(node)
    edges = tuple((edge.operand, edge.transposed) for edge in (info.left, info.right))
    return (
        info.is_fp8
        and node.target in (aten.mm.default, aten.addmm.default)
        and not node.kwargs
        and edges in _LAYOUTS[info.gemm]
        and _is_aligned(node.meta["val"].shape[1])
        and all(bias.meta["val"].shape == node.meta["val"].shape[1:] for bias in _biases([node]))
    )


def _is_aligned(width: int | torch.SymInt) -> bool:
    """Whether a part of a merged output that wide starts and ends where wide loads may."""
    return isinstance(width, int) and width % ALIGNMENT == 0


def _biases(fprops: Sequence[fx.Node]) -> list[fx.Node]:
    return [args_of(node)[0] for node in fprops if node.target is aten.addmm.default]


def _may_merge(sites: Sequence[_SiteGemms]) -> bool:
    fprops, backward = [site.fprop for site in sites], [n for s in sites for n in s.backward]
    return (
        len({site.weight for site in sites}) == len(sites)
        and len({(len(site.dgrads), len(site.wgrads)) for site in sites}) == 1
        and all(_is_plain(node) for node in backward)
        and all(_has_one_grad(site) for site in sites)
        and len({_sum_of(node) for site in sites for node in site.dgrads}) <= 1
        and _are_alike([site.weight for site in sites])
        and not any(_is_returned(node) for node in fprops)
        and all(_may_be_one(nodes) for nodes in (fprops, backward) if nodes)
        and (not backward or max(fprops) < min(backward))
    )


def _are_alike(weights: Sequence[fx.Node]) -> bool:
    """Whether none of the weights is frozen, or all are, and their scales can be put together."""
    frozen = [weight for weight in weights if weight.target is DEQUANTIZE]
    if not frozen:
        return True
    return len(frozen) == len(weights) and can_be_joined(weights)


def _has_one_grad(site: _SiteGemms) -> bool:
    """Whether there is at most one dgrad and wgrad, and both take the same grad_output."""
    several = len(site.dgrads) > 1 or len(site.wgrads) > 1
    return not several and len({value_key(grad) for grad in site.grads}) <= 1


def _sum_of(node: fx.Node) -> fx.Node:
    """The sum that a value is only part of, through reshapes and sums."""
    while len(node.users) == 1:
        (user,) = node.users
        if user.target not in RESHAPES and not _is_sum(user):
            break
        node = user
    return node


def _is_sum(node: fx.Node) -> bool:
    """Whether it adds two values of the same shape and dtype, and does nothing else."""
    if node.target is not aten.add.Tensor or node.kwargs or len(node.all_input_nodes) != 2:
        return False
    kinds = [_kind(value.meta["val"])[0][:2] for value in (node, *node.all_input_nodes)]
    return kinds[0] == kinds[1] == kinds[2]


def _is_returned(node: fx.Node) -> bool:
    """Whether the graph's caller gets a view of the value."""
    return any(user.op == "output" for user in _readers(node))


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """What uses a value or a view of it, views included."""
    for user in node.users:
        yield user
        if _is_view(user):
            yield from _readers(user)


def _is_view(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target is operator.getitem
    aliases = (result.alias_info for result in node.target._schema.returns)
    return node.target is aten._unsafe_view.default or any(a is not None for a in aliases)


def _may_be_one(nodes: Sequence[fx.Node]) -> bool:
    """Whether none depends on another, and what depends on the first ones may be moved."""
    waiting = _waiting(nodes)
    return waiting.isdisjoint(nodes) and not any(node.is_impure() for node in waiting)


def _waiting(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """What depends on one of the nodes and comes before the last of them in graph order."""
    edges = nx.DiGraph()
    edges.add_nodes_from(nodes)
    for node in _from_first_to_last(nodes):
        edges.add_edges_from((node, user) for user in node.users if user <= max(nodes))
    return set().union(*(nx.descendants(edges, node) for node in nodes))


def _from_first_to_last(nodes: Iterable[fx.Node]) -> Iterator[fx.Node]:
    node, last = min(nodes), max(nodes)
    yield node
    while node is not last:
        node = node.next
        yield node


# --- merging ------------------------------------------------------------------------------------


def _merge_fprop(graph: fx.Graph, sites: Sequence[_SiteGemms]) -> set[fx.Node]:
    """Replace the fprops; returns what stands in for them in another layout."""
    old = [site.fprop for site in sites]
    first = old[0]
    info = replace(_merged(_info(first), sites), n=_total(sites))
    with graph.inserting_before(_behind(old)):
        weight = _cat([site.weight for site in sites], first)
        right = _emit(aten.permute.default, (weight, [1, 0]), f"{weight.name}_t", first)
        biases = _biases(old)
        bias = [_cat(biases, first)] if biases else []
        args = (*bias, operands(first)[0], right)
        merged = _emit(first.target, args, f"{first.name}_merged", first)
        merged.meta["fp8"] = info
        parts = _copied(_slices(merged, 1, old, sites), old)
    return _replace(zip(old, parts, strict=True))


def _copied(slices: Sequence[fx.Node], old: Sequence[fx.Node]) -> list[fx.Node]:
    """The slices, or copies of those that are read as they lie or outlive the others.

    A view that is kept for backward, such as v, keeps the whole of what it is a view of.
    """
    kept = [any(is_backward(user) for user in _readers(node)) for node in old]
    return [
        _emit(aten.clone.default, (new,), f"{node.name}_copy", node)
        if (is_kept and not all(kept)) or any(_reads_memory(user) for user in _readers(node))
        else new
        for new, node, is_kept in zip(slices, old, kept, strict=True)
    ]


def _reads_memory(node: fx.Node) -> bool:
    """Whether it depends on strides, or is a higher-order operator, which we cannot evaluate."""
    is_op = isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem
    return not is_op or node.target is aten.as_strided.default


def _merge_backward(graph: fx.Graph, sites: Sequence[_SiteGemms]) -> set[fx.Node]:
    """Replace the dgrads and wgrads; returns what stands in for them in another layout."""
    old = [node for site in sites for node in site.backward]
    if not old:
        return set()
    with graph.inserting_before(_behind(old)):
        grad = _cat([site.grads[0] for site in sites], old[0], 1)
        dgrad, wgrads = _merged_dgrad(sites, grad), _merged_wgrads(sites, grad)
    changed = _replace((node, new) for node, new in wgrads)
    for site in sites[1:]:
        changed |= {_leave_out(node) for node in site.dgrads}
    return changed | _replace((node, dgrad) for node in sites[0].dgrads if dgrad is not None)


def _merged_dgrad(sites: Sequence[_SiteGemms], grad: fx.Node) -> fx.Node | None:
    """One dgrad, which is the sum of all."""
    if not sites[0].dgrads:
        return None
    (first,) = sites[0].dgrads
    # With the dimension spelled out, or it would be taken for the same node as in forward and kept.
    weight = _cat([site.weight for site in sites], first, 0)
    weight.meta["partitioner_tag"] = "must_be_in_backward"
    merged = _emit(aten.mm.default, (grad, weight), f"{first.name}_merged", first)
    merged.meta["fp8"] = replace(_merged(_info(first), sites), k=_total(sites))
    return merged


def _merged_wgrads(sites: Sequence[_SiteGemms], grad: fx.Node) -> Iterable[tuple[fx.Node, fx.Node]]:
    """Each wgrad and what replaces it: rows of one GEMM, so that they are contiguous."""
    old = [node for site in sites for node in site.wgrads]
    if not old:
        return []
    first = old[0]
    left = _emit(aten.permute.default, (grad, [1, 0]), f"{grad.name}_t", first)
    x = _operand(first, Operand.INPUT)
    merged = _emit(aten.mm.default, (left, x), f"{first.name}_merged", first)
    info = _merged(_info(first), sites)
    edges = {edge.operand: replace(edge, transposed=False) for edge in (info.left, info.right)}
    merged.meta["fp8"] = replace(
        info,
        left=replace(edges[Operand.GRAD_OUTPUT], transposed=True),
        right=edges[Operand.INPUT],
        m=_total(sites),
        n=size_expr(x.meta["val"].shape[1]),
    )
    return zip(old, _turned(_slices(merged, 0, old, sites), old), strict=True)


def _turned(slices: Sequence[fx.Node], old: Sequence[fx.Node]) -> list[fx.Node]:
    """The slices, transposed where the old wgrad was ``input^T x grad_output``."""
    return [
        _emit(aten.permute.default, (new, [1, 0]), f"{new.name}_t", node)
        if _info(node).left.operand is Operand.INPUT
        else new
        for new, node in zip(slices, old, strict=True)
    ]


def _merged(info: GemmInfo, sites: Sequence[_SiteGemms]) -> GemmInfo:
    return replace(info, merged=tuple(site.site for site in sites[1:]))


def _total(sites: Sequence[_SiteGemms]) -> Any:
    return size_expr(sum(site.features for site in sites))


def _cat(values: Sequence[fx.Node], like: fx.Node, *dim: int) -> fx.Node:
    return _emit(aten.cat.default, (list(values), *dim), f"{values[0].name}_cat", like)


def _slices(
    merged: fx.Node, dim: int, old: Sequence[fx.Node], sites: Sequence[_SiteGemms]
) -> list[fx.Node]:
    ends = pairwise(accumulate((site.features for site in sites), initial=0))
    return [
        _emit(aten.slice.Tensor, (merged, dim, start, end), f"{node.name}_slice", node)
        for node, (start, end) in zip(old, ends, strict=True)
    ]


def _emit(target: Any, args: tuple[Any, ...], name: str, like: fx.Node) -> fx.Node:
    node = emit(like.graph, target, args, name, like)
    node.meta.update({key: like.meta[key] for key in _REGION if key in like.meta})
    return node


# --- the graph around them ----------------------------------------------------------------------


def _behind(nodes: Sequence[fx.Node]) -> fx.Node:
    """Move what depends on one of the nodes behind the last of them; returns what follows that."""
    waiting, last = _waiting(nodes), max(nodes)
    for node in reversed([n for n in _from_first_to_last(nodes) if n in waiting]):
        last.append(node)
    return last.next


def _replace(pairs: Iterable[tuple[fx.Node, fx.Node]]) -> set[fx.Node]:
    """Put each new node in the place of the old one; returns those that differ in layout."""
    changed = set()
    for old, new in pairs:
        if _kind(old.meta["val"]) != _kind(new.meta["val"]):
            changed.add(new)
        old.replace_all_uses_with(new)
        _erase(old)
    return changed


def _leave_out(part: fx.Node) -> fx.Node:
    """Take a value out of the sum that it is part of; returns what that sum now is."""
    value, (total,) = part, part.users
    while total.target in RESHAPES:
        value, (total,) = total, total.users
    (rest,) = (other for other in total.all_input_nodes if other is not value)
    total.replace_all_uses_with(rest)
    _erase(total)
    return rest


def _erase(node: fx.Node) -> None:
    """Erase a node that nothing uses, and all that was only there for it."""
    inputs = node.all_input_nodes
    node.graph.erase_node(node)
    for value in inputs:
        if not value.users and not value.is_impure():
            _erase(value)


def _refresh(graph: fx.Graph, changed: set[fx.Node]) -> None:
    """Evaluate again what reads a changed value, until the values are what they were."""
    for node in graph.nodes if changed else ():
        if node.op == "output" or changed.isdisjoint(node.all_input_nodes) or _fresh(node):
            continue
        value = _evaluated(node, changed)
        if _kind(value) != _kind(node.meta["val"]):
            node.meta["val"] = value
            changed.add(node)


def _fresh(node: fx.Node) -> bool:
    """Whether the value cannot depend on the layout of what is read, or cannot be had again."""
    if node.target is operator.getitem:
        return False
    tags = getattr(node.target, "tags", ())
    symbolic = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
    return not isinstance(node.target, torch._ops.OpOverload) or any(t in tags for t in symbolic)


def _evaluated(node: fx.Node, changed: set[fx.Node]) -> Any:
    """A node's value; from copies of what it reads, if it cannot be had from strided values."""
    try:
        return evaluate(node)
    except Exception:
        if node.target in RESHAPES:
            node.target = aten.reshape.default
            return evaluate(node)
        for value in changed.intersection(node.all_input_nodes):
            with node.graph.inserting_before(node):
                copy = _emit(aten.clone.default, (value,), f"{value.name}_copy", value)
            node.replace_input_with(value, copy)
        return evaluate(node)


def _kind(value: Any) -> list[tuple[Any, ...]]:
    """Dtype, shape and strides of the tensors, without asking for what is symbolic in them."""
    values = value if isinstance(value, list | tuple) else (value,)
    return [
        (v.dtype, [size_expr(s) for s in v.shape], [size_expr(s) for s in v.stride()])
        for v in values
        if isinstance(v, torch.Tensor)
    ]
