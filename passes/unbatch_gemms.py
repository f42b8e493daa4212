"""Undo the batches that PyTorch makes of a product of several matrices with one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from ..ir import RESHAPES, SITE_TAG, args_of, aten, base_of, emit, evaluate, size_expr
from .tag_sites import EINSUM_TAG

_VIEWS = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)


def unbatch_gemms(gm: fx.GraphModule) -> int:
    """Multiply several matrices with one in one GEMM, instead of in a batched matmul with copies.

    Where its input is not contiguous and its weight needs no gradient, ATen takes ``nn.Linear`` and
    ``matmul`` apart so: the last token of every sequence (``logits_to_keep`` in transformers), or
    channels that were transposed.

    Before:
        permute  : bf16[32, 64] = aten.permute(w, [1, 0])
        expand   : bf16[4, 1, 32] = aten.expand(slice_1, [4, 1, 32])
        view     : bf16[4, 1, 32] = aten.view(expand, [4, 1, 32])
        expand_1 : bf16[4, 32, 64] = aten.expand(permute, [4, 32, 64])
        view_1   : bf16[4, 32, 64] = aten.view(expand_1, [4, 32, 64])
        bmm      : bf16[4, 1, 64] = aten.bmm(view, view_1)
    After:
        bmm_rows : bf16[4, 32] = aten.view(slice_1, [-1, 32])
        bmm_mm   : bf16[4, 64] = aten.mm(bmm_rows, permute)
        bmm_view : bf16[4, 1, 64] = aten.view(bmm_mm, [4, 1, 64])

    Rows that do not follow each other in memory are copied first, which becomes part of their cast.
    An einsum that is a site is traced as a batch of one matrix, behind views that mostly undo each
    other: it becomes a product of matrices, too.

    Requires: an ATen graph with ``meta["val"]``.
    Ensures: no matmul call of a batch with one matrix on the right is batched, nor an einsum.
    Leaves alone: products of two batches; one matrix on the left; what is no call of ``linear``,
        ``matmul`` or ``einsum``.
    Numerics: reorders (a batched kernel may add in another order).
    """
    found = 0
    rows: dict[fx.Node, fx.Node] = {}
    matrices: dict[Any, fx.Node] = {}
    for node in gm.graph.find_nodes(op="call_function", target=aten.bmm.default):
        custom = node.meta.get("custom") or {}
        if EINSUM_TAG in custom and size_expr(node.meta["val"].shape[0]) == 1:
            _take_only(node, matrices)
            found += 1
            continue
        matrix = _one_matrix(args_of(node)[1])
        if matrix is not None and SITE_TAG in custom:
            _unbatch(node, *matrix, rows)
            found += 1
    return found


def _one_matrix(batch: fx.Node) -> tuple[fx.Node, bool] | None:
    """The matrix that all those of a batch are, and whether these are its transpose."""
    node, transposed = batch, False
    for source in _sources(batch):
        if node.target is aten.permute.default:
            transposed = not transposed
        node = source
    value, of_batch = node.meta["val"], batch.meta["val"]
    if value.dim() != 2:
        return None
    rows, columns = (size_expr(size) for size in value.shape)
    expected = [size_expr(size) for size in of_batch.shape[1:]]
    return (node, transposed) if expected == [rows, columns][:: -1 if transposed else 1] else None


def _sources(node: fx.Node) -> Iterator[fx.Node]:
    """What a value is an expansion of, step by step, down to a matrix."""
    while node.meta["val"].dim() > 2:
        if not _swaps(node) and node.target not in (*RESHAPES, aten.expand.default):
            return
        node = args_of(node)[0]
        yield node


def _swaps(node: fx.Node) -> bool:
    """Whether it transposes the matrices of a batch."""
    return node.target is aten.permute.default and list(args_of(node)[1]) == [0, 2, 1]


def _unbatch(
    node: fx.Node, matrix: fx.Node, transposed: bool, known: dict[fx.Node, fx.Node]
) -> None:
    graph, (left, right) = node.graph, args_of(node)
    value = _itself(left)
    with graph.inserting_before(node):
        if value not in known:  # merge_gemms looks for GEMMs of one input
            known[value] = _rows_of(value, node)
        if transposed:
            matrix = _transposed(matrix, node)
        product = emit(graph, aten.mm.default, (known[value], matrix), f"{node}_mm", node)
        shape = [_size(value, 0), _size(value, 1), _size(matrix, 1)]
        out = emit(graph, aten.view.default, (product, shape), f"{node}_view", node)
    node.replace_all_uses_with(out)
    graph.erase_node(node)
    for batch in (left, right):
        for each in [batch, *_sources(batch)]:
            if not each.users and each.op == "call_function":
                graph.erase_node(each)


def _take_only(node: fx.Node, known: dict[Any, fx.Node]) -> None:
    """Multiply two batches of one matrix each as matrices."""
    graph, batches = node.graph, args_of(node)
    with graph.inserting_before(node):
        left, right = (_only_matrix(batch, node, known) for batch in batches)
        product = emit(graph, aten.mm.default, (left, right), f"{node}_mm", node)
        shape = [1, _size(left, 0), _size(right, 1)]
        out = emit(graph, aten.view.default, (product, shape), f"{node}_view", node)
    node.replace_all_uses_with(out)
    graph.erase_node(node)
    for batch in batches:
        for each in [batch, *_views_behind(batch)]:
            if not each.users and each.op == "call_function":
                graph.erase_node(each)


def _only_matrix(batch: fx.Node, like: fx.Node, known: dict[Any, fx.Node]) -> fx.Node:
    """The matrix of a batch of one; the same node wherever it is the same, as find_gemms and
    merge_gemms want it.

    Where the batch has the elements of a value that it is a view of in their order, or in that of
    their transpose, the matrix is a view of that value, without what lies between.
    """
    if _swaps(batch):
        return _transposed(_only_matrix(args_of(batch)[0], like, known), like)
    rows, columns = batch.meta["val"].shape[1:]
    lies = [size_expr(stride) for stride in batch.meta["val"].stride()[1:]]
    straight = lies == [size_expr(columns), 1]
    across = not straight and lies == [1, size_expr(rows)]
    whole = [each for each in _views_behind(batch) if each.meta["val"].is_contiguous()]
    source = whole[-1] if whole and (straight or across) else batch
    across = across and source is not batch
    sizes = (columns, rows) if across else (rows, columns)
    shape = tuple(map(size_expr, sizes))
    if (source, shape) not in known:
        known[source, shape] = source
        if tuple(map(size_expr, source.meta["val"].shape)) != shape:
            args = (source, _shape(batch, (2, 1) if across else (1, 2)))
            view = emit(like.graph, aten.view.default, args, f"{batch}_matrix", like)
            known[source, shape] = view
    if across and (source, shape, across) not in known:
        known[source, shape, across] = _transposed(known[source, shape], like)
    return known[(source, shape, across) if across else (source, shape)]


def _views_behind(node: fx.Node) -> Iterator[fx.Node]:
    """What a value is a view of, step by step, with all of its elements."""
    while node.target in _VIEWS:
        node = args_of(node)[0]
        yield node


def _shape(batch: fx.Node, dims: tuple[int, int]) -> list[int | fx.Node]:
    """Two of its sizes, as arguments of ``view``, which finds out one that is symbolic."""
    first, second = (batch.meta["val"].shape[dim] for dim in dims)
    if isinstance(second, int):
        return [first if isinstance(first, int) else -1, second]
    return [_size(batch, dims[0]), -1]


def _transposed(matrix: fx.Node, like: fx.Node) -> fx.Node:
    base, odd = base_of(matrix)
    if odd:
        return base
    return emit(like.graph, aten.permute.default, (matrix, [1, 0]), f"{matrix}_t", like)


def _itself(value: fx.Node) -> fx.Node:
    """What a value is an expansion or a view of, to its own shape."""
    while value.target in (*RESHAPES, aten.expand.default):
        source = args_of(value)[0]
        shapes = ([*map(size_expr, each.meta["val"].shape)] for each in (source, value))
        if next(shapes) != next(shapes):
            break
        value = source
    return value


def _rows_of(value: fx.Node, like: fx.Node) -> fx.Node:
    """The matrix of all rows of a batch of matrices."""
    graph = like.graph
    if not _rows_follow(value):
        value = emit(graph, aten.clone.default, (value,), f"{like}_copy", like)
        value.kwargs = {"memory_format": torch.contiguous_format}
        value.meta["val"] = evaluate(value)
    args = (value, [-1, _size(value, 2)])
    return emit(graph, aten.view.default, args, f"{like}_rows", like)


def _rows_follow(value: fx.Node) -> bool:
    """Whether all rows of a batch of matrices have one distance from each to the next."""
    batch, rows, _ = (size_expr(size) for size in value.meta["val"].shape)
    apart, row, column = (size_expr(stride) for stride in value.meta["val"].stride())
    return column == 1 and (batch == 1 or rows == 1 or apart == rows * row)


def _size(value: fx.Node, dim: int) -> int | fx.Node:
    """A size as an argument: a node where it is symbolic."""
    size = value.meta["val"].shape[dim]
    if isinstance(size, int):
        return size
    return emit(value.graph, aten.sym_size.int, (value, dim), f"{value.name}_size_{dim}")
