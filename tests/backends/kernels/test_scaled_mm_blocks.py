"""The GEMM with a scale per block against the reference operator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp8compile.backends.kernels.scaled_mm import TileConfig
from fp8compile.backends.kernels.scaled_mm_blocks import config_for, scaled_mm_blocks
from fp8compile.recipe import GRANULARITIES, Granularity

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FINE = [pair for pair in GRANULARITIES if Granularity.TENSOR not in pair]
FINE += [(right, left) for left, right in FINE if left is not right]
SMALL = TileConfig(64, 64, num_warps=4, group_m=2)


def check(
    m: int,
    n: int,
    k: int,
    pair: tuple[Granularity, Granularity],
    *,
    formats: tuple[torch.dtype, torch.dtype] = (E4M3, E4M3),
    bias_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype = torch.float32,
    config: TileConfig | None = None,
    fast_accum: bool = False,
) -> None:
    """Multiply random matrices whose rows and columns differ in size."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    blocks = [granularity.block for granularity in pair]
    operands = []
    for rows, block, fmt in zip((m, n), blocks, formats, strict=True):
        x = 0.03 * random(rows, k) * 5 ** random(rows, 1) * 5 ** random(1, k)
        q, _, scale_inv, _ = torch.ops.fp8.quantize_blocks(x, block, False, fmt, True, False)
        operands.append((q, scale_inv))
    (a, a_scale_inv), (b, b_scale_inv) = operands
    bias = None if bias_dtype is None else random(n).to(bias_dtype)
    args = (a, b, a_scale_inv, b_scale_inv, bias)
    out = scaled_mm_blocks(
        *args, out_dtype=out_dtype, blocks=blocks, config=config, fast_accum=fast_accum
    )
    want = torch.ops.fp8.scaled_mm_blocks(*args, torch.float32, *blocks, fast_accum)
    absolute = [q.float().abs().to(q.dtype) for q in (a, b)]
    sizes = torch.ops.fp8.scaled_mm_blocks(
        *absolute, a_scale_inv, b_scale_inv, None, torch.float32, *blocks, fast_accum
    )
    # Hopper sums FP8 products in about 14 bits of the largest, which here may be most of the sum:
    # the worst measured on an H100 is 2**-9.7.
    accumulation = 2**-9.5 if DEVICE == "cuda" else 2**-18
    rounding = want.abs() * torch.finfo(out_dtype).eps
    assert out.shape == (m, n) and out.dtype == out_dtype
    worst = (((out.float() - want).abs() - rounding) / sizes).max()
    assert worst <= accumulation


@pytest.mark.parametrize("pair", FINE, ids=lambda pair: f"{pair[0]} x {pair[1]}")
@pytest.mark.parametrize("shape", [(64, 64, 128), (130, 200, 300), (1, 16, 16), (33, 77, 160)])
def test_shapes(shape: tuple[int, int, int], pair: tuple[Granularity, Granularity]) -> None:
    check(*shape, pair)


@pytest.mark.parametrize("pair", FINE, ids=lambda pair: f"{pair[0]} x {pair[1]}")
@pytest.mark.parametrize("formats", [(E5M2, E4M3), (E4M3, E5M2)], ids=str)
def test_formats(
    formats: tuple[torch.dtype, torch.dtype], pair: tuple[Granularity, Granularity]
) -> None:
    check(80, 72, 160, pair, formats=formats)


@pytest.mark.parametrize("bias_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("n", [144, 77])
def test_bias_and_output(n: int, out_dtype: torch.dtype, bias_dtype: torch.dtype) -> None:
    check(70, n, 256, FINE[-1], bias_dtype=bias_dtype, out_dtype=out_dtype)


@pytest.mark.parametrize("fast_accum", [False, True])
def test_a_scale_per_row_leaves_the_accumulation_open(fast_accum: bool) -> None:
    rows = (Granularity.ROW, Granularity.ROW)
    check(136, 272, 400, rows, fast_accum=fast_accum, config=SMALL)


@pytest.mark.parametrize("columns", [0, 32, 128])
def test_a_tile_of_k_is_one_block(columns: int) -> None:
    for size in (16, 256, 4096):
        config = config_for(size, size, size, columns)
        assert config.block_k == columns or columns == 0


def test_two_operands_in_e5m2_are_refused() -> None:
    a = torch.zeros(16, 128, device=DEVICE).to(E5M2)
    one = torch.ones(16, 1, device=DEVICE)
    with pytest.raises(ValueError, match="E5M2 x E5M2"):
        scaled_mm_blocks(a, a, one, one, out_dtype=torch.float32, blocks=[(1, 128), (1, 128)])
