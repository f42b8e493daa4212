"""Rules of pointwise operators: mostly the function that they apply, as sympy has it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from ..ir import args_of, aten
from .gaussian import Value, X
from .walk import ONE, Analysis, Rule, exact, is_floating

prims = torch.ops.prims
# A score is masked by a number at least this far from 0, in its place or added to it.
_MASKED = 10_000
_ROOT_2 = sympy.sqrt(2)

Function = Callable[..., sympy.Expr]


def pointwise(function: Function, operands: int = 1, *, singular: bool = False) -> Rule:
    """The rule of an operator that applies a function to the elements of its first operands.

    ``singular``: it is not defined for all numbers. Where an operand could reach one of those, as
    the mean square of a row could by our moments, it counts as the root of its mean square.
    """

    def rule(moments: Analysis, node: fx.Node) -> Value:
        values = [moments.of(arg) for arg in args_of(node)[:operands]]
        if singular:
            values = [_defined(moments, value) for value in values]
        return applied(moments, node, function, values)

    return rule


def applied(moments: Analysis, node: fx.Node, function: Function, values: Sequence[Value]) -> Value:
    """A function of values of one root, if there is no more than one, and of constants."""
    roots = {value.root for value in values if not value.is_constant} or {values[0].root}
    if len(roots) > 1:
        return moments.without_rule(node)
    return moments.composed(node.name, roots.pop(), function(*(value.function for value in values)))


def _defined(moments: Analysis, value: Value) -> Value:
    if value.is_constant or value.function.is_positive:
        return value
    return moments.constant(f"rms_{value.name}", sympy.sqrt(moments.second(value)))


def _independent(a: Value, b: Value) -> bool:
    return not a.is_constant and not b.is_constant and a.root is not b.root


# --- arithmetic ---------------------------------------------------------------------------------


def weighted_sum(
    moments: Analysis, node: fx.Node, a: Value, b: Value, factor: sympy.Expr = ONE
) -> Value:
    """``a + factor b``: of independent terms, means and variances are added."""
    if not _independent(a, b):
        return applied(moments, node, lambda x, y: x + factor * y, (a, b))
    mean = moments.mean(a) + factor * moments.mean(b)
    return moments.root(node.name, mean, moments.variance(a) + factor**2 * moments.variance(b))


def product(moments: Analysis, node: fx.Node, a: Value, b: Value) -> Value:
    """``a b``: of independent factors, means and mean squares are multiplied."""
    if not _independent(a, b):
        return applied(moments, node, lambda x, y: x * y, (a, b))
    return moments.root(node.name, *moments.of_product(a, b))


def add(moments: Analysis, node: fx.Node) -> Value:
    a, b = (moments.of(arg) for arg in args_of(node)[:2])
    return weighted_sum(moments, node, a, b, exact(node.kwargs.get("alpha", 1)))


def subtract(moments: Analysis, node: fx.Node) -> Value:
    """``a - b``; nothing is left that is larger than 0 where that is the maximum."""
    left, right = args_of(node)[:2]
    a, b = moments.of(left), moments.of(right)
    if _reduces(right, aten.amax.default, left):
        return applied(moments, node, lambda x, y: sympy.Min(x - y, 0), (a, b))
    return weighted_sum(moments, node, a, b, -exact(node.kwargs.get("alpha", 1)))


def multiply(moments: Analysis, node: fx.Node) -> Value:
    a, b = (moments.of(arg) for arg in args_of(node))
    return product(moments, node, a, b)


def divide(moments: Analysis, node: fx.Node) -> Value:
    """``a / b``; by the sum of a row over that row, it gives the weights of an average."""
    left, right = args_of(node)[:2]
    a, b = moments.of(left), moments.of(right)
    inverse = applied(moments, node, lambda x: 1 / x, [_defined(moments, b)])
    result = product(moments, node, a, inverse)
    if _reduces(right, aten.sum.dim_IntList, left) and a.function.is_nonnegative:
        return replace(result, amax=ONE, averages=True)
    return result


def _reduces(node: Any, target: Any, operand: Any) -> bool:
    """Whether a node is that reduction of that operand."""
    return isinstance(node, fx.Node) and node.target is target and args_of(node)[0] is operand


def multiply_add(moments: Analysis, node: fx.Node) -> Value:
    """``a b + c``."""
    a, b, c = (moments.of(arg) for arg in args_of(node))
    return weighted_sum(moments, node, product(moments, node, a, b), c)


def power(moments: Analysis, node: fx.Node) -> Value:
    base, exponent = (moments.of(arg) for arg in args_of(node))
    natural = exponent.function.is_integer and exponent.function.is_nonnegative
    base = base if natural else _defined(moments, base)
    return applied(moments, node, lambda x, y: x**y, [base, exponent])


# --- choices ------------------------------------------------------------------------------------


def compare(function: Function) -> Rule:
    """A comparison is 1 where it holds; one of what is not floating point counts as true."""

    def rule(moments: Analysis, node: fx.Node) -> Value:
        left, right = args_of(node)[:2]
        if not is_floating(left):
            return moments.constant(node.name, ONE)
        if left.target is aten.rand.default:  # what dropout keeps, for which 'greater' is used
            kept = 1 - exact(right)
            return moments.root(node.name, kept, kept * (1 - kept))
        return applied(moments, node, function, [moments.of(left), moments.of(right)])

    return rule


def _greater(x: sympy.Expr, y: sympy.Expr) -> sympy.Expr:
    return sympy.Heaviside(x - y, 0)


def _at_least(x: sympy.Expr, y: sympy.Expr) -> sympy.Expr:
    return sympy.Heaviside(x - y, 1)


def where(moments: Analysis, node: fx.Node) -> Value:
    """What the condition is known to choose; else the larger, unless that masks a score."""
    condition, *chosen = (moments.of(arg) for arg in args_of(node))
    scores = [value for value in chosen if not _masks(value)]
    if len(scores) == 1:
        return scores[0]
    if condition.is_constant:
        return moments.without_rule(node)
    share = moments.mean(condition)
    return mixture(moments, node, [(share, chosen[0]), (1 - share, chosen[1])])


def _masks(value: Value) -> bool:
    number = value.function
    return bool(number.is_Number and (not number.is_finite or abs(number) >= _MASKED))


def mixture(moments: Analysis, node: fx.Node, parts: Sequence[tuple[sympy.Expr, Value]]) -> Value:
    """A tensor of which each value makes up its share."""
    means = [moments.mean(value) for _, value in parts]
    mean = sympy.Add(*(share * each for (share, _), each in zip(parts, means, strict=True)))
    variance = sympy.Add(
        *(
            share * (moments.variance(value) + (each - mean) ** 2)
            for (share, value), each in zip(parts, means, strict=True)
        )
    )
    return moments.root(node.name, mean, variance)


# --- activations --------------------------------------------------------------------------------


def _relu(x: sympy.Expr) -> sympy.Expr:
    return sympy.Max(x, 0)


def _sigmoid(x: sympy.Expr) -> sympy.Expr:
    return 1 / (1 + sympy.exp(-x))


def _silu(x: sympy.Expr) -> sympy.Expr:
    return x * _sigmoid(x)


def _gelu(x: sympy.Expr) -> sympy.Expr:
    return x * (1 + sympy.erf(x / _ROOT_2)) / 2


def _softplus(x: sympy.Expr) -> sympy.Expr:
    return sympy.log(1 + sympy.exp(x))


def gradient(slope: Function) -> Rule:
    """The backward of an activation: the gradient times the slope at its second operand."""

    def rule(moments: Analysis, node: fx.Node) -> Value:
        outer, at, *rest = (moments.of(arg) for arg in args_of(node))
        inner = applied(moments, node, slope, [at, *rest])
        return product(moments, node, outer, inner)

    return rule


def _slope_of(function: Function) -> Function:
    def slope(x: sympy.Expr, *_: Any) -> sympy.Expr:
        return function(X).diff(X).xreplace({X: x})

    return slope


POINTWISE: dict[Any, Rule] = {
    aten.add: add,
    aten.sub: subtract,
    aten.mul: multiply,
    aten.div: divide,
    aten.pow: power,
    aten.neg: pointwise(lambda x: -x),
    aten.abs: pointwise(sympy.Abs),
    aten.exp: pointwise(sympy.exp),
    aten.erf: pointwise(sympy.erf),
    aten.tanh: pointwise(sympy.tanh),
    aten.sin: pointwise(sympy.sin),
    aten.cos: pointwise(sympy.cos),
    aten.relu: pointwise(_relu),
    aten.sigmoid: pointwise(_sigmoid),
    aten.silu: pointwise(_silu),
    aten.gelu: pointwise(_gelu),
    aten.softplus: pointwise(_softplus),
    aten.maximum: pointwise(sympy.Max, 2),
    aten.minimum: pointwise(sympy.Min, 2),
    aten.clamp_min: pointwise(sympy.Max, 2),
    aten.clamp_max: pointwise(sympy.Min, 2),
    aten.log: pointwise(sympy.log, singular=True),
    aten.sqrt: pointwise(sympy.sqrt, singular=True),
    aten.rsqrt: pointwise(lambda x: 1 / sympy.sqrt(x), singular=True),
    aten.reciprocal: pointwise(lambda x: 1 / x, singular=True),
    aten.silu_backward: gradient(_slope_of(_silu)),
    aten.gelu_backward: gradient(_slope_of(_gelu)),
    aten.threshold_backward: gradient(_greater),
    aten.tanh_backward: gradient(lambda y: 1 - y**2),
    aten.sigmoid_backward: gradient(lambda y: y * (1 - y)),
    aten.gt: compare(_greater),
    aten.ge: compare(_at_least),
    aten.lt: compare(lambda x, y: 1 - _at_least(x, y)),
    aten.le: compare(lambda x, y: 1 - _greater(x, y)),
    aten.where: where,
}
if hasattr(prims, "fma"):  # newer versions of PyTorch
    POINTWISE[prims.fma] = multiply_add
