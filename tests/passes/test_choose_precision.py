"""choose_precision: what stays in high precision, and why."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fp8compile import RECIPES, Gemm
from fp8compile.cost import COSTS, H200
from fp8compile.ir import gemms
from fp8compile.passes import choose_precision, find_gemms
from fp8compile.passes.choose_precision import SKIPPED, SLOWER
from fp8compile.passes.site_costs import _add_casts, _sized
from tests.helpers import trace_joint
from tests.passes.common import before, check_pass, fprop, linear_joint


def reasons(gm: fx.GraphModule) -> list[str | None]:
    return [info.reason for _, info in gemms(gm)]


@pytest.mark.parametrize("tokens", [16, 24, 1])
def test_any_size_will_do(tokens: int) -> None:
    gm, run = before("choose_precision", linear_joint(tokens=tokens))
    assert check_pass(gm, run) == 0
    assert reasons(gm) == [None, None, None]


@pytest.mark.parametrize(
    ("n", "k", "dtype", "reason"),
    [
        (0, 32, torch.bfloat16, "N is 0"),
        (64, 32, torch.float64, "dtype float64 has no FP8 form"),
        (64, 32, torch.complex64, "dtype complex64 has no FP8 form"),
        (64, 32, torch.int32, "dtype int32 has no FP8 form"),
    ],
)
def test_reasons(n: int, k: int, dtype: torch.dtype, reason: str) -> None:
    gm = fprop(n, k, dtype)
    find_gemms(gm)
    assert check_pass(gm, choose_precision) == 1
    assert reasons(gm) == [reason]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_that_have_an_fp8_form(dtype: torch.dtype) -> None:
    gm = fprop(dtype=dtype)
    find_gemms(gm)
    choose_precision(gm)
    assert reasons(gm) == [None]


def test_what_the_user_skips() -> None:
    gm, _ = before("choose_precision")
    assert choose_precision(gm, skips=lambda fqn: fqn == "w") == 3
    assert reasons(gm) == [SKIPPED] * 3


# --- cost ---------------------------------------------------------------------------------------

# A device on which arithmetic is all that counts, and one on which nothing but launches does.
FREE_CASTS = replace(H200, copy_bandwidth=1e21, launch_seconds=0.0)
SLOW_LAUNCHES = replace(H200, launch_seconds=1.0)


class Wide(nn.Module):
    """Two sites that share a computed input; the output of one is the input of a third."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(64, 32))
        self.b = nn.Parameter(torch.randn(16, 32))
        self.c = nn.Parameter(torch.randn(48, 64))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sin(x)
        return F.linear(F.linear(h, self.a), self.c).sum() + F.linear(h, self.b).sum()


def found_gemms(module: nn.Module, tokens: int | None = 32) -> fx.GraphModule:
    x = torch.randn(tokens or 32, 32, requires_grad=True)
    if tokens is None:
        torch._dynamo.mark_dynamic(x, 0)
    joint = trace_joint(module, x)
    find_gemms(joint.gm, sites=joint.sites)
    return joint.gm


def test_no_cost_decision_without_a_device() -> None:
    gm = found_gemms(Wide())
    assert choose_precision(gm) == 0
    assert COSTS not in gm.meta


def test_what_is_slower_is_declined_with_both_times() -> None:
    gm, _ = before("choose_precision")
    assert check_pass(gm, lambda gm: choose_precision(gm, device=SLOW_LAUNCHES)) == 3
    (reason,) = set(reasons(gm))
    assert reason is not None and reason.startswith(f"{SLOWER}: ")
    assert " us against 3e+06 us; it pays with no number of tokens" in reason


def test_what_is_faster_is_kept() -> None:
    gm = found_gemms(Wide())
    assert choose_precision(gm, device=FREE_CASTS) == 0
    assert set(reasons(gm)) == {None}


def test_only_predicted_when_nothing_shall_be_declined() -> None:
    gm = found_gemms(Wide())
    assert choose_precision(gm, device=SLOW_LAUNCHES, decline_slower=False) == 0
    costs = gm.meta[COSTS]
    assert set(costs) == {(site, gemm) for site in range(3) for gemm in Gemm}
    assert all(cost.fp8_us > cost.high_us for cost in costs.values())


def test_the_reason_names_the_crossover() -> None:
    x = torch.randn(64, 512, requires_grad=True, dtype=torch.bfloat16)
    joint = trace_joint(nn.Linear(512, 1024, bias=False).bfloat16(), x)
    find_gemms(joint.gm, sites=joint.sites)
    assert choose_precision(joint.gm, device=H200) == 3
    (reason,) = set(reasons(joint.gm))
    assert reason is not None
    crossover = int(reason.split("it pays from ")[1].removesuffix(" tokens"))
    assert crossover > 64 and crossover % 16 == 0


def test_sites_that_share_an_input_are_decided_together() -> None:
    device = replace(FREE_CASTS, launch_seconds=4.5e-9)
    alone, together = found_gemms(Wide()), found_gemms(Wide())
    choose_precision(alone, skips=lambda fqn: fqn != "b", device=device)
    choose_precision(together, device=device)
    for gm, kept in ((alone, False), (together, True)):
        b = [info.is_fp8 for _, info in gemms(gm) if info.site.fqn == "b"]
        assert b == [kept] * 3


def test_symbolic_tokens_are_decided_by_their_hint() -> None:
    gm = found_gemms(Wide(), tokens=None)
    choose_precision(gm, device=SLOW_LAUNCHES)
    why = {info.gemm: str(info.reason) for _, info in gemms(gm)}
    assert why.keys() == set(Gemm) and all(reason.startswith(SLOWER) for reason in why.values())


def test_skipped_and_impossible_gemms_have_their_time_only() -> None:
    gm = found_gemms(Wide())
    choose_precision(gm, skips=lambda fqn: fqn == "c", device=FREE_CASTS)
    predicted = {site: set() for site in range(3)}
    for (site, _), cost in gm.meta[COSTS].items():
        predicted[site].add(cost.fp8_us is not None)
    assert sorted(predicted.values(), key=str) == [{False}, {True}, {True}]


def test_odd_sizes_and_dtypes_are_not_predicted() -> None:
    for gm in (fprop(n=0), fprop(dtype=torch.float64)):
        find_gemms(gm)
        choose_precision(gm, device=H200)
        assert gm.meta[COSTS] == {}


def test_current_scaling_reads_what_it_casts_twice() -> None:
    times = []
    for recipe in ("delayed", "current"):
        gm = found_gemms(Wide())
        choose_precision(gm, device=H200, decline_slower=False, recipe=RECIPES[recipe])
        times.append(sum(cost.fp8_us for cost in gm.meta[COSTS].values()))
    assert times[0] < times[1]


class Casts(nn.Module):
    """One linear layer, with something in front of it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(64, 32))
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "input":
            return F.linear(x, self.w)
        h = torch.sin(x)
        out = F.linear(h, self.w)
        return out if self.kind == "fused" else out.sum() + h.sum()


def test_casts_are_fused_into_pointwise_producers() -> None:
    """A graph input is read; a computed value is not; one that others read is written as well."""
    casts = {}
    for kind in ("input", "fused", "also read"):
        gm = found_gemms(Casts(kind))
        sized = {node: each for node, info in gemms(gm) if (each := _sized(node, info, None))}
        _add_casts(sized)
        fprop_gemm = next(each for each in sized.values() if each.info.gemm is Gemm.FPROP)
        casts[kind] = fprop_gemm.casts[0]
    assert (casts["input"].read, casts["input"].written, casts["input"].launches) == (4, 2, 1)
    assert (casts["fused"].read, casts["fused"].spared, casts["fused"].launches) == (0, 4, 0)
    assert (casts["also read"].read, casts["also read"].spared) == (0, 0)


def test_weights_that_are_cast_once_cost_nothing() -> None:
    """And rows that only GEMMs of one direction take find their scales in registers."""
    costs = {}
    for once in (False, True):
        gm, _ = before("choose_precision", linear_joint())
        choose_precision(
            gm,
            device=H200,
            decline_slower=False,
            recipe=RECIPES["rowwise"],
            weights_cast_once=once,
        )
        costs[once] = {gemm: cost.fp8_us for (_, gemm), cost in gm.meta[COSTS].items()}
    launch_us = 1e6 * H200.launch_seconds
    saved = {gemm: costs[False][gemm] - costs[True][gemm] for gemm in Gemm}
    assert saved[Gemm.FPROP] > launch_us / 2 and saved[Gemm.DGRAD] > launch_us
    assert saved[Gemm.WGRAD] == pytest.approx(0)


def test_rows_alone_are_scaled_in_registers() -> None:
    """Columns, too, are looked for before the cast."""
    launches = {}
    for kind, tokens in (("inference", False), ("training", True)):
        x = torch.randn(32, 32, requires_grad=tokens)
        joint = trace_joint(Wide() if tokens else Wide().requires_grad_(False), x)
        find_gemms(joint.gm, sites=joint.sites)
        sized = {n: e for n, i in gemms(joint.gm) if (e := _sized(n, i, RECIPES["rowwise"]))}
        _add_casts(sized, weights_cast_once=True)
        gemm = next(each for each in sized.values() if each.info.gemm is Gemm.FPROP)
        launches[kind] = gemm.casts[0].launches
    assert launches == {"inference": 0, "training": 1}
