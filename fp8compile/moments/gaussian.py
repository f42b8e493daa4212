"""Means and variances of a graph's tensors as sympy expressions.

In the spirit of Unit Scaling (arXiv 2303.11257), but from the weights' actual statistics and
exactly where that is possible: a tensor is a function, applied to each element, of a *root*, whose
elements are taken for independent Gaussians. So ``x * sigmoid(x)`` is a function of ``x``, its
factors are not taken for independent, and its moments are integrals over one Gaussian: in closed
form for polynomials, else by Gauss-Hermite quadrature. Where functions of two roots meet, the roots
are taken for independent, and the result is a new root.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import sympy

X = sympy.Symbol("x", real=True)  # the root, in the function of a Value
_MOST_OPERATIONS = 60  # of a function; what is longer becomes a root
_NODES, _WEIGHTS = np.polynomial.hermite.hermgauss(32)


@dataclass(frozen=True, eq=False)
class Root:
    """A tensor whose elements are taken for independent samples of one Gaussian."""

    mean: sympy.Expr
    variance: sympy.Expr


@dataclass(frozen=True)
class Value:
    """A tensor: a function of ``X`` that maps each element of the root to one of its own.

    ``amax``: its largest magnitude, where more is known of it than mean and variance. ``averages``:
    whether its rows are weights that sum to 1.
    """

    name: str
    root: Root
    function: sympy.Expr = X
    amax: sympy.Expr | None = None
    averages: bool = False

    @property
    def is_constant(self) -> bool:
        """Whether all elements are the same number."""
        return X not in self.function.free_symbols


@dataclass(frozen=True)
class Moments:
    """The values of a graph, and the definitions of the symbols in their moments, in order."""

    definitions: dict[sympy.Symbol, sympy.Expr] = field(default_factory=dict)
    _known: dict[tuple[Root, sympy.Expr], Root] = field(default_factory=dict)

    def root(
        self,
        name: str,
        mean: sympy.Expr,
        variance: sympy.Expr,
        amax: sympy.Expr | None = None,
    ) -> Value:
        """A new root with these moments; without a variance, it is a constant."""
        if variance == 0:
            return self.constant(name, mean)
        named = self._define(f"mean_{name}", mean), self._define(f"var_{name}", variance)
        return Value(name, Root(*named), amax=amax)

    def constant(self, name: str, number: sympy.Expr | float) -> Value:
        """A tensor all of whose elements are one number."""
        number = self._define(f"value_{name}", number)
        return Value(name, Root(number, sympy.Integer(0)), number, sympy.Abs(number))

    def composed(self, name: str, root: Root, function: sympy.Expr) -> Value:
        """A function of a root; of one that is too long only the moments are kept."""
        if X not in function.free_symbols:
            return self.constant(name, function)
        value = Value(name, root, function)
        if function.count_ops() <= _MOST_OPERATIONS:
            return value
        return self.root(name, self.mean(value), self.variance(value))

    def mean(self, value: Value) -> sympy.Expr:
        """The mean of the elements."""
        return self._moments(value).mean

    def variance(self, value: Value) -> sympy.Expr:
        """The variance of the elements."""
        return self._moments(value).variance

    def second(self, value: Value) -> sympy.Expr:
        """The mean of the squares."""
        return self.variance(value) + self.mean(value) ** 2

    def of_product(self, a: Value, b: Value) -> tuple[sympy.Expr, sympy.Expr]:
        """Mean and variance of a product of independent factors."""
        mean = self.mean(a) * self.mean(b)
        spread = self.variance(a) * self.second(b)
        return mean, spread + self.mean(a) ** 2 * self.variance(b)

    def largest(self, value: Value, elements: int) -> sympy.Expr:
        """The largest magnitude to expect among so many elements.

        Of n Gaussians it is close to ``sigma sqrt(2 ln n)``.
        """
        if value.amax is not None:
            return value.amax
        deviations = math.sqrt(2 * math.log(max(elements, 2)))
        return sympy.Abs(self.mean(value)) + deviations * sympy.sqrt(self.variance(value))

    def _moments(self, value: Value) -> Root:
        """The moments of a value, as those of a root."""
        root, function = value.root, value.function
        if function is X:
            return root
        if (root, function) not in self._known:
            mean = self._define(f"mean_{value.name}", _expected(function, root))
            variance = self._define(f"var_{value.name}", _variance(function, root, mean))
            self._known[root, function] = Root(mean, variance)
        return self._known[root, function]

    def _define(self, name: str, expression: sympy.Expr) -> sympy.Expr:
        """A symbol for an expression, or itself if it is a number or a symbol already."""
        expression = sympy.sympify(expression)
        if expression.is_Atom:
            return expression
        if not expression.free_symbols:
            return expression.evalf()
        while (symbol := sympy.Symbol(name, real=True)) in self.definitions:
            name += "_"
        self.definitions[symbol] = expression
        return symbol


def _expected(function: sympy.Expr, root: Root) -> sympy.Expr:
    """The mean of a function of a Gaussian."""
    if X not in function.free_symbols:
        return function
    if function.is_polynomial(X):
        terms = sympy.Poly(function, X).terms()
        return sympy.Add(*(factor * _power(degree, root) for (degree,), factor in terms))
    return Expectation(function, root.mean, root.variance)


def _variance(function: sympy.Expr, root: Root, mean: sympy.Expr) -> sympy.Expr:
    """The variance of a function of a Gaussian, given its mean."""
    if not function.is_polynomial(X):
        return Expectation((function - mean) ** 2, root.mean, root.variance)
    polynomial = sympy.Poly(function, X)
    if polynomial.degree() <= 1:
        return polynomial.coeff_monomial(X) ** 2 * root.variance
    return sympy.expand(_expected(function**2, root) - _expected(function, root) ** 2)


def _power(degree: int, root: Root) -> sympy.Expr:
    """The mean of ``X ** degree``: odd central moments are 0, even ones ``(d - 1)!! var^(d/2)``."""
    even = range(0, degree + 1, 2)
    return sympy.Add(
        *(
            math.comb(degree, d)
            * root.mean ** (degree - d)
            * root.variance ** (d // 2)
            * sympy.factorial2(d - 1)
            for d in even
        )
    )


def largest_of(expressions: Sequence[sympy.Expr]) -> sympy.Expr:
    """The largest of some expressions, without comparing them, which takes sympy long."""
    different = list(dict.fromkeys(expressions))
    return sympy.Max(*different, evaluate=False) if len(different) > 1 else different[0]


class Expectation(sympy.Function):
    """The mean of the first argument, a function of ``X``, of a Gaussian with mean and variance."""

    nargs = 3

    def _numpycode(self, printer: sympy.printing.printer.Printer) -> str:
        function, mean, variance = map(printer.doprint, self.args)
        return f"expectation(lambda {X}: {function}, {mean}, {variance})"


def expectation(
    function: Callable[[np.ndarray], np.ndarray], mean: float, variance: float
) -> float:
    """The mean of a function of a Gaussian, by Gauss-Hermite quadrature with 32 nodes."""
    values = function(mean + math.sqrt(2 * variance) * _NODES)
    return float(np.sum(_WEIGHTS * values) / math.sqrt(math.pi))


def evaluator(
    expressions: Sequence[sympy.Expr], definitions: Mapping[sympy.Symbol, sympy.Expr]
) -> tuple[list[sympy.Symbol], Callable[..., list[float]]]:
    """The symbols that expressions depend on, and a function that evaluates these for their values.

    In float64; what is not defined, or too large, comes out as nan or inf.
    """
    needed = _needed(expressions, definitions)
    used = [expression.free_symbols for expression in (*expressions, *dict(needed).values())]
    arguments = sorted(set().union(*used) - definitions.keys() - {X}, key=str)
    given = {"expectation": expectation, "erf": np.vectorize(math.erf, otypes=[float])}
    function = sympy.lambdify(
        arguments,
        list(expressions),
        modules=[given, "numpy"],
        cse=lambda reduced: (needed, reduced),
    )

    def evaluate(*values: float) -> list[float]:
        with np.errstate(all="ignore"):
            return [float(found) for found in function(*map(np.float64, values))]

    return arguments, evaluate


def _needed(
    expressions: Sequence[sympy.Expr], definitions: Mapping[sympy.Symbol, sympy.Expr]
) -> list[tuple[sympy.Symbol, sympy.Expr]]:
    """The definitions that the expressions depend on, in order."""
    wanted = set().union(*(expression.free_symbols for expression in expressions))
    found = []
    for symbol, expression in reversed(list(definitions.items())):
        if symbol in wanted:
            wanted |= expression.free_symbols
            found.append((symbol, expression))
    return found[::-1]
