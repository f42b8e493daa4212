"""Numerics that kernels share: division."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8compile.backends.kernels.device import divide
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
