"""The reference numerics of the fp8:: operators, which everything else is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fp8compile import Format
from fp8compile.ops import current_scale

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FORMATS = pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=["e4m3", "e5m2"])
fp8 = torch.ops.fp8


def one(scale: float = 1.0) -> Tensor:
    return torch.tensor([scale])


def quantize(x: Tensor, scale: Tensor | None = None, fmt: torch.dtype = E4M3) -> Any:
    return fp8.quantize(x, scale, 0, fmt)


def representable(fmt: torch.dtype) -> Tensor:
    """Every finite value of a format, ascending."""
    values = torch.arange(256).to(torch.uint8).view(fmt).float()
    return values[values.isfinite()].unique()


# --- quantize -----------------------------------------------------------------------------------


@FORMATS
def test_representable_values_survive(fmt: torch.dtype) -> None:
    values = representable(fmt)[None]
    q, q_t, scale_inv, amax, _ = quantize(values, one(), fmt)
    count = values.shape[1]
    assert torch.equal(q[:, :count].float(), values)
    assert torch.equal(q_t[:, :1].float(), values.t())
    assert scale_inv == 1 and amax == Format.of(fmt).max


@FORMATS
def test_rounds_to_the_nearest_and_ties_to_even(fmt: torch.dtype) -> None:
    values = representable(fmt)
    middle = (values[:-1] + values[1:]) / 2
    found = quantize(middle[None], one(), fmt)[0][:, : len(middle)]
    assert ((found.view(torch.uint8) & 1) == 0).all()  # the last bit of the mantissa
    for offset, neighbour in ((0.49, values[:-1]), (0.51, values[1:])):
        near = values[:-1] + offset * values.diff()
        assert torch.equal(
            quantize(near[:, None], one(), fmt)[1][0, : len(near)].float(), neighbour
        )


@FORMATS
def test_finite_values_saturate(fmt: torch.dtype) -> None:
    largest = Format.of(fmt).max
    values = torch.tensor([[largest * 1.01, -largest * 100, 3e38, -3e38]])
    signs = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    assert torch.equal(quantize(values, one(), fmt)[0][:, :4].float(), signs * largest)


@FORMATS
def test_values_that_are_not_finite_become_nan(fmt: torch.dtype) -> None:
    values = torch.tensor([[torch.nan, torch.inf, -torch.inf, 2.0]])
    q, q_t, _, amax, _ = quantize(values, one(), fmt)
    assert q.float().isnan().tolist() == [[True, True, True, False] + 12 * [False]]
    assert torch.equal(q[:, :4].float().isnan(), q_t[:, :1].float().isnan().t())
    assert amax.isinf().all()


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_current_scaling_uses_the_whole_range(fmt: torch.dtype, dtype: torch.dtype) -> None:
    x = torch.randn(32, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    q, q_t, scale_inv, amax, _ = quantize(x, None, fmt)
    assert amax == x.float().abs().amax()
    assert q.float().abs().amax() == Format.of(fmt).max
    torch.testing.assert_close(1 / scale_inv, Format.of(fmt).max / amax)
    assert torch.equal(q.float().t(), q_t.float())
    assert (q.dtype, q_t.dtype, scale_inv.shape, amax.shape) == (fmt, fmt, (1,), (1,))


def test_a_delayed_scale_is_taken_from_its_slot() -> None:
    scales = torch.tensor([1.0, 4.0, 0.0])
    x = torch.tensor([[1.0, -2.0]])
    for slot, used in ((0, 1.0), (1, 4.0), (2, 448 / 2)):
        q, _, scale_inv, amax, _ = fp8.quantize(x, scales, slot, E4M3)
        assert torch.equal(q[:, :2].float(), x * used) and scale_inv == 1 / used and amax == 2


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 32), (32, 1), (16, 32), (17, 33), (0, 32), (16, 0)], ids=str
)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided", "expanded"])
def test_copies_are_contiguous_and_alias_nothing(shape: tuple[int, int], layout: str) -> None:
    m, n = shape
    x = {
        "contiguous": lambda: torch.randn(m, n),
        "transposed": lambda: torch.randn(n, m).t(),
        "strided": lambda: torch.randn(m, 2 * n)[:, ::2],
        "expanded": lambda: torch.randn(1, n).expand(m, n),
    }[layout]()
    q, q_t, _, _, _ = quantize(x)
    assert q.is_contiguous() and q_t.is_contiguous()
    row, row_t = -(-n // 16) * 16, -(-m // 16) * 16
    assert (q.shape, q_t.shape) == ((m, row), (n, row_t))
    assert torch.equal(q[:, :n].float().t(), q_t[:, :m].float())
    assert torch.count_nonzero(q[:, n:].float()) == 0 == torch.count_nonzero(q_t[:, m:].float())
    assert q.stride() == (max(row, 1), 1) and q_t.stride() == (max(row_t, 1), 1)
    assert not q.numel() or q.data_ptr() != q_t.data_ptr()


@FORMATS
def test_a_value_is_cast_again_with_the_scale_that_was_used(fmt: torch.dtype) -> None:
    x = torch.randn(16, 32)
    first = quantize(x, None, fmt)
    again = quantize(x, first[4], fmt)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(first, again, strict=True))


def test_unwanted_copies_are_empty() -> None:
    x = torch.randn(16, 32)
    q, q_t, _, _, _ = fp8.quantize(x, None, 0, E4M3, True, False)
    assert (q.shape, q_t.shape) == ((16, 32), (0,))
    q, q_t, _, _, _ = fp8.quantize(x, None, 0, E4M3, False, True)
    assert (q.shape, q_t.shape) == ((0,), (32, 16))


def test_zeros_and_nothing() -> None:
    q, _, scale_inv, amax, _ = quantize(torch.zeros(4, 8))
    assert torch.count_nonzero(q.float()) == 0 and scale_inv == 1 and amax == 0
    assert quantize(torch.zeros(0, 8))[3] == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=16),
    st.sampled_from([E4M3, E5M2]),
)
def test_the_error_is_at_most_half_a_step(values: list[float], fmt: torch.dtype) -> None:
    x = torch.tensor([values])
    q, _, scale_inv, amax, _ = quantize(x, None, fmt)
    assert q.float().isfinite().all() and scale_inv.isfinite().all()
    if not 1e-30 < amax < 1e30:  # beyond, the scale itself leaves float32
        return
    back = q[:, : len(values)].double() * scale_inv.double()
    mantissa = {E4M3: 3, E5M2: 2}[fmt]
    smallest = representable(fmt).diff().min() * scale_inv.double()
    bound = torch.maximum(x.double().abs() * 2.0 ** -(mantissa + 1), smallest / 2)
    assert ((back - x.double()).abs() <= bound * 1.0001).all()


@FORMATS
def test_current_scale_is_always_usable(fmt: torch.dtype) -> None:
    largest = Format.of(fmt).max
    amax = torch.tensor([0.0, torch.inf, torch.nan, 1e-45, 2.0, 3e38])
    scale = current_scale(amax, largest)
    assert scale[:3].tolist() == [1, 1, 1]
    assert scale.isfinite().all() and (scale > 0).all()
    assert scale[4] == largest / 2


# --- scaled_mm ----------------------------------------------------------------------------------


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("formats", [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)], ids=str)
def test_scaled_mm_is_exact_on_small_integers(
    formats: tuple[torch.dtype, torch.dtype], out_dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-3, 4, (n, 32), generator=generator).float() for n in (16, 48))
    bias = torch.randint(-3, 4, (48,), generator=generator).to(out_dtype)
    args = (a.to(formats[0]), b.to(formats[1]), one(0.5), one(2.0))
    for extra in (None, bias):
        expected = a @ b.t() + (0 if extra is None else extra.float())
        out = fp8.scaled_mm(*args, extra, out_dtype, True)
        assert out.dtype is out_dtype and torch.equal(out.float(), expected)


def test_scaled_mm_keeps_nan_in_its_row() -> None:
    a = torch.ones(4, 16)
    a[2, 3] = torch.nan
    out = fp8.scaled_mm(
        a.to(E4M3), torch.ones(8, 16).to(E4M3), one(), one(), None, torch.float32, True
    )
    assert out.isnan().any(1).tolist() == [False, False, True, False]


def test_scaled_mm_of_nothing() -> None:
    a, b = torch.ones(0, 16).to(E4M3), torch.ones(8, 16).to(E4M3)
    assert fp8.scaled_mm(a, b, one(), one(), None, torch.bfloat16, True).shape == (0, 8)


# --- track_amax, update_scales ------------------------------------------------------------------


def test_track_amax_takes_the_maximum_in_place() -> None:
    amax = torch.tensor([1.0, 5.0, 0.0, 7.0])
    fp8.track_amax(amax, [one(3.0), one(2.0)], [0, 1])
    assert amax.tolist() == [3, 5, 0, 7]
    fp8.track_amax(amax, [one(3.0), one(2.0)], [0, 1])  # idempotent
    assert amax.tolist() == [3, 5, 0, 7]
    fp8.track_amax(amax, [one(torch.inf)], [2])
    assert amax.tolist() == [3, 5, torch.inf, 7]
    fp8.track_amax(amax, [], [])
    assert amax.tolist() == [3, 5, torch.inf, 7]


def state(slots: int, history: int = 4) -> dict[str, Any]:
    zeros = {name: torch.zeros(slots) for name in ("scale", "amax_fwd", "amax_bwd")}
    return zeros | {
        "history": torch.zeros(history, slots),
        "events": torch.zeros(3, slots, dtype=torch.int32),
        "fp8_max": torch.full((slots,), 448.0),
        "position": 0,
        "jump_limit": 32.0,
        "saturation_limit": 1.0625,
    }


def test_update_scales() -> None:
    s = state(5)
    s["scale"][2:4] = 9.0
    s["history"][1] = torch.tensor([0.0, 8.0, 0.0, 0.0, 2.0])
    s["amax_fwd"] = torch.tensor([4.0, 1.0, 0.0, torch.inf, 1.0])
    s["amax_bwd"] = torch.tensor([0.0, 2.0, 0.0, 0.0, torch.nan])
    fp8.update_scales(*s.values())
    # new amax; larger amax in the history; nothing seen; inf seen; nan seen
    assert s["scale"].tolist() == [448 / 4, 448 / 8, 9, 9, 448 / 2]
    assert s["history"][0].tolist() == [4, 2, 0, 0, 0]
    assert s["events"].tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert torch.count_nonzero(s["amax_fwd"]) == torch.count_nonzero(s["amax_bwd"]) == 0


def test_update_scales_counts_what_saturated_beyond_rounding() -> None:
    s = state(6)
    s["scale"][1:] = 448 / 8.0  # the first has none yet: its cast found its own
    s["scale"][5] = torch.finfo(torch.float32).max  # overflows
    s["amax_fwd"] = torch.tensor([100.0, 8.0, 8.5, 8.51, torch.inf, 8.0])
    fp8.update_scales(*s.values())
    assert s["events"][:2].tolist() == [[0, 0, 0, 0, 1, 0], [0, 0, 0, 1, 0, 1]]


def test_update_scales_overwrites_the_oldest() -> None:
    s = state(1, history=2)
    for step, amax in enumerate([8.0, 2.0, 1.0]):
        s["amax_fwd"][0] = amax
        s["position"] = step % 2
        fp8.update_scales(*s.values())
    assert s["history"].flatten().tolist() == [1, 2] and s["scale"] == 448 / 2


def run(amax: Sequence[float], history: int = 4, **limits: float) -> tuple[list[float], int]:
    """The largest amax that each step's new scale stands for (0: unknown), and the jumps."""
    s, represented = state(1, history) | limits, []
    for step, value in enumerate(amax):
        s["amax_fwd"][0] = value
        s["position"] = step % history
        fp8.update_scales(*s.values())
        represented.append(round(448.0 / float(s["scale"]), 3) if s["scale"] else 0.0)
    return represented, int(s["events"][2])


def test_a_spike_keeps_its_slot_in_current_scaling_until_it_is_forgotten() -> None:
    spike = [1.0, 1, 100, 1, 1, 1, 1, 1]
    assert run(spike) == ([1, 1, 0, 0, 0, 0, 1, 1], 1)
    assert run(spike, jump_limit=torch.inf) == ([1, 1, 0, 100, 100, 100, 1, 1], 0)
    both = {"jump_limit": torch.inf, "saturation_limit": torch.inf}
    assert run(spike, **both) == ([1, 1, 100, 100, 100, 100, 1, 1], 0)


def test_a_jump_counts_in_both_directions_and_only_beyond_the_limit() -> None:
    assert run([1.0, 32, 32, 32]) == ([1, 0, 32, 32], 0)  # outgrown, and no jump
    assert run([1.0, 33, 33, 33, 33, 33]) == ([1, 0, 0, 0, 33, 33], 1)
    assert run([33.0, 1, 1, 1, 1, 1]) == ([33, 0, 0, 0, 1, 1], 1)
    assert run([32.0, 1, 1, 1, 1, 1]) == ([32, 32, 32, 32, 1, 1], 0)


def test_numbers_that_come_in_turns_stay_in_current_scaling() -> None:
    assert run([1.0, 100] * 4) == ([1, 0, 0, 0, 0, 0, 0, 0], 1)


def test_two_spikes_are_two_jumps_if_the_first_was_forgotten() -> None:
    assert run([1.0, 100, 1, 1, 1, 1, 100, 1]) == ([1, 0, 0, 0, 0, 1, 0, 0], 2)


def test_steps_without_an_amax_are_no_jump() -> None:
    assert run([0.0, 0, 4, 0, 4, 0, 0, torch.inf, 4]) == ([0, 0, 0, 4, 4, 4, 4, 4, 4], 0)


def test_the_saturation_limit_moves_where_a_clipped_slot_goes_to_current_scaling() -> None:
    growth = [1.0, 1.5, 1.5, 4.0, 4.0]
    assert run(growth) == ([1, 0, 1.5, 0, 4], 0)
    assert run(growth, saturation_limit=2.0) == ([1, 1.5, 1.5, 0, 4], 0)


# --- registration -------------------------------------------------------------------------------

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


@FORMATS
@pytest.mark.parametrize("copies", [(True, True), (True, False), (False, True)], ids=str)
def test_opcheck_quantize(fmt: torch.dtype, copies: tuple[bool, bool]) -> None:
    args = (torch.randn(16, 32), torch.zeros(3), 1, fmt, *copies)
    # test_schema compares outputs with an operator that has no kernel for fp8
    results = torch.library.opcheck(fp8.quantize.default, args, test_utils=CHECKS[1:])
    assert set(results.values()) == {"SUCCESS"}


def test_opcheck_scaled_mm() -> None:
    a, b = torch.randn(16, 32).to(E4M3), torch.randn(48, 32).to(E5M2)
    args = (a, b, one(), one(), torch.randn(48), torch.float32, True)
    results = torch.library.opcheck(fp8.scaled_mm.default, args, test_utils=CHECKS[1:])
    assert set(results.values()) == {"SUCCESS"}


def test_opcheck_track_amax_and_update_scales() -> None:
    tracked = (torch.zeros(3), [one(2.0)], [1])
    for op, args in ((fp8.track_amax, tracked), (fp8.update_scales, tuple(state(3).values()))):
        results = torch.library.opcheck(op.default, args, test_utils=CHECKS)
        assert set(results.values()) == {"SUCCESS"}
