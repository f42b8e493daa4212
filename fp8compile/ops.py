"""The graph's FP8 operators. Their eager bodies define the numerics: they are the reference.

Every kernel is tested against these bodies, and the reference backend simply runs them, so a
result on a CPU predicts the result on a GPU. All operands of ``fp8::scaled_mm`` are K-major
(row-major ``[rows, K]``), because that is what Hopper's tensor cores take; ``fp8::quantize``
therefore offers a row-major and a transposed copy, and no view ever touches an FP8 tensor. K is
padded with zeros to a multiple of 16, so that a GEMM may have any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.functional import pad

from .errors import FrozenError
from .formats import Format

ALIGNMENT = 16  # elements, and bytes: a row of an FP8 copy, for TMA and for cuBLASLt
LARGEST_SCALE = 2.0**126  # its inverse, which GEMMs multiply by, is no denormal


def padded(size: Any, multiple: Any = ALIGNMENT) -> Any:
    """A size, known or symbolic, rounded up to a multiple; unchanged where known to be one."""
    if statically_known_true(size % multiple == 0):
        return size
    return (size + (multiple - 1)) // multiple * multiple


@torch.library.custom_op("fp8::quantize", mutates_args=())
def quantize(
    x: Tensor,
    scale: Tensor | None,
    slot: int,
    format: torch.dtype,
    row_major: bool = True,
    transposed: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Cast ``x`` to FP8 with a tensorwise scale.

    Args:
        x: ``[M, N]``, float.
        scale: ``f32[S]``, the delayed scales of a graph, or None for current scaling. Where
            ``scale[slot]`` is 0 no amax has been seen yet, and current scaling is used. ``f32[1]``
            is a scale that was found for ``x`` before, which is never 0.
        slot: index into ``scale``.
        format: ``float8_e4m3fn`` or ``float8_e5m2``.
        row_major, transposed: which copies to write; the others come back empty.

    Returns:
        ``q`` (``[M, N]``), ``q_t`` (``[N, M]``), both contiguous and with rows padded with zeros to
        a multiple of 16 elements, ``scale_inv`` (``f32[1]``), ``amax`` (``f32[1]``, infinite if
        any value is not finite) and ``scale_used`` (``f32[1]``).

    A finite value saturates at the format's maximum; a NaN or infinite value becomes NaN, so that
    it stays visible. The current scale is ``FP8_MAX / amax`` (arXiv 2209.05433, section 3.1), and
    1 if amax is zero or not finite.
    """
    fp8_max = Format.of(format).max
    f = x.float()
    amax = f.abs().amax() if f.numel() else f.new_zeros(())
    amax = torch.where(amax.isnan(), torch.inf, amax)
    used = current_scale(amax, fp8_max)
    if scale is not None:
        used = torch.where(scale[slot] > 0, scale[slot], used)
    y = (f * used).clamp(-fp8_max, fp8_max)
    q = torch.where(f.isfinite(), y, torch.nan).to(format)
    return (
        _with_padded_rows(q) if row_major else q.new_empty(0),
        _with_padded_rows(q.t()) if transposed else q.new_empty(0),
        used.reciprocal().reshape(1),
        amax.reshape(1).clone(),
        used.reshape(1).clone(),
    )


@quantize.register_fake
def _(
    x: Tensor,
    scale: Tensor | None,
    slot: int,
    format: torch.dtype,
    row_major: bool = True,
    transposed: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    m, n = x.shape
    return (
        x.new_empty((m, padded(n)) if row_major else (0,), dtype=format),
        x.new_empty((n, padded(m)) if transposed else (0,), dtype=format),
        x.new_empty((1,), dtype=torch.float32),
        x.new_empty((1,), dtype=torch.float32),
        x.new_empty((1,), dtype=torch.float32),
    )


@torch.library.custom_op("fp8::find_scale", mutates_args=())
def find_scale(x: Tensor, format: torch.dtype) -> Tensor:
    """The scale (``f32[1]``) that ``fp8::quantize`` finds for ``x``, to cast it later."""
    amax = x.float().abs().amax() if x.numel() else x.new_zeros((), dtype=torch.float32)
    return current_scale(amax, Format.of(format).max).reshape(1)


@find_scale.register_fake
def _(x: Tensor, format: torch.dtype) -> Tensor:
    return x.new_empty((1,), dtype=torch.float32)


def _with_padded_rows(q: Tensor) -> Tensor:
    rows, columns = q.shape
    if columns % ALIGNMENT == 0:
        return q.clone(memory_format=torch.contiguous_format)
    copy = q.new_zeros((rows, padded(columns)))
    copy[:, :columns] = q
    return copy


def current_scale(amax: Tensor, fp8_max: float | Tensor) -> Tensor:
    """``FP8_MAX / amax``, at most 2**126; 1 where amax is zero or not finite."""
    # Divide tensors: for a Python number torch multiplies by the reciprocal, and rounds twice.
    largest = fp8_max if isinstance(fp8_max, Tensor) else amax.new_full((), fp8_max)
    scale = (largest / amax).clamp(max=LARGEST_SCALE)
    return torch.where(amax.isfinite() & (amax > 0), scale, 1.0)


# --- a scale per block --------------------------------------------------------------------------


@torch.library.custom_op("fp8::quantize_blocks", mutates_args=())
def quantize_blocks(
    x: Tensor,
    block: Sequence[int],
    power_of_two: bool,
    format: torch.dtype,
    row_major: bool = True,
    transposed: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cast ``x`` to FP8 with a scale for every block of a copy, found from the block itself.

    Args:
        x: ``[M, N]``, float.
        block: ``(rows, columns)`` that share a scale, in the row-major copy as in the transposed
            one; 0 stands for all. ``(1, 0)`` has a scale per row, ``(1, 128)`` and ``(128, 128)``
            are those of DeepSeek-V3 (arXiv 2412.19437, section 3.3.2), ``(1, 32)`` that of OCP
            microscaling. What lies beyond the end counts as zero.
        power_of_two: round a scale down to a power of two, as an e8m0 exponent stores it. Nothing
            saturates then (arXiv 2506.08027, section 3), as by OCP's own rule the largest may.
        format: ``float8_e4m3fn`` or ``float8_e5m2``.
        row_major, transposed: which copies to write; the others come back empty.

    Returns:
        ``q`` (``[M, N]``) and ``q_t`` (``[N, M]``), both contiguous and with rows padded with zeros
        to a multiple of 16 elements and of ``columns``; ``scale_inv`` and ``scale_inv_t``, ``f32``
        with a number per block. Those of blocks of one row lie in the order in which GEMMs read
        them, ``[blocks of a row, rows]``; others as the blocks do.

    The scale of a block is ``FP8_MAX / amax``, and 1 if its amax is zero or not finite. A block
    with a value that is not finite becomes NaN as a whole.
    """
    empty = (x.new_empty(0, dtype=format), x.new_empty(0, dtype=torch.float32))
    q, scale_inv = in_blocks(x, block, power_of_two, format) if row_major else empty
    q_t, scale_inv_t = in_blocks(x.t(), block, power_of_two, format) if transposed else empty
    return q, q_t, scale_inv, scale_inv_t


@quantize_blocks.register_fake
def _(
    x: Tensor,
    block: Sequence[int],
    power_of_two: bool,
    format: torch.dtype,
    row_major: bool = True,
    transposed: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def copy(wanted: bool, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        pitch = max(block[1], ALIGNMENT)
        sizes = zip((rows, columns), block, strict=True)
        down, across = (padded(size, length) // length if length else 1 for size, length in sizes)
        blocks = (across, down) if block[0] == 1 else (down, across)
        return (
            x.new_empty((rows, padded(columns, pitch)) if wanted else (0,), dtype=format),
            x.new_empty(blocks if wanted else (0,), dtype=torch.float32),
        )

    m, n = x.shape
    (q, scale_inv), (q_t, scale_inv_t) = copy(row_major, m, n), copy(transposed, n, m)
    return q, q_t, scale_inv, scale_inv_t


def in_blocks(
    x: Tensor, block: Sequence[int], power_of_two: bool, format: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The row-major copy of ``quantize_blocks`` and its scale_inv, in PyTorch's operators."""
    fp8_max, pitch = Format.of(format).max, max(block[1], ALIGNMENT)
    (m, n), high, wide = x.shape, block[0], block[1] or padded(x.shape[1], pitch)
    down, across = padded(m, high) // high, padded(n, wide) // wide  # blocks
    f = pad(x.float(), (0, across * wide - n, 0, down * high - m))
    blocks = f.reshape(down, high, across, wide)
    amax = blocks.abs().amax((1, 3), keepdim=True)
    scale = current_scale(amax, fp8_max)
    if power_of_two:
        scale = _floor_to_power_of_two(scale)
    y = (blocks * scale).clamp(-fp8_max, fp8_max)
    q = torch.where(amax.isfinite(), y, torch.nan).to(format).reshape(f.shape)[:m]
    scale_inv = scale.reciprocal().reshape(down, across)
    return q.contiguous(), scale_inv.t().contiguous() if high == 1 else scale_inv


def _floor_to_power_of_two(scale: Tensor) -> Tensor:
    """The largest power of two that is no larger: the number without its mantissa."""
    return (scale.view(torch.int32) & 0x7F800000).view(torch.float32)


@torch.library.custom_op("fp8::scaled_mm_blocks", mutates_args=())
def scaled_mm_blocks(
    a: Tensor,
    b: Tensor,
    a_scale_inv: Tensor,
    b_scale_inv: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    a_block: Sequence[int],
    b_block: Sequence[int],
    fast_accum: bool,
) -> Tensor:
    """``a @ b.T + bias`` of operands with a scale per block, both K-major.

    Args:
        a: ``[M, K]`` FP8, contiguous. b: ``[N, K]`` FP8, contiguous.
        a_scale_inv, b_scale_inv: ``f32``, a number per block of ``a`` and of ``b``.
        bias: ``[N]``, float, or None. out_dtype: bfloat16, float16 or float32.
        a_block, b_block: see ``quantize_blocks``; both have as many columns.
        fast_accum: see Recipe; ignored here.

    Returns ``[M, N]`` of ``out_dtype``. The products of a block's columns are summed up and scaled
    in float32, and the blocks' sums added (arXiv 2412.19437, section 3.3.2).
    """
    left, right = per_row(a_scale_inv, a_block, a), per_row(b_scale_inv, b_block, b)
    out = a.new_zeros((a.shape[0], b.shape[0]), dtype=torch.float32)
    wide = a_block[1] or a.shape[1]
    for i in range(left.shape[1]):
        part = slice(i * wide, (i + 1) * wide)
        products = a[:, part].float() @ b[:, part].float().t()
        out += products * left[:, i, None] * right[:, i]
    return (out if bias is None else out + bias).to(out_dtype)


@scaled_mm_blocks.register_fake
def _(
    a: Tensor,
    b: Tensor,
    a_scale_inv: Tensor,
    b_scale_inv: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    a_block: Sequence[int],
    b_block: Sequence[int],
    fast_accum: bool,
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


def per_row(scale_inv: Tensor, block: Sequence[int], q: Tensor) -> Tensor:
    """A scale_inv with a row for every row of its copy."""
    return (
        scale_inv.t() if block[0] == 1 else scale_inv.repeat_interleave(block[0], 0)[: q.shape[0]]
    )


# --- activations kept in FP8 --------------------------------------------------------------------

GROUP = 128  # elements of a row that share a scale where activations are stored in FP8

# Not quantize_blocks with (1, 128) and one copy, though the numbers are the same: that makes an
# operand of a GEMM, and the passes take it for one (share it, fold factors into it, let only a
# scaled_mm read it). It is a matrix, with its scales in a GEMM's order; what is stored here has any
# number of dimensions, and is read back by whatever backward kernel needs it, element by element.
# Views, which would bring one to the other, must not touch an FP8 tensor.


@torch.library.custom_op("fp8::quantize_groups", mutates_args=())
def quantize_groups(x: Tensor) -> tuple[Tensor, Tensor]:
    """Cast ``x`` to E4M3 with one scale per 128 elements of a row, found from them (1x128).

    The form in which COAT (arXiv 2410.19313, section 5) stores activations for backward.

    Args:
        x: ``[..., N]``, float, N divisible by 128.

    Returns ``q`` (``e4m3[..., N]``) and ``scale_inv`` (``f32[..., N / 128]``). A group whose amax
    is zero or not finite has the scale 1; one with a value that is not finite becomes NaN.
    """
    fp8_max = Format.E4M3.max
    f = x.float().unflatten(-1, (-1, GROUP))
    amax = f.abs().amax(-1, keepdim=True)
    scale = current_scale(amax, fp8_max)
    y = (f * scale).clamp(-fp8_max, fp8_max)
    q = torch.where(amax.isfinite(), y, torch.nan).to(Format.E4M3.dtype)
    return q.flatten(-2), scale.reciprocal().squeeze(-1)


@quantize_groups.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    groups = (*x.shape[:-1], x.shape[-1] // GROUP)
    return x.new_empty(x.shape, dtype=Format.E4M3.dtype), x.new_empty(groups, dtype=torch.float32)


@torch.library.custom_op("fp8::dequantize_groups", mutates_args=())
def dequantize_groups(q: Tensor, scale_inv: Tensor, dtype: torch.dtype) -> Tensor:
    """``q * scale_inv`` in ``dtype``: what ``quantize_groups`` has stored."""
    return (q.float().unflatten(-1, (-1, GROUP)) * scale_inv.unsqueeze(-1)).flatten(-2).to(dtype)


@dequantize_groups.register_fake
def _(q: Tensor, scale_inv: Tensor, dtype: torch.dtype) -> Tensor:
    return q.new_empty(q.shape, dtype=dtype)


# --- weights that are FP8 to begin with ---------------------------------------------------------


@torch.library.custom_op("fp8::dequantize", mutates_args=())
def dequantize(q: Tensor, scale_inv: Tensor, block: Sequence[int], dtype: torch.dtype) -> Tensor:
    """``q * scale_inv`` in ``dtype``: a weight that ``freeze`` has left in FP8 only.

    Args:
        q: ``[N, K]`` FP8. scale_inv: ``f32``, a number per block, lying as the blocks do:
            ``[N, 1]`` for ``(1, 0)``, ``[N / 128, K / 128]``, rounded up, for ``(128, 128)``, and
            ``[1]`` for ``(0, 0)``.
        block: see ``quantize_blocks``. dtype: of the result.
    """
    return dequantized(q, scale_inv, block, dtype)


@dequantize.register_fake
def _(q: Tensor, scale_inv: Tensor, block: Sequence[int], dtype: torch.dtype) -> Tensor:
    return q.new_empty(q.shape, dtype=dtype)


def _refuse_gradient(ctx: Any, grad: Tensor) -> None:
    raise FrozenError(
        "a frozen weight requires a gradient, and FP8 cannot be trained; call "
        "fp8compile.unfreeze(model) first, or requires_grad_(False) on what is frozen"
    )


dequantize.register_autograd(_refuse_gradient)


def dequantized(q: Tensor, scale_inv: Tensor, block: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The same in PyTorch's operators."""
    scales, (rows, columns) = scale_inv, q.shape
    if block[0] > 1:
        scales = scales.repeat_interleave(block[0], 0)[:rows]
    if block[1]:
        scales = scales.repeat_interleave(block[1], 1)[:, :columns]
    return (q.float() * scales).to(dtype)


@torch.library.custom_op("fp8::cat_rows", mutates_args=())
def cat_rows(parts: Sequence[Tensor]) -> Tensor:
    """The rows of several FP8 matrices ``[N_i, K]`` as one ``[sum of N_i, K]``."""
    return torch.cat([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)


@cat_rows.register_fake
def _(parts: Sequence[Tensor]) -> Tensor:
    rows = sum(part.shape[0] for part in parts)
    return parts[0].new_empty((rows, parts[0].shape[1]))


@torch.library.custom_op("fp8::scaled_mm", mutates_args=())
def scaled_mm(
    a: Tensor,
    b: Tensor,
    a_scale_inv: Tensor,
    b_scale_inv: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    fast_accum: bool,
    addend: Tensor | None = None,
) -> Tensor:
    """``(a @ b.T) * a_scale_inv * b_scale_inv + bias + addend``, with both operands K-major.

    Args:
        a: ``[M, K]`` FP8, contiguous. b: ``[N, K]`` FP8, contiguous. K is a multiple of 16.
        a_scale_inv, b_scale_inv: ``f32[1]``. bias: ``[N]``, float, or None.
        out_dtype: bfloat16, float16 or float32. fast_accum: see Recipe; ignored here.
        addend: ``[M, N]`` of ``out_dtype``, or None.

    Returns ``[M, N]`` of ``out_dtype``. Products and sums are in float32.
    """
    out = (a.float() @ b.float().t()) * (a_scale_inv * b_scale_inv)
    out = out if bias is None else out + bias
    return (out if addend is None else out + addend).to(out_dtype)


@scaled_mm.register_fake
def _(
    a: Tensor,
    b: Tensor,
    a_scale_inv: Tensor,
    b_scale_inv: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    fast_accum: bool,
    addend: Tensor | None = None,
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


@torch.library.custom_op("fp8::track_amax", mutates_args=("amax",))
def track_amax(amax: Tensor, values: Sequence[Tensor], slots: Sequence[int]) -> None:
    """Max-accumulate ``values`` (each ``f32[n]``) into ``amax`` (``f32[S]``), each at the n slots
    from its own of ``slots`` on.

    Max is idempotent, so recomputation, micro-batches and repeated calls cannot corrupt it.
    """
    if slots:
        each = zip(values, slots, strict=True)
        taken = [slot + i for value, slot in each for i in range(value.numel())]
        index = torch.tensor(taken, device=amax.device)
        amax.scatter_reduce_(0, index, torch.cat(list(values)), "amax")


@track_amax.register_fake
def _(amax: Tensor, values: Sequence[Tensor], slots: Sequence[int]) -> None:
    return None


# A value is saturated in earnest when the clamp changes it by more than rounding to E4M3 ever does.
SATURATED = 1 + 2**-4


def _lie_apart(history: Tensor, limit: float) -> Tensor:
    """Whether a slot's largest amax in a history is more than ``limit`` times its smallest.

    A zero is a step without the slot, or one of nothing but zeros; it says nothing.
    """
    smallest = torch.where(history > 0, history, torch.inf).amin(0)
    return history.amax(0) > limit * smallest


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
    """End a step of delayed scaling on the flat state of a graph; see ScalingState for shapes.

    Writes the step's amax into ``history[position]``, sets each scale to ``fp8_max`` over the
    largest amax in the history, and clears both amax tensors. A slot whose history holds no amax
    keeps its scale. An amax that is not finite is not recorded, and counts as an event in
    ``events[0]``; one that this step's scale was too large for counts in ``events[1]``.

    Two guard rails set a scale to 0, so that the next step finds its own (current scaling):

    - The amax is more than ``saturation_limit`` times the largest of the history. It was clipped,
      and may still be growing, as behind a weight that starts at zero.
    - The largest amax of the history, this step's included, is more than ``jump_limit`` times the
      smallest that is not zero. One scale cannot do for both; so a slot that has jumped, up or
      down, stays in current scaling until the history has forgotten what was before the jump, or
      the spike. Each time this begins counts in ``events[2]``.

    Both depend on nothing but the history and this step's amax, and so are the same in all
    replicas. A limit of ``inf`` turns one off.
    """
    amax = torch.maximum(amax_fwd, amax_bwd)
    finite = amax.isfinite()
    events[0] += (~finite).int()
    events[1] += (finite & (amax * scale > SATURATED * fp8_max)).int()
    previous = history.amax(0)
    # The first step has no history: its amax is all that there is to go by.
    seen = (previous > 0) | (position > 0)
    clipped = finite & (amax > saturation_limit * previous) & seen
    apart_before = _lie_apart(history, jump_limit)
    history[position] = torch.where(finite, amax, 0.0)
    apart = _lie_apart(history, jump_limit)
    events[2] += (apart & ~apart_before).int()
    largest = history.amax(0)
    known = torch.where(largest > 0, current_scale(largest, fp8_max), scale)
    scale.copy_(torch.where(clipped | apart, 0.0, known))
    amax_fwd.zero_()
    amax_bwd.zero_()


# Not a custom_op, which looks for results that are arguments: 0.1 ms at the end of every step.
_WRITTEN = ("scale", "amax_fwd", "amax_bwd", "history", "events")
_SCHEMA = torch.library.infer_schema(update_scales, mutates_args=_WRITTEN)
torch.library.define("fp8::update_scales", _SCHEMA)
torch.library.impl("fp8::update_scales", "default", update_scales)
torch.library.register_fake("fp8::update_scales", lambda *args: None)
