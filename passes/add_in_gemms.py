"""Let GEMMs add a matrix to their output, as a residual connection does."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from ..ir import RESHAPES, SCALED_MM, args_of, aten, emit, gemm_info
from ..regions import is_computable

_ADDEND = 7  # the position of scaled_mm's argument


def add_in_gemms(gm: fx.GraphModule, pays: Callable[[fx.Node], bool]) -> int:
    """Have a GEMM read what would be added to its output, so that the kernel behind reads only the
    sum, and need not write it.

    Before:
        mm_fp8  : bf16[16, 64] = fp8.scaled_mm(y_fp8, w_fp8, ..., None, bf16, True) ...
        view    : bf16[2, 8, 64] = aten.view(mm_fp8, [2, 8, 64])
        add     : bf16[2, 8, 64] = aten.add.Tensor(x, view)
    After:
        x_rows  : bf16[16, 64] = aten.reshape(x, [16, 64])
        add_fp8 : bf16[16, 64] = fp8.scaled_mm(y_fp8, w_fp8, ..., None, bf16, True, x_rows) ...
        add_sum : bf16[2, 8, 64] = aten.reshape(add_fp8, [2, 8, 64])

    Requires: a final graph; before grow_regions, which would take the sum.
    Ensures: what a GEMM adds is in memory anyway, and lies there as the output does.
    Leaves alone: outputs that are read otherwise, sums that are read once (by a kernel that need
    not write them), sums of other dtypes or sizes, scales per row or block, and GEMMs that ``pays``
    (of the scaled_mm node) is False of.
    Numerics: reorders (the output is not rounded before it is added).
    """
    rewrites = 0
    for add in list(gm.graph.find_nodes(op="call_function", target=aten.add.Tensor)):
        for output, other in (args_of(add)[::-1], args_of(add)):
            gemm = _gemm_of(output)
            if gemm is not None and _fits(add, gemm, other) and pays(gemm):
                _add_in(gm.graph, add, gemm, other)
                rewrites += 1
                break
    return rewrites


def _gemm_of(output: object) -> fx.Node | None:
    """The GEMM whose output a value is, if nothing else reads that."""
    node = output
    while isinstance(node, fx.Node) and len(node.users) == 1:
        if node.target is SCALED_MM:
            return node if len(node.args) == _ADDEND else None
        if node.target not in RESHAPES:
            return None
        node = args_of(node)[0]
    return None


def _fits(add: fx.Node, gemm: fx.Node, other: object) -> bool:
    """Whether the other term is a matrix in memory, of the output's dtype and known size."""
    if add.kwargs or not isinstance(other, fx.Node) or len(add.all_input_nodes) != 2:
        return False
    total, output, term = (node.meta["val"] for node in (add, gemm, other))
    if not all(isinstance(size, int) for each in (total, term) for size in each.shape):
        return False
    alike = total.dtype == output.dtype == term.dtype and total.shape == term.shape
    in_memory = _is_returned(add) or len(add.users) > 1
    return alike and term.is_contiguous() and in_memory and _is_stored(other)


def _is_stored(value: fx.Node) -> bool:
    """Whether a value is in memory whatever reads it."""
    while value.target in RESHAPES:
        value = args_of(value)[0]
    return _is_returned(value) or not is_computable(value)


def _is_returned(value: fx.Node) -> bool:
    return any(user.op == "output" for user in value.users)


def _add_in(graph: fx.Graph, add: fx.Node, gemm: fx.Node, other: fx.Node) -> None:
    with graph.inserting_before(add):
        rows = emit(graph, aten.reshape.default, (other, _shape(gemm)), f"{other.name}_rows")
        args = (*gemm.args, rows)
        total = emit(graph, SCALED_MM, args, f"{add.name}_fp8", like=gemm)
        shape = _shape(add)
        whole = emit(graph, aten.reshape.default, (total, shape), f"{add.name}_sum", like=add)
    if (info := gemm_info(gemm)) is not None:
        total.meta["fp8"] = info
    add.replace_all_uses_with(whole)
    for node in (add, *_between(add, gemm), gemm):
        graph.erase_node(node)


def _shape(node: fx.Node) -> list[int]:
    return list(node.meta["val"].shape)


def _between(add: fx.Node, gemm: fx.Node) -> list[fx.Node]:
    """The views between a GEMM and the sum, the last first."""
    views: list[fx.Node] = []
    (node,) = gemm.users
    while node is not add:
        views.insert(0, node)
        (node,) = node.users
    return views
