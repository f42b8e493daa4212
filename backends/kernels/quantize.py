"""Quantize a matrix with one scale, into a row-major and a transposed FP8 copy, in one pass.

Bytes: bf16 in, both copies out: 2 + 1 + 1 per element; current scaling reads x once more, for its
amax. Two kernels are launched. The first finds the amax of x, and returns at once if the delayed
scale is already known. The second casts. Numerics: see `device`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .device import magnitude_bits, pack_fp8, resolve_scale, saturate, tile_amax
from .launch import Launch, run, static_value


@triton.jit(do_not_specialize=["slot", "amax_slot"])
def _amax_kernel(
    x_ptr,
    scale_ptr,
    amax_ptr,
    slot,
    amax_slot,
    M,
    N,
    stride_m,
    stride_n,
    DELAYED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Max-accumulate |x| into `amax[amax_slot]`; do nothing if `scale[slot]` is known."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(M, BLOCK_M) * tiles_n
    if DELAYED:
        tiles = tl.where(tl.load(scale_ptr + slot) > 0, 0, tiles)
    largest = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        rows = (tile // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        cols = (tile % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        offsets = rows.to(tl.int64) * stride_m + cols.to(tl.int64) * stride_n
        x = tl.load(x_ptr + offsets, mask=(rows < M) & (cols < N), other=0.0)
        largest = tl.maximum(largest, magnitude_bits(x))
    amax = tile_amax(largest)
    tl.atomic_max(amax_ptr + amax_slot, amax, mask=amax > 0, sem="relaxed")


@triton.jit
def _load_rows(x_ptr, offsets, mask, scale, FP8_MAX: tl.constexpr):
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return saturate(x, scale, FP8_MAX), magnitude_bits(x)


@triton.jit(do_not_specialize=["slot", "current_slot"])
def _quantize_kernel(
    x_ptr,
    q_ptr,
    q_t_ptr,
    scale_ptr,
    current_amax_ptr,
    scale_inv_ptr,
    amax_ptr,
    slot,
    current_slot,
    M,
    N,
    stride_m,
    stride_n,
    FP8_MAX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROW_MAJOR: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PACKED: tl.constexpr,
    PTX: tl.constexpr,
    DELAYED: tl.constexpr,
    TRACK: tl.constexpr,
):
    """Cast one tile of x; program 0 also writes scale_inv.

    The tile is read as four interleaved sets of rows, so that one thread holds four rows of each of
    its columns. It packs those four bytes into a word of the transposed copy. Moving words between
    threads, not bytes, makes every access to memory 16 bytes wide (PACKED, which needs M to be a
    multiple of 16), and avoids `tl.trans` on FP8, which some releases of Triton miscompile.
    """
    ROWS: tl.constexpr = BLOCK_M // 4
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0)
    first_m = (tile // tiles_n) * BLOCK_M
    first_n = (tile % tiles_n) * BLOCK_N
    rows_left = M - first_m
    cols_left = N - first_n
    cols = tl.arange(0, BLOCK_N)[None, :]
    x_ptr += first_m.to(tl.int64) * stride_m + first_n.to(tl.int64) * stride_n
    delayed_scale = tl.load(scale_ptr + slot) if DELAYED else 0.0
    scale = resolve_scale(delayed_scale, tl.load(current_amax_ptr + current_slot), FP8_MAX)
    if tile == 0:
        tl.store(scale_inv_ptr, tl.div_rn(1.0, scale))

    dtype: tl.constexpr = q_ptr.dtype.element_ty if ROW_MAJOR else q_t_ptr.dtype.element_ty
    rows = tl.arange(0, ROWS)[:, None] * 4
    in_n = cols < cols_left
    x_offsets = rows * stride_m + cols * stride_n
    # All loads come before the first store, because no load may move up over a store.
    y0, bits0 = _load_rows(x_ptr, x_offsets, (rows < rows_left) & in_n, scale, FP8_MAX)
    x_ptr += stride_m
    y1, bits1 = _load_rows(x_ptr, x_offsets, (rows + 1 < rows_left) & in_n, scale, FP8_MAX)
    x_ptr += stride_m
    y2, bits2 = _load_rows(x_ptr, x_offsets, (rows + 2 < rows_left) & in_n, scale, FP8_MAX)
    x_ptr += stride_m
    y3, bits3 = _load_rows(x_ptr, x_offsets, (rows + 3 < rows_left) & in_n, scale, FP8_MAX)

    if ROW_MAJOR:
        q_ptr += first_m.to(tl.int64) * N + first_n
        for j in tl.static_range(4):
            mask = (rows + j < rows_left) & in_n
            tl.store(q_ptr + ((rows + j) * N + cols), (y0, y1, y2, y3)[j].to(dtype), mask=mask)
    if TRANSPOSED:
        words = pack_fp8(y0, y1, y2, y3, dtype, PTX)
        if PACKED:
            word = tl.arange(0, ROWS)[:, None]
            pitch = (M // 16) * 4  # M // 4, in a form that shows it to be a multiple of 4
            mask = (word < (rows_left // 16) * 4) & in_n
            words_ptr = q_t_ptr.to(tl.pointer_type(tl.int32))
            words_ptr += first_n.to(tl.int64) * pitch + first_m // 4
            words_ptr += tl.trans(cols * pitch + word)
            tl.store(words_ptr, tl.trans(words), mask=tl.trans(mask))
        else:
            bytes_ptr = q_t_ptr.to(tl.pointer_type(tl.uint8))
            bytes_ptr += first_n.to(tl.int64) * M + first_m
            for j in tl.static_range(4):
                mask = (rows + j < rows_left) & in_n
                byte = ((words >> (8 * j)) & 0xFF).to(tl.uint8)
                tl.store(bytes_ptr + (cols * M + rows + j), byte, mask=mask)
    if TRACK:
        bits = tl.maximum(tl.maximum(bits0, bits1), tl.maximum(bits2, bits3))
        tl.atomic_max(amax_ptr + slot, tile_amax(bits), sem="relaxed")


@dataclass(frozen=True)
class QuantizeTile:
    """How much of x one program casts, and with how many warps."""

    block_m: int
    block_n: int
    num_warps: int

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n}w{self.num_warps}"


# By what is written: row-major copy only, transposed copy only, both. The first of each is used
# unless a caller chooses. On an H200, 16384 x 14336 bf16, they reach 99, 86 and 86 % of a copy.
_TILES = {
    (True, False): (QuantizeTile(256, 64, 4), QuantizeTile(64, 256, 4), QuantizeTile(32, 256, 4)),
    (False, True): (QuantizeTile(256, 64, 4), QuantizeTile(64, 256, 4), QuantizeTile(128, 64, 4)),
    (True, True): (QuantizeTile(32, 128, 8), QuantizeTile(64, 64, 4), QuantizeTile(128, 64, 4)),
}
_AMAX_TILE = QuantizeTile(32, 256, 8)
_AMAX_PROGRAMS = 132 * 4  # Four per streaming multiprocessor of an H100 or H200.


def tile_candidates(row_major: bool, transposed: bool) -> tuple[QuantizeTile, ...]:
    """The tiles worth timing, best first."""
    return _TILES[row_major, transposed]


def quantize_launches(
    x: Any,
    q: Any,
    q_t: Any,
    scale: Any,
    slot: int,
    current_amax: Any,
    current_slot: int,
    scale_inv: Any,
    amax: Any,
    *,
    m: Any,
    n: Any,
    stride_m: Any,
    stride_n: Any,
    format: torch.dtype,
    tile: QuantizeTile | None = None,
) -> list[Launch]:
    """The two launches that quantize `x` (`[m, n]`).

    Args:
        q, q_t: the row-major (`[m, n]`) and transposed (`[n, m]`) copy; None: not written.
        scale: `f32[S]`, delayed scales; None: current scaling.
        slot: index into `scale` and into `amax`.
        current_amax: `f32[...]` workspace, zero at `current_slot`.
        scale_inv: `f32[1]`, written.
        amax: `f32[S]`, max-accumulated at `slot`; None: not tracked.
        tile: see `tile_candidates`.
    """
    if _is_one(stride_m) and not _is_one(stride_n):
        # x is a transposed view: read what it is a view of, and exchange the two copies.
        m, n, stride_m, stride_n, q, q_t = n, m, stride_n, stride_m, q_t, q
    tile = tile or tile_candidates(q is not None, q_t is not None)[0]
    extent = {"M": m, "N": n, "stride_m": stride_m, "stride_n": stride_n}
    find_amax = Launch(
        kernel=_amax_kernel,
        tensors={"x_ptr": x, "scale_ptr": scale, "amax_ptr": current_amax},
        sizes={"slot": slot, "amax_slot": current_slot, **extent},
        constants={
            "DELAYED": scale is not None,
            "BLOCK_M": _AMAX_TILE.block_m,
            "BLOCK_N": _AMAX_TILE.block_n,
        },
        grid=(_amax_programs(m, n), 1, 1),
        num_warps=_AMAX_TILE.num_warps,
    )
    cast = Launch(
        kernel=_quantize_kernel,
        tensors={
            "x_ptr": x,
            "q_ptr": q,
            "q_t_ptr": q_t,
            "scale_ptr": scale,
            "current_amax_ptr": current_amax,
            "scale_inv_ptr": scale_inv,
            "amax_ptr": amax,
        },
        sizes={"slot": slot, "current_slot": current_slot, **extent},
        constants={
            "FP8_MAX": torch.finfo(format).max,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "ROW_MAJOR": q is not None,
            "TRANSPOSED": q_t is not None,
            "PACKED": statically_known_true(static_value(m) % 16 == 0),
            "PTX": not triton.knobs.runtime.interpret,
            "DELAYED": scale is not None,
            "TRACK": amax is not None,
        },
        grid=(_tiles(m, n, tile), 1, 1),
        num_warps=tile.num_warps,
    )
    return [find_amax, cast]


def quantize(
    x: Tensor,
    scale: Tensor | None,
    format: torch.dtype,
    *,
    row_major: bool = True,
    transposed: bool = True,
    amax: Tensor | None = None,
    tile: QuantizeTile | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Quantize `x` now: `(q, q_t, scale_inv)`. `scale` and `amax` are those of slot 0."""
    m, n = x.shape
    q = x.new_empty((m, n), dtype=format) if row_major else None
    q_t = x.new_empty((n, m), dtype=format) if transposed else None
    scale_inv = x.new_empty(1, dtype=torch.float32)
    launches = quantize_launches(
        x,
        q,
        q_t,
        scale,
        0,
        x.new_zeros(1, dtype=torch.float32),
        0,
        scale_inv,
        amax,
        m=m,
        n=n,
        stride_m=x.stride(0),
        stride_n=x.stride(1),
        format=format,
        tile=tile,
    )
    for launch in launches:
        run(launch)
    return q, q_t, scale_inv


def _tiles(m: Any, n: Any, tile: QuantizeTile) -> Any:
    rows = (m + tile.block_m - 1) // tile.block_m
    return rows * ((n + tile.block_n - 1) // tile.block_n)


def _amax_programs(m: Any, n: Any) -> int:
    if isinstance(m, int) and isinstance(n, int):
        return min(_AMAX_PROGRAMS, _tiles(m, n, _AMAX_TILE))
    return _AMAX_PROGRAMS


def _is_one(stride: Any) -> bool:
    return statically_known_true(static_value(stride) == 1)
