"""The GEMM of few rows against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp8compile.backends.kernels.scaled_mm_few_rows import (
    FEW_ROWS,
    ONE_SCALE,
    FewRowsConfig,
    few_rows_config_for,
    scaled_mm_few_rows,
)

Blocks = tuple[tuple[int, int], tuple[int, int]]
PER_ROW = ((1, 0), (1, 0))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def scale_shapes(m: int, n: int, k: int, blocks: Blocks) -> list[tuple[int, int]]:
    """Those of the scales of both operands; of blocks of one row, K comes first."""
    shapes = []
    for rows, (high, wide) in zip((m, n), blocks, strict=True):
        along_k = k // wide if wide else 1
        if high == 1:
            shapes.append((along_k, rows))
        else:
            shapes.append((-(-rows // high) if high else 1, along_k))
    return shapes


def per_element(scales: Tensor, block: tuple[int, int], q: Tensor) -> Tensor:
    """A scale for every element of an operand."""
    high, wide = block
    scales = scales.t() if high == 1 else scales.repeat_interleave(high or len(q), 0)[: len(q)]
    return scales.repeat_interleave(wide or q.shape[1], 1)


def check(
    m: int,
    n: int,
    k: int,
    *,
    blocks: Blocks = PER_ROW,
    formats: tuple[torch.dtype, torch.dtype] = (E4M3, E4M3),
    bias_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype = torch.float32,
    config: FewRowsConfig | None = None,
    fast_accum: bool = True,
) -> None:
    """Multiply random matrices whose scales differ; the error must stay within accumulation."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    a, b = random(m, k).to(formats[0]), random(n, k).to(formats[1])
    left, right = (5 ** random(*shape) for shape in scale_shapes(m, n, k, blocks))
    bias = None if bias_dtype is None else random(n).to(bias_dtype)
    out = scaled_mm_few_rows(
        a,
        b,
        left,
        right,
        bias,
        out_dtype=out_dtype,
        blocks=blocks,
        config=config,
        fast_accum=fast_accum,
    )
    x, y = (
        q.double() * per_element(scales.double(), block, q)
        for q, scales, block in ((a, left, blocks[0]), (b, right, blocks[1]))
    )
    want, sizes = x @ y.t(), x.abs() @ y.abs().t()
    if bias is not None:
        want += bias.double()
        sizes += bias.double().abs()
    # Hopper sums FP8 products in about 14 bits of the largest, which may be most of the sum.
    accumulation = 2**-9.5 if DEVICE == "cuda" else 2**-18
    rounding = want.abs() * torch.finfo(out_dtype).eps
    assert out.shape == (m, n) and out.dtype == out_dtype
    assert (((out.double() - want).abs() - rounding) / sizes).max() <= accumulation


@pytest.mark.parametrize("blocks", [ONE_SCALE, PER_ROW], ids=["tensorwise", "rowwise"])
@pytest.mark.parametrize(
    "shape", [(1, 64, 256), (5, 16, 16), (16, 200, 288), (33, 77, 160), (128, 96, 512)]
)
def test_shapes(shape: tuple[int, int, int], blocks: Blocks) -> None:
    check(*shape, blocks=blocks)


@pytest.mark.parametrize(
    "blocks", [((1, 128), (128, 128)), ((128, 128), (1, 128)), ((1, 128), (1, 128))], ids=str
)
@pytest.mark.parametrize("shape", [(1, 64, 256), (16, 200, 384), (33, 77, 128), (128, 300, 512)])
def test_blocks(shape: tuple[int, int, int], blocks: Blocks) -> None:
    """The configuration is the one of precise sums, whose block of K is 128."""
    check(*shape, blocks=blocks, fast_accum=False)


@pytest.mark.parametrize("fast_accum", [False, True], ids=["precise", "fast"])
@pytest.mark.parametrize(("m", "wide"), [(16, 4096), (32, 4096), (64, 64), (64, 4096), (64, 65536)])
def test_configurations(m: int, wide: int, fast_accum: bool) -> None:
    """Those of some shapes, with whole and with broken tiles."""
    config = few_rows_config_for(m, wide, fast_accum=fast_accum)
    for n, k in ((128, 512), (100, 336)):
        check(m, n, k, config=config, fast_accum=fast_accum)


def test_more_rows_than_expected() -> None:
    """Where the number of rows is symbolic, the configuration is that of the example."""
    check(75, 64, 256, config=few_rows_config_for(16, 4096))
    check(300, 64, 256, config=few_rows_config_for(128, 64))


@pytest.mark.parametrize("bias_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("m", [7, 70])
def test_bias_and_output(m: int, out_dtype: torch.dtype, bias_dtype: torch.dtype) -> None:
    check(m, 77, 256, bias_dtype=bias_dtype, out_dtype=out_dtype)


@pytest.mark.parametrize("formats", [(E5M2, E4M3), (E4M3, E5M2)], ids=str)
@pytest.mark.parametrize("m", [7, 70])
def test_formats(m: int, formats: tuple[torch.dtype, torch.dtype]) -> None:
    check(m, 72, 160, formats=formats)


def test_the_narrowest_whose_programs_all_run_at_once() -> None:
    tiles = {
        n: few_rows_config_for(64, n).block_n for n in (64, 2112, 2113, 4096, 8448, 16896, 128256)
    }
    assert list(tiles.values()) == [16, 16, 32, 32, 64, 128, 128]
    assert few_rows_config_for(FEW_ROWS, 4096).block_n == 64
    assert {few_rows_config_for(m, 4096).block_m for m in range(1, 17)} == {16}


def test_two_operands_in_e5m2_are_refused() -> None:
    a = torch.zeros(16, 128, device=DEVICE).to(E5M2)
    one = torch.ones(1, device=DEVICE)
    with pytest.raises(ValueError, match="E5M2 x E5M2"):
        scaled_mm_few_rows(a, a, one, one, out_dtype=torch.float32)
