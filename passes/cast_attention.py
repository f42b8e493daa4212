"""Let attention's forward run in FP8."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from ..cost import MARGIN, AttentionWork, Device
from ..formats import Format
from ..ir import ATTENTION, QUANTIZE, SITE_TAG, VIEWS, Site, args_of, aten, emit, evaluate
from ..ops import ALIGNMENT
from .attention_scale import BACKWARD, FORWARD, QUERY
from .choose_precision import SLOWER
from .insert_casts import quantize_getitem

LARGEST_HEAD = 128  # that cuDNN multiplies in FP8 on Hopper
WHY_NOT = "fp8_attention_kept"  # in a node's meta: why it stays in high precision
_CONVERT = torch.ops.prims.convert_element_type.default
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_OUT, _SUMS = 0, 1  # of attention's results: the output, and the logarithms of the softmax's sums
_PLANS = ("recompute", "ac_graph_id")  # of a region that is checkpointed
_SAVES = (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE)


def cast_attention(
    gm: fx.GraphModule,
    *,
    device: Device | None = None,
    scale: fx.Node | None = None,
    sites: Iterable[Site] = (),
) -> int:
    """Cast the query, key and value of attention to E4M3, and multiply these in forward.

    Before:
        sdpa    : (bf16[2, 4, 64, 16], f32[2, 4, 64]) = aten._...(q, k, v, 0.0, True)
        getitem : bf16[2, 4, 64, 16] = sdpa[0]
    After:
        q_by_token     : bf16[2, 64, 4, 16] = aten.permute(q, [0, 2, 1, 3])
        q_rows         : bf16[128, 64] = aten.reshape(q_by_token, [128, 64])
        q_rows_q       : (e4m3[128, 64], ...) = fp8.quantize(q_rows, None, 0, e4m3, True, False)
        attention      : (e4m3[128, 64], f32[2, 4, 64]) = fp8.attention(q_rows_fp8, ...)
        attention_fp8  : e4m3[128, 64] = attention[0]
        attention_wide : f32[128, 64] = prims.convert_element_type(attention_fp8, f32)
        attention_mul  : f32[128, 64] = aten.mul.Tensor(attention_wide, v_rows_scale_inv)
        attention_rows : bf16[128, 64] = prims.convert_element_type(attention_mul, bf16)
        attention_view : bf16[2, 64, 4, 16] = aten.view(attention_rows, [2, 64, 4, 16])
        attention_out  : bf16[2, 4, 64, 16] = aten.permute(attention_view, [0, 2, 1, 3])

    ``scale`` is the graph input that holds known scales, if there is one. A query, key or value
    that is computed from the output of one of ``sites`` has its scale there, in that site's slot,
    unless another is, too; others have current scales. The output has the scale of the values,
    whose average it is. Backward stays in high precision (unless ``cast_attention_backward``
    follows): it takes the query, key, value and output as they now are, of which FP8 is what is
    kept. With ``device``, calls that FP8 is predicted not to make faster there are
    declined: those of short sequences.

    Requires: fold_scales, which makes factors of the query or key part of attention's scale.
    Ensures: the meta of what is left in high precision says why.
    Leaves alone: masks, dropout, heads that are no multiple of 16 or larger than 128; symbolic
        sizes, for each of which cuDNN would make a plan; what reads other results.
    Numerics: quantizes (forward only).
    """
    calls = []
    for node in gm.graph.nodes:
        if node.target not in FORWARD:
            continue
        reason = why_not_fp8(node)
        if reason is None and device is not None:
            reason = slower_in_fp8(*work_of(node).us(device))
        if reason is not None:
            node.meta[WHY_NOT] = reason
        else:
            calls.append(node)
    slots = {} if scale is None else _slots(calls, {site.index: site for site in sites})
    for node in calls:
        _replace(gm.graph, node, scale, slots)
    return len(calls)


def attention_calls(gm: fx.GraphModule) -> list[tuple[fx.Node, str]]:
    """The calls of attention that were to be in FP8, each with why it is not, or ""."""
    return [
        (node, node.meta.get(WHY_NOT, ""))
        for node in gm.graph.nodes
        if node.target is ATTENTION or (node.target in FORWARD and WHY_NOT in node.meta)
    ]


def why_not_fp8(node: fx.Node) -> str | None:
    """Why a call of attention has to stay in high precision, or None."""
    given = arguments_of(node)
    q, k, v = (value.meta["val"] for value in _operands(node))
    if not all(isinstance(size, int) for size in (*q.shape, *k.shape)):
        return "its sizes are symbolic"
    if q.dtype not in _DTYPES:
        return f"it is {str(q.dtype).removeprefix('torch.')}"
    if given["dropout_p"]:
        return "it has dropout"
    if given.get("attn_bias") is not None or given.get("attn_mask") is not None:
        return "it has a mask"
    if 0 in (*q.shape, *k.shape):
        return "it is empty"
    head = q.shape[-1]
    if head % ALIGNMENT or head > LARGEST_HEAD:
        return f"its heads have {head} elements, not a multiple of 16 up to {LARGEST_HEAD}"
    if v.shape != k.shape:
        return f"its values have {v.shape[-1]} elements a head, and its keys {k.shape[-1]}"
    if q.shape[2] == 1:
        return f"{SLOWER} for one query"  # which takes what it takes to read keys and values
    if not all(has_fitting_strides(torch.empty_like(value)) for value in (q, k, v)):
        return "its query, key or value lie neither by head nor by token"
    if given["is_causal"] and q.shape[2] != k.shape[2]:
        return f"it is causal, with {q.shape[2]} queries and {k.shape[2]} keys"
    return _why_not_results(_results(node), q)


def slower_in_fp8(high_us: float, fp8_us: float) -> str | None:
    """Why attention that takes so long stays in high precision, or None if FP8 pays."""
    if fp8_us < MARGIN * high_us:
        return None
    return f"{SLOWER}: {fp8_us:.3g} us against {high_us:.3g} us"


def work_of(node: fx.Node) -> AttentionWork:
    """The work of a call of attention, forward or backward."""
    given = arguments_of(node)
    (batch, heads, queries, head), keys = (given[n].meta["val"].shape for n in ("query", "key"))
    return AttentionWork(
        batch, heads, keys[1], queries, keys[2], head, is_causal=bool(given["is_causal"])
    )


def _why_not_results(results: dict[int, Any], q: torch.Tensor) -> str | None:
    """Whether something else can stand for what is read of attention's results."""
    out = results.pop(_OUT, None)
    if out is not None and not has_fitting_strides(out):
        return f"its output has the strides {tuple(out.stride())}"
    sums = results.pop(_SUMS, None)
    if sums is not None and sums.numel() != q.numel() // q.shape[-1]:
        return f"its backward takes {tuple(sums.shape)} sums"
    # Seeds of dropout, which there is not.
    if any(not isinstance(value, torch.Tensor) or value.numel() > 2 for value in results.values()):
        return f"its results {sorted(results)} are read"
    return None


def _slots(calls: Sequence[fx.Node], sites: Mapping[int, Site]) -> dict[fx.Node, int]:
    """Which queries, keys and values have a scaling state, and in which slot."""
    found = {value: site_above(value) for call in calls for value in _operands(call)}
    times = Counter(found.values())
    return {
        value: sites[site].attention_slot
        for value, site in found.items()
        if site is not None and site in sites and times[site] == 1
    }


def site_above(value: fx.Node) -> int | None:
    """The index of the site whose output a value is computed from, if that is one alone."""
    found: set[int] = set()
    stack, seen = [value], {value}
    while stack and len(found) < 2:
        node = stack.pop()
        site = (node.meta.get("custom") or {}).get(SITE_TAG)
        if site is not None:
            found.add(site)
            continue
        stack += [above for above in node.all_input_nodes if above not in seen]
        seen.update(node.all_input_nodes)
    return found.pop() if len(found) == 1 else None


def _operands(node: fx.Node) -> list[fx.Node]:
    """The query, key and value of a call."""
    given = arguments_of(node)
    return [given[name] for name in ("query", "key", "value")]


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """An operator's arguments by name, those that are not given as well."""
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [argument.name for argument in node.target._schema.arguments]
    defaults = {a.name: a.default_value for a in node.target._schema.arguments}
    return defaults | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _results(node: fx.Node) -> dict[int, Any]:
    """The fake values of those results that anything reads, by their index."""
    return {args_of(item)[1]: item.meta["val"] for item in node.users if item.users}


def _replace(
    graph: fx.Graph, node: fx.Node, known: fx.Node | None, slots: Mapping[fx.Node, int]
) -> None:
    """``known``: the known scales; ``slots``: which of them values have."""
    given, work = arguments_of(node), work_of(node)
    scale = work.head**-0.5 if given["scale"] is None else float(given["scale"])
    before = set(graph.nodes)
    with graph.inserting_before(node):
        casts = [
            cast_rows(graph, value, node, (known, slots[value]) if value in slots else (None, 0))
            for value in _operands(node)
        ]
        copies, inverses = (
            [quantize_getitem(graph, cast, name) for cast in casts] for name in ("fp8", "scale_inv")
        )
        out_scale = quantize_getitem(graph, casts[-1], "scale_used")  # averages fit where v does
        how = (work.batch, work.heads, work.kv_heads, work.is_causal, scale)
        new = emit(graph, ATTENTION, (*copies, *inverses, out_scale, *how), "attention", like=node)
        backwards = _backwards_of(node)
        for item in list(node.users):
            if item.users:
                item.replace_all_uses_with(_result(graph, item, new, inverses[-1]))
            graph.erase_node(item)
    graph.erase_node(node)  # which, as it could have dropout, nothing else takes for dead
    _plan_like(node, set(graph.nodes) - before)
    for backward in backwards:
        _take_rounded(graph, backward, copies, inverses)


def _backwards_of(node: fx.Node) -> list[fx.Node]:
    """The backwards that take the sums of a call."""
    stack = [item for item in node.users if args_of(item)[1] == _SUMS]
    found = []
    while stack:
        for user in stack.pop().users:
            if user.target in BACKWARD:
                found.append(user)
            elif user.target in VIEWS:
                stack.append(user)
    return found


def _take_rounded(
    graph: fx.Graph, backward: fx.Node, copies: Sequence[fx.Node], inverses: Sequence[fx.Node]
) -> None:
    """Let a backward in high precision take what forward has multiplied.

    The sums that it takes are of products of rounded numbers. With those of others, the softmax
    that it computes again does not add up to 1, the more so the larger they are.
    """
    args, first = list(args_of(backward)), QUERY[backward.target]
    with graph.inserting_before(backward):
        for i, (copy, inverse) in enumerate(zip(copies, inverses, strict=True), first):
            wanted = torch.empty_like(args[i].meta["val"])  # what its gradient is like
            name = f"{args[i].name}_rounded"
            args[i] = value_of(graph, copy, inverse, wanted, name, like=backward)
    backward.args = tuple(args)


def _plan_like(node: fx.Node, made: set[fx.Node]) -> None:
    """In a region that is checkpointed, compute again what stands for a call, if that would have
    been; or keep what the new call has made, and compute again from that.
    """
    plan = {key: node.meta[key] for key in _PLANS if key in node.meta}
    for new in made if plan else ():
        results = new.target is ATTENTION or ATTENTION in (n.target for n in new.all_input_nodes)
        kept = plan.get("recompute") in _SAVES and not results
        again = {"recompute": CheckpointPolicy.PREFER_RECOMPUTE} if kept else {}
        new.meta.update(plan | again)


def cast_rows(
    graph: fx.Graph, value: fx.Node, attention: fx.Node, scale: tuple[fx.Node | None, int]
) -> fx.Node:
    """The cast to E4M3 of what attention takes, ``[batch * tokens, heads * D]``."""
    make = partial(emit, graph, like=attention)
    batch, heads, tokens, head = value.meta["val"].shape
    by_token = make(aten.permute.default, (value, [0, 2, 1, 3]), f"{value.name}_by_token")
    shape = [batch * tokens, heads * head]
    rows = make(aten.reshape.default, (by_token, shape), f"{value.name}_rows")
    how = (*scale, Format.E4M3.dtype, True, False)
    return make(QUANTIZE, (rows, *how), f"{rows.name}_q")


def _result(graph: fx.Graph, item: fx.Node, new: fx.Node, scale_inv: fx.Node) -> fx.Node:
    """What stands for one of attention's results."""
    make = partial(emit, graph, like=new)
    index, wanted = args_of(item)[1], item.meta["val"]
    if index == _SUMS:
        sums = make(operator.getitem, (new, 1), "attention_sums")
        return make(aten.view.default, (sums, list(wanted.shape)), "attention_lse")
    if index != _OUT:  # a seed of no dropout
        how = {"dtype": wanted.dtype, "device": new.meta["val"][0].device, "pin_memory": False}
        seed = graph.call_function(aten.full.default, (list(wanted.shape), 0), how)
        seed.meta.update(item.meta)
        return seed
    copy = make(operator.getitem, (new, 0), "attention_fp8")
    return value_of(graph, copy, scale_inv, wanted, "attention")


def value_of(
    graph: fx.Graph,
    copy: fx.Node,
    scale_inv: fx.Node,
    wanted: torch.Tensor,
    name: str,
    like: fx.Node | None = None,
) -> fx.Node:
    """What an FP8 copy by token stands for, in the layout of ``wanted``, ``[batch, heads, tokens,
    D]``.
    """
    make = partial(emit, graph, like=like or copy)
    batch, heads, tokens, head = wanted.shape
    wide = make(_CONVERT, (copy, torch.float32), f"{name}_wide")
    scaled = make(aten.mul.Tensor, (wide, scale_inv), f"{name}_mul")
    rows = make(_CONVERT, (scaled, wanted.dtype), f"{name}_rows")
    by_token = make(aten.view.default, (rows, [batch, tokens, heads, head]), f"{name}_view")
    value = make(aten.permute.default, (by_token, [0, 2, 1, 3]), f"{name}_out")
    if value.meta["val"].stride() != wanted.stride():
        value = make(aten.clone.default, (value,), f"{name}_clone")
        value.kwargs = {"memory_format": torch.contiguous_format}
        value.meta["val"] = evaluate(value)
    return value


def has_fitting_strides(value: torch.Tensor) -> bool:
    """Whether ``value_of`` can stand for a result of attention."""
    return value.is_contiguous() or value.transpose(1, 2).is_contiguous()
