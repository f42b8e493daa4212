"""Persistent FP8 GEMM for Hopper: `(a @ b.T) * a_scale_inv * b_scale_inv + bias`.

Both operands are K-major (row-major `[rows, K]`), as the tensor cores want them. One program per
streaming multiprocessor walks over the output tiles; TMA moves every tile, so the shapes need not
be multiples of the tile, and loads of the next tile overlap the epilogue of this one. An output
whose rows TMA cannot write, because N is no multiple of 16, is stored by the threads. Bytes: M*K +
N*K read, M*N of the output type written. FLOPs: 2*M*N*K.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import tile_position
from .launch import Launch, run

SMS = 132  # Streaming multiprocessors of an H100 SXM or H200.


@triton.jit
def _store_tile(c, acc, bias_ptr, row, col, M, N, HAS_BIAS: tl.constexpr, ALIGNED: tl.constexpr):
    cols = col + tl.arange(0, acc.shape[1])
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if ALIGNED:
        c.store([row, col], acc.to(c.dtype))
    else:
        rows = row + tl.arange(0, acc.shape[0])[:, None]
        at = rows.to(tl.int64) * N + cols[None, :]
        tl.store(c + at, acc.to(c.dtype.element_ty), mask=(rows < M) & (cols < N)[None, :])


@triton.jit
def _scaled_mm_kernel(
    a_desc,
    b_desc,
    c,
    a_scale_inv_ptr,
    b_scale_inv_ptr,
    bias_ptr,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    NUM_SMS: tl.constexpr,
    EPILOGUE_SUBTILE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FAST_ACCUM: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_k = tl.cdiv(K, BLOCK_K)
    scale_inv = tl.load(a_scale_inv_ptr) * tl.load(b_scale_inv_ptr)
    start = tl.program_id(0)
    # The flattened loop is software-pipelined across tiles: the epilogue counts for itself, since
    # reusing the position computed before the inner loop would lengthen its live range.
    stored_tile = start - NUM_SMS
    for tile in tl.range(start, tiles_m * tiles_n, NUM_SMS, flatten=True):
        tile_m, tile_n = tile_position(tile, tiles_m, tiles_n, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(tiles_k):
            a = a_desc.load([tile_m * BLOCK_M, k * BLOCK_K])
            b = b_desc.load([tile_n * BLOCK_N, k * BLOCK_K])
            if FAST_ACCUM:
                acc = tl.dot(a, b.T, acc)
            else:
                # The tensor cores keep about 14 bits of the sum: promote it to float32 per block.
                acc = tl.dot(a, b.T, acc, max_num_imprecise_acc=BLOCK_K)

        stored_tile += NUM_SMS
        tile_m, tile_n = tile_position(stored_tile, tiles_m, tiles_n, GROUP_M)
        row = tile_m * BLOCK_M
        col = tile_n * BLOCK_N
        acc *= scale_inv
        if EPILOGUE_SUBTILE:
            HALF: tl.constexpr = BLOCK_N // 2
            halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1))
            left, right = tl.split(halves)
            _store_tile(c, left, bias_ptr, row, col, M, N, HAS_BIAS, ALIGNED)
            _store_tile(c, right, bias_ptr, row, col + HALF, M, N, HAS_BIAS, ALIGNED)
        else:
            _store_tile(c, acc, bias_ptr, row, col, M, N, HAS_BIAS, ALIGNED)


@dataclass(frozen=True)
class TileConfig:
    """The shape of a tile, the order of tiles, and how a tile is worked on."""

    block_m: int
    block_n: int
    block_k: int = 128
    group_m: int = 8
    num_warps: int = 8
    num_stages: int = 3
    epilogue_subtile: bool = True

    def __str__(self) -> str:
        tile = f"{self.block_m}x{self.block_n}x{self.block_k}"
        half = "e2" if self.epilogue_subtile else ""
        return f"{tile}g{self.group_m}w{self.num_warps}s{self.num_stages}{half}"


# With the share of the peak that one tile reaches: a guess that orders what is worth timing.
_FAST_CONFIGS = {
    TileConfig(128, 256): 1.0,
    TileConfig(256, 128): 1.0,
    TileConfig(128, 128, num_stages=5): 0.85,
    TileConfig(64, 256, num_warps=4, num_stages=4): 0.75,
    TileConfig(128, 64, num_warps=4, num_stages=6): 0.6,
    TileConfig(64, 128, num_warps=4, num_stages=6): 0.6,
    TileConfig(64, 64, block_k=256, num_warps=4, num_stages=5): 0.4,
}
# What the threads store has to be moved between them first, whole: halves take more registers.
_UNALIGNED_CONFIGS = {
    TileConfig(128, 256, epilogue_subtile=False): 1.0,
    TileConfig(128, 128, num_stages=4, epilogue_subtile=False): 0.85,
    TileConfig(128, 64, num_warps=4, num_stages=6): 0.6,
    TileConfig(64, 128, num_warps=4, num_stages=6): 0.6,
    TileConfig(64, 64, block_k=256, num_warps=4, num_stages=5): 0.4,
}
# Promotion to float32 needs a second accumulator, for which larger tiles have no registers left.
_PRECISE_CONFIGS = {
    TileConfig(128, 128, num_stages=5): 0.85,
    TileConfig(64, 128, num_warps=4, num_stages=6): 0.6,
    TileConfig(128, 64, num_warps=4, num_stages=6): 0.6,
    TileConfig(64, 64, num_warps=4, num_stages=6): 0.4,
}


def candidates(
    m: int, n: int, k: int, *, fast_accum: bool = True, aligned: bool = True
) -> list[TileConfig]:
    """The configurations worth timing for this shape, best guess first."""

    def cost(item: tuple[TileConfig, float]) -> float:
        config, efficiency = item
        tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
        area = config.block_m * config.block_n
        return triton.cdiv(tiles, SMS) * area * triton.cdiv(k, config.block_k) / efficiency

    fast = _FAST_CONFIGS if aligned else _UNALIGNED_CONFIGS
    configs = fast if fast_accum else _PRECISE_CONFIGS
    return [config for config, _ in sorted(configs.items(), key=cost)]


def scaled_mm_launch(
    a: Any,
    b: Any,
    out: Any,
    a_scale_inv: Any,
    b_scale_inv: Any,
    bias: Any,
    *,
    m: Any,
    n: Any,
    k: Any,
    config: TileConfig,
    fast_accum: bool,
    aligned: bool,
    num_sms: int,
) -> Launch:
    """The launch of one GEMM.

    Args:
        a, b: FP8, `[m, k]` and `[n, k]`, contiguous; k a multiple of 16; not both E5M2.
        out: `[m, n]`, contiguous. aligned: whether n is known to be a multiple of 16.
        a_scale_inv, b_scale_inv: `f32[1]`.
        bias: `[n]`, any float type, added in float32; or None.
    """
    store_n = config.block_n // 2 if config.epilogue_subtile else config.block_n
    stored_by_tma = {"c": [config.block_m, store_n]} if aligned else {}
    return Launch(
        kernel=_scaled_mm_kernel,
        tensors={
            "a_desc": a,
            "b_desc": b,
            "c": out,
            "a_scale_inv_ptr": a_scale_inv,
            "b_scale_inv_ptr": b_scale_inv,
            "bias_ptr": bias,
        },
        sizes={"M": m, "N": n, "K": k},
        constants={
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "GROUP_M": config.group_m,
            "NUM_SMS": num_sms,
            "EPILOGUE_SUBTILE": config.epilogue_subtile,
            "HAS_BIAS": bias is not None,
            "FAST_ACCUM": fast_accum,
            "ALIGNED": aligned,
        },
        grid=(_programs(m, n, config, num_sms), 1, 1),
        descriptors={
            "a_desc": [config.block_m, config.block_k],
            "b_desc": [config.block_n, config.block_k],
            **stored_by_tma,
        },
        writes=frozenset({"c"}),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _programs(m: Any, n: Any, config: TileConfig, num_sms: int) -> int:
    if isinstance(m, int) and isinstance(n, int):
        return min(num_sms, triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n))
    return num_sms


def scaled_mm(
    a: Tensor,
    b: Tensor,
    a_scale_inv: Tensor,
    b_scale_inv: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    config: TileConfig | None = None,
    fast_accum: bool = True,
    aligned: bool | None = None,
    num_sms: int = SMS,
) -> Tensor:
    """Multiply now. See `scaled_mm_launch` for what the operands must be."""
    (m, k), n = a.shape, b.shape[0]
    aligned = n % 16 == 0 if aligned is None else aligned
    launch_of = partial(
        scaled_mm_launch,
        config=config or candidates(m, n, k, fast_accum=fast_accum, aligned=aligned)[0],
        fast_accum=fast_accum,
        aligned=aligned,
        num_sms=num_sms,
    )
    return multiply(launch_of, a, b, a_scale_inv, b_scale_inv, bias, out_dtype)


def multiply(
    launch_of: Callable[..., Launch],
    a: Tensor,
    b: Tensor,
    a_scale_inv: Tensor,
    b_scale_inv: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Run the launch of a GEMM's kernel, with all of its options bound; returns the product."""
    (m, k), n = a.shape, b.shape[0]
    _check_operands(a, b)
    out = a.new_empty((m, n), dtype=out_dtype)
    run(launch_of(a, b, out, a_scale_inv, b_scale_inv, bias, m=m, n=n, k=k))
    return out


def _check_operands(a: Tensor, b: Tensor) -> None:
    if a.dtype == b.dtype == torch.float8_e5m2:
        raise ValueError("scaled_mm: E5M2 x E5M2 is not supported; give one operand as E4M3")
    if a.shape[1] != b.shape[1] or a.shape[1] % 16:
        raise ValueError(
            f"scaled_mm: K must be equal in both operands and a multiple of 16, "
            f"got {a.shape[1]} and {b.shape[1]}"
        )
    if not (a.is_contiguous() and b.is_contiguous()):
        raise ValueError("scaled_mm: operands must be row-major [rows, K]")
