"""The Triton functions that compute a region's values for one tile.

From each result upwards, every node becomes a line of text, its operands first; a view becomes
nothing, since it only moves the position that is read. A reduction over rows ends a function: all
programs that share a row must have run it before the next function can use the total. Values are in
float32 from load to store; nothing in between is rounded, as in Inductor's kernels.
"""

from __future__ import annotations

import operator
from collections.abc import Set
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import fx

from ..ir import DEQUANTIZE_GROUPS, args_of, aten
from ..regions import (
    COL,
    CONSTANTS,
    ROW,
    ROW_REDUCTIONS,
    Chosen,
    Position,
    Quotient,
    Read,
    Remainder,
    is_computable,
    offset,
    reads,
    shape_of,
)
from .region import Region

# A value: the node, the position, and the conditions under which it is needed.
Key = tuple[fx.Node, Position, tuple[Any, ...]]


@dataclass
class Function:
    """A function of the emitted file. ``level``: how many reductions its values depend on."""

    name: str
    level: int
    lines: list[str] = field(default_factory=list)
    known: dict[Key, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)  # of the lines -> their variables
    places: set[str] = field(default_factory=set)  # of PLACES, those that it uses
    arguments: set[str] = field(default_factory=set)  # pointers and sizes
    totals: list[str] = field(default_factory=list)  # of earlier functions
    returns: list[str] = field(default_factory=list)

    @property
    def parameters(self) -> list[str]:
        places = [name for name in PLACES if name in self.places]
        return places + sorted(self.arguments) + self.totals

    def text(self) -> str:
        head = f"@triton.jit\ndef {self.name}({', '.join(self.parameters)}):"
        lines = [*self.lines, f"return {', '.join(self.returns)}"]
        return head + "".join(f"\n    {line}" for line in lines)


_FEW_BYTES = 16
PLACES = ("rows", "cols", "in_m", "in_n")


@dataclass(frozen=True)
class Total:
    """A reduction over rows: its variable, the level of the function that starts it, and its kind
    ("sum" or "max")."""

    name: str
    level: int
    kind: str


class Values:
    """The functions for a region's results.

    ``sums``: those that end in reductions over rows, in the order of their levels. ``last``: those
    that return the results; one, or one for each branch of the region. ``suffix``: of their names,
    which tells the regions of one file apart.
    """

    def __init__(self, region: Region, suffix: str = "") -> None:
        self.region = region
        self.suffix = suffix
        self.totals: dict[tuple[fx.Node, str], Total] = {}
        self.symbols: set[sympy.Symbol] = set(region.space.size.free_symbols)
        self._names: set[str] = set()
        self._levels: dict[tuple[fx.Node, Position], int] = {}
        self._varying: dict[tuple[fx.Node, Position], set[sympy.Symbol]] = {}
        depth = max(self._level(r.node, r.position) for r in region.results)
        self.sums = [Function(f"_sums_{i}{suffix}", i) for i in range(depth)]
        for node, place in self._reductions():
            self._prepare(node, place)
        if region.branches:
            self.last = [self._branch(i, b.node) for i, b in enumerate(region.branches)]
        else:
            self.last = [self._results(Function(f"_values{suffix}", depth))]

    @property
    def loads_little(self) -> bool:
        """Whether the results of an element are computed from so few bytes, each load counted, that
        a program can hold those of many elements.
        """
        return max(map(self._bytes_loaded, self.last)) <= _FEW_BYTES

    @property
    def loads(self) -> int:
        """How many elements of matrices the results of one element are computed from at most."""
        return max(len(self._loaded(function, {ROW, COL})) for function in self.last)

    @property
    def bytes_loaded(self) -> int:
        """What is loaded for an element alone, and before that for the sums over its row."""
        return sum(self._bytes_loaded(f, {ROW, COL}) for f in (*self.sums, *self.last))

    def _bytes_loaded(self, function: Function, varying: Set[sympy.Symbol] = frozenset()) -> int:
        return sum(node.meta["val"].dtype.itemsize for node in self._loaded(function, varying))

    def _loaded(self, function: Function, varying: Set[sympy.Symbol]) -> list[fx.Node]:
        """The input that each load of a function reads, if its place varies with these."""
        return [
            node
            for node, place, _ in function.known
            if node in self.region.inputs and self._varies_with(node, place) >= varying
        ]

    def _results(self, function: Function) -> Function:
        for result in self.region.results:
            value = self._pull(function, result.node, result.position, ())
            if result.kind in ("cast", "scale") or self.region.is_matrix(result.node):
                value = self._widened(function, value, result.node, result.position)
            function.returns.append(value)
        return function

    def _branch(self, index: int, node: fx.Node) -> Function:
        function = Function(f"_part_{index}{self.suffix}", 0)
        value = self._pull(function, node, (ROW, COL), ())
        function.returns.append(self._widened(function, value, node, (ROW, COL)))
        return function

    def _widened(self, function: Function, value: str, node: fx.Node, place: Position) -> str:
        """One number for each element of the tile, also where rows or columns share them."""
        if self._varies_with(node, place) >= {ROW, COL}:
            return value
        function.places |= {"rows", "cols"}
        return self._assign(
            function, "widened", f"tl.broadcast_to({value}, rows.shape[0], cols.shape[1])"
        )

    def _varies_with(self, node: fx.Node, place: Position) -> set[sympy.Symbol]:
        if not is_computable(node):
            return set().union(*(expr.free_symbols for expr in place))
        key = (node, place)
        if key not in self._varying:
            found: set[sympy.Symbol] = set()
            for read in self._reads(node, place):
                found |= self._varies_with(read.node, read.position)
                found |= read.condition[0].free_symbols if read.condition else set()
            self._varying[key] = found & {ROW} if _reduction(node) else found
        return self._varying[key]

    # --- reductions --------------------------------------------------------------------------

    def _reads(self, node: fx.Node, place: Position) -> list[Read]:
        if not is_computable(node):
            return []
        found = reads(node, place, self.region.space)
        assert found is not None, f"{node} is not computable at {place}"
        return found

    def _level(self, node: fx.Node, place: Position) -> int:
        key = (node, place)
        if key not in self._levels:
            found = self._reads(node, place)
            level = max((self._level(read.node, read.position) for read in found), default=0)
            step = {"": 0, "var": 2}.get(_reduction(node), 1)
            self._levels[key] = level + step
        return self._levels[key]

    def _reductions(self) -> list[tuple[fx.Node, Position]]:
        """All reductions over rows, those that others depend on first."""
        seen, found = set(), []
        stack = [(r.node, r.position) for r in self.region.results]
        while stack:
            key = stack.pop()
            if key in seen:
                continue
            seen.add(key)
            stack += [(read.node, read.position) for read in self._reads(*key)]
            if _reduction(key[0]):
                found.append(key)
        return sorted(found, key=lambda key: self._level(*key))

    def _prepare(self, node: fx.Node, place: Position) -> None:
        """Start a reduction in the function of its operand's level."""
        kind = _reduction(node)
        (read,) = self._reads(node, place)
        function = self.sums[self._level(read.node, read.position)]
        value = self._pull(function, read.node, read.position, ())
        self._start(node, "max" if kind == "max" else "sum", function, value)
        if kind == "var":
            after = self.sums[function.level + 1]
            value = self._pull(after, read.node, read.position, ())
            mean = self._mean(after, node)
            centered = self._assign(after, "centered", f"{value} - {mean}")
            self._start(node, "squares", after, f"{centered} * {centered}")

    def _start(self, node: fx.Node, kind: str, function: Function, value: str) -> None:
        if (node, kind) in self.totals:
            return
        combine = "max" if kind == "max" else "sum"
        name = self._name(f"row_{kind}")
        function.places.add("in_n")
        outside = 'float("-inf")' if kind == "max" else "0.0"
        masked = f"tl.where(in_n, ({value}).to(tl.float32), {outside})"
        function.lines.append(f"{name} = tl.{combine}({masked}, axis=1)[:, None]")
        function.returns.append(name)
        self.totals[node, kind] = Total(name, function.level, combine)

    def _total(self, function: Function, node: fx.Node) -> str:
        """The result of a reduction that an earlier function has started."""
        kind = _reduction(node)
        if kind == "mean":
            return self._mean(function, node)
        if kind == "var":
            correction = args_of(node)[0].kwargs.get("correction", 1)
            count = self._number(function, self.region.space.n - sympy.sympify(correction))
            total = self._carry(function, self.totals[node, "squares"].name)
            return self._assign(function, "variance", f"{total} / {count}")
        return self._carry(function, self.totals[node, kind].name)

    def _mean(self, function: Function, node: fx.Node) -> str:
        total = self._carry(function, self.totals[node, "sum"].name)
        count = self._number(function, self.region.space.n)
        return self._assign(function, "mean", f"{total} / {count}")

    # --- values ------------------------------------------------------------------------------

    def _pull(self, function: Function, node: fx.Node, place: Position, needed: Any) -> str:
        """The variable that holds a value in a function."""
        key = (node, place, needed)
        if key not in function.known:
            function.known[key] = self._value(function, node, place, needed)
        return function.known[key]

    def _value(self, function: Function, node: fx.Node, place: Position, needed: Any) -> str:
        if _reduction(node):
            return self._total(function, node)
        if not is_computable(node):
            return self._load(function, node, place, needed)
        if node.target in CONSTANTS:
            return _operand(args_of(node)[-1], ())
        found = self._reads(node, place)
        if node.target is aten.cat.default:
            return self._choose(function, found, needed)
        logit = _logit_of_silu(node)
        if logit is not None:
            value = self._pull(function, found[0].node, found[0].position, needed)
            gate = self._assign(function, "gate", f"sigmoid({value})")
            return self._assign(function, "silu", f"{value} * {gate}")
        if _is_erf_plus_1(node):
            (read,) = self._reads(found[0].node, found[0].position)
            value = self._pull(function, read.node, read.position, needed)
            return self._assign(function, "erf", f"erf_plus_1({value})")
        if node.target not in _TEXT:  # a view
            return self._pull(function, found[0].node, found[0].position, needed)
        tensors = iter([self._pull(function, r.node, r.position, needed) for r in found])
        operands = [_operand(arg, tensors) for arg in node.args]
        text = _TEXT[node.target](node, operands)
        return text if text == operands[0] else self._assign(function, _short(node), text)

    def _choose(self, function: Function, found: list[Read], needed: Any) -> str:
        """A concatenation: the part that the position lies in; the others are not loaded."""
        together = self._at_one_place(found)
        chosen = ""
        for read in reversed(together or found):
            where = needed if together else (*needed, read.condition)
            value = self._pull(function, read.node, read.position, where)
            if chosen:
                assert read.condition is not None
                expr, _, end = read.condition
                test = f"{self._expr(function, expr)} < {self._expr(function, end)}"
                value = self._assign(function, "joined", f"tl.where({test}, {value}, {chosen})")
            chosen = value
        return chosen

    def _at_one_place(self, found: list[Read]) -> list[Read]:
        """Two parts of a concatenation that are computed from one value, of places a fixed number
        of elements apart, as halves that rotary embeddings exchange: both read at the place of the
        part that is chosen, so that the value is loaded and computed once. Else nothing.
        """
        if len(found) != 2 or found[0].condition is None:
            return []
        (node, first), (other, second) = (self._source(r.node, r.position) for r in found)
        gaps = [sympy.expand(b - a) for a, b in zip(first, second, strict=node is other)]
        apart = [gap for gap in gaps if gap != 0]
        if node is not other or len(apart) != 1 or not apart[0].is_number:
            return []
        expr, _, end = found[0].condition
        shift = Chosen(expr, end, sympy.S.Zero, apart[0])
        positions = zip(*(read.position for read in found), strict=True)
        moved = [(a + shift, b + shift - apart[0]) if a != b else (a, b) for a, b in positions]
        places = zip(*moved, strict=True)
        reads = [replace(r, position=place) for r, place in zip(found, places, strict=True)]
        sources = [self._source(read.node, read.position) for read in reads]
        return reads if sources[0] == sources[1] else []

    def _source(self, node: fx.Node, place: Position) -> tuple[fx.Node, Position]:
        """Where a value comes from through views and operators of one operand."""
        while not _reduction(node) and is_computable(node) and node.target not in CONSTANTS:
            found = self._reads(node, place)
            if len(found) != 1 or found[0].condition is not None:
                break
            node, place = found[0].node, found[0].position
        return node, place

    def _load(self, function: Function, node: fx.Node, place: Position, needed: Any) -> str:
        """An element of an input, in float32."""
        name = self._assign(function, node.name, self._load_text(function, node, place, needed))
        dtype = node.meta["val"].dtype
        if dtype == torch.float32:
            return name
        text = f"{name} != 0" if dtype == torch.bool else f"widen({name})"
        return self._assign(function, f"{name}_f32", text)

    def _load_text(self, function: Function, node: fx.Node, place: Position, needed: Any) -> str:
        strides = [_as_expr(stride) for stride in node.meta["val"].stride()]
        at = offset(place, shape_of(node), strides)
        mask = self._mask(function, place, needed)
        function.arguments.add(f"{node.name}_ptr")
        return f"tl.load({node.name}_ptr + {self._expr(function, at)}{mask})"

    def _carry(self, function: Function, name: str) -> str:
        if name not in function.totals:
            function.totals.append(name)
        return name

    def _assign(self, function: Function, base: str, text: str) -> str:
        """The variable that holds what ``text`` computes; the same text is computed once."""
        if text not in function.texts:
            function.texts[text] = self._name(base)
            function.lines.append(f"{function.texts[text]} = {text}")
        return function.texts[text]

    def _name(self, base: str) -> str:
        name, count = base, 0
        while name in self._names:
            count += 1
            name = f"{base}_{count}"
        self._names.add(name)
        return name

    # --- expressions -------------------------------------------------------------------------

    def _mask(self, function: Function, place: Position, needed: Any) -> str:
        symbols = set().union(*(e.free_symbols for e in place)) if place else set()
        tests = [test for symbol, test in ((ROW, "in_m"), (COL, "in_n")) if symbol in symbols]
        function.places.update(tests)
        for expr, low, high in needed:
            if not expr.free_symbols <= symbols:
                continue  # what is loaded is the same wherever it is needed
            text = self._expr(function, expr)
            if low != 0:
                tests.append(f"({text} >= {self._expr(function, low)})")
            tests.append(f"({text} < {self._expr(function, high)})")
        return f", mask={' & '.join(tests)}, other=0.0" if tests else ""

    def _expr(self, function: Function, expr: Any) -> str:
        expr = sympy.sympify(expr)
        for symbol, name in ((ROW, "rows"), (COL, "cols")):
            if symbol in expr.free_symbols:
                function.places.add(name)
        sizes = expr.free_symbols - {ROW, COL}
        self.symbols |= sizes
        function.arguments |= {str(size) for size in sizes}
        return expr_text(expr)

    def _number(self, function: Function, expr: sympy.Expr) -> str:
        return f"{float(expr)}" if expr.is_number else f"({self._expr(function, expr)})"


def expr_text(expr: sympy.Expr) -> str:
    """An index expression as Triton text; factors and terms that vary least come last."""
    if expr == ROW:
        return "rows"
    if expr == COL:
        return "cols"
    if isinstance(expr, Quotient | Remainder):
        sign = "//" if isinstance(expr, Quotient) else "%"
        return f"({expr_text(expr.args[0])} {sign} {expr_text(expr.args[1])})"
    if isinstance(expr, Chosen):
        x, n, a, b = map(expr_text, expr.args)
        return f"tl.where({x} < {n}, {a}, {b})"
    if isinstance(expr, sympy.Add):
        terms = sorted(expr.args, key=lambda e: (e.is_number, COL in e.free_symbols))
        return f"({' + '.join(expr_text(term) for term in terms)})"
    if isinstance(expr, sympy.Mul):
        return " * ".join(expr_text(e) for e in sorted(expr.args, key=lambda e: e.is_number))
    return str(expr)


def _as_expr(size: Any) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _reduction(node: fx.Node) -> str:
    """ "sum", "mean", "max" or "var" for a reduction over rows, else ""."""
    if node.target is operator.getitem:
        source, index = args_of(node)
        if source.target is aten.var_mean.correction:
            return ("var", "mean")[index]
        return ""
    kinds: dict[Any, str] = ROW_REDUCTIONS
    return kinds.get(node.target, "")


def _logit_of_silu(node: fx.Node) -> fx.Node | None:
    """x, if a node is ``x / (1 + exp(-x))``, the form that PyTorch gives ``silu(x)``.

    Its backward takes the sigmoid of the same x: written with one, the two share it.
    """
    if node.target is not aten.div.Tensor:
        return None
    x, total = args_of(node)
    exponential, negative = _argument(total, aten.add.Tensor), None
    if exponential is not None and args_of(total)[1] == 1:
        negative = _argument(exponential, aten.exp.default)
    return x if negative is not None and _argument(negative, aten.neg.default) is x else None


def _is_erf_plus_1(node: fx.Node) -> bool:
    """Whether a node is ``erf(x) + 1``, as in ``gelu(x)``; of a small erf, 1 leaves few bits."""
    if node.target is not aten.add.Tensor or node.kwargs:
        return False
    return args_of(node)[1] == 1 and _argument(args_of(node)[0], aten.erf.default) is not None


def _argument(node: Any, target: Any) -> Any:
    """The first argument of a node, if it is a call of ``target``."""
    return args_of(node)[0] if isinstance(node, fx.Node) and node.target is target else None


def _operand(arg: Any, tensors: Any) -> str:
    if isinstance(arg, fx.Node):
        return str(next(tensors))
    if isinstance(arg, bool | torch.dtype) or arg is None:
        return str(arg)
    return f'float("{arg}")' if arg != arg or abs(arg) == float("inf") else repr(float(arg))


# Where the name of an operator is long, or that of a function that computes it.
_SHORT = {"convert_element_type": "converted", "sigmoid": "gate", "log1p": "log", "exp": "power"}


def _short(node: fx.Node) -> str:
    name = str(getattr(node.target, "_opname", "value"))
    return _SHORT.get(name, name)


def _simple(template: str) -> Any:
    return lambda node, operands: template.format(*(_as_number(node, operands)))


def _as_number(node: fx.Node, operands: list[str]) -> list[str]:
    """Operands as float32: arithmetic on a mask counts it as 0 and 1."""
    return [
        f"{text}.to(tl.float32)"
        if isinstance(arg, fx.Node) and arg.meta["val"].dtype == torch.bool
        else text
        for arg, text in zip(node.args, operands, strict=True)
    ]


def _convert(node: fx.Node, operands: list[str]) -> str:
    source, target = args_of(node)[0].meta["val"].dtype, args_of(node)[1]
    if source == torch.bool and target != torch.bool:
        return f"{operands[0]}.to(tl.float32)"
    if target == torch.bool and source != torch.bool:
        return f"{operands[0]} != 0"
    return operands[0]


_POWERS = {
    -1: "1.0 / {0}",
    -0.5: "tl.rsqrt({0})",
    0.5: "tl.sqrt({0})",
    1: "{0}",
    2: "{0} * {0}",
    3: "{0} * {0} * {0}",
    4: "{0} * {0} * {0} * {0}",
}


def _power(node: fx.Node, operands: list[str]) -> str:
    return _POWERS[args_of(node)[1]].format(operands[0])


# Comparisons instead of min and max, so that NaN stays.
_TEXT = {
    aten.add.Tensor: _simple("{0} + {1}"),
    aten.add.Scalar: _simple("{0} + {1}"),
    aten.sub.Tensor: _simple("{0} - {1}"),
    aten.sub.Scalar: _simple("{0} - {1}"),
    aten.mul.Tensor: _simple("{0} * {1}"),
    aten.mul.Scalar: _simple("{0} * {1}"),
    aten.div.Tensor: _simple("{0} / {1}"),
    aten.div.Scalar: _simple("{0} / {1}"),
    aten.pow.Tensor_Scalar: _power,
    aten.neg.default: _simple("-{0}"),
    aten.abs.default: _simple("tl.abs({0})"),
    aten.exp.default: _simple("exp({0})"),
    aten.log.default: _simple("tl.log({0})"),
    aten.log1p.default: _simple("log1p({0})"),
    aten.sqrt.default: _simple("tl.sqrt({0})"),
    aten.rsqrt.default: _simple("tl.rsqrt({0})"),
    aten.reciprocal.default: _simple("1.0 / {0}"),
    aten.sigmoid.default: _simple("sigmoid({0})"),
    aten.tanh.default: _simple("2.0 * sigmoid(2.0 * {0}) - 1.0"),
    aten.erf.default: _simple("tl.erf({0})"),
    aten.relu.default: _simple("tl.where({0} < 0.0, 0.0, {0})"),
    aten.sin.default: _simple("tl.sin({0})"),
    aten.cos.default: _simple("tl.cos({0})"),
    aten.maximum.default: _simple("tl.where(({0} > {1}) | ({0} != {0}), {0}, {1})"),
    aten.minimum.default: _simple("tl.where(({0} < {1}) | ({0} != {0}), {0}, {1})"),
    aten.clamp_min.default: _simple("tl.where({0} < {1}, {1}, {0})"),
    aten.clamp_max.default: _simple("tl.where({0} > {1}, {1}, {0})"),
    aten.where.self: lambda node, operands: "tl.where({}, {}, {})".format(*operands),
    aten.gt.Scalar: _simple("{0} > {1}"),
    aten.gt.Tensor: _simple("{0} > {1}"),
    aten.ge.Scalar: _simple("{0} >= {1}"),
    aten.ge.Tensor: _simple("{0} >= {1}"),
    aten.lt.Scalar: _simple("{0} < {1}"),
    aten.lt.Tensor: _simple("{0} < {1}"),
    aten.le.Scalar: _simple("{0} <= {1}"),
    aten.le.Tensor: _simple("{0} <= {1}"),
    aten.eq.Scalar: _simple("{0} == {1}"),
    aten.eq.Tensor: _simple("{0} == {1}"),
    aten.ne.Scalar: _simple("{0} != {1}"),
    aten.ne.Tensor: _simple("{0} != {1}"),
    aten.logical_not.default: lambda node, operands: f"{operands[0]} == 0",
    aten.logical_and.default: lambda node, operands: f"({operands[0]} != 0) & ({operands[1]} != 0)",
    torch.ops.prims.convert_element_type.default: _convert,
    DEQUANTIZE_GROUPS: lambda node, operands: f"{operands[0]} * {operands[1]}",
}
