"""The reference numerics of casts with a scale per block, against plain PyTorch of other shape."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp8compile import Format
from fp8compile.recipe import GRANULARITIES, Granularity

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
fp8 = torch.ops.fp8
FINE = [granularity for granularity in Granularity if granularity is not Granularity.TENSOR]
BLOCKS = pytest.mark.parametrize("block", [g.block for g in FINE], ids=map(str, FINE))
SHAPES = pytest.mark.parametrize("shape", [(128, 256), (70, 200), (1, 16), (130, 33)], ids=str)


def quantize(x: Tensor, block: tuple[int, int], power_of_two: bool = False, fmt=E4M3):  # type: ignore[no-untyped-def]
    return fp8.quantize_blocks(x, block, power_of_two, fmt)


def uneven(m: int, n: int) -> Tensor:
    """Values whose rows and columns differ in size."""
    return torch.randn(m, n) * 10 ** torch.randn(m, 1) * 10 ** torch.randn(1, n)


def block_by_block(x: Tensor, block: tuple[int, int], fmt: torch.dtype) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3's definition in loops, each block over its own amax / FP8_MAX; and each amax."""
    high, wide = block[0], block[1] or x.shape[1]
    q = torch.zeros(x.shape)
    amax = torch.zeros(-(-x.shape[0] // high), -(-x.shape[1] // wide))
    for i in range(amax.shape[0]):
        for j in range(amax.shape[1]):
            rows, columns = slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide)
            part = x[rows, columns]
            amax[i, j] = part.abs().max()
            scale = torch.tensor(Format.of(fmt).max) / amax[i, j]
            q[rows, columns] = (part * scale).to(fmt).float()
    return q, amax


@BLOCKS
@SHAPES
@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=["e4m3", "e5m2"])
def test_equals_a_cast_block_by_block(
    fmt: torch.dtype, shape: tuple[int, int], block: tuple[int, int]
) -> None:
    x = uneven(*shape)
    q, _, scale_inv, _ = quantize(x, block, fmt=fmt)
    want, amax = block_by_block(x, block, fmt)
    assert torch.equal(q[:, : shape[1]].float(), want)
    found = scale_inv.t() if block[0] == 1 else scale_inv
    torch.testing.assert_close(found, amax / Format.of(fmt).max)


@BLOCKS
@SHAPES
def test_the_transposed_copy_is_that_of_the_transposed_matrix(
    shape: tuple[int, int], block: tuple[int, int]
) -> None:
    x = uneven(*shape)
    _, q_t, _, scale_inv_t = quantize(x, block)
    q, _, scale_inv, _ = quantize(x.t().contiguous(), block)
    assert torch.equal(q_t.float(), q.float()) and torch.equal(scale_inv_t, scale_inv)
    assert q_t.is_contiguous() and scale_inv_t.is_contiguous()


@BLOCKS
@SHAPES
def test_rows_are_padded_with_zeros(shape: tuple[int, int], block: tuple[int, int]) -> None:
    q, q_t, _, _ = quantize(uneven(*shape), block)
    unit = max(16, block[1])
    assert q.shape[1] % unit == q_t.shape[1] % unit == 0
    assert not q[:, shape[1] :].float().any() and not q_t[:, shape[0] :].float().any()


@BLOCKS
def test_the_fake_says_what_comes_back(block: tuple[int, int]) -> None:
    for copies in ((True, True), (True, False), (False, True)):
        args = (torch.randn(70, 200), block, True, E5M2, *copies)
        torch.library.opcheck(fp8.quantize_blocks.default, args)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_what_is_not_finite_makes_its_block_nan_and_spoils_no_other(power_of_two: bool) -> None:
    x = torch.randn(4, 256)
    x[0, 3], x[1, 200] = torch.nan, -torch.inf
    q, _, scale_inv, _ = quantize(x, (1, 128), power_of_two)
    clean, _, clean_inv, _ = quantize(x.nan_to_num(0, 0, 0), (1, 128), power_of_two)
    spoiled = torch.zeros(4, 256, dtype=torch.bool)
    spoiled[0, :128] = spoiled[1, 128:] = True
    assert torch.equal(q.float().isnan(), spoiled)
    assert torch.equal(q.float()[~spoiled], clean.float()[~spoiled])
    assert scale_inv[0, 0] == scale_inv[1, 1] == 1
    others = [[1, 0], [0, 1], [0, 2], [1, 2], [0, 3], [1, 3]]
    assert all(scale_inv[i, j] == clean_inv[i, j] for i, j in others)


def test_a_group_that_is_not_finite_is_nan_and_has_the_scale_one() -> None:
    x = torch.randn(2, 256)
    x[1, 130] = torch.inf
    q, scale_inv = fp8.quantize_groups(x)
    assert q.float().isnan().sum() == q[1, 128:].float().isnan().sum() == 128
    assert scale_inv[1, 1] == 1 and (scale_inv[0] != 1).all()


def test_a_block_of_zeros_has_the_scale_one() -> None:
    q, _, scale_inv, _ = quantize(torch.zeros(2, 128), (1, 32))
    assert not q.float().any() and torch.equal(scale_inv, torch.ones(4, 2))


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-3, 1.0, 449.0, 3e38])
def test_power_of_two_scales_saturate_nothing(size: float) -> None:
    x = size * torch.rand(8, 64)
    q, _, scale_inv, _ = quantize(x, (1, 32), power_of_two=True)
    exponent = scale_inv.log2()
    assert torch.equal(exponent, exponent.round()) and (exponent >= -126).all()
    back = q.float() * scale_inv.t().repeat_interleave(32, 1)
    amax = x.unflatten(1, (2, 32)).amax(2).t()
    full = scale_inv > 2.0**-126  # where the exponent is not at its end
    assert (amax <= 448 * scale_inv).all() and (amax > 223 * scale_inv)[full].all()
    assert ((back - x).abs() <= (x * 2**-4).clamp(min=2**-10 * scale_inv.max())).all()


PAIRS = [pair for pair in GRANULARITIES if Granularity.TENSOR not in pair]
PAIRS += [(right, left) for left, right in PAIRS if left is not right]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0]} x {pair[1]}")
def test_scaled_mm_multiplies_what_the_copies_stand_for(
    pair: tuple[Granularity, Granularity],
) -> None:
    m, n, k = 70, 144, 300
    found, exact = [], []
    for rows, granularity in zip((m, n), pair, strict=True):
        high, wide = granularity.block
        q, _, scale_inv, _ = quantize(uneven(rows, k), (high, wide))
        each = scale_inv.t() if high == 1 else scale_inv.repeat_interleave(high, 0)[:rows]
        spread = each.repeat_interleave(wide or q.shape[1], 1)
        exact.append(q.double() * spread.double())
        found.append((q, scale_inv))
    (a, a_scale_inv), (b, b_scale_inv) = found
    bias, blocks = torch.randn(n), [granularity.block for granularity in pair]
    args = (a, b, a_scale_inv, b_scale_inv, bias, torch.float32, *blocks, False)
    out = fp8.scaled_mm_blocks(*args)
    sizes = exact[0].abs() @ exact[1].abs().t() + bias.abs()
    assert ((out - exact[0] @ exact[1].t() - bias).abs() <= 1e-6 * sizes).all()


def error_db(x: Tensor, back: Tensor) -> float:
    return float(10 * torch.log10(x.square().sum() / (x - back).square().sum()))


def test_finer_scales_keep_an_outlier_to_itself() -> None:
    """One channel a million times as large: under one scale per tensor all others underflow."""
    x = torch.randn(256, 256)
    x[:, 7] *= 1e6
    others = [i for i in range(256) if i // 128 != 0]
    q, _, scale_inv, _, _ = fp8.quantize(x, None, 0, E4M3)
    tensorwise = error_db(x[:, others], q[:, others].float() * scale_inv)
    for block in ((1, 128), (128, 128), (1, 32)):
        q, _, scale_inv, _ = quantize(x, block)
        each = scale_inv.t() if block[0] == 1 else scale_inv.repeat_interleave(128, 0)
        back = q.float() * each.repeat_interleave(block[1], 1)
        assert error_db(x[:, others], back[:, others]) > tensorwise + 25
