"""FP8 GEMM of few rows, such as decoding has: `(a @ b.T) * a_scale_inv * b_scale_inv + bias`.

Both operands are K-major. The time is that of reading `b`, so every program reads rows of `b` from
the first column to the last, and multiplies them with all of `a`, which comes from L2. The tensor
cores take 64 rows on their left: where `a` has fewer, they multiply `b @ a.T`. An operand has one
scale, or one per row, or one per block; then the products of every block of K are scaled and added
up in float32 (arXiv 2412.19437, section 3.3.2). Bytes: N*K, M*K and the scales read, M*N of the
output type written. FLOPs: 2*M*N*K.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .scaled_mm import SMS, multiply
from .scaled_mm_blocks import scales_of_rows, tiles_of

# For more, `b` no longer is what takes the time; sums of their own for blocks of K take some, too.
FEW_ROWS, FEW_ROWS_OF_BLOCKS = 128, 64
FEW_ROWS_BLOCK = 128  # columns of K that are summed up precisely, and may have a scale
ONE_SCALE = ((0, 0), (0, 0))  # blocks of all rows and columns
_LEFT_ROWS = 64  # of an operand of the tensor cores


@triton.jit
def _scaled_mm_few_rows_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    a_scale_inv_ptr,
    b_scale_inv_ptr,
    bias_ptr,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    B_LEFT: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    A_ROWS: tl.constexpr,
    B_ROWS: tl.constexpr,
    WHOLE_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FAST_ACCUM: tl.constexpr,
):
    # Programs that read the same of b follow each other, and all but the first find it in L2.
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    in_m = rows < M
    in_n = (cols < N) | EVEN_N
    a_at = a_ptr + rows.to(tl.int64)[:, None] * K + ks[None, :]
    b_at = b_ptr + cols.to(tl.int64)[:, None] * K + ks[None, :]
    blocks_k = tl.cdiv(K, BLOCK_K)
    a_scales = scales_of_rows(a_scale_inv_ptr, rows, blocks_k, A_ROWS)
    b_scales = scales_of_rows(b_scale_inv_ptr, cols, blocks_k, B_ROWS)
    a_step = M if A_ROWS == 1 else 1
    b_step = N if B_ROWS == 1 else 1
    imprecise: tl.constexpr = None if FAST_ACCUM else BLOCK_K  # then promoted to float32
    acc = tl.zeros((BLOCK_N, BLOCK_M) if B_LEFT else (BLOCK_M, BLOCK_N), tl.float32)
    # With their number told to the loop, all loads have stages, those of scales too.
    for block in tl.range(0, blocks_k, num_stages=NUM_STAGES):
        k = block * BLOCK_K
        in_k = (k + ks < K) | EVEN_K
        a = tl.load(a_at + k, mask=in_m[:, None] & in_k[None, :], other=0.0)
        # Nothing reads b again: what does come again shall stay in L2.
        b = tl.load(
            b_at + k,
            mask=in_n[:, None] & in_k[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        if not WHOLE_K:
            a_scale = tl.load(a_scales + block * a_step, mask=in_m, other=0.0)
            b_scale = tl.load(b_scales + block * b_step, mask=in_n, other=0.0)
            if B_LEFT:
                acc += tl.dot(b, a.T) * b_scale[:, None] * a_scale[None, :]
            else:
                acc += tl.dot(a, b.T) * a_scale[:, None] * b_scale[None, :]
        elif B_LEFT:
            acc = tl.dot(b, a.T, acc, max_num_imprecise_acc=imprecise)
        else:
            acc = tl.dot(a, b.T, acc, max_num_imprecise_acc=imprecise)
    if B_LEFT:
        acc = acc.T
    if WHOLE_K and A_ROWS == 0:
        acc *= tl.load(a_scales) * tl.load(b_scales)
    elif WHOLE_K:
        acc *= tl.load(a_scales, mask=in_m, other=0.0)[:, None]
        acc *= tl.load(b_scales, mask=in_n, other=0.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=in_n, other=0.0).to(tl.float32)[None, :]
    c_at = c_ptr + rows.to(tl.int64)[:, None] * N + cols[None, :]
    tl.store(c_at, acc.to(c_ptr.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


@dataclass(frozen=True)
class FewRowsConfig:
    """How many rows of either operand a program multiplies, and how much of K at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_stages: int

    def __str__(self) -> str:
        return f"few rows {self.block_m}x{self.block_n}x{self.block_k}s{self.num_stages}"


# Narrow ones first.
_CONFIGS = (
    FewRowsConfig(64, 16, 256, 8),
    FewRowsConfig(64, 32, 256, 6),
    FewRowsConfig(64, 64, 256, 5),
    FewRowsConfig(64, 128, 128, 5),
)


def few_rows_config_for(m: int, n: int, *, fast_accum: bool = True) -> FewRowsConfig:
    """The configuration for a shape: of those whose programs all run at once, the narrowest, for
    the more of them, the more of `b` is on its way; or else the widest.

    On an H100, with `b` of 768 to 128256 rows, it is 1.00 to 1.19 times as fast as cuBLASLt for up
    to 64 rows, 1.07 times in the geometric mean, and 0.87 to 1.10 times for 128, which has one
    scale for all rows there (`examples/bench/gemms.py`). With blocks of 128, 0.94 to 1.39 times for
    16 to 64 rows; of one row cuBLASLt takes none.
    """
    few = max(16, triton.next_power_of_2(m))
    configs = (_CONFIGS[0], FewRowsConfig(few, 64, 256, 6)) if few < _LEFT_ROWS else _CONFIGS
    at_once = (config for config in configs if _programs(m, n, config) <= SMS)
    config = next(at_once, configs[-1])
    if fast_accum:
        return config
    stages = config.num_stages * config.block_k // FEW_ROWS_BLOCK
    return replace(config, block_k=FEW_ROWS_BLOCK, num_stages=stages)


def _programs(m: int, n: int, config: FewRowsConfig) -> int:
    return tiles_of(m, config.block_m) * tiles_of(n, config.block_n)


def scaled_mm_few_rows_launch(
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
    config: FewRowsConfig,
    fast_accum: bool,
) -> Launch:
    """The launch of one GEMM, which is right for any number of rows.

    Args:
        a, b: FP8, `[m, k]` and `[n, k]`, contiguous; k a multiple of 16; not both E5M2.
        out: `[m, n]`, contiguous.
        a_scale_inv, b_scale_inv: `f32`, contiguous, a number per block.
        blocks: rows and columns of a block of `a` and of `b`, 0 for all; both have as many columns,
            which divide k.
        bias: `[n]`, any float type, added in float32; or None.
        config: whose block of K is that of the scales, where blocks of K have scales.
    """
    (a_rows, columns), (b_rows, _) = blocks
    return Launch(
        kernel=_scaled_mm_few_rows_kernel,
        tensors={
            "a_ptr": a,
            "b_ptr": b,
            "c_ptr": out,
            "a_scale_inv_ptr": a_scale_inv,
            "b_scale_inv_ptr": b_scale_inv,
            "bias_ptr": bias,
        },
        sizes={"M": m, "N": n, "K": k},
        constants={
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "B_LEFT": config.block_m < _LEFT_ROWS,
            "EVEN_N": isinstance(n, int) and n % config.block_n == 0,
            "EVEN_K": isinstance(k, int) and k % config.block_k == 0,
            "A_ROWS": a_rows,
            "B_ROWS": b_rows,
            "WHOLE_K": columns == 0,
            "NUM_STAGES": config.num_stages,
            "HAS_BIAS": bias is not None,
            "FAST_ACCUM": fast_accum,
        },
        grid=(tiles_of(m, config.block_m), tiles_of(n, config.block_n), 1),
        writes=frozenset({"c_ptr"}),
        num_warps=4,
    )


def scaled_mm_few_rows(
    a: Tensor,
    b: Tensor,
    a_scale_inv: Tensor,
    b_scale_inv: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    blocks: Sequence[Sequence[int]] = ONE_SCALE,
    config: FewRowsConfig | None = None,
    fast_accum: bool = True,
) -> Tensor:
    """Multiply now. See `scaled_mm_few_rows_launch` for what the operands must be."""
    launch_of = partial(
        scaled_mm_few_rows_launch,
        blocks=blocks,
        config=config or few_rows_config_for(len(a), len(b), fast_accum=fast_accum),
        fast_accum=fast_accum,
    )
    return multiply(launch_of, a, b, a_scale_inv, b_scale_inv, bias, out_dtype)
