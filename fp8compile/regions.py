"""Where each value of a fused kernel lies: positions, spaces, and what an operator reads.

A *region* is the part of a graph that becomes one kernel. The kernel walks over a *space*, the
rows and columns of the matrices that it casts. ``reads`` says which elements of its arguments an
operator needs for one element of its result; followed upwards from a cast, it tells which values
the kernel computes and which elements of memory it loads. Views cost nothing here: they only change
positions.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from .ir import (
    DEQUANTIZE_GROUPS,
    QUANTIZE,
    QUANTIZE_BLOCKS,
    QUANTIZE_GROUPS,
    RESHAPES,
    args_of,
    aten,
    size_expr,
)
from .ops import ALIGNMENT, GROUP

prims = torch.ops.prims

ROW, COL = sympy.symbols("row col", integer=True, nonnegative=True)
Position = tuple[sympy.Expr, ...]


class Quotient(sympy.Function):
    """``x // n``, as an expression that sympy leaves alone."""


class Remainder(sympy.Function):
    """``x % n``, as an expression that sympy leaves alone."""


class Chosen(sympy.Function):
    """``a if x < n else b``, of ``(x, n, a, b)``, as an expression that sympy leaves alone."""


@dataclass(frozen=True)
class Space:
    """The rows and columns that a kernel walks over."""

    m: sympy.Expr
    n: sympy.Expr

    @property
    def size(self) -> sympy.Expr:
        return self.m * self.n

    def extent(self, position: Sequence[sympy.Expr]) -> sympy.Expr:
        """How many different elements a position takes while the kernel walks over the space."""
        symbols = set().union(*(expr.free_symbols for expr in position))
        return (self.m if ROW in symbols else sympy.S.One) * (
            self.n if COL in symbols else sympy.S.One
        )


@dataclass(frozen=True)
class Read:
    """An element of ``node`` that an operator needs, if ``condition`` (None: always) holds.

    ``condition``: ``(expr, low, high)``, which stands for ``low <= expr < high``.
    """

    node: fx.Node
    position: Position
    condition: tuple[sympy.Expr, sympy.Expr, sympy.Expr] | None = None


# --- positions ----------------------------------------------------------------------------------


def quotient(x: sympy.Expr, n: sympy.Expr) -> sympy.Expr:
    """``x // n`` for ``x >= 0``."""
    if n == 1 or x == 0:
        return x
    return Quotient(x.args[0], x.args[1] * n) if isinstance(x, Quotient) else Quotient(x, n)


def remainder(x: sympy.Expr, n: sympy.Expr) -> sympy.Expr:
    """``x % n`` for ``x >= 0``."""
    return sympy.S.Zero if n == 1 or x == 0 else Remainder(x, n)


def joined(position: Sequence[sympy.Expr], sizes: Sequence[sympy.Expr]) -> sympy.Expr:
    """The position in the dimension that these dimensions are flattened into."""
    expr, size = sympy.S.Zero, sympy.S.One
    for outer, outer_size in zip(reversed(position), reversed(sizes), strict=True):
        expr = _join_two(outer, outer_size, expr, size)
        size *= outer_size
    return expr


def _join_two(
    outer: sympy.Expr, outer_size: sympy.Expr, inner: sympy.Expr, size: sympy.Expr
) -> sympy.Expr:
    """``outer * size + inner``, or the expression that these are quotient and remainder of."""
    if size == 1:
        return outer
    if outer_size == 1:
        return inner
    if isinstance(inner, Remainder) and inner.args[1] == size:
        whole = inner.args[0]
        if outer == quotient(whole, size):
            return whole
        if outer == Remainder(quotient(whole, size), outer_size):
            return Remainder(whole, outer_size * size)
    return outer * size + inner


def split(expr: sympy.Expr, sizes: Sequence[sympy.Expr]) -> list[sympy.Expr]:
    """The positions in the dimensions that a dimension is unflattened into."""
    position: list[sympy.Expr] = []
    real = [i for i, size in enumerate(sizes) if size != 1]
    for i in range(len(sizes) - 1, -1, -1):
        if sizes[i] == 1:
            position.append(sympy.S.Zero)
        elif i == real[0]:
            position.append(expr)
        else:
            position.append(remainder(expr, sizes[i]))
            expr = quotient(expr, sizes[i])
    return position[::-1]


def reshaped(
    position: Position, shape: Sequence[sympy.Expr], new: Sequence[sympy.Expr]
) -> Position:
    """Where an element of a tensor of ``shape`` lies after it is reshaped to ``new``."""
    result: list[sympy.Expr] = []
    i = j = 0
    while i < len(shape) or j < len(new):
        first_i, first_j = i, j
        old_size = new_size = sympy.S.One
        i, j = min(i + 1, len(shape)), min(j + 1, len(new))
        old_size, new_size = math.prod(shape[first_i:i]), math.prod(new[first_j:j])
        while sympy.expand(old_size - new_size) != 0:
            if j == len(new) or (i < len(shape) and _smaller(old_size, new_size)):
                i += 1
            else:
                j += 1
            if i > len(shape) or j > len(new):
                raise ValueError(f"cannot reshape {tuple(shape)} to {tuple(new)}")
            old_size, new_size = math.prod(shape[first_i:i]), math.prod(new[first_j:j])
        result += split(joined(position[first_i:i], shape[first_i:i]), new[first_j:j])
    return tuple(result)


def _smaller(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether ``a < b``, where that is known; else whether b has a factor that a lacks."""
    if a.is_number and b.is_number:
        return bool(a < b)
    ratio = sympy.simplify(a / b)
    return bool(ratio < 1) if ratio.is_number else not ratio.is_polynomial()


def offset(position: Position, shape: Sequence[Any], strides: Sequence[Any]) -> sympy.Expr:
    """The distance in elements from a tensor's first element, with few divisions."""
    terms: list[tuple[sympy.Expr, sympy.Expr, sympy.Expr]] = []  # innermost last
    for expr, size, stride in zip(
        reversed(position), reversed(shape), reversed(strides), strict=True
    ):
        if size == 1:
            continue
        if terms and stride == terms[0][1] * terms[0][2]:
            inner, inner_size, inner_stride = terms[0]
            whole = _join_two(expr, size, inner, inner_size)
            if whole != expr * inner_size + inner:
                terms[0] = (whole, size * inner_size, inner_stride)
                continue
        terms.insert(0, (expr, size, stride))
    return sympy.Add(*(expr * stride for expr, _, stride in terms))


def in_first_row(position: Position, columns: int) -> set[tuple[int, ...]]:
    """The different positions of as many columns of the first row; all sizes are numbers."""
    functions = {
        "Quotient": operator.floordiv,
        "Remainder": operator.mod,
        "Chosen": lambda x, n, a, b: a if x < n else b,
    }
    at = sympy.lambdify(COL, [expr.subs(ROW, 0) for expr in position], modules=[functions])
    return {tuple(at(column)) for column in range(columns)}


def place_in(space: Space, shape: Sequence[sympy.Expr]) -> Position | None:
    """The position of a contiguous tensor's element that a kernel over ``space`` stores.

    One element per element of the space, or per row; None if the shape is neither.
    """
    size = math.prod(shape)
    if sympy.expand(size - space.size) == 0:
        return reshaped((ROW, COL), (space.m, space.n), shape)
    if shape and shape[-1] == 1 and sympy.expand(size - space.m) == 0:
        return (*split(ROW, shape[:-1]), sympy.S.Zero)
    return None


def hint(size: int | torch.SymInt, default: int = 8192) -> int:
    """A size, or the size of the example where it is symbolic; ``default`` if it has none."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint) if size.node.has_hint() else default
    return size


# --- operators ----------------------------------------------------------------------------------

SAME_PLACE = {aten.clone.default, aten.alias.default, prims.convert_element_type.default}
ROW_REDUCTIONS = {
    aten.sum.dim_IntList: "sum",
    aten.mean.dim: "mean",
    aten.amax.default: "max",
    aten.var_mean.correction: "var_mean",
}
CONSTANTS = {aten.full.default, aten.scalar_tensor.default}  # those with a single element
# What a kernel can compute from elements at one place. The emitter knows how; see there.
POINTWISE = {
    getattr(getattr(aten, name), overload)
    for name, overloads in {
        "add": ("Tensor", "Scalar"),
        "sub": ("Tensor", "Scalar"),
        "mul": ("Tensor", "Scalar"),
        "div": ("Tensor", "Scalar"),
        "pow": ("Tensor_Scalar",),
        "neg": ("default",),
        "abs": ("default",),
        "exp": ("default",),
        "log": ("default",),
        "log1p": ("default",),
        "sqrt": ("default",),
        "rsqrt": ("default",),
        "reciprocal": ("default",),
        "sigmoid": ("default",),
        "tanh": ("default",),
        "erf": ("default",),
        "relu": ("default",),
        "sin": ("default",),
        "cos": ("default",),
        "maximum": ("default",),
        "minimum": ("default",),
        "clamp_min": ("default",),
        "clamp_max": ("default",),
        "where": ("self",),
        "gt": ("Scalar", "Tensor"),
        "ge": ("Scalar", "Tensor"),
        "lt": ("Scalar", "Tensor"),
        "le": ("Scalar", "Tensor"),
        "eq": ("Scalar", "Tensor"),
        "ne": ("Scalar", "Tensor"),
        "logical_not": ("default",),
        "logical_and": ("default",),
    }.items()
    for overload in overloads
}
MAX_ROW = 65536  # elements; a program computes whole rows, where sums over rows are needed
POWERS = (-1, -0.5, 0.5, 1, 2, 3, 4)  # exponents that take no more than multiplications and roots
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def shape_of(node: fx.Node) -> tuple[sympy.Expr, ...]:
    """A tensor's shape as sympy expressions."""
    return tuple(size_expr(size) for size in node.meta["val"].shape)


def is_computable(node: fx.Node) -> bool:
    """Whether a kernel can compute this node's values itself, wherever they lie."""
    value = node.meta.get("val")
    if isinstance(value, tuple | list):
        return node.target in (aten.split.Tensor, aten.var_mean.correction)
    if not isinstance(value, torch.Tensor) or value.dtype not in (*_FLOATS, torch.bool):
        return False
    if not all(_is_usable(arg, node) for arg in node.all_input_nodes):
        return False
    if node.target in CONSTANTS:
        return value.dim() == 0 and value.dtype in _FLOATS
    if node.target is aten.pow.Tensor_Scalar and node.args[1] not in POWERS:
        return False
    if node.target in POINTWISE or node.target in SAME_PLACE:
        return not (set(node.kwargs) - {"dtype", "memory_format"}) and _alpha_is_one(node)
    if node.target is operator.getitem:
        return args_of(node)[0].target in (aten.split.Tensor, aten.var_mean.correction)
    return node.target in _READS or node.target in RESHAPES or node.target in ROW_REDUCTIONS


def _is_usable(arg: fx.Node, node: fx.Node) -> bool:
    """Whether a kernel can take an operand: numbers that float32 holds, on its own device."""
    value = arg.meta.get("val")
    if isinstance(value, torch.SymInt):
        return node.target in RESHAPES and _has_one_unknown_size(node)
    if not isinstance(value, torch.Tensor):
        return arg.target in (aten.split.Tensor, aten.var_mean.correction)
    converts = node.target in (prims.convert_element_type.default, DEQUANTIZE_GROUPS)
    if not converts and value.dtype not in (*_FLOATS, torch.bool):
        return False
    result = node.meta["val"]
    return not isinstance(result, torch.Tensor) or result.device == value.device


def _has_one_unknown_size(reshape: fx.Node) -> bool:
    """Whether one size follows from the others: a region's graph, which has no sizes as inputs,
    then has -1 for it.
    """
    return sum(isinstance(size, fx.Node) for size in args_of(reshape)[1]) == 1


def _alpha_is_one(node: fx.Node) -> bool:
    scaled = node.target in (aten.add.Scalar, aten.sub.Scalar)
    return not (scaled and len(node.args) > 2) and bool(node.kwargs.get("alpha", 1) == 1)


def reads(node: fx.Node, position: Position, space: Space) -> list[Read] | None:
    """The elements that one element of a computable node is computed from.

    None if it cannot be computed by a kernel that walks over ``space``: a reduction over anything
    but whole rows.
    """
    if node.target in RESHAPES:
        (source,) = node.all_input_nodes[:1]
        try:
            place = reshaped(position, shape_of(node), shape_of(source))
        except ValueError:
            return None
        return [Read(source, place)]
    if node.target in ROW_REDUCTIONS:
        return _reduction_reads(node, position, space)
    if node.target is operator.getitem:
        return _getitem_reads(node, position, space)
    if node.target in _READS:
        return _READS[node.target](node, position)
    return [
        Read(arg, broadcast(position, shape_of(arg)))
        for arg in node.args
        if isinstance(arg, fx.Node)
    ]


def broadcast(position: Position, shape: Sequence[sympy.Expr]) -> Position:
    """The element of a tensor of ``shape`` that is broadcast to ``position``."""
    place = position[len(position) - len(shape) :]
    return tuple(sympy.S.Zero if size == 1 else e for e, size in zip(place, shape, strict=True))


def reduced_dims(node: fx.Node) -> list[int]:
    """The dimensions that a reduction sums over, counted from the front."""
    source, dims = args_of(node)[0], args_of(node)[1] if len(node.args) > 1 else None
    rank = source.meta["val"].dim()
    return sorted(d % rank for d in dims) if dims else list(range(rank))


def sum_behind(node: fx.Node) -> fx.Node:
    """The float32 sum that a node does nothing with but convert it, else the node itself."""
    if node.target is prims.convert_element_type.default:
        source = args_of(node)[0]
        is_sum = source.target is aten.sum.dim_IntList
        if is_sum and len(source.users) == 1 and source.meta["val"].dtype is torch.float32:
            return source
    return node


def _keeps_dims(node: fx.Node) -> bool:
    if node.target is aten.var_mean.correction:
        return bool(node.kwargs.get("keepdim", False))
    return bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim", False))


def _reduction_reads(node: fx.Node, position: Position, space: Space) -> list[Read] | None:
    """A reduction over all of a row: the position of the result must not depend on the column."""
    source, dims = args_of(node)[0], reduced_dims(node)
    shape = shape_of(source)
    along = [shape[d] for d in dims]
    if any(COL in e.free_symbols for e in position) or math.prod(along) != space.n:
        return None
    if not space.n.is_number or space.n > MAX_ROW:
        return None
    inner = iter(split(COL, along))
    outer = iter(e for d, e in enumerate(position) if not _keeps_dims(node) or d not in dims)
    place = tuple(next(inner) if d in dims else next(outer) for d in range(len(shape)))
    return [Read(source, place)]


def _getitem_reads(node: fx.Node, position: Position, space: Space) -> list[Read] | None:
    source, index = args_of(node)
    if source.target is aten.var_mean.correction:
        return _reduction_reads(source, position, space)
    tensor, size, *rest = args_of(source)
    dim = (rest[0] if rest else 0) % len(position)
    moved = list(position)
    moved[dim] = moved[dim] + index * size
    return [Read(tensor, tuple(moved))]


def _permute(node: fx.Node, position: Position) -> list[Read]:
    source, dims = args_of(node)
    place: list[Any] = [None] * len(position)
    for to, origin in enumerate(dims):
        place[origin % len(position)] = position[to]
    return [Read(source, tuple(place))]


def _transpose(node: fx.Node, position: Position) -> list[Read]:
    source, *dims = args_of(node)
    a, b = dims or (0, 1)
    place = list(position)
    if place:
        place[a], place[b] = place[b], place[a]
    return [Read(source, tuple(place))]


def _expand(node: fx.Node, position: Position) -> list[Read]:
    source = args_of(node)[0]
    return [Read(source, broadcast(position, shape_of(source)))]


def _unsqueeze(node: fx.Node, position: Position) -> list[Read]:
    source, dim = args_of(node)
    dim %= len(position)
    return [Read(source, position[:dim] + position[dim + 1 :])]


def _squeeze(node: fx.Node, position: Position) -> list[Read]:
    source, dims = args_of(node)[0], args_of(node)[1]
    rank = source.meta["val"].dim()
    gone = {d % rank for d in ([dims] if isinstance(dims, int) else dims)}
    gone = {d for d in gone if source.meta["val"].shape[d] == 1}
    left = iter(position)
    return [Read(source, tuple(sympy.S.Zero if d in gone else next(left) for d in range(rank)))]


def _slice(node: fx.Node, position: Position) -> list[Read]:
    source, dim, start, _, step = (*args_of(node), *(0, 0, None, 1)[len(node.args) - 1 :])[:5]
    start = start or 0
    place = list(position)
    size = size_expr(source.meta["val"].shape[dim])
    place[dim] = place[dim] * step + (start if start >= 0 else size + start)
    return [Read(source, tuple(place))]


def _select(node: fx.Node, position: Position) -> list[Read]:
    source, dim, index = args_of(node)
    dim %= len(position) + 1
    size = size_expr(source.meta["val"].shape[dim])
    at = sympy.Integer(index) if index >= 0 else size + index
    return [Read(source, (*position[:dim], at, *position[dim:]))]


def _cat(node: fx.Node, position: Position) -> list[Read]:
    parts, *rest = args_of(node)
    dim = (rest[0] if rest else 0) % len(position)
    found, start = [], sympy.S.Zero
    for part in parts:
        end = start + shape_of(part)[dim]
        place = list(position)
        place[dim] = position[dim] - start
        found.append(Read(part, tuple(place), (position[dim], start, end)))
        start = end
    return found


def _dequantize_groups(node: fx.Node, position: Position) -> list[Read]:
    q, scale_inv = args_of(node)[:2]
    group = (*position[:-1], quotient(position[-1], sympy.Integer(GROUP)))
    return [Read(q, position), Read(scale_inv, group)]


_READS = {
    DEQUANTIZE_GROUPS: _dequantize_groups,
    aten.permute.default: _permute,
    aten.t.default: _transpose,
    aten.transpose.int: _transpose,
    aten.expand.default: _expand,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.cat.default: _cat,
}


# --- casts --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Columns of a cast's matrix: ``value`` at ``position``, stored from column ``start`` on."""

    value: fx.Node
    position: Position
    start: sympy.Expr


def cast_shape(cast: fx.Node) -> tuple[sympy.Expr, sympy.Expr]:
    """The rows and columns of a cast; leading dimensions are all rows."""
    *rows, n = shape_of(args_of(cast)[0])
    return sympy.prod(rows), n


def is_aligned(size: sympy.Expr) -> bool:
    """Whether a size is known to be a multiple of 16: a row of that many is not padded."""
    return bool(sympy.Mod(size, ALIGNMENT) == 0)


def cast_parts(cast: fx.Node, space: Space) -> list[Part]:
    """The parts of a cast that a kernel over ``space`` writes: one, or those of a concatenation."""
    value = args_of(cast)[0]
    if cast_shape(cast)[1] == space.n:
        *rows, n = shape_of(value)
        return [Part(value, (*split(ROW, rows), *split(COL, [n])), sympy.S.Zero)]
    pieces = concatenated_columns(cast)
    return [Part(piece, (ROW, COL), i * space.n) for i, piece in enumerate(pieces)]


def concatenated_columns(cast: fx.Node) -> list[fx.Node]:
    """The matrices that a cast one is the concatenation of, if they have the same width; or [].

    The width is a multiple of 16, or of a block's: then nothing has to be padded between them.
    None are told apart where only rows are cast, each of the whole with one scale.
    """
    value = args_of(cast)[0]
    if (
        scales_whole_rows(cast)
        or value.target is not aten.cat.default
        or len(value.args) < 2
        or args_of(value)[1] not in (1, -1)
    ):
        return []
    pieces = list(args_of(value)[0])
    same = len({shape_of(piece) for piece in pieces}) == 1
    wide = args_of(cast)[1][1] if cast.target is QUANTIZE_BLOCKS else 0
    unit = max(wide, ALIGNMENT)
    return pieces if same and sympy.Mod(shape_of(pieces[0])[1], unit) == 0 else []


def casts_of(gm: fx.GraphModule) -> Iterator[fx.Node]:
    """Every cast, in graph order."""
    casts = (QUANTIZE, QUANTIZE_BLOCKS, QUANTIZE_GROUPS)
    return (node for node in gm.graph.nodes if node.target in casts)


def scales_whole_rows(cast: fx.Node) -> bool:
    """Whether a cast has a scale per row, and writes no copy whose rows are the value's columns."""
    if cast.target is not QUANTIZE_BLOCKS or args_of(cast)[1][1]:
        return False
    _, transposed = (*args_of(cast)[4:], True, True)[:2]
    return not transposed
