"""The walk over a graph that finds the moments of its tensors, and what the rules ask of a node."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx

from ..internals import is_tangent
from ..ir import op_name, size_hint
from .gaussian import Moments, Value, largest_of

log = logging.getLogger(__name__)
ZERO, ONE = sympy.Integer(0), sympy.Integer(1)


class Statistics:
    """Symbols for the actual mean, variance and amax of a graph input."""

    def __init__(self, name: str) -> None:
        names = (f"{what}_{name}" for what in ("mean", "var", "amax"))
        self.ordered = tuple(sympy.Symbol(name, real=True) for name in names)
        self.symbols = frozenset(self.ordered)


class Analysis(Moments):
    """The moments of all tensors of a graph, by the rules of its operators.

    ``statistics``: the inputs whose actual statistics will be known. Of other inputs, those that
    are floating point have mean 0 and variance 1, and what is no floating point tensor counts as 1.
    A gradient that comes in from outside is that of a loss which is the mean over the rows of an
    output ``[rows, columns]``, such as a cross entropy: its variance is ``1 / (rows^2 columns)``,
    and no element is larger than ``1 / rows``. The gradient of a scalar loss is 1.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        statistics: Mapping[fx.Node, Statistics],
        rules: Mapping[Any, Rule],
    ) -> None:
        super().__init__()
        self._rules = rules
        self._values: dict[fx.Node, Value | tuple[Value, ...]] = {}
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                self._values[node] = self._input(node, statistics.get(node))
            elif node.op != "output":
                self._values[node] = self._result(node)

    def _input(self, node: fx.Node, known: Statistics | None) -> Value:
        if known is not None:
            return self.root(node.name, *known.ordered)
        if not is_floating(node):
            return self.constant(node.name, 1)
        if not is_tangent(node):
            return self.root(node.name, ZERO, ONE)
        shape = sizes(node)
        if not shape:
            return self.constant(node.name, 1)
        columns = max(shape[-1], 1) if len(shape) > 1 else 1
        rows = max(elements(node) // columns, 1)
        return self.root(node.name, ZERO, ONE / (rows**2 * columns), ONE / rows)

    def _result(self, node: fx.Node) -> Value | tuple[Value, ...]:
        rule = self._rules.get(getattr(node.target, "overloadpacket", node.target))
        if rule is not None:
            return rule(self, node)
        if not is_floating(node):
            return self.constant(node.name, ONE)
        log.debug("no rule for the moments of %s, %s", node.name, op_name(node.target))
        return self.without_rule(node)

    def without_rule(self, node: fx.Node) -> Value:
        """The mean square of the operand with the largest."""
        values = [self.of(arg) for arg in node.all_input_nodes if is_floating(arg)]
        seconds = [self.second(value) for value in values] or [ONE]
        return self.root(node.name, ZERO, largest_of(seconds))

    def of(self, arg: Any) -> Value:
        """The value of a node, of its first result if it has several, or of a number."""
        if not isinstance(arg, fx.Node):
            return self.constant("number", exact(arg))
        value = self._values[arg]
        return value[0] if isinstance(value, tuple) else value

    def all_of(self, node: fx.Node) -> Value | tuple[Value, ...]:
        """The value of a node, or of each of its results."""
        return self._values[node]

    def part(self, node: fx.Node, value: Value) -> Value:
        """Other elements of the same distribution."""
        if value.is_constant:
            return value
        return self.root(node.name, self.mean(value), self.variance(value), value.amax)


Rule: TypeAlias = Callable[[Analysis, fx.Node], Value | tuple[Value, ...]]


def sizes(node: fx.Node) -> list[int]:
    """The sizes of a node's (first) result, symbolic ones as in the traced call, or 1."""
    value = node.meta["val"]
    value = value[0] if isinstance(value, list | tuple) else value
    shape = value.shape if isinstance(value, torch.Tensor) else ()
    hints = (size_hint(size) for size in shape)
    return [1 if hint is None else hint for hint in hints]


def elements(node: fx.Node) -> int:
    """How many elements a node's (first) result has, at least 1."""
    return max(math.prod(sizes(node)), 1)


def is_floating(node: fx.Node) -> bool:
    """Whether a node's (first) result is a floating point tensor."""
    value = node.meta["val"]
    value = value[0] if isinstance(value, list | tuple) else value
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def exact(number: Any) -> sympy.Expr:
    """A number as sympy has it, with integers as such; what is none counts as 1."""
    if isinstance(number, bool) or not isinstance(number, int | float):
        return ONE
    whole = math.isfinite(number) and float(number).is_integer()
    return sympy.Integer(int(number)) if whole else sympy.Float(number)
