"""What an edge holds, and what a cast to either format would lose of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp8compile.edge_records import EdgeRecord, dequantized
from fp8compile.formats import Format
from fp8compile.ir import Edge
from fp8compile.recipe import RECIPES, Granularity, Operand


def record(recipe: str) -> EdgeRecord:
    return EdgeRecord(Edge(Operand.INPUT, transposed=False), RECIPES[recipe])


def test_what_a_format_holds_loses_nothing() -> None:
    edge = record("current")
    edge.add(448.0 * torch.tensor([[1.0, 0.5], [-0.25, 0.0]]))
    seen = edge.seen()
    assert (seen.noise["e4m3"], seen.underflow["e4m3"], seen.saturated["e4m3"]) == (0, 0, 0)
    assert seen.amax == 448 and seen.rms == pytest.approx(448 * (1.3125 / 4) ** 0.5)


def test_too_small_for_one_format_and_not_for_the_other() -> None:
    edge = record("current")
    edge.add(torch.tensor([[1.0, 2.0**-20, 0.0, 0.0]]))
    seen = edge.seen()
    assert seen.underflow == {"e4m3": 0.5, "e5m2": 0.0}  # of what is not zero


@pytest.mark.parametrize(("recipe", "clipped"), [("delayed", 0.25), ("current", 0.0)])
def test_a_scale_from_earlier_batches_clips(recipe: str, clipped: float) -> None:
    edge = record(recipe)
    edge.add(torch.ones(2, 2))
    edge.add(torch.tensor([[1.0, 1.0], [1.0, 4.0]]))
    assert edge.seen().saturated["e4m3"] == clipped / 2  # the mean of two batches


def test_nothing_is_seen_in_a_batch_without_rows() -> None:
    edge = record("current")
    edge.add(torch.ones(0, 4))
    seen = edge.seen()
    assert (seen.amax, seen.rms, seen.noise["e4m3"]) == (0, 0, 0) and not seen.quantiles


@pytest.mark.parametrize("granularity", [Granularity.ROW, Granularity.BLOCK_1X128])
def test_finer_scales_keep_small_rows_and_clip_nothing(granularity: Granularity) -> None:
    x = torch.cat([torch.full((1, 128), 1e4), torch.full((1, 128), 1e-4)])

    def lost(granularity: Granularity, scale: Tensor) -> tuple[float, bool]:
        y, clipped = dequantized(x, granularity, RECIPES["rowwise"], Format.E4M3, scale)
        return float((y[1] - x[1]).abs().max()), bool(clipped.any())

    assert lost(granularity, torch.ones(())) == (pytest.approx(0, abs=1e-9), False)
    assert lost(Granularity.TENSOR, torch.tensor(448 / 1e4)) == (pytest.approx(1e-4), False)
    assert lost(Granularity.TENSOR, torch.ones(()))[1]
