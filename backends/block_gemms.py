"""GEMMs of operands with a scale per block, in an operator of PyTorch where that takes them.

``aten._scaled_mm`` has CUTLASS for scales per row, and cuBLASLt for blocks of 128. Elsewhere our
own kernels multiply, and where there are few rows with a scale each, for which CUTLASS is slow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from ..internals import traced
from ..ir import args_of, fake_mode_of, size_expr
from ..regions import is_aligned

_FOUR = 4  # numbers of 4 bytes: the alignment that cuBLASLt asks for


def is_scaled_mm(node: fx.Node) -> bool:
    """Whether ``aten._scaled_mm`` can do what a ``fp8::scaled_mm_blocks`` node does.

    Its outputs' rows are multiples of 16 elements. A bias it adds in bfloat16 only, and so it has
    rows with a scale. Of blocks, it wants the scales of 1x128 in fours, and
    those of a row of 128x128, which we give it on the right only.
    """
    a, b, _, _, bias, out_dtype, *blocks, _ = args_of(node)
    sizes = [[size_expr(size) for size in value.meta["val"].shape] for value in (a, b)]
    plain = out_dtype is torch.bfloat16
    adds = bias is None or (plain and bias.meta["val"].dtype is out_dtype)
    if not is_aligned(sizes[1][0]):
        return False
    if not adds:
        return False
    if not blocks[0][1]:
        return plain
    return tuple(blocks[0]) == (1, 128) and all(
        sympy.Mod(rows if block[0] == 1 else columns / block[1], _FOUR) == 0
        for (rows, columns), block in zip(sizes, blocks, strict=True)
    )


def lower_to_scaled_mm(node: fx.Node) -> fx.Node:
    """``aten._scaled_mm`` for a ``fp8::scaled_mm_blocks`` node that it can do."""
    a, b, a_scale_inv, b_scale_inv, bias, out_dtype, a_block, b_block, fast = args_of(node)
    fn = partial(_scaled, blocks=(a_block, b_block), fast=fast, out_dtype=out_dtype)
    (out,) = inline(node, fn, a, b, a_scale_inv, b_scale_inv, *([] if bias is None else [bias]))
    return out


def _scaled(
    a: Tensor,
    b: Tensor,
    a_scale_inv: Tensor,
    b_scale_inv: Tensor,
    bias: Tensor | None = None,
    *,
    blocks: Sequence[Sequence[int]],
    fast: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    left = a_scale_inv.t()
    right = b_scale_inv if blocks[1][0] == 1 else b_scale_inv.t()
    return torch._scaled_mm(a, b.t(), left, right, bias, out_dtype=out_dtype, use_fast_accum=fast)


def inline(before: fx.Node, fn: Callable[..., Any], *values: fx.Node) -> list[fx.Node]:
    """Put the operators of a function of tensors in front of a node; returns its results."""
    graph, fakes = before.graph, [value.meta["val"] for value in values]
    body = traced(fn, fakes, fake_mode_of(graph))
    copies: dict[fx.Node, fx.Node] = dict(
        zip(body.find_nodes(op="placeholder"), values, strict=True)
    )
    with graph.inserting_before(before):
        found: Any = graph.graph_copy(body, copies)
    for node in copies.values():
        if node not in values and isinstance(before.meta.get("stack_trace"), str):
            node.meta.setdefault("stack_trace", before.meta["stack_trace"])
    return list(found) if isinstance(found, list | tuple) else [found]
