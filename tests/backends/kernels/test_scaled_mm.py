"""The GEMM against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp8compile.backends.kernels.scaled_mm import TileConfig, candidates, scaled_mm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SMALL = TileConfig(64, 64, block_k=64, group_m=2, num_warps=4)
# Every distinct configuration that any shape is offered.
CONFIGS = [
    (config, fast_accum, aligned)
    for fast_accum in (True, False)
    for aligned in (True, False)
    for config in candidates(4096, 4096, 4096, fast_accum=fast_accum, aligned=aligned)
]


def check(
    m: int,
    n: int,
    k: int,
    *,
    formats: tuple[torch.dtype, torch.dtype] = (E4M3, E4M3),
    bias_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    config: TileConfig = SMALL,
    fast_accum: bool = True,
    num_sms: int = 3,
) -> None:
    """Multiply random matrices; the error must stay within rounding and accumulation."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    a, b = random(m, k).to(formats[0]), random(n, k).to(formats[1])
    scales = torch.tensor([0.5], device=DEVICE), torch.tensor([0.03], device=DEVICE)
    bias = None if bias_dtype is None else random(n).to(bias_dtype)
    out = scaled_mm(
        a,
        b,
        *scales,
        bias,
        out_dtype=out_dtype,
        config=config,
        fast_accum=fast_accum,
        num_sms=num_sms,
    )
    want = (a.double() @ b.double().t()) * scales[0].double() * scales[1].double()
    bound = (a.double().abs() @ b.double().abs().t()) * 0.015
    if bias is not None:
        want += bias.double()
        bound += bias.double().abs()
    # Hopper sums FP8 products in about 14 bits; in precise mode only within each block of K.
    # Worst errors measured on an H200: 2**-11.6 and 2**-14.3 of the bound, the same as cuBLASLt's.
    accumulation = 2**-18
    if DEVICE == "cuda":
        accumulation = 2**-11 if fast_accum else 2**-13.5
    rounding = want.abs() * torch.finfo(out_dtype).eps
    assert out.shape == (m, n) and out.dtype == out_dtype
    assert ((out.double() - want).abs() <= rounding + bound * accumulation).all()


@pytest.mark.parametrize(
    "shape",
    [(64, 64, 64), (130, 200, 80), (1, 16, 16), (200, 144, 272), (33, 77, 32), (130, 10, 48)],
)
def test_shapes(shape: tuple[int, int, int]) -> None:
    check(*shape)


@pytest.mark.parametrize("num_sms", [1, 2, 132])
def test_programs_share_the_tiles(num_sms: int) -> None:
    check(320, 200, 96, num_sms=num_sms)


@pytest.mark.parametrize("formats", [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)], ids=str)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_types(formats: tuple[torch.dtype, torch.dtype], out_dtype: torch.dtype) -> None:
    check(80, 72, 96, formats=formats, out_dtype=out_dtype)


@pytest.mark.parametrize("bias_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("subtile", [True, False])
def test_bias(bias_dtype: torch.dtype, subtile: bool) -> None:
    config = TileConfig(64, 64, block_k=64, num_warps=4, epilogue_subtile=subtile)
    check(70, 136, 80, bias_dtype=bias_dtype, out_dtype=torch.float32, config=config)


@pytest.mark.parametrize(("config", "fast_accum", "aligned"), CONFIGS, ids=str)
def test_configs(config: TileConfig, fast_accum: bool, aligned: bool) -> None:
    n = 272 if aligned else 269
    check(136, n, 144, bias_dtype=torch.bfloat16, config=config, fast_accum=fast_accum)


def test_candidates_fit_the_shape() -> None:
    assert candidates(16384, 4096, 4096)[0].block_m * candidates(16384, 4096, 4096)[0].block_n == (
        128 * 256
    )
    assert candidates(16, 8192, 4096)[0].block_m == 64
    assert len({str(config) for config, fast, aligned in CONFIGS if fast and aligned}) == len(
        candidates(64, 64, 64, fast_accum=True)
    )


def test_unsupported_operands_raise() -> None:
    one = torch.ones(1, device=DEVICE)
    for a, b, match in (
        (torch.zeros(16, 32).to(E5M2), torch.zeros(16, 32).to(E5M2), "E5M2 x E5M2"),
        (torch.zeros(16, 24).to(E4M3), torch.zeros(16, 24).to(E4M3), "multiple of 16"),
        (torch.zeros(32, 16).to(E4M3).t(), torch.zeros(16, 32).to(E4M3), "row-major"),
    ):
        with pytest.raises(ValueError, match=match):
            scaled_mm(a.to(DEVICE), b.to(DEVICE), one, one, out_dtype=torch.bfloat16)
