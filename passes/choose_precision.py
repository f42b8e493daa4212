"""Decide which GEMMs run in FP8; the others get a reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..ir import SCALED_MM, GemmInfo, gemms, operands

ALIGNMENT = 16  # elements; one 16-byte row of an FP8 operand, the unit of a TMA load
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def choose_precision(gm: fx.GraphModule, *, skips: Callable[[str], bool] | None = None) -> int:
    """Give every GEMM that cannot or shall not run in FP8 its reason.

    Before:
        mm : bf16[16, 17] = aten.mm(x, permute)  # mm fprop = input x weight^T
    After:
        mm : bf16[16, 17] = aten.mm(x, permute)  # mm fprop, not in FP8: N = 17 is not divisible by 16

    ``skips(fqn)`` says which sites the user asked to keep in high precision.

    Requires: find_gemms.
    Ensures: a GEMM without a reason has K and N divisible by 16, no empty dimension, and operands
        in bfloat16, float16 or float32.
    Leaves alone: GEMMs that have a reason already.
    Numerics: exact.
    """  # noqa: E501
    rewrites = 0
    for node, info in list(gemms(gm)):
        if not info.is_fp8 or node.target is SCALED_MM:
            continue
        reason = _reason(node, info, skips)
        if reason is not None:
            node.meta["fp8"] = replace(info, reason=reason)
            rewrites += 1
    return rewrites


def _reason(node: fx.Node, info: GemmInfo, skips: Callable[[str], bool] | None) -> str | None:
    if skips is not None and skips(info.site.fqn):
        return SKIPPED
    left, right = operands(node)
    dtypes = [value.meta["val"].dtype for value in (left, right)]
    for dtype in dtypes:
        if dtype not in _DTYPES:
            return f"dtype {str(dtype).removeprefix('torch.')} has no FP8 form"
    if dtypes[0] != dtypes[1]:
        return "the operands' dtypes differ"
    m, k = left.meta["val"].shape
    n = right.meta["val"].shape[1]
    for name, size in (("M", m), ("N", n), ("K", k)):
        if statically_known_true(size == 0):
            return f"{name} is 0"
    for name, size, expr in (("K", k, info.k), ("N", n, info.n)):
        if not statically_known_true(size % ALIGNMENT == 0):
            verb = "is" if isinstance(expr, sympy.Integer) else "may be"
            return f"{name} = {expr} {verb} not divisible by {ALIGNMENT}"
    return None


SKIPPED = "skipped by the user"
