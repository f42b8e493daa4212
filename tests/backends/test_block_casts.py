"""Regions whose casts have a scale per block: bit for bit where nothing comes before the cast."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, fx, nn

from fp8compile.backends import triton
from fp8compile.backends.block_gemms import is_scaled_mm
from fp8compile.backends.fused import emit_once, tiles
from fp8compile.backends.kernels.scaled_mm_few_rows import FEW_ROWS, FEW_ROWS_OF_BLOCKS
from fp8compile.compile import compile_graph
from fp8compile.frozen import freeze
from fp8compile.ir import SCALED_MM_BLOCKS, aten
from fp8compile.options import parse_options
from fp8compile.passes import drop_unused_outputs, grow_regions
from tests.backends.common import DEVICE, only_region
from tests.helpers import interpret, trace_final
from tests.models import MLP, sqnr_db

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BLOCKS = [(1, 128), (128, 128), (1, 32), (1, 0)]
COPIES = [(True, True), (True, False), (False, True)]


def quantize(
    x: Tensor,
    block: Sequence[int],
    power_of_two: bool = False,
    fmt: torch.dtype = E4M3,
    copies: tuple[bool, bool] = (True, True),
) -> list[Tensor]:
    """``fp8::quantize_blocks``, of which the wanted copies and their scales are returned."""
    outputs = torch.ops.fp8.quantize_blocks(x, block, power_of_two, fmt, *copies)
    return [output for output, wanted in zip(outputs, copies * 2, strict=True) if wanted]


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype in (E4M3, E5M2) else x


def uneven(*shape: int) -> Tensor:
    m, n = shape
    x = torch.randn(m, n) * 10 ** torch.randn(m, 1) * 10 ** torch.randn(1, n)
    return x.bfloat16().to(DEVICE)


@pytest.mark.parametrize("copies", COPIES, ids=["both", "row-major", "transposed"])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("shape", [(32, 1), (5, 3), (1, 1), (3, 40)], ids=str)
def test_the_padding_of_a_narrow_matrix_is_zero(
    shape: tuple[int, int], block: tuple[int, int], copies: tuple[bool, bool]
) -> None:
    case = only_region(lambda x: quantize(x, block, copies=copies), x=uneven(*shape))
    found = case.run()
    for name, want in case.oracle().items():
        assert torch.equal(bits(found[name]), bits(want)), name


@pytest.mark.parametrize("copies", COPIES, ids=["both", "row-major", "transposed"])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("shape", [(128, 256), (130, 200), (33, 16), (1, 130)], ids=str)
def test_a_cast_alone_is_the_reference_bit_by_bit(
    shape: tuple[int, int], block: tuple[int, int], copies: tuple[bool, bool]
) -> None:
    x = uneven(*shape)
    x[0, 5], x[-1, 7], x[:, 9] = torch.nan, torch.inf, 0
    want = quantize(x, block, copies=copies)
    case = only_region(lambda x: quantize(x, block, copies=copies), x=x)
    for tile in tiles(case.region):
        for expected, found in zip(want, case.run(tile).values(), strict=True):
            assert torch.equal(bits(expected), bits(found)), tile


@pytest.mark.parametrize("block", [(1, 32), (1, 128), (128, 128)], ids=str)
@pytest.mark.parametrize("shape", [(40, 32), (33, 16), (130, 200)], ids=str)
def test_rows_and_blocks_of_one_value(shape: tuple[int, int], block: tuple[int, int]) -> None:
    """As where two GEMMs with recipes of their own read it: tiles hold whole rows and blocks, or
    the scales of rows are found before.
    """

    def both(x: Tensor) -> list[Tensor]:
        rows, blocks = (quantize(x, size, copies=(True, False)) for size in ((1, 0), block))
        return [*rows, *blocks]

    x = uneven(*shape)
    case = only_region(both, x=x)
    for tile in tiles(case.region):
        for expected, found in zip(both(x), case.run(tile).values(), strict=True):
            assert torch.equal(bits(expected), bits(found)), tile


@pytest.mark.parametrize("rows", [20, 130])
def test_tiles_of_sums_made_before_cover_the_padding(rows: int) -> None:
    """The last of them may hold nothing else: a transposed copy is padded to blocks of 128."""

    def twice(x: Tensor, w: Tensor) -> list[Tensor]:
        y = norm(x, w)
        return [*quantize(y, (1, 128)), *quantize(y, (1, 32), copies=(True, False))]

    case = only_region(twice, x=uneven(rows, 200), w=torch.randn(200).bfloat16())
    assert case.region.sums_apart and case.region.searched
    want = case.oracle()
    for tile in tiles(case.region):
        found = case.run(tile)
        assert all(close(want[key], found[key]) for key in want), tile


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_scales_that_are_powers_of_two_and_the_other_format(block: tuple[int, int]) -> None:
    x = uneven(130, 200)
    x[0, 5], x[-1, 7], x[:, 9] = torch.nan, torch.inf, 0
    assert bit_by_bit(lambda x: quantize(x, block, True, E5M2), x)


def norm(x: Tensor, w: Tensor) -> Tensor:
    f = x.float()
    return (f * torch.rsqrt(f.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * w


def swiglu_backward(gate: Tensor, up: Tensor, g: Tensor) -> Tensor:
    s = gate.float().sigmoid()
    up_grad = g.float() * gate.float() * s
    gate_grad = g.float() * up.float() * s * (1 + gate.float() * (1 - s))
    return torch.cat([gate_grad.to(g.dtype), up_grad.to(g.dtype)], 1)


VALUES: dict[str, tuple[Callable[..., Tensor], dict[str, tuple[int, ...]]]] = {
    "norm": (norm, {"x": (70, 200), "w": (200,)}),
    "norm of few columns": (norm, {"x": (70, 48), "w": (48,)}),
    "swiglu backward": (swiglu_backward, dict.fromkeys(("gate", "up", "g"), (130, 128))),
    "swiglu backward of odd parts": (
        swiglu_backward,
        dict.fromkeys(("gate", "up", "g"), (40, 72)),
    ),
    "weights": (lambda a, b: torch.cat([a, b]), {"a": (64, 160), "b": (144, 160)}),
    "parts of other values": (lambda a, b: torch.cat([a, b], 1), {"a": (40, 128), "b": (40, 256)}),
}


def close(want: Tensor, found: Tensor) -> bool:
    """Up to values that one more rounding moves to their neighbour."""
    if want.dtype is torch.float32:
        return torch.allclose(want, found, rtol=1e-5)
    return bool(sqnr_db(want.float(), found.float()) > 35)


@pytest.mark.parametrize("copies", COPIES, ids=["both", "row-major", "transposed"])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("name", VALUES)
def test_casts_behind_other_operators(
    name: str, block: tuple[int, int], copies: tuple[bool, bool]
) -> None:
    fn, shapes = VALUES[name]
    inputs = {n: torch.randn(shape).bfloat16().to(DEVICE) for n, shape in shapes.items()}
    case = only_region(lambda **inputs: quantize(fn(**inputs), block, copies=copies), **inputs)
    oracle = case.oracle()
    # Which copies are written does not change a tile's arithmetic: one is enough for those alone.
    for tile in tiles(case.region)[: None if all(copies) else 1]:
        found = case.run(tile)
        assert all(close(oracle[key], found[key]) for key in oracle), tile


def test_values_and_column_sums_beside_a_cast() -> None:
    def fn(x: Tensor, g: Tensor) -> list[Tensor]:
        value = x * g.sigmoid()
        return [*quantize(value, (1, 128)), value, value.float().sum(0)]

    inputs = {name: torch.randn(130, 200).bfloat16().to(DEVICE) for name in ("x", "g")}
    case = only_region(fn, **inputs)
    oracle, found = case.oracle(), case.run()
    assert all(sqnr_db(oracle[key].float(), found[key].float()) > 35 for key in oracle)


def test_each_input_is_loaded_once_and_the_head_says_so() -> None:
    fn, shapes = VALUES["swiglu backward"]
    inputs = {n: torch.randn(shape).bfloat16() for n, shape in shapes.items()}
    text = emit_once(only_region(lambda **i: quantize(fn(**i), (1, 128)), **inputs).region).text
    assert all(text.count(f"tl.load(input_{i}_ptr") == 1 for i in (1, 2, 3))
    assert "fp8.quantize_blocks(" in text and "each byte once" in text


def bit_by_bit(fn: Callable[[Tensor], list[Tensor]], x: Tensor) -> bool:
    """Whether every tile of the region of a function gives what the reference does."""
    case = only_region(fn, x=x)
    oracle = case.oracle()
    return all(
        torch.equal(bits(oracle[name]), bits(found))
        for tile in tiles(case.region)
        for name, found in case.run(tile).items()
    )


@pytest.mark.parametrize("shape", [(5, 2100), (3, 16500)], ids=str)
def test_long_rows_with_a_scale_each(shape: tuple[int, int]) -> None:
    """One of them is too long for a program that holds it all."""
    x = uneven(*shape)
    x[0, 5], x[-1, 7], x[:, 9] = torch.nan, torch.inf, 0
    region = only_region(lambda x: quantize(x, (1, 0), copies=(True, False)), x=x).region
    assert bool(region.searched) is (shape[1] > 16384)
    assert bit_by_bit(lambda x: quantize(x, (1, 0), copies=(True, False)), x)


@pytest.mark.parametrize("rows", [(True, True), (True, False)], ids=["both", "row-major"])
@pytest.mark.parametrize("block", [(0, 0), (1, 128)], ids=str)
def test_scales_per_row_beside_others_of_one_value(
    block: tuple[int, int], rows: tuple[bool, bool]
) -> None:
    """As where sites with recipes of their own take one input."""

    def fn(x: Tensor) -> list[Tensor]:
        if block == (0, 0):
            others = list(torch.ops.fp8.quantize(x, None, 0, E4M3)[:3])
        else:
            others = quantize(x, block)
        return [*quantize(x, (1, 0), copies=rows), *others]

    assert bit_by_bit(fn, uneven(70, 200))


@pytest.mark.parametrize("block", [(1, 0), (1, 128)], ids=str)
def test_what_lies_behind_the_last_row_counts_as_zero(block: tuple[int, int]) -> None:
    """Also where it lies behind tiles that are all inside; exp(0) is larger than the values."""
    x, y, z = (-torch.rand(144, 128, device=DEVICE) for _ in range(3))
    case = only_region(lambda x, y, z: quantize((x.exp() + y) * z.exp(), block), x=x, y=y, z=z)
    assert case.region.searched
    oracle = case.oracle()
    for tile in tiles(case.region):
        found = case.run(tile)
        assert all(close(oracle[key], found[key]) for key in oracle), tile


def test_a_search_comes_first_where_a_tile_of_whole_blocks_would_hold_too_much() -> None:
    def searched(
        fn: Callable[..., Tensor], copies: tuple[bool, bool], *names: str, rows: int = 40
    ) -> bool:
        inputs = {name: torch.randn(rows, 128).bfloat16() for name in names}
        case = only_region(lambda **i: quantize(fn(**i), (1, 128), copies=copies), **inputs)
        return bool(case.region.searched)

    both, rows = (True, True), (True, False)
    assert searched(swiglu_backward, both, "gate", "up", "g")
    assert not searched(swiglu_backward, rows, "gate", "up", "g")
    assert not searched(lambda x: x.relu(), both, "x")
    assert not searched(lambda x, y: x * y, both, "x", "y")
    # Parts that start at multiples of a tile have their own: each loads one.
    assert searched(lambda q, k, v: torch.cat([q, k, v]), both, "q", "k", "v")
    assert not searched(lambda q, k, v: torch.cat([q, k, v]), both, "q", "k", "v", rows=128)


def test_scales_that_were_searched_for_are_loaded_before_anything_is_stored() -> None:
    fn, shapes = VALUES["swiglu backward"]
    inputs = {n: torch.randn(shape).bfloat16() for n, shape in shapes.items()}
    source = emit_once(only_region(lambda **i: quantize(fn(**i), (1, 128)), **inputs).region)
    main = source.text.split(f"def {source.name}(")[1].split("@triton.jit")[0]
    loads = [match.start() for match in re.finditer(r"tl\.load\(found_ptr", main)]
    assert len(loads) == 2 * (4 + 1)  # of rows in four sets, and of columns, of either half
    assert max(loads) < main.index("_values(") < main.index("tl.store(")


def test_column_sums_beside_scales_per_row() -> None:
    def fn(x: Tensor) -> list[Tensor]:
        value = x.relu()
        return [*quantize(value, (1, 0)), value.float().sum(0)]

    gm = trace_final(fn, x=torch.randn(32, 64))
    assert grow_regions(gm) == 1
    (call,) = gm.graph.find_nodes(op="call_module")
    assert len(call.users) == 5  # both copies with their scales, and the sum


def test_search_loads_each_input_once() -> None:
    fn, shapes = VALUES["swiglu backward"]
    inputs = {n: torch.randn(shape).bfloat16() for n, shape in shapes.items()}
    text = emit_once(only_region(lambda **i: quantize(fn(**i), (1, 0)), **inputs).region).text
    assert all(text.count(f"tl.load(input_{i}_ptr") == 1 for i in (1, 2, 3))
    assert text.count("tl.atomic_max(found_ptr") == 4  # rows and columns of either half


@pytest.mark.parametrize(
    ("m", "n", "k", "blocks", "out", "bias", "yes"),
    [
        (128, 48, 96, [(1, 0), (1, 0)], torch.bfloat16, None, True),
        (128, 48, 96, [(1, 0), (1, 0)], torch.bfloat16, torch.bfloat16, True),
        (128, 48, 96, [(1, 0), (1, 0)], torch.float32, None, False),
        (128, 50, 96, [(1, 0), (1, 0)], torch.bfloat16, None, False),
        (64, 48, 512, [(1, 128), (128, 128)], torch.bfloat16, None, True),
        (64, 48, 512, [(1, 128), (1, 128)], torch.float32, None, True),
        (64, 48, 512, [(1, 128), (1, 128)], torch.float32, torch.bfloat16, False),
        (64, 48, 384, [(1, 128), (128, 128)], torch.bfloat16, None, False),
        (63, 48, 512, [(1, 128), (128, 128)], torch.bfloat16, None, False),
        (64, 48, 512, [(128, 128), (1, 128)], torch.bfloat16, None, False),
        (64, 48, 512, [(1, 32), (1, 32)], torch.bfloat16, None, False),
    ],
)
def test_what_scaled_mm_of_pytorch_can_do(
    m: int, n: int, k: int, blocks: Any, out: torch.dtype, bias: torch.dtype | None, yes: bool
) -> None:
    """As measured with torch 2.11 on an H100."""
    left, right = uneven(m, k).cpu(), uneven(n, k).cpu()

    def fn(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
        a, a_scale_inv = quantize(left, blocks[0], copies=(True, False))
        b, b_scale_inv = quantize(right, blocks[1], copies=(True, False))
        args = (a, b, a_scale_inv, b_scale_inv, bias, out, *blocks, False)
        return torch.ops.fp8.scaled_mm_blocks(*args)

    added = None if bias is None else torch.ones(n, dtype=bias)
    gm = trace_final(fn, left=left, right=right, bias=added)
    (mm,) = gm.graph.find_nodes(op="call_function", target=SCALED_MM_BLOCKS)
    assert is_scaled_mm(mm) is yes


def lowered(
    model: nn.Module, x: Tensor, recipe: str, dynamic: bool = False, more: Sequence[Tensor] = ()
) -> list[tuple[int, fx.GraphModule]]:
    """How many regions the graphs of a call and its backward have, and what they are lowered to;
    and those that calls with ``more`` add.
    """
    torch._dynamo.reset()
    found = []

    def keep(gm: fx.GraphModule, example_inputs: Any, **_: Any) -> Callable[..., Any]:
        graph = fx.Graph()
        graph.output(graph.graph_copy(gm.graph, {}))
        copy = fx.GraphModule(gm, graph)
        drop_unused_outputs(copy)
        regions = grow_regions(copy)
        with mock.patch.object(triton, "choose_gemm", lambda shape, device: None):
            triton.lower_to_triton(copy)
        found.append((regions, copy))
        return interpret(gm, example_inputs)

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        options = parse_options({"recipe": recipe})
        return compile_graph(gm, example_inputs, options, inner_compile=keep)

    compiled = torch.compile(model, backend=backend, dynamic=dynamic)
    for each in (x, *more):
        result = compiled(each)
        if result.requires_grad:
            result.sum().backward()
    return found


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("recipe", ["rowwise", "blockwise", "mx"])
def test_whole_graphs_are_lowered(recipe: str, dynamic: bool) -> None:
    model = MLP(128, 256, bias=True).bfloat16()
    found = lowered(model, torch.randn(48, 128).bfloat16(), recipe, dynamic)
    assert len(found) == 2
    for regions, gm in found:
        gm.graph.lint()
        assert regions > 0
        assert not [n for n in gm.graph.nodes if n.op == "call_module"]
        assert not [n for n in gm.graph.nodes if "fp8." in str(n.target)]
        arithmetic = [n for n in gm.graph.nodes if n.target in vars(operator).values()]
        assert all("val" in n.meta for n in arithmetic)


def scaled_mms(found: Sequence[tuple[int, fx.GraphModule]]) -> int:
    """How many GEMMs are left to PyTorch, in all graphs."""
    target = aten._scaled_mm.default
    return sum(len(gm.graph.find_nodes(op="call_function", target=target)) for _, gm in found)


@pytest.mark.parametrize(
    ("recipe", "most"), [("rowwise", FEW_ROWS), ("blockwise", FEW_ROWS_OF_BLOCKS)]
)
def test_few_rows_have_a_kernel_of_their_own(recipe: str, most: int) -> None:
    for rows in (1, most, most + 4):
        with torch.no_grad():
            found = lowered(MLP(512, 512).bfloat16(), torch.randn(rows, 512).bfloat16(), recipe)
        assert scaled_mms(found) == (0 if rows <= most else 2)


def test_few_rows_that_become_many_are_another_graph() -> None:
    few, as_many, many, more, as_few = (
        torch.randn(rows, 512).bfloat16() for rows in (16, FEW_ROWS, 200, 300, 20)
    )
    model = MLP(512, 512).bfloat16()
    with torch.no_grad():
        before = lowered(model, few, "rowwise", dynamic=True, more=[as_many])
        after = lowered(model, few, "rowwise", dynamic=True, more=[as_many, many, more, as_few])
        never = lowered(model, many, "rowwise", dynamic=True, more=[more, few])
    assert [scaled_mms(found) for found in (before, after, never)] == [0, 2, 2]
    assert len(after) == 2 * len(before) and len(never) == len(before)


def test_rows_of_a_given_range_are_not_guarded() -> None:
    """PyTorch refuses to be told more of them than the user has said."""
    for largest, wanted in ((FEW_ROWS, 0), (4096, 2)):
        x = torch.randn(16, 512).bfloat16()
        torch._dynamo.mark_dynamic(x, 0, min=2, max=largest)
        with torch.no_grad():
            assert scaled_mms(lowered(MLP(512, 512).bfloat16(), x, "rowwise")) == wanted


@pytest.mark.parametrize("recipe", ["rowwise", "blockwise"])
def test_graphs_with_frozen_weights_are_lowered(recipe: str) -> None:
    """Nothing is left of FP8's operators but that which puts weights together, once."""
    model = MLP(128, 256, bias=True).bfloat16()
    freeze(model, recipe)
    x = torch.randn(48, 128).bfloat16()
    with torch.no_grad():
        found = lowered(model, x, recipe)
    left = [str(n.target) for _, gm in found for n in gm.graph.nodes if "fp8." in str(n.target)]
    assert left == ["fp8.cat_rows.default"]
    for _, gm in lowered(model, x.requires_grad_(), recipe):  # backward dequantizes
        gm.graph.lint()
        left = [str(n.target) for n in gm.graph.nodes if "fp8." in str(n.target)]
        assert set(left) <= {"fp8.cat_rows.default"}
