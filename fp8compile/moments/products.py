"""Rules of matrix products, convolutions and attention: sums of independent products."""

from __future__ import annotations

import math
import operator
from typing import Any

import sympy
from torch import fx

from ..ir import ATTENTION, SCALED_MM, args_of, aten, constant_factor, quantize_output
from .gaussian import Value
from .pointwise import weighted_sum
from .walk import ONE, ZERO, Analysis, Rule, elements, exact, sizes

# --- products of matrices -----------------------------------------------------------------------


def _dot(
    moments: Analysis, name: str, a: Value, b: Value, terms: int, scale: float | sympy.Expr = ONE
) -> Value:
    """Sums of so many products of independent factors, times a number."""
    mean, variance = moments.of_product(a, b)
    return moments.root(name, scale * terms * mean, scale**2 * terms * variance)


def matmul(moments: Analysis, node: fx.Node) -> Value:
    """``[added +] a @ b``. Rows of weights that sum to 1 may have one that is 1, so that what they
    average keeps its variance.
    """
    *added, a, b = args_of(node)
    weights, values = moments.of(a), moments.of(b)
    if weights.averages:
        return moments.part(node, values)
    result = _dot(moments, node.name, weights, values, sizes(a)[-1])
    return weighted_sum(moments, node, result, moments.of(added[0])) if added else result


def scaled_matmul(moments: Analysis, node: fx.Node) -> Value:
    a, b, *scales_inv, bias = args_of(node)[:5]
    factors = filter(None, map(constant_factor, scales_inv))  # which fold_scales has moved there
    scale = exact(math.prod(factor for _, factor in factors))
    result = _dot(moments, node.name, moments.of(a), moments.of(b), _terms(a), scale)
    return result if bias is None else weighted_sum(moments, node, result, moments.of(bias))


def _terms(copy: fx.Node) -> int:
    """How many products an FP8 copy's GEMM sums up, without the zeros that pad its rows."""
    if copy.target is not operator.getitem:
        return sizes(copy)[1]
    cast = args_of(copy)[0]
    shape = sizes(args_of(cast)[0])
    return shape[0] if quantize_output(cast, "fp8_t") is copy else shape[1]


def convolution(moments: Analysis, node: fx.Node) -> Value:
    x, weight, bias = args_of(node)[:3]
    terms = math.prod(sizes(weight)[1:])
    result = _dot(moments, node.name, moments.of(x), moments.of(weight), terms)
    return result if bias is None else weighted_sum(moments, node, result, moments.of(bias))


def convolution_backward(moments: Analysis, node: fx.Node) -> tuple[Value, Value, Value]:
    """The gradients of input, weight and bias."""
    outer, x, weight = args_of(node)[:3]
    g, out_channels = moments.of(outer), sizes(outer)[1]
    kernel = math.prod(sizes(weight)[2:]) * out_channels // args_of(node)[9]
    rows = elements(outer) // out_channels
    return (
        _dot(moments, f"{node.name}_x", g, moments.of(weight), kernel),
        _dot(moments, f"{node.name}_w", g, moments.of(x), rows),
        moments.root(f"{node.name}_b", rows * moments.mean(g), rows * moments.variance(g)),
    )


# --- attention ----------------------------------------------------------------------------------


def attention(moments: Analysis, node: fx.Node) -> tuple[Value, ...]:
    """What matters is the largest value: a token that attends to one other takes its v as it is."""
    value = moments.part(node, moments.of(args_of(node)[2]))
    return (value, *[value] * (len(node.meta["val"]) - 1))


# Sums over the tokens i of a causal attention that weighs all i tokens alike, where they are
# largest: of 1/i^2 for the first v; (i-1)/i^2 at i = 2 for q; of (i-1)/i^3 for the first k.
_V = float(sympy.zeta(2))
_Q = 0.25
_K = float(sympy.zeta(2) - sympy.zeta(3))


def attention_backward(moments: Analysis, node: fx.Node) -> tuple[Value, ...]:
    """The gradients of q, k and v.

    With weights p: dv = p^T g, dp = g v^T, ds = p (dp - sum p dp), dq = ds k / sqrt(d), and
    dk = ds^T q / sqrt(d), so that the d terms of dp cancel against the scale. Heads that share k
    and v add up there.
    """
    outer, q, k, v = args_of(node)[:4]
    g, q_, k_, v_ = (moments.second(moments.of(arg)) for arg in (outer, q, k, v))
    shared = max(elements(q) // elements(k), 1)
    variances = (_Q * g * v_ * k_, shared * _K * g * v_ * q_, shared * _V * g)
    gradients = [
        moments.root(f"{node.name}_{name}", ZERO, variance)
        for name, variance in zip("qkv", variances, strict=True)
    ]
    return (*gradients, *[gradients[0]] * (len(node.meta["val"]) - 3))


_ATTENTION = (
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
)
_ATTENTION_BACKWARD = (
    aten._scaled_dot_product_flash_attention_backward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
    aten._scaled_dot_product_efficient_attention_backward,
    aten._scaled_dot_product_cudnn_attention_backward,
)
PRODUCTS: dict[Any, Rule] = {
    **dict.fromkeys((*_ATTENTION, ATTENTION.overloadpacket), attention),
    **dict.fromkeys(_ATTENTION_BACKWARD, attention_backward),
    aten.mm: matmul,
    aten.bmm: matmul,
    aten.addmm: matmul,
    aten.baddbmm: matmul,
    SCALED_MM.overloadpacket: scaled_matmul,
    aten.convolution: convolution,
    aten.convolution_backward: convolution_backward,
}
