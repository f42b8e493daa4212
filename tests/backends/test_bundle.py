"""Several regions in one launch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8compile.backends import bundle
from fp8compile.backends.bundle import bundles, can_share, emit_bundle
from fp8compile.backends.kernels.launch import run
from fp8compile.backends.triton import lower_to_triton
from fp8compile.passes import grow_regions
from tests.backends.common import Case, assert_close, bundled, only_region, quantize
from tests.helpers import trace_final

SCALES = {"known": [30.0, 700.0], "unknown": [0.0, 0.0], "one unknown": [30.0, 0.0]}


def row_major(scales: str, *shape: int) -> Case:
    return weight(lambda w, scale: quantize(w, scale)[0::2], scales, w=shape)


def transposed(scales: str, *shape: int) -> Case:
    return weight(lambda w, scale: quantize(w, scale, 1)[1:], scales, w=shape)


def joined(scales: str, *widths: int) -> Case:
    """Weights of GEMMs that are merged."""

    def fn(a: Tensor, b: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return quantize(torch.cat([a, b]), scale)[1:]

    return weight(fn, scales, a=(widths[0], 48), b=(widths[1], 48))


def weight(fn: Any, scales: str, **shapes: tuple[int, ...]) -> Case:
    inputs = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    return only_region(fn, **inputs, scale=torch.tensor(SCALES[scales]))


@pytest.mark.parametrize("scales", SCALES)
def test_every_region_gets_its_own_results(scales: str) -> None:
    cases = [
        row_major(scales, 50, 272),
        row_major(scales, 50, 272),  # looks like the first, with other values
        transposed(scales, 33, 80),
        joined(scales, 16, 32),
        row_major(scales, 16, 16),
    ]
    launch, results = bundled(cases)
    run(launch)
    for case, written in zip(cases, results, strict=True):
        assert_close(written, case.oracle())


def test_regions_that_look_alike_share_their_functions() -> None:
    cases = [row_major("known", 50, 272), transposed("known", 32, 32), row_major("known", 50, 272)]
    text = emit_bundle([case.region for case in cases]).text
    assert text.count("def _region_") == text.count("    _region_") == 2
    assert "tl.where(region == 1, r2_" in text


def test_a_bundle_is_limited_in_bytes_and_in_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    regions = [row_major("known", 32, width).region for width in (32, 32, 64, 16, 16, 16)]
    monkeypatch.setattr(bundle, "MOST_BYTES", 2048)
    assert [len(group) for group in bundles(regions)] == [2, 1, 3]
    monkeypatch.setattr(bundle, "MOST_REGIONS", 2)
    assert [len(group) for group in bundles(regions)] == [2, 1, 2, 1]


def test_what_needs_more_than_one_launch_or_counters_is_left_alone() -> None:
    def norm(x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return quantize(x * torch.rsqrt(x.square().mean(-1, keepdim=True)), scale)

    def bias(x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return (*quantize(x, scale), x.sum(0))

    assert can_share(row_major("known", 32, 32).region)
    assert not can_share(weight(norm, "known", x=(32, 32)).region)
    assert not can_share(weight(bias, "known", x=(32, 32)).region)
    current = only_region(lambda w: quantize(w, None)[0::2], w=torch.randn(32, 32))
    assert not can_share(current.region)


def test_casts_of_parameters_are_launched_together() -> None:
    """What is saved for backward, or comes in as a gradient, is cast where it is needed."""

    def fn(primals_1: Tensor, primals_2: Tensor, saved: Tensor, scale: Tensor) -> list[Tensor]:
        return [out for x in (primals_1, saved, primals_2) for out in quantize(x, scale)[:1]]

    shapes = {"primals_1": (32, 48), "primals_2": (64, 32), "saved": (32, 32)}
    gm = trace_final(fn, **{n: torch.randn(s) for n, s in shapes.items()}, scale=torch.ones(1))
    grow_regions(gm)
    assert len([*gm.children()]) == 3
    sources = lower_to_triton(gm)
    names = Counter(name.rpartition("_")[0] for name in sources)
    assert names == {"fp8_fill_words": 1, "fp8_bundle": 1, "fp8_cast": 1}
    assert len([n for n in gm.graph.nodes if "triton_kernel" in str(n.target)]) == 3
