"""Decide which GEMMs run in FP8; the others get a reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..cost import Device, Prediction
from ..ir import DEQUANTIZE, SCALED_MMS, GemmInfo, base_of, gemm_info, gemms, operands
from ..recipe import Recipe
from .site_costs import Group, predict_groups

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def choose_precision(
    gm: fx.GraphModule,
    *,
    skips: Callable[[str], bool] | None = None,
    device: Device | None = None,
    decline_slower: bool = True,
    recipe: Recipe | None = None,
    weights_cast_once: bool = False,
) -> int:
    """Give every GEMM that cannot or shall not run in FP8 its reason.

    Before:
        mm : bf16[16, 64] = aten.mm(x, permute)  # mm fprop = input x weight^T
    After:
        mm : bf16[16, 64] = aten.mm(x, permute)  # mm fprop, not in FP8: skipped by the user

    ``skips(fqn)`` says which sites the user asked to keep in high precision; the recipe (the site's
    own, or else ``recipe``) which GEMM roles. With ``device``, what each GEMM costs there is
    predicted, for the recipe's scales, and those that FP8 would not make faster are declined,
    unless ``decline_slower`` is False or the recipe is only emulated; ``weights_cast_once``:
    without the casts of weights, as in inference. GEMMs of one site, and of sites that take the
    same input, are decided as a whole, for the sizes of the traced call. Those with a frozen weight
    are not declined: it would have to be dequantized first.

    Requires: find_gemms.
    Ensures: a GEMM without a reason has no dimension that is known to be empty, and operands in
        bfloat16, float16 or float32.
    Leaves alone: GEMMs that have a reason already.
    Numerics: exact.
    """
    rewrites = 0
    for node, info in list(gemms(gm)):
        if not info.is_fp8 or node.target in SCALED_MMS:
            continue
        reason = _reason(node, info, skips, info.site.recipe or recipe)
        if reason is not None:
            node.meta["fp8"] = replace(info, reason=reason)
            rewrites += 1
    if device is not None:
        predict = partial(predict_groups, recipe=recipe, weights_cast_once=weights_cast_once)
        rewrites += _weigh(gm, partial(predict, device=device), recipe, decline_slower)
    return rewrites


def _weigh(
    gm: fx.GraphModule,
    predict: Callable[[fx.GraphModule], Mapping[Group, Prediction]],
    recipe: Recipe | None,
    decline: bool,
) -> int:
    """Predict, and decline, until those left pay without what they shared with the declined."""
    declined = 0
    while True:
        predictions = predict(gm)
        slower = [
            (group, found)
            for group, found in predictions.items()
            if not found.pays and not _is_emulated(group, recipe) and not _has_frozen(group)
        ]
        if not decline or not slower:
            return declined
        for group, found in slower:
            for node in group:
                info = gemm_info(node)
                assert info is not None
                node.meta["fp8"] = replace(info, reason=_why_slower(found))
            declined += len(group)


def _is_emulated(group: Group, recipe: Recipe | None) -> bool:
    """Whether what a group asks for is not there to be fast."""
    info = gemm_info(group[0])
    own = (info.site.recipe if info else None) or recipe
    return own is not None and own.is_emulated


def _has_frozen(group: Group) -> bool:
    values = [value for node in group for value in operands(node)]
    return any(base_of(value)[0].target is DEQUANTIZE for value in values)


def _why_slower(found: Prediction) -> str:
    fp8_us, high_us = sum(found.fp8_us), sum(found.high_us)
    crossover = f"from {found.pays_from} tokens" if found.pays_from else "with no number of tokens"
    return f"{SLOWER}: {fp8_us:.3g} us against {high_us:.3g} us; it pays {crossover}"


def _reason(
    node: fx.Node, info: GemmInfo, skips: Callable[[str], bool] | None, recipe: Recipe | None
) -> str | None:
    if skips is not None and skips(info.site.fqn):
        return SKIPPED
    if recipe is not None and info.gemm in recipe.high_precision:
        return KEPT
    left, right = operands(node)
    dtypes = [value.meta["val"].dtype for value in (left, right)]
    for dtype in dtypes:
        if dtype not in _DTYPES:
            return f"dtype {str(dtype).removeprefix('torch.')} has no FP8 form"
    if dtypes[0] != dtypes[1]:
        return "the operands' dtypes differ"
    m, k = left.meta["val"].shape
    n = right.meta["val"].shape[1]
    empty = [n for n, size in (("M", m), ("N", n), ("K", k)) if statically_known_true(size == 0)]
    return f"{empty[0]} is 0" if empty else None


SKIPPED = "skipped by the user"
KEPT = "kept in high precision by the recipe"
SLOWER = "FP8 would not be faster"
