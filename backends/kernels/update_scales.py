"""The delayed-scaling step: roll the amax history of every slot and update its scale.

One launch for all slots of a graph, once per optimizer step, without a host synchronisation;
what it computes is defined by ``fp8::update_scales``.
A slot that has never seen a usable amax keeps its scale; one whose amax outgrows its history, or
whose history holds both small and large ones, gets 0, for unknown.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ...ops import SATURATED
from .device import scale_from_amax
from .launch import Launch, run

_BLOCK = 128


@triton.jit
def _or_inf(amax):
    """An amax, or infinity for one that says nothing."""
    return tl.where(amax > 0, amax, float("inf"))


@triton.jit(do_not_specialize=["position"])
def _update_scales_kernel(
    scale_ptr,
    amax_fwd_ptr,
    amax_bwd_ptr,
    history_ptr,
    events_ptr,
    fp8_max_ptr,
    position,
    S,
    H,
    jump_limit,
    saturation_limit,
    SATURATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = slots < S
    fwd = tl.load(amax_fwd_ptr + slots, mask=mask, other=0.0)
    bwd = tl.load(amax_bwd_ptr + slots, mask=mask, other=0.0)
    finite = (fwd < float("inf")) & (bwd < float("inf"))  # False for NaN, too.
    amax = tl.where(finite, tl.maximum(fwd, bwd), 0.0)
    scale = tl.load(scale_ptr + slots, mask=mask, other=1.0)
    fp8_max = tl.load(fp8_max_ptr + slots, mask=mask, other=1.0)
    saturated = finite & (amax * scale > SATURATED * fp8_max)
    counts = events_ptr + slots
    tl.store(counts, tl.load(counts, mask=mask, other=0) + tl.where(finite, 0, 1), mask=mask)
    tl.store(
        counts + S, tl.load(counts + S, mask=mask, other=0) + tl.where(saturated, 1, 0), mask=mask
    )

    largest, smallest = amax, _or_inf(amax)
    before, least_before = tl.zeros((BLOCK,), tl.float32), _or_inf(tl.zeros((BLOCK,), tl.float32))
    for row in range(H):
        past = tl.load(history_ptr + row * S + slots, mask=mask, other=0.0)
        before = tl.maximum(before, past)
        least_before = tl.minimum(least_before, _or_inf(past))
        kept = tl.where(row == position, 0.0, past)
        largest = tl.maximum(largest, kept)
        smallest = tl.minimum(smallest, _or_inf(kept))
    clipped = (amax > saturation_limit * before) & ((before > 0) | (position > 0))
    apart = largest > jump_limit * smallest
    jumped = apart & (before <= jump_limit * least_before)
    tl.store(history_ptr + position * S + slots, amax, mask=mask)
    counts += 2 * S
    tl.store(counts, tl.load(counts, mask=mask, other=0) + tl.where(jumped, 1, 0), mask=mask)

    new = scale_from_amax(tl.where(largest > 0, largest, 1.0), fp8_max)
    known = tl.where(largest > 0, new, scale)
    tl.store(scale_ptr + slots, tl.where(clipped | apart, 0.0, known), mask=mask)
    tl.store(amax_fwd_ptr + slots, tl.zeros((BLOCK,), tl.float32), mask=mask)
    tl.store(amax_bwd_ptr + slots, tl.zeros((BLOCK,), tl.float32), mask=mask)


def update_scales_launch(
    scale: Any,
    amax_fwd: Any,
    amax_bwd: Any,
    history: Any,
    events: Any,
    fp8_max: Any,
    position: Any,
    jump_limit: float,
    saturation_limit: float,
    *,
    slots: Any,
    history_len: Any,
) -> Launch:
    """The launch of one delayed-scaling step; everything but `fp8_max` is updated in place.

    Args:
        scale, amax_fwd, amax_bwd, fp8_max: `f32[slots]`; both amax are left zero.
        history: `f32[history_len, slots]`, a ring; row `position` is overwritten.
        events: `i32[3, slots]`, counts in row 0 amax that were not finite (such an amax counts as
            zero), in row 1 those that `scale` was too large for, in row 2 jumps.
        jump_limit, saturation_limit: see `fp8::update_scales`. Arguments of the kernel, so that
            recipes share it.
    """
    return Launch(
        kernel=_update_scales_kernel,
        tensors={
            "scale_ptr": scale,
            "amax_fwd_ptr": amax_fwd,
            "amax_bwd_ptr": amax_bwd,
            "history_ptr": history,
            "events_ptr": events,
            "fp8_max_ptr": fp8_max,
        },
        sizes={
            "position": position,
            "S": slots,
            "H": history_len,
            "jump_limit": jump_limit,
            "saturation_limit": saturation_limit,
        },
        constants={"SATURATED": SATURATED, "BLOCK": _BLOCK},
        grid=((slots + _BLOCK - 1) // _BLOCK, 1, 1),
    )


def update_scales(
    scale: Tensor,
    amax_fwd: Tensor,
    amax_bwd: Tensor,
    history: Tensor,
    events: Tensor,
    fp8_max: Tensor,
    position: int,
    jump_limit: float,
    saturation_limit: float,
) -> None:
    """Do one delayed-scaling step now, in place."""
    history_len, slots = history.shape
    launch = update_scales_launch(
        scale,
        amax_fwd,
        amax_bwd,
        history,
        events,
        fp8_max,
        position,
        jump_limit,
        saturation_limit,
        slots=slots,
        history_len=history_len,
    )
    run(launch)
