"""Let attention's backward run in FP8, too."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable

from torch import fx

from ..attention import GRADIENTS
from ..cost import Device
from ..ir import (
    ATTENTION,
    ATTENTION_BACKWARD,
    GRADIENT_SCALES,
    VIEWS,
    Site,
    args_of,
    emit,
)
from .attention_scale import BACKWARD
from .cast_attention import (
    WHY_NOT,
    arguments_of,
    cast_rows,
    has_fitting_strides,
    site_above,
    slower_in_fp8,
    value_of,
    work_of,
)
from .insert_casts import quantize_getitem

# What cuDNN has a backward in FP8 for on Hopper (9.19): heads of so many elements, and sequences of
# multiples of so many tokens. Of others it leaves out the last.
HEADS, TOKENS = (128,), 128
_OF_PRODUCTS = GRADIENTS.index("products")


def cast_attention_backward(
    gm: fx.GraphModule,
    *,
    device: Device | None = None,
    scale: fx.Node | None = None,
    sites: Iterable[Site] = (),
) -> int:
    """Multiply in E4M3 in the backward of those attentions whose forward does.

    Before:
        backward  : (bf16[1, 1, 128, 128], ...) = aten._..._backward(grad, ...)
        getitem_2 : bf16[1, 1, 128, 128] = backward[0]
    After:
        grad_by_token      : bf16[1, 128, 1, 128] = aten.permute(grad, [0, 2, 1, 3])
        grad_rows          : bf16[128, 128] = aten.reshape(grad_by_token, [128, 128])
        grad_rows_q        : (e4m3[128, 128], ...) = fp8.quantize(grad_rows, scale, 4, e4m3, True...
        gradient_scales    : (f32[4], ...) = fp8.gradient_scales(scale, 5, grad_rows_scale_inv, ...
        attention_backward : (e4m3[128, 128], ...) = fp8.attention_backward(grad_rows_fp8, ...
        grad_query         : e4m3[128, 128] = attention_backward[0]
        grad_query_wide    : f32[128, 128] = prims.convert_element_type(grad_query, f32)
        grad_query_mul     : f32[128, 128] = aten.mul.Tensor(grad_query_wide, grad_query_scale_inv)
        grad_query_rows    : bf16[128, 128] = prims.convert_element_type(grad_query_mul, bf16)
        grad_query_view    : bf16[1, 128, 1, 128] = aten.view(grad_query_rows, [1, 128, 1, 128])
        grad_query_out     : bf16[1, 1, 128, 128] = aten.permute(grad_query_view, [0, 2, 1, 3])

    It takes the query, key and value as forward has cast them, and forward's output in FP8: nothing
    of these is kept in high precision for it. Its scales are delayed, those of gradients that only
    come about while it runs can be no others: ``scale`` is the graph input that holds them, and
    ``sites`` those with delayed scaling. They are in the slots of the site whose output the query
    is computed from. With ``device``, what FP8 is predicted not to make faster there is declined.

    Requires: cast_attention; a joint graph.
    Ensures: the meta of what is left in high precision says why.
    Leaves alone: an attention whose query comes from no site with delayed scaling, or from one that
        computes another's, too; heads that have not 128 elements; sequences of no multiple of 128.
    Numerics: quantizes.
    """
    calls = {node: _forward_of(node) for node in gm.graph.nodes if node.target in BACKWARD}
    by_index: dict[int | None, Site] = {site.index: site for site in sites}
    owners = {node: site_above(_query(call)) for node, call in calls.items() if call is not None}
    times = Counter(owners.values())
    rewrites = 0
    for node, owner in owners.items():
        reason = _why_not(node, device)
        if scale is None or owner not in by_index or times[owner] > 1:
            reason = "its query has no delayed scales of its own"
        if reason is not None:
            node.meta[WHY_NOT] = reason
            continue
        assert scale is not None
        _replace(gm.graph, node, scale, by_index[owner].attention_slot + 1)
        rewrites += 1
    gm.graph.eliminate_dead_code()
    return rewrites


def _why_not(node: fx.Node, device: Device | None) -> str | None:
    work = work_of(node)
    if work.head not in HEADS:
        return f"its heads have {work.head} elements, and not {HEADS[0]}"
    if work.queries % TOKENS or work.keys % TOKENS:
        return f"it has {work.queries} queries and {work.keys} keys, not multiples of {TOKENS}"
    if not all(has_fitting_strides(item.meta["val"]) for item in node.users):
        return "its gradients lie neither by head nor by token"
    return None if device is None else slower_in_fp8(*work.backward_us(device))


def attention_backwards(gm: fx.GraphModule) -> list[tuple[fx.Node, str]]:
    """The backwards of attention that were to be in FP8, each with why it is not, or ""."""
    return [
        (node, node.meta.get(WHY_NOT, ""))
        for node in gm.graph.nodes
        if node.target is ATTENTION_BACKWARD or (node.target in BACKWARD and WHY_NOT in node.meta)
    ]


def _forward_of(node: fx.Node) -> fx.Node | None:
    """The attention in FP8 that a backward belongs to, whose sums it takes; None if that is not."""
    sums = arguments_of(node)["logsumexp"]
    while sums.target in VIEWS:
        sums = args_of(sums)[0]
    if sums.target is not operator.getitem or args_of(sums)[0].target is not ATTENTION:
        return None
    return args_of(sums)[0]


def _query(call: fx.Node) -> fx.Node:
    """What an attention's query is cast from."""
    cast = args_of(args_of(call)[0])[0]
    return args_of(cast)[0]


def _replace(graph: fx.Graph, node: fx.Node, known: fx.Node, slot: int) -> None:
    """``slot``: the first of those of the gradients, that of the output's."""
    call, given = _forward_of(node), arguments_of(node)
    assert call is not None
    *operands, _, batch, heads, kv_heads, is_causal, scale = args_of(call)
    copies, inverses = operands[:3], operands[3:]
    results = {args_of(item)[1]: item for item in call.users}
    head = given["query"].meta["val"].shape[-1]
    with graph.inserting_before(node):
        cast = cast_rows(graph, given["grad_out"], node, (known, slot))
        grad_out, inverse = (quantize_getitem(graph, cast, name) for name in ("fp8", "scale_inv"))
        args = (known, slot + 1 + _OF_PRODUCTS, inverse, *inverses, head, scale)
        scales = emit(graph, GRADIENT_SCALES, args, "gradient_scales", like=node)
        known_all, products_inverse = (
            emit(graph, operator.getitem, (scales, i), f"gradient_scales_{i}", like=node)
            for i in (0, 1 + _OF_PRODUCTS)
        )
        how = (known_all, products_inverse, batch, heads, kv_heads, is_causal, scale)
        taken = (grad_out, *copies, results[0], results[1], inverse, *inverses, *how)
        new = emit(graph, ATTENTION_BACKWARD, taken, "attention_backward", like=node)
        for item in list(node.users):
            index = args_of(item)[1]
            if item.users:
                which = GRADIENTS[1 + _OF_PRODUCTS :][index]
                name = f"grad_{which}"
                copy = emit(graph, operator.getitem, (new, index), name, like=node)
                own = (scales, 1 + GRADIENTS.index(which))
                scale_inv = emit(graph, operator.getitem, own, f"{name}_scale_inv", like=node)
                wanted = item.meta["val"]
                item.replace_all_uses_with(value_of(graph, copy, scale_inv, wanted, name))
            graph.erase_node(item)
    graph.erase_node(node)
