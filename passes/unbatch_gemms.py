"""Undo the batches that PyTorch makes of a product of several matrices with one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from ..ir import RESHAPES, SITE_TAG, args_of, aten, base_of, emit, evaluate, size_expr


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

    Requires: an ATen graph with ``meta["val"]``.
    Ensures: no matmul call of a batch with one matrix on the right is batched.
    Leaves alone: products of two batches; one matrix on the left; what is no call of ``linear`` or
        ``matmul``.
    Numerics: reorders (a batched kernel may add in another order).
    """
    found = 0
    rows: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.find_nodes(op="call_function", target=aten.bmm.default):
        matrix = _one_matrix(args_of(node)[1])
        if matrix is not None and SITE_TAG in (node.meta.get("custom") or {}):
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
        swaps = node.target is aten.permute.default and list(args_of(node)[1]) == [0, 2, 1]
        if not swaps and node.target not in (*RESHAPES, aten.expand.default):
            return
        node = args_of(node)[0]
        yield node


def _unbatch(
    node: fx.Node, matrix: fx.Node, transposed: bool, known: dict[fx.Node, fx.Node]
) -> None:
    graph, (left, right) = node.graph, args_of(node)
    value = _itself(left)
    with graph.inserting_before(node):
        if value not in known:  # merge_gemms looks for GEMMs of one input
            known[value] = _rows_of(value, node)
        if transposed:
            base, odd = base_of(matrix)
            args = (matrix, [1, 0])
            matrix = base if odd else emit(graph, aten.permute.default, args, f"{matrix}_t", node)
        product = emit(graph, aten.mm.default, (known[value], matrix), f"{node}_mm", node)
        shape = [_size(value, 0), _size(value, 1), _size(matrix, 1)]
        out = emit(graph, aten.view.default, (product, shape), f"{node}_view", node)
    node.replace_all_uses_with(out)
    graph.erase_node(node)
    for batch in (left, right):
        for each in [batch, *_sources(batch)]:
            if not each.users and each.op == "call_function":
                graph.erase_node(each)


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
