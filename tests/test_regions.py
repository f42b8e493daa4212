"""Positions of views, by brute force: every element is found where torch has put it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from fp8compile.ir import aten
from fp8compile.regions import (
    COL,
    ROW,
    Quotient,
    Read,
    Remainder,
    Space,
    is_computable,
    joined,
    offset,
    place_in,
    prims,
    reads,
    reshaped,
    shape_of,
    split,
)
from tests.helpers import trace

M, N = sympy.Integer(6), sympy.Integer(8)
SPACE = Space(M, N)


def sizes(*shape: Any) -> tuple[sympy.Expr, ...]:
    return tuple(map(sympy.sympify, shape))


def value(expr: Any, row: int, col: int) -> int:
    """What an index expression is for one element of the space."""
    if isinstance(expr, Quotient | Remainder):
        x, n = (value(arg, row, col) for arg in expr.args)
        return x // n if isinstance(expr, Quotient) else x % n
    if isinstance(expr, sympy.Add | sympy.Mul):
        combine = sum if isinstance(expr, sympy.Add) else math.prod
        return combine(value(arg, row, col) for arg in expr.args)
    return {ROW: row, COL: col}.get(expr) if isinstance(expr, sympy.Symbol) else int(expr)


def elements() -> list[tuple[int, int]]:
    return [(row, col) for row in range(M) for col in range(N)]


def memory_of(node: fx.Node, position: Sequence[Any], row: int, col: int) -> int:
    """Follow what is read up to the graph's input; the offset of the element in its memory."""
    while is_computable(node):
        found = reads(node, tuple(position), SPACE)
        assert found is not None
        (read,) = [each for each in found if _holds(each, row, col)]
        node, position = read.node, read.position
    tensor = node.meta["val"]
    for expr, size in zip(position, tensor.shape, strict=True):
        assert 0 <= value(expr, row, col) < size
    return value(offset(tuple(position), shape_of(node), tensor.stride()), row, col)


def _holds(read: Read, row: int, col: int) -> bool:
    if read.condition is None:
        return True
    expr, low, high = (value(each, row, col) for each in read.condition)
    return low <= expr < high


# --- random chains of views -----------------------------------------------------------------------


@st.composite
def shapes(draw: st.DrawFn, size: int) -> tuple[int, ...]:
    """A shape with so many elements."""
    shape: list[int] = []
    while size > 1:
        factors = [n for n in range(2, size + 1) if size % n == 0]
        shape.append(draw(st.sampled_from(factors)))
        size //= shape[-1]
    for _ in range(draw(st.integers(0, 1))):
        shape.insert(draw(st.integers(0, len(shape))), 1)
    return tuple(shape)


def views(draw: st.DrawFn, x: Tensor) -> Tensor:
    """A random view of x, mostly; or a concatenation of slices of it."""
    kinds = ["view", "permute", "slice", "cat", "expand", "select", "unsqueeze", "squeeze"]
    kinds += ["transpose", "split"]
    kind = draw(st.sampled_from(kinds))
    dim = draw(st.integers(-x.dim(), x.dim() - 1)) if x.dim() else 0
    if kind == "view":
        return x.reshape(draw(shapes(x.numel())))
    if kind == "unsqueeze":
        return x.unsqueeze(dim)
    if kind == "squeeze" and 1 in x.shape:
        return x.squeeze(x.shape.index(1))
    if not x.dim():
        return x
    if kind == "permute":
        return x.permute(draw(st.permutations(range(x.dim()))))
    if kind == "transpose":
        return x.transpose(dim, draw(st.integers(-x.dim(), x.dim() - 1)))
    if kind == "expand" and x.numel() <= 24:
        return x.unsqueeze(dim).expand([-1 if n > 1 else 2 for n in x.unsqueeze(dim).shape])
    if kind == "select" and x.numel() > 4:
        return x.select(dim, draw(st.integers(-x.shape[dim], x.shape[dim] - 1)))
    if kind == "slice":
        start = draw(st.integers(-x.shape[dim], x.shape[dim] - 1))
        step = draw(st.integers(1, 2))
        return aten.slice.Tensor(x, dim, start, 2**63 - 1, step)
    if kind == "split":
        size = draw(st.integers(1, x.shape[dim]))
        parts = torch.split(x, size, dim)
        return parts[draw(st.integers(0, len(parts) - 1))]
    if kind == "cat" and x.numel() <= 48:
        return torch.cat([x.narrow(dim, 0, draw(st.integers(1, x.shape[dim]))), x], dim)
    return x


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_every_element_of_a_chain_of_views_is_found(data: st.DataObject) -> None:
    shape = data.draw(shapes(data.draw(st.sampled_from([8, 12, 24, 48]))))
    order = data.draw(st.permutations(range(len(shape))))
    x = torch.arange(math.prod(shape)).view(shape).permute(order)  # strides of all kinds
    x = torch.as_strided(x, x.shape, x.stride()).float()
    steps = data.draw(st.integers(1, 4))

    def chain(x: Tensor) -> Tensor:
        for _ in range(steps):
            x = views(data.draw, x)
        return x

    gm = trace(chain, x=x)
    (result,) = gm.graph.output_node().args
    want = gm(x)
    space = Space(sympy.Integer(1), sympy.Integer(max(want.numel(), 1)))
    place = reshaped((ROW, COL), (space.m, space.n), shape_of(result))
    flat = x.as_strided((x.numel(),), (1,))
    for col, element in enumerate(want.flatten().tolist()):
        assert flat[memory_of(result, place, 0, col)] == element


@given(st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_reshaping_keeps_the_order_of_elements(data: st.DataObject) -> None:
    old, new = (sizes(*data.draw(shapes(48))) for _ in range(2))
    again = reshaped(reshaped((ROW, COL), (M, N), old), old, new)
    for row, col in elements():
        index = [value(expr, row, col) for expr in again]
        assert all(0 <= i < size for i, size in zip(index, new, strict=True))
        assert int(torch.arange(48).view(*map(int, new))[tuple(index)]) == row * N + col


@given(st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_offsets_in_any_strides(data: st.DataObject) -> None:
    shape = data.draw(shapes(48))
    order = data.draw(st.permutations(range(len(shape))))
    x = torch.arange(48 * 2).view(*(shape[i] for i in order), 2)[..., 0]
    x = x.permute([order.index(i) for i in range(len(shape))])
    at = offset(reshaped((ROW, COL), (M, N), sizes(*shape)), shape, x.stride())
    for (row, col), element in zip(elements(), x.flatten().tolist(), strict=True):
        assert value(at, row, col) == element


# --- what the expressions look like ---------------------------------------------------------------


def integers(*names: str) -> list[sympy.Symbol]:
    return list(sympy.symbols(names, integer=True, positive=True))


def test_split_and_joined_are_inverse() -> None:
    shape = sizes(3, 1, 2, 4)
    position = split(COL, shape)
    assert position[1] == 0
    assert joined(position, shape) == COL
    assert joined(position[2:], shape[2:]) == Remainder(COL, 8)
    assert joined(position[:3], shape[:3]) == Quotient(COL, 4)


def test_a_matrix_in_memory_order_needs_no_division() -> None:
    shape = sizes(2, 3, 8)
    assert offset(reshaped((ROW, COL), (M, N), shape), shape, (24, 8, 1)) == 8 * ROW + COL
    heads = sizes(M, 2, 4)
    place = reshaped((ROW, COL), (M, N), heads)
    assert offset(place, heads, (8, 4, 1)) == 8 * ROW + COL
    assert offset(place, heads, (16, 4, 1)) == 16 * ROW + COL


def test_symbolic_sizes_are_reshaped_like_numbers() -> None:
    (s,) = integers("s")
    halves = (ROW, Quotient(COL, 4), Remainder(COL, 4))
    assert reshaped((ROW, COL), sizes(s, 8), sizes(s, 2, 4)) == halves
    assert reshaped(halves, sizes(s, 2, 4), sizes(s, 8)) == (ROW, COL)
    batch = (Quotient(ROW, 6), Remainder(ROW, 6), COL)
    assert reshaped((ROW, COL), sizes(s * 6, 8), sizes(s, 6, 8)) == batch
    assert reshaped(batch, sizes(s, 6, 8), sizes(s * 6, 8)) == (ROW, COL)
    assert reshaped(batch, sizes(s, 6, 8), sizes(s * 6, 2, 4)) == halves
    a, b = integers("a", "b")
    both = (Quotient(ROW, b), Remainder(ROW, b), COL)
    assert reshaped((ROW, COL), sizes(a * b, 8), sizes(a, b, 8)) == both
    assert reshaped(both, sizes(a, b, 8), sizes(a * b, 8)) == (ROW, COL)
    assert reshaped(both, sizes(a, b, 8), sizes(a * b, 2, 4)) == halves


def test_what_cannot_be_reshaped() -> None:
    with pytest.raises(ValueError, match="cannot reshape"):
        reshaped((ROW, COL), (M, N), sizes(7, 7))


def test_a_space_stores_matrices_and_one_number_per_row() -> None:
    assert place_in(SPACE, sizes(6, 8)) == (ROW, COL)
    assert place_in(SPACE, sizes(2, 3, 8)) == (Quotient(ROW, 3), Remainder(ROW, 3), COL)
    assert place_in(SPACE, sizes(2, 3, 1)) == (Quotient(ROW, 3), Remainder(ROW, 3), 0)
    assert place_in(SPACE, sizes(6)) is None and place_in(SPACE, sizes(1, 8)) is None


def test_the_extent_of_a_position() -> None:
    assert SPACE.extent((ROW, COL)) == SPACE.size == 48
    assert SPACE.extent((Quotient(ROW, 2), sympy.S.Zero)) == 6
    assert SPACE.extent((COL,)) == 8 and SPACE.extent(()) == 1


# --- what an operator reads -----------------------------------------------------------------------


def result_of(fn: Any, **inputs: Tensor) -> fx.Node:
    (node,) = trace(fn, **inputs).graph.output_node().args
    return node


def test_a_reduction_reads_its_row() -> None:
    node = result_of(lambda x: x.sum([1, 2], keepdim=True), x=torch.ones(6, 2, 4))
    (read,) = reads(node, (ROW, sympy.S.Zero, sympy.S.Zero), SPACE) or []
    assert read.position == (ROW, Quotient(COL, 4), Remainder(COL, 4))


@pytest.mark.parametrize("dims", [[0], [1], [0, 1, 2]], ids=str)
def test_other_reductions_are_not_for_this_kernel(dims: list[int]) -> None:
    node = result_of(lambda x: x.sum(dims, keepdim=True), x=torch.ones(6, 2, 4))
    place = tuple(sympy.S.Zero if d in dims else e for d, e in enumerate((ROW, COL, COL)))
    assert reads(node, place, SPACE) is None


X, IDS = torch.ones(6, 8), torch.ones(6, 8, dtype=torch.int64)
NOT_COMPUTABLE = {
    "cumsum": (lambda x: x.cumsum(0), {"x": X}),
    "integers": (lambda ids: ids + 1, {"ids": IDS}),
    "comparison of integers": (lambda ids: ids == 7, {"ids": IDS}),
    "float64": (lambda x: x * 2, {"x": X.double()}),
    "comparison of float64": (lambda x: x > 1, {"x": X.double()}),
    "complex": (lambda x: x * 1j, {"x": X}),
    "alpha": (lambda x: torch.add(x, x, alpha=2), {"x": X}),
    "power": (lambda x: x**2.5, {"x": X}),
    "a matrix of ones": (lambda x: torch.ones_like(x), {"x": X}),
}


@pytest.mark.parametrize("name", NOT_COMPUTABLE)
def test_what_a_kernel_does_not_compute(name: str) -> None:
    fn, inputs = NOT_COMPUTABLE[name]
    assert not is_computable(result_of(fn, **inputs))


def test_a_number_on_another_device_is_not_taken() -> None:
    node = result_of(lambda x: x * 2.0 + x, x=X)
    product = node.args[0]
    assert is_computable(product)
    product.args = (product.args[0], product.args[0])
    product.args[0].meta["val"] = product.args[0].meta["val"].to("meta")
    assert not is_computable(product)


def test_conversions_from_integers_and_constants_are_computed() -> None:
    converted = prims.convert_element_type
    assert is_computable(result_of(lambda ids: converted(ids, torch.float32), ids=IDS))
    chosen = result_of(lambda x: torch.where(x > 0, x, 0.0), x=X)
    condition, _, zero = chosen.args
    assert all(is_computable(node) for node in (chosen, condition, zero))
