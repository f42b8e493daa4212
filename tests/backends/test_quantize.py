"""Regions that only cast, bit for bit against the definition of quantization in torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fp8compile.backends.fused import Tile, prepare, tiles
from fp8compile.backends.kernels.launch import run
from tests.backends.common import DEVICE, Case, assert_close, no_region_is_small, only_region

FORMATS = [torch.float8_e4m3fn, torch.float8_e5m2]
LARGEST_SCALE = 2.0**126
WRITTEN = [(True, False), (False, True), (True, True)]


def cast(
    x: Tensor,
    scale: float | None,
    fmt: torch.dtype,
    row_major: bool = True,
    transposed: bool = True,
) -> Case:
    """The region of one cast, with its wanted copies and all else that it returns."""
    copies = (row_major, transposed, True, True, True)
    wanted = [i for i, is_wanted in enumerate(copies) if is_wanted]

    def fn(x: Tensor, scale: Tensor | None = None) -> list[Tensor]:
        outputs = torch.ops.fp8.quantize(x, scale, 0, fmt, row_major, transposed)
        return [outputs[i] for i in wanted]

    return only_region(fn, x=x, scale=None if scale is None else torch.tensor([scale, 1.0]))


TILES = sorted(
    {t for w in WRITTEN for t in tiles(cast(torch.ones(16, 16), 1.0, FORMATS[0], *w).region)},
    key=str,
)


def reference_quantize(
    x: Tensor, scale: Tensor | None, fmt: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The definition: `(q, q_t, scale_inv, amax, scale_used)`."""
    fp8_max = torch.finfo(fmt).max
    f = x.float()
    amax = f.abs().amax()
    amax = torch.where(amax.isnan(), torch.inf, amax)
    # `fp8_max / amax` would be rounded twice: torch multiplies by the reciprocal.
    current = torch.div(torch.full_like(amax, fp8_max), amax).clamp(max=LARGEST_SCALE)
    used = torch.where(amax.isfinite() & (amax > 0), current, 1.0)
    if scale is not None:
        used = torch.where(scale > 0, scale, used)
    y = (f * used).clamp(-fp8_max, fp8_max)
    q = torch.where(f.isfinite(), y, torch.nan).to(fmt)
    return padded(q), padded(q.t()), used.reciprocal().reshape(1), amax, used


def padded(q: Tensor) -> Tensor:
    """Rows of a multiple of 16 bytes, with zeros at their end."""
    return F.pad(q.contiguous().view(torch.uint8), (0, -q.shape[1] % 16)).view(q.dtype)


def outputs_of(case: Case, tile: Tile | None = None) -> list[Tensor]:
    """What a region returns, in order."""
    results = case.run(tile)
    return [results[node.name] for node in case.gm.graph.output_node().args[0]]


def check(x: Tensor, scale: float | None, fmt: torch.dtype, tile: Tile | None = None) -> None:
    """Compare all that a cast returns with the definition."""
    x = x.to(DEVICE)
    q, q_t, scale_inv, amax, used = outputs_of(cast(x, scale, fmt), tile)
    known = None if scale is None else torch.tensor(scale, device=DEVICE)
    want_q, want_q_t, want_scale_inv, want_amax, want_used = reference_quantize(x, known, fmt)
    assert torch.equal(scale_inv, want_scale_inv)
    assert torch.equal(amax[0], want_amax) and torch.equal(used[0], want_used)
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


@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
def test_values_of_a_large_matrix_without_a_scale(make: Callable[[], Tensor]) -> None:
    with no_region_is_small():
        check(make(), 0.0, FORMATS[0])


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
@pytest.mark.parametrize("m", [144, 132], ids=["even", "padded"])
def test_tiles(m: int, tile: Tile) -> None:
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
        want_q, want_q_t, *_ = reference_quantize(x, None, FORMATS[0])
        q, *_ = outputs_of(cast(x, None, FORMATS[0], transposed=False))
        assert torch.equal(q.view(torch.uint8), want_q.view(torch.uint8))
        q_t, *_ = outputs_of(cast(x, None, FORMATS[0], row_major=False))
        assert torch.equal(q_t.view(torch.uint8), want_q_t.view(torch.uint8))


def test_tracked_amax_is_the_maximum_over_calls() -> None:
    x = torch.zeros(70, 40, device=DEVICE)
    case = cast(x, 1.0, FORMATS[0])
    launches, results = prepare(case.gm, case.inputs)
    amax = results[case.gm.graph.output_node().args[0][3].name]
    for peak, want in ((3.0, 3.0), (-7.0, 7.0), (5.0, 7.0), (float("nan"), torch.inf)):
        x[66, 39] = peak
        for launch in launches:
            run(launch)
        assert amax.item() == want


@pytest.mark.parametrize("width", [3, 8, 24])
def test_the_padding_of_a_narrow_norm_is_zero(width: int) -> None:
    """Rows are whole in a tile, which has to reach behind them."""

    def fn(x: Tensor) -> list[Tensor]:
        y = F.rms_norm(x, (width,))
        q, _, scale_inv, _, _ = torch.ops.fp8.quantize(y, None, 0, torch.float8_e4m3fn, True, False)
        return [q, scale_inv]

    case = only_region(fn, x=torch.randn(40, width))
    found = case.run()
    (q,) = (value for value in found.values() if value.dtype is torch.float8_e4m3fn)
    assert not q[:, width:].float().any() and q[:, :width].float().abs().max() == 448
    assert_close(found, case.oracle())
