"""A few random programs, and whether the check would see what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from torch import float8_e5m2, fx

from fp8compile import compile as compiler
from fp8compile.ir import (
    QUANTIZE,
    QUANTIZE_BLOCKS,
    SCALED_MM,
    TRACK_AMAX,
    GemmInfo,
    args_of,
    evaluate,
)
from fp8compile.passes import choose_precision, tag_sites
from fp8compile.passes.insert_casts import quantize_getitem
from fp8compile.recipe import Gemm

from .check import Tally, check
from .programs import Input, Program, programs

pytestmark = pytest.mark.filterwarnings("ignore")


def _settings(examples: int) -> Any:
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@_settings(20)
@given(programs(max_steps=6))
def test_random_programs(program: Program) -> None:
    check(program)


@_settings(3)
@given(programs(max_steps=4))
def test_random_programs_in_triton(program: Program) -> None:
    check(program, kernels=True)


# --- would it see a bug? --------------------------------------------------------------------------

BLOCK = Program(
    inputs=(Input("x", (32, 32), requires_grad=True),),
    init=(
        "self.q, self.k = (nn.Parameter(torch.randn(32, 32) / 5) for _ in range(2))",
        "self.o = nn.Parameter(torch.randn(32, 32) / 8)",
        "self.bias = nn.Parameter(torch.randn(32))",
    ),
    forward=(
        "q, k = F.linear(x, self.q, self.bias), F.linear(x, self.k, self.bias)",
        "h = F.silu(q) * k",
        "y = h @ self.o",
    ),
    outputs="y, x + y",
)


def test_every_gemm_of_the_block_is_compared() -> None:
    tally = Tally()
    check(BLOCK, tally, kernels=True)
    # Training has 9, twice, and inference 3; two of three are merged.
    assert tally.gemms == {"in FP8": 21, "merged": 14}
    assert tally.kernels > tally.regions > 6  # every kernel of training runs in both steps
    assert tally.results["as close as rounding errors allow"] == 0


def _change(node: fx.Node, position: int, value: Any) -> None:
    node.args = (*node.args[:position], value, *node.args[position + 1 :])
    if node.target is QUANTIZE:
        node.meta["val"] = evaluate(node)


def other_operand(gm: fx.GraphModule) -> None:
    """A GEMM takes its weight the other way round."""
    mm = gm.graph.find_nodes(op="call_function", target=SCALED_MM)[1]
    cast = args_of(args_of(mm)[1])[0]
    _change(cast, 4, True)
    with gm.graph.inserting_before(mm):
        _change(mm, 1, quantize_getitem(gm.graph, cast, "fp8"))


def other_scale(gm: fx.GraphModule) -> None:
    """A GEMM undoes the scale of another's operand."""
    first, second = gm.graph.find_nodes(op="call_function", target=SCALED_MM)[:2]
    _change(second, 2, args_of(first)[2])


def no_bias(gm: fx.GraphModule) -> None:
    """A GEMM forgets its bias."""
    for mm in gm.graph.find_nodes(op="call_function", target=SCALED_MM):
        _change(mm, 4, None)


def other_format(gm: fx.GraphModule) -> None:
    """A cast that should be in E4M3 is in E5M2, which has less precision."""
    _change(gm.graph.find_nodes(op="call_function", target=QUANTIZE)[0], 3, float8_e5m2)


def other_slot(gm: fx.GraphModule) -> None:
    """A cast reads the scale of another."""
    casts = gm.graph.find_nodes(op="call_function", target=QUANTIZE)
    _change(casts[0], 2, args_of(casts[1])[2])


def lost_amax(gm: fx.GraphModule) -> None:
    """A cast's amax is not recorded."""
    track = gm.graph.find_nodes(op="call_function", target=TRACK_AMAX)[0]
    amax, values, slots = args_of(track)
    track.args = (amax, values[1:], slots[1:])


BUGS = (other_operand, other_scale, no_bias, other_format, other_slot, lost_amax)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_bug_in_the_graph_is_seen(bug: Callable[[fx.GraphModule], None]) -> None:
    run_passes = compiler.run_passes

    def with_bug(gm: fx.GraphModule, *args: Any, **kwargs: Any) -> dict[str, int]:
        counts = run_passes(gm, *args, **kwargs)
        bug(gm)
        gm.recompile()
        return counts

    with mock.patch.object(compiler, "run_passes", with_bug), pytest.raises(AssertionError):
        check(BLOCK)


def test_a_gemm_that_stays_in_high_precision_is_seen() -> None:
    def reason(node: fx.Node, info: GemmInfo, *_: Any) -> str | None:
        return "forgotten" if info.gemm is Gemm.WGRAD else None

    forgetful = mock.patch.dict(choose_precision.__globals__, {"_reason": reason})
    with forgetful, pytest.raises(AssertionError, match=r"wgrad of sites .* is_fp8=False"):
        check(BLOCK)


MIXED = replace(BLOCK, recipe="blockwise, dgrad is not cast", overrides=(("o", "e4m3_only"),))


@pytest.mark.parametrize("recipe", ["mx", "static", "current, input in e5m2"])
def test_every_recipe_is_compared(recipe: str) -> None:
    tally = Tally()
    check(replace(MIXED, recipe=recipe, overrides=(("o", "rowwise"),)), tally)
    assert tally.gemms["in FP8"] == 21
    assert tally.results["as close as rounding errors allow"] == 0


def test_static_scales_beside_current_ones_that_are_kept() -> None:
    check(replace(BLOCK, recipe="current", overrides=(("q", "static"),)))


def test_a_site_without_its_own_recipe_is_seen() -> None:
    check(MIXED)
    site = tag_sites.__globals__["Site"]

    def forgetful(**fields: Any) -> Any:
        return site(**{**fields, "recipe": None})

    forgotten = mock.patch.dict(tag_sites.__globals__, {"Site": forgetful})
    with forgotten, pytest.raises(AssertionError):
        check(MIXED)


def test_blocks_of_another_size_are_seen() -> None:
    run_passes = compiler.run_passes

    def run(gm: fx.GraphModule, *args: Any, **kwargs: Any) -> dict[str, int]:
        counts = run_passes(gm, *args, **kwargs)
        cast = gm.graph.find_nodes(op="call_function", target=QUANTIZE_BLOCKS)[0]
        cast.update_arg(1, [1, 32])
        return counts

    with mock.patch.object(compiler, "run_passes", run), pytest.raises(AssertionError):
        check(MIXED)
