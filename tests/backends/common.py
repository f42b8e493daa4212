"""Regions made from plain functions, run in Triton and compared with their own FX subgraph."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx

from fp8compile.backends import emit, fused
from fp8compile.backends.bundle import bundle_launch, emit_bundle, prefix, tile_of
from fp8compile.backends.fused import Tile, prepare, run_region
from fp8compile.backends.kernels.launch import Launch
from fp8compile.backends.region import Region
from fp8compile.passes import grow_regions, split_regions
from tests.helpers import trace_final

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FP8 = (E4M3, E5M2)


def quantize(
    x: Tensor, scale: Tensor | None, slot: int = 0, format: torch.dtype = E4M3
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``fp8::quantize``: ``q, q_t, scale_inv, amax``."""
    return torch.ops.fp8.quantize(x, scale, slot, format)


@contextmanager
def what_nobody_writes_is_nan() -> Iterator[None]:
    """New memory, such as the padding of a cast, is no zero by chance."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # then torch.empty fills its memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def no_region_is_small() -> Iterator[None]:
    """As for large matrices, a kernel of its own looks for a missing amax of transposed copies."""
    small = mock.patch.object(emit, "_SMALL", 0)
    with small, mock.patch.dict(fused._emitted, clear=True):
        yield


@dataclass
class Case:
    """One region with values for its inputs."""

    gm: fx.GraphModule
    inputs: dict[str, Tensor]

    @property
    def region(self) -> Region:
        return Region.of(self.gm)

    def run(self, tile: Tile | None = None) -> dict[str, Tensor]:
        with what_nobody_writes_is_nan():
            return run_region(self.gm, self.inputs, tile=tile)

    def oracle(self) -> dict[str, Tensor]:
        """What the subgraph computes in float32, where nothing in between is rounded."""
        inputs = [x.float() if x.is_floating_point() else x for x in self.inputs.values()]
        returned = self.gm.graph.output_node().args[0]
        return dict(zip([n.name for n in returned], _InFloat32(self.gm).run(*inputs), strict=True))


class _InFloat32(fx.Interpreter):
    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.prims.convert_element_type.default:
            return args[0].float()
        return super().call_function(target, args, kwargs)


def only_region(fn: Callable[..., Any], **inputs: Tensor | None) -> Case:
    """The region of a function that has one, with what it is called with."""
    given = {k: v.to(DEVICE) for k, v in inputs.items() if v is not None}
    gm = trace_final(fn, **(inputs | given))
    grow_regions(gm)
    calls = Calls(gm)
    calls.run(*given.values())
    (case,) = calls.cases
    return case


def parts_of_region(fn: Callable[..., Any], **inputs: Tensor | None) -> list[Case]:
    """The parts that a function's region is split into, if that is worth while or not."""
    given = {k: v.to(DEVICE) for k, v in inputs.items() if v is not None}
    gm = trace_final(fn, **(inputs | given))
    grow_regions(gm)
    assert split_regions(gm, least_bytes=-sys.maxsize) == 1
    calls = Calls(gm)
    calls.run(*given.values())
    return calls.cases


class Calls(fx.Interpreter):
    """Notes what every region is called with."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.cases: list[Case] = []

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        region = self.module.get_submodule(target)
        names = [node.name for node in region.graph.find_nodes(op="placeholder")]
        self.cases.append(Case(region, dict(zip(names, args, strict=True))))
        return super().call_module(target, args, kwargs)


def bundled(cases: list[Case]) -> tuple[Launch, list[dict[str, Tensor]]]:
    """The launch that several regions share, and what it will write for each."""
    words = torch.zeros(sum(case.region.word_count for case in cases))
    tensors: dict[str, Any] = {"words": words}
    results = []
    for index, case in enumerate(cases):
        own, words = words.split([case.region.word_count, len(words) - case.region.word_count])
        tile = tile_of(case.region)
        launches, written = prepare(case.gm, case.inputs, tile=tile, words=own)
        for name, tensor in launches[-1].tensors.items():
            tensors[prefix(index) + name.removesuffix("_ptr")] = tensor
        results.append(written)
    return bundle_launch(emit_bundle([case.region for case in cases]), tensors), results


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """FP8 values may differ by one step where float32 rounding decides, and that is rare."""
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        got = actual[name]
        assert got.shape == want.shape, name
        if want.dtype in FP8:
            steps = (ordinal(got) - ordinal(want)).abs()
            assert got.dtype == want.dtype and steps.max() <= 1, name
            assert (steps > 0).float().mean() <= 0.01, name
        elif want.dtype == torch.bool:
            assert torch.equal(got, want), name
        else:
            expected_value, size = want.double(), want.double().abs()
            info = torch.finfo(got.dtype)  # below tiny, numbers lie as far apart as there
            rounding = info.eps * size.clamp(min=info.tiny) + 1e-5 * size.max()
            error = (got.double() - expected_value).abs()
            assert ((error <= rounding) | (got.double() == expected_value)).all(), name


def ordinal(x: Tensor) -> Tensor:
    """FP8 values as integers whose differences count the values in between; NaN far away."""
    bits = x.view(torch.uint8).int()
    value = torch.where(bits < 128, bits, 128 - bits)
    return torch.where(x.float().isnan(), 10_000, value)


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        got = actual[name]
        assert (got.shape, got.dtype) == (want.shape, want.dtype), name
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8)), name
