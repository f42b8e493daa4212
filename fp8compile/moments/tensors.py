"""Rules of sums, of parts of tensors and wholes of parts, and of tensors made from nothing.

Sums have independent terms.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from ..ir import QUANTIZE, args_of, aten
from .gaussian import Value, largest_of
from .pointwise import mixture
from .walk import ONE, ZERO, Analysis, Rule, elements, exact

prims = torch.ops.prims

# --- sums ---------------------------------------------------------------------------------------


def _summed(node: fx.Node) -> int:
    """How many elements are made into one."""
    return max(elements(args_of(node)[0]) // elements(node), 1)


def total(moments: Analysis, node: fx.Node) -> Value:
    value, n = moments.of(args_of(node)[0]), _summed(node)
    return moments.root(node.name, n * moments.mean(value), n * moments.variance(value))


def average(moments: Analysis, node: fx.Node) -> Value:
    value, n = moments.of(args_of(node)[0]), _summed(node)
    return moments.root(node.name, moments.mean(value), moments.variance(value) / n)


def spread(moments: Analysis, node: fx.Node) -> Value:
    """The variance, whose own is ``2 sigma^4 / n`` for Gaussians."""
    value, n = moments.of(args_of(node)[0]), _summed(node)
    variance = moments.variance(value)
    return moments.root(node.name, variance, 2 * variance**2 / n)


def spread_and_average(moments: Analysis, node: fx.Node) -> tuple[Value, Value]:
    return spread(moments, node), average(moments, node)


def extreme(sign: int) -> Rule:
    """The largest or smallest of n, close to ``sqrt(2 ln n)`` standard deviations from the mean."""

    def rule(moments: Analysis, node: fx.Node) -> Value:
        value = moments.of(args_of(node)[0])
        off = math.sqrt(2 * math.log(_summed(node))) * sympy.sqrt(moments.variance(value))
        return moments.constant(node.name, moments.mean(value) + sign * off)

    return rule


# --- parts and wholes ---------------------------------------------------------------------------


def same(moments: Analysis, node: fx.Node) -> Value:
    """The elements in another shape or dtype."""
    return moments.of(args_of(node)[0])


def some(moments: Analysis, node: fx.Node) -> Value:
    """Some of the elements."""
    return moments.part(node, moments.of(args_of(node)[0]))


def item(moments: Analysis, node: fx.Node) -> Value:
    source, index = args_of(node)
    values = moments.all_of(source)
    if isinstance(values, tuple):
        return values[index]
    if source.target is QUANTIZE:  # a copy counts as what it is one of; then its scale is 1
        return values if index < 2 else moments.constant(node.name, ONE)
    return moments.part(node, values)


def concatenated(moments: Analysis, node: fx.Node) -> Value:
    """Parts that have their shares of the elements; the largest element is that of any part."""
    parts = args_of(node)[0]
    values = [moments.of(part) for part in parts]
    whole = sum(elements(part) for part in parts)
    shares = [sympy.Rational(elements(part), whole) for part in parts]
    mixed = mixture(moments, node, list(zip(shares, values, strict=True)))
    amaxes = [moments.largest(moments.of(part), elements(part)) for part in parts]
    return Value(mixed.name, mixed.root, mixed.function, largest_of(amaxes))


def scattered(moments: Analysis, node: fx.Node) -> Value:
    """A tensor with a part replaced by another, or by a number."""
    if node.target not in _SCATTERED:
        return moments.without_rule(node)
    base, part = args_of(node)[0], args_of(node)[_SCATTERED[node.target]]
    written = part if node.target is not aten.scatter.value else args_of(node)[2]
    share = min(sympy.Rational(elements(written), elements(base)), ONE)
    return mixture(moments, node, [(1 - share, moments.of(base)), (share, moments.of(part))])


# Which argument is written into the first.
_SCATTERED = {
    aten.scatter.value: 3,
    aten.slice_scatter.default: 1,
    aten.select_scatter.default: 1,
}


def padded(moments: Analysis, node: fx.Node) -> Value:
    x, _, *number = args_of(node)
    share = sympy.Rational(elements(x), elements(node))
    filling = moments.of(*number) if number else moments.constant(node.name, ZERO)
    return mixture(moments, node, [(share, moments.of(x)), (1 - share, filling)])


# --- from nothing -------------------------------------------------------------------------------


def filled(number: Callable[[fx.Node], Any]) -> Rule:
    """A tensor of one number."""
    return lambda moments, node: moments.constant(node.name, exact(number(node)))


def drawn(mean: sympy.Expr, variance: sympy.Expr) -> Rule:
    """Random numbers."""
    return lambda moments, node: moments.root(node.name, mean, variance)


def chosen(moments: Analysis, node: fx.Node) -> Value:
    """1 with a probability, else 0."""
    probability = exact(args_of(node)[1])
    return moments.root(node.name, probability, probability * (1 - probability))


def counted(moments: Analysis, node: fx.Node) -> Value:
    """The numbers below n, evenly."""
    n = elements(node)
    return moments.root(node.name, sympy.Rational(n - 1, 2), sympy.Rational(n * n - 1, 12))


_SAME = (
    *(aten.view, aten._unsafe_view, aten.reshape, aten.permute, aten.t, aten.transpose),
    *(aten.expand, aten.squeeze, aten.unsqueeze, aten.alias, aten.clone, aten.detach),
    *(aten._to_copy, aten.contiguous, aten.repeat, aten.clamp, aten.lift_fresh_copy),
    *(prims.convert_element_type, prims.device_put, QUANTIZE.overloadpacket),
)
_SOME = (
    *(aten.slice, aten.select, aten.split, aten.split_with_sizes, aten.unbind, aten.embedding),
    *(aten.index, aten.gather, aten.index_select, aten.flip, aten.roll, aten.as_strided),
)
TENSORS: dict[Any, Rule] = {
    **dict.fromkeys(_SAME, same),
    **dict.fromkeys(_SOME, some),
    operator.getitem: item,
    aten.sum: total,
    aten.mean: average,
    aten.var: spread,
    aten.var_mean: spread_and_average,
    aten.amax: extreme(1),
    aten.amin: extreme(-1),
    aten.copy: lambda moments, node: moments.of(args_of(node)[1]),
    aten.cat: concatenated,
    aten.scatter: scattered,
    aten.slice_scatter: scattered,
    aten.select_scatter: scattered,
    aten.constant_pad_nd: padded,
    aten.full: filled(lambda node: args_of(node)[1]),
    aten.full_like: filled(lambda node: args_of(node)[1]),
    aten.scalar_tensor: filled(lambda node: args_of(node)[0]),
    aten.empty: filled(lambda node: 0),
    aten.bernoulli: chosen,
    aten.rand: drawn(sympy.Rational(1, 2), sympy.Rational(1, 12)),
    aten.randn: drawn(ZERO, ONE),
    prims.iota: counted,
}
