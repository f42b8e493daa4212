"""FP8 GEMM for Hopper of operands with a scale per block: `a @ b.T + bias`.

Both operands are K-major. Where every block of K has a scale, its products are summed up by the
tensor cores, scaled, and added up in float32 (arXiv 2412.19437, section 3.3.2): a tile of K is one
block wide. Where a row has one scale, the sum over all of K is scaled. Bytes: M*K + N*K and the
scales read, M*N of the output type written. FLOPs: 2*M*N*K.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import tile_position
from .launch import Launch
from .scaled_mm import TileConfig, _store_tile, candidates, multiply


@triton.jit
def scales_of_rows(scales_ptr, rows, blocks_k, ROWS: tl.constexpr):
    """Where the first scale of each row is; `ROWS`: how many share one, or 0 for all.

    Scales of blocks of one row lie one block of K after the other, others row by row.
    """
    if ROWS == 0:
        return scales_ptr
    elif ROWS == 1:
        return scales_ptr + rows
    else:
        return scales_ptr + (rows // ROWS) * blocks_k


@triton.jit
def _scaled_mm_blocks_kernel(
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
    A_ROWS: tl.constexpr,
    B_ROWS: tl.constexpr,
    WHOLE_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FAST_ACCUM: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    tiles_k = tl.cdiv(K, BLOCK_K)
    tile_m, tile_n = tile_position(
        tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M
    )
    row = tile_m * BLOCK_M
    col = tile_n * BLOCK_N
    rows = row + tl.arange(0, BLOCK_M)
    cols = col + tl.arange(0, BLOCK_N)
    a_scales = scales_of_rows(a_scale_inv_ptr, rows, tiles_k, A_ROWS)
    b_scales = scales_of_rows(b_scale_inv_ptr, cols, tiles_k, B_ROWS)
    a_step = M if A_ROWS == 1 else 1
    b_step = N if B_ROWS == 1 else 1
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(tiles_k):
        a = a_desc.load([row, k * BLOCK_K])
        b = b_desc.load([col, k * BLOCK_K])
        if WHOLE_K:
            if FAST_ACCUM:
                acc = tl.dot(a, b.T, acc)
            else:
                acc = tl.dot(a, b.T, acc, max_num_imprecise_acc=BLOCK_K)
        else:
            a_scale_inv = tl.load(a_scales + k * a_step, mask=rows < M, other=0.0)
            b_scale_inv = tl.load(b_scales + k * b_step, mask=cols < N, other=0.0)
            acc += tl.dot(a, b.T) * a_scale_inv[:, None] * b_scale_inv[None, :]
    if WHOLE_K:
        acc *= tl.load(a_scales, mask=rows < M, other=0.0)[:, None]
        acc *= tl.load(b_scales, mask=cols < N, other=0.0)[None, :]
    _store_tile(c, acc, bias_ptr, row, col, M, N, HAS_BIAS, ALIGNED)


def scaled_mm_blocks_launch(
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
    blocks: Sequence[Sequence[int]],
    config: TileConfig,
    fast_accum: bool,
    aligned: bool,
) -> Launch:
    """The launch of one GEMM.

    Args:
        a, b: FP8, `[m, k]` and `[n, k]`, contiguous; not both E5M2.
        out: `[m, n]`, contiguous. aligned: whether n is known to be a multiple of 16.
        a_scale_inv, b_scale_inv: `f32`, contiguous, a number per block.
        blocks: rows and columns of a block of `a` and of `b`; both have as many columns, which
            divide k, or 0 for all.
        bias: `[n]`, any float type, added in float32; or None.
        config: whose tile of K is one block wide, where blocks of K have scales.
    """
    (a_rows, columns), (b_rows, _) = blocks
    return Launch(
        kernel=_scaled_mm_blocks_kernel,
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
            "A_ROWS": a_rows,
            "B_ROWS": b_rows,
            "WHOLE_K": columns == 0,
            "HAS_BIAS": bias is not None,
            "FAST_ACCUM": fast_accum,
            "ALIGNED": aligned,
        },
        grid=(tiles_of(m, config.block_m) * tiles_of(n, config.block_n), 1, 1),
        descriptors={
            "a_desc": [config.block_m, config.block_k],
            "b_desc": [config.block_n, config.block_k],
            **({"c": [config.block_m, config.block_n]} if aligned else {}),
        },
        writes=frozenset({"c"}),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def tiles_of(size: Any, block: int) -> Any:
    """How many blocks cover a size, which may be a proxy of a graph node."""
    return (size + block - 1) // block


def config_for(m: int, n: int, k: int, columns: int) -> TileConfig:
    """The tile for a shape, where that many columns share a scale (0: all).

    A sum of its own for every block of K takes as many registers again.
    """
    config = candidates(m, n, k, fast_accum=False)[0]
    block_k = columns or config.block_k
    return replace(config, block_k=block_k, num_stages=4, epilogue_subtile=False)


def scaled_mm_blocks(
    a: Tensor,
    b: Tensor,
    a_scale_inv: Tensor,
    b_scale_inv: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    blocks: Sequence[Sequence[int]],
    config: TileConfig | None = None,
    fast_accum: bool = False,
) -> Tensor:
    """Multiply now. See `scaled_mm_blocks_launch` for what the operands must be."""
    (m, k), n = a.shape, b.shape[0]
    launch_of = partial(
        scaled_mm_blocks_launch,
        blocks=blocks,
        config=config or config_for(m, n, k, blocks[0][1]),
        fast_accum=fast_accum,
        aligned=n % 16 == 0,
    )
    return multiply(launch_of, a, b, a_scale_inv, b_scale_inv, bias, out_dtype)
