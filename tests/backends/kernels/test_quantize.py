"""Quantization, bit for bit against its definition in torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fp8compile.backends.kernels.quantize import QuantizeTile, quantize, tile_candidates

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = [torch.float8_e4m3fn, torch.float8_e5m2]
FLOAT32_MAX = torch.finfo(torch.float32).max
WRITTEN = [(True, False), (False, True), (True, True)]
TILES = sorted({tile for written in WRITTEN for tile in tile_candidates(*written)}, key=str)


def reference_quantize(
    x: Tensor, scale: Tensor | None, fmt: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition: `(q, q_t, scale_inv, amax)`."""
    fp8_max = torch.finfo(fmt).max
    f = x.float()
    amax = f.abs().amax()
    amax = torch.where(amax.isnan(), torch.inf, amax)
    # `fp8_max / amax` would be rounded twice: torch multiplies by the reciprocal.
    current = torch.div(torch.full_like(amax, fp8_max), amax).clamp(max=FLOAT32_MAX)
    used = torch.where(amax.isfinite() & (amax > 0), current, 1.0)
    if scale is not None:
        used = torch.where(scale > 0, scale, used)
    y = (f * used).clamp(-fp8_max, fp8_max)
    q = torch.where(f.isfinite(), y, torch.nan).to(fmt)
    return q, q.t().contiguous(), used.reciprocal().reshape(1), amax


def check(x: Tensor, scale: float | None, fmt: torch.dtype, **options: QuantizeTile) -> None:
    """Compare all that `quantize` returns, and the amax it tracks, with the definition."""
    x = x.to(DEVICE)
    scales = None if scale is None else torch.tensor([scale], device=DEVICE)
    tracked = torch.zeros(1, device=DEVICE)
    q, q_t, scale_inv = quantize(x, scales, fmt, amax=tracked, **options)
    want_q, want_q_t, want_scale_inv, want_amax = reference_quantize(
        x, None if scales is None else scales[0], fmt
    )
    assert q is not None and q_t is not None
    assert torch.equal(scale_inv, want_scale_inv)
    assert torch.equal(tracked[0], want_amax)
    assert torch.equal(q.view(torch.uint8), want_q.view(torch.uint8))
    assert torch.equal(q_t.view(torch.uint8), want_q_t.view(torch.uint8))


def normal(m: int, n: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(0)).to(dtype)


def with_value(value: float) -> Callable[[], Tensor]:
    def make() -> Tensor:
        x = normal(65, 48)
        x[40, 13] = value
        return x

    return make


INPUTS = {
    "normal": lambda: normal(65, 48),
    "tiny": lambda: normal(65, 48) * 1e-30,
    "denormal": lambda: normal(65, 48, torch.float32) * 1e-39,
    "huge": lambda: normal(65, 48) * 1e37,
    "zeros": lambda: torch.zeros(65, 48, dtype=torch.bfloat16),
    "negative_zeros": lambda: -torch.zeros(65, 48, dtype=torch.bfloat16),
    "outlier": with_value(3e4),
    "negative_outlier": with_value(-3e4),
    "nan": with_value(float("nan")),
    "negative_nan": with_value(-float("nan")),
    "inf": with_value(float("inf")),
    "negative_inf": with_value(-float("inf")),
}


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("scale", [None, 0.0, 37.5], ids=["current", "unknown", "delayed"])
@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
def test_values(make: Callable[[], Tensor], scale: float | None, fmt: torch.dtype) -> None:
    check(make(), scale, fmt)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(64, 128), (65, 48), (1, 16), (130, 200), (16, 1), (3, 7)])
def test_shapes(shape: tuple[int, int], dtype: torch.dtype, fmt: torch.dtype) -> None:
    check(normal(*shape, dtype), None, fmt)


def test_strided_inputs() -> None:
    check(normal(72, 48).t(), None, FORMATS[0])
    check(normal(80, 48).t(), None, FORMATS[0])
    check(normal(96, 80)[::2, 8:56], 2.0, FORMATS[0])
    check(normal(96, 80)[:, ::3], 2.0, FORMATS[1])


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("m", [144, 132], ids=["packed", "bytes"])
def test_tiles(m: int, tile: QuantizeTile) -> None:
    check(normal(m, 272), None, FORMATS[0], tile=tile)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_every_rounding(fmt: torch.dtype) -> None:
    """All FP8 values, the midpoints between neighbours, and both float32 next to those."""
    finite = torch.arange(256, dtype=torch.uint8).view(fmt).float()
    finite = finite[finite.isfinite()].sort().values
    middle = (finite[1:] + finite[:-1]) / 2
    beside = [torch.nextafter(middle, torch.tensor(s * torch.inf)) for s in (1, -1)]
    values = torch.zeros(32, 32)
    every = torch.cat([finite, middle, *beside])
    values.view(-1)[: len(every)] = every
    check(values, 1.0, fmt)


def test_writes_only_what_is_asked_for() -> None:
    for x in (normal(64, 80).to(DEVICE), normal(64, 80).to(DEVICE).t()):
        want_q, want_q_t, _, _ = reference_quantize(x, None, FORMATS[0])
        q, q_t, _ = quantize(x, None, FORMATS[0], transposed=False)
        assert q_t is None and q is not None
        assert torch.equal(q.view(torch.uint8), want_q.view(torch.uint8))
        q, q_t, _ = quantize(x, None, FORMATS[0], row_major=False)
        assert q is None and q_t is not None
        assert torch.equal(q_t.view(torch.uint8), want_q_t.view(torch.uint8))


def test_tracked_amax_is_the_maximum_over_calls() -> None:
    amax = torch.zeros(1, device=DEVICE)
    for peak, want in ((3.0, 3.0), (-7.0, 7.0), (5.0, 7.0), (float("nan"), torch.inf)):
        x = torch.zeros(70, 40, device=DEVICE)
        x[66, 39] = peak
        quantize(x, torch.ones(1, device=DEVICE), FORMATS[0], amax=amax)
        assert amax.item() == want
