"""Numerics that kernels share: division, and the error function of a GELU."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8compile.backends.kernels.device import divide, erf_plus_1
from fp8compile.ops import LARGEST_SCALE
from tests.backends.common import DEVICE

FLOAT32 = torch.finfo(torch.float32)


@triton.jit
def _divide_kernel(b_ptr, quotient_ptr, A: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(quotient_ptr + at, divide(A, tl.load(b_ptr + at)))


def check(a: float, b: Tensor) -> None:
    """Compare with PyTorch's division; ``b``: as many as fill blocks of 1024."""
    b = b.to(DEVICE)
    got = torch.empty_like(b)
    _divide_kernel[(b.numel() // 1024,)](b, got, a, 1024)
    want = (torch.full_like(b, a) / b).clamp(max=LARGEST_SCALE)
    assert torch.equal(got, want)


def of_exponent(exponent: int, mantissas: Tensor) -> Tensor:
    """Floats by their bits; exponent 0: denormals."""
    return ((exponent << 23) | mantissas.int()).view(torch.float32)


@pytest.mark.parametrize("a", [448.0, 57344.0])
@pytest.mark.parametrize("exponent", [0, 1, 7, 8, 9, 100, 127, 134, 135, 200, 253, 254])
def test_a_scale_is_the_rounded_quotient(a: float, exponent: int) -> None:
    mantissas = torch.linspace(1, 2**23 - 1, 1024, dtype=torch.float64).round()
    check(a, of_exponent(exponent, mantissas))


@pytest.mark.parametrize("exponent", [7, 8, 100, 126, 127, 128, 250, 252])
def test_an_inverse_is_the_rounded_quotient(exponent: int) -> None:
    mantissas = torch.linspace(0, 2**23 - 1, 1024, dtype=torch.float64).round()
    check(1.0, of_exponent(exponent, mantissas))


def test_the_inverse_of_the_largest_scale_is_the_smallest_normal_number() -> None:
    assert FLOAT32.tiny == 1 / LARGEST_SCALE
    check(1.0, torch.full((1024,), LARGEST_SCALE))


@pytest.mark.gpu
@pytest.mark.parametrize("a", [1.0, 448.0, 57344.0])
def test_every_mantissa_is_divided_right(a: float) -> None:
    check(a, of_exponent(127, torch.arange(2**23)))


@triton.jit
def _erf_plus_1_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, erf_plus_1(tl.load(x_ptr + at)))


def erf_plus_1_of(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    _erf_plus_1_kernel[(x.numel() // 1024,)](x, out, 1024)
    return out.double()


def test_erf_plus_1_is_as_exact_as_float32_lets_its_sum_be() -> None:
    x = torch.linspace(-6, 6, 2**14, device=DEVICE)
    errors = (erf_plus_1_of(x) - (x.double().erf() + 1)).abs()
    assert errors.max() <= 2.0**-22  # 2 has steps of 2 ** -23, and the hardware's 2 ** x an error
    below = x < -1  # where the sum is small, it is no difference of numbers near 1
    assert errors[below].max() <= 5e-8


def test_erf_plus_1_of_what_is_small_large_or_not_finite() -> None:
    x = torch.tensor([0.0, -0.0, 1e-20, -1e-20, 4, -4, 1e4, -1e4, 1e38, -1e38, torch.inf])
    x = torch.cat([x, -x[-1:], torch.full((1024 - 12,), torch.nan)]).to(DEVICE)
    want = torch.tensor([1, 1, 1, 1, 2, 0, 2, 0, 2, 0, 2, 0], dtype=torch.float64)
    got = erf_plus_1_of(x).cpu()
    assert (got[:12] - want).abs().max() <= 2e-8 and got[10] == 2 and got[11] == 0
    assert got[12:].isnan().all()
