"""Find the GEMMs of each site in a joint graph, and which of fprop, dgrad and wgrad they are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from torch import fx

from ..internals import inputs_of
from ..ir import (
    DEQUANTIZE,
    SCALED_MMS,
    SITE_TAG,
    Edge,
    GemmInfo,
    Site,
    aten,
    base_of,
    is_backward,
    operands,
    size_expr,
    value_key,
)
from ..recipe import Gemm, Operand
from .tag_sites import ATTENTION_TAG, EINSUM_TAG, LEFT_OUT_TAG, OTHER_EINSUM, TWO_ACTIVATIONS

_GEMM_OPS = (aten.mm.default, aten.addmm.default)
_BATCHED, _CONVOLUTION = "batched matmul of two activations", "convolution"
# What no user could expect to run in FP8.
NO_FP8_FORM = (_BATCHED, _CONVOLUTION, TWO_ACTIVATIONS)
_TAKEN = "matmul, @, mm, addmm, einsum and nn.MultiheadAttention"
_FAST_PATH = (
    "PyTorch's fast path for inference is one operator; turn it off with "
    "torch.backends.mha.set_fastpath_enabled(False)"
)
# ``matrix @ batch`` where no gradient is needed of the matrix; ``batch @ matrix`` is unbatched.
_BATCHED_SITE = "traced as a batched matmul: one matrix from the left; transpose the product"


def find_gemms(gm: fx.GraphModule, *, sites: Sequence[Site] | None = None) -> int:
    """Mark every GEMM of a site with its role and the roles of its operands.

    Before:
        permute : bf16[32, 64] = aten.permute(w, [1, 0])
        mm      : bf16[16, 64] = aten.mm(x, permute)
    After:
        permute : bf16[32, 64] = aten.permute(w, [1, 0])
        mm      : bf16[16, 64] = aten.mm(x, permute)  # w fprop = input x weight^T

    ``sites`` are those of ``tag_sites``, which the nodes' tags point into. Without it every
    untagged GEMM is taken for the fprop of a site of its own.

    Requires: an ATen graph with ``meta["val"]``.
    Ensures: ``meta["fp8"]`` is a GemmInfo, with the sizes as sympy expressions.
    Leaves alone: batched matmuls, GEMMs without a tag, the GEMMs of a site it cannot tell apart.
    Numerics: exact.
    """
    known: dict[int, tuple[fx.Node, fx.Node]] = {}  # site -> base of its input and its weight
    found = 0
    for node in gm.graph.nodes:
        if node.target not in _GEMM_OPS or "fp8" in node.meta:
            continue
        candidates = _sites_of(node, sites, len(known))
        described = (_describe(node, site, known) for site in candidates)
        info = next((info for info in described if info is not None), None)
        if info is not None:
            node.meta["fp8"] = info
            found += 1
    return found


def _sites_of(node: fx.Node, sites: Sequence[Site] | None, next_index: int) -> list[Site]:
    """The sites of the call that a GEMM comes from; the GEMMs of a call come in their order."""
    if sites is None:
        return [] if is_backward(node) else [Site(next_index, fqn=node.name)]
    call = (node.meta.get("custom") or {}).get(SITE_TAG)
    return [] if call is None else list(takewhile(lambda s: s.call == call, sites[call:]))


def _describe(
    node: fx.Node, site: Site, known: dict[int, tuple[fx.Node, fx.Node]]
) -> GemmInfo | None:
    left, right = operands(node)
    (left_base, left_t), (right_base, right_t) = base_of(left), base_of(right)
    if is_backward(node):
        if site.index not in known:
            return None
        roles = _backward_roles(left_base, right_base, *known[site.index])
    elif site.index in known:
        return None
    else:
        weight_first = _weight_first(node, site)
        bases = (right_base, left_base) if weight_first else (left_base, right_base)
        known[site.index] = bases
        pair = (Operand.INPUT, Operand.WEIGHT)
        roles = (Gemm.FPROP, *(reversed(pair) if weight_first else pair))
    if roles is None:
        return None
    gemm, left_role, right_role = roles
    m, k = left.meta["val"].shape
    return GemmInfo(
        site=site,
        gemm=gemm,
        left=Edge(left_role, left_t),
        right=Edge(right_role, right_t),
        m=size_expr(m),
        n=size_expr(right.meta["val"].shape[1]),
        k=size_expr(k),
        dtype=node.meta["val"].dtype,
        reason=site.reason or _scaled_addmm(node),
    )


def _weight_first(node: fx.Node, site: Site) -> bool:
    """Whether the weight is the left operand: ATen takes those of an einsum in either order."""
    if EINSUM_TAG not in (node.meta.get("custom") or {}) or site.weight is None:
        return site.weight_first
    gm = node.graph.owning_module
    assert gm is not None
    weight = inputs_of(gm)[site.weight]
    is_weight = [_origin(value) is weight for value in operands(node)]
    return is_weight[0] if any(is_weight) else site.weight_first


def _origin(node: fx.Node) -> fx.Node:
    """What a value is derived from by views and casts."""
    while len(node.all_input_nodes) == 1 or node.target is DEQUANTIZE:
        node = node.all_input_nodes[0]
    return node


def _backward_roles(
    left: fx.Node, right: fx.Node, input_base: fx.Node, weight_base: fx.Node
) -> tuple[Gemm, Operand, Operand] | None:
    """dgrad multiplies grad_output with the weight, wgrad with the input; in either order."""
    # What was written in place is reshaped anew for each of its readers.
    keys = [value_key(left), value_key(right)]
    if (key := value_key(weight_base)) in keys:
        gemm, other = Gemm.DGRAD, Operand.WEIGHT
    elif (key := value_key(input_base)) in keys:
        gemm, other = Gemm.WGRAD, Operand.INPUT
    else:
        return None
    if keys[0] == key:
        return gemm, other, Operand.GRAD_OUTPUT
    return gemm, Operand.GRAD_OUTPUT, other


def _scaled_addmm(node: fx.Node) -> str | None:
    scaled = {key: value for key, value in node.kwargs.items() if value != 1}
    return f"addmm with {scaled}" if scaled else None


def unsited_matmuls(gm: fx.GraphModule) -> list[tuple[fx.Node, str]]:
    """Matmuls and convolutions that belong to no site, each with the reason it is left alone."""
    reasons = {
        aten.bmm.default: _BATCHED,
        aten.baddbmm.default: _BATCHED,
        aten._grouped_mm.default: "grouped matmul of experts",
        aten.convolution.default: _CONVOLUTION,
        aten.mv.default: "matrix-vector product",
        aten.addmv.default: "matrix-vector product",
        aten.mm.default: "",
        aten.addmm.default: "",
        aten._transformer_encoder_layer_fwd.default: _FAST_PATH,
        aten._native_multi_head_attention.default: _FAST_PATH,
    }
    return [
        (node, _why_unsited(node) or reasons[node.target] or _untagged(node))
        for node in gm.graph.nodes
        if node.target in reasons and node.target not in SCALED_MMS and "fp8" not in node.meta
    ]


def _why_unsited(node: fx.Node) -> str | None:
    """What is known of the call that a matmul comes from."""
    custom = node.meta.get("custom") or {}
    if node.target is aten.bmm.default and SITE_TAG in custom and ATTENTION_TAG not in custom:
        return OTHER_EINSUM if EINSUM_TAG in custom else _BATCHED_SITE
    return custom.get(LEFT_OUT_TAG)


def _untagged(node: fx.Node) -> str:
    stack = node.meta.get("source_fn_stack") or node.meta.get("fwd_source_fn_stack")
    made_by = getattr(stack[-1][1], "__name__", stack[-1][0]) if stack else "an operator"
    return f"made by {made_by}; call nn.Linear or F.linear, which can be FP8, as can {_TAKEN}"
