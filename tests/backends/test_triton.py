"""Whole final graphs, lowered to kernel launches; what they compute is tested per region."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fp8compile.backends import fused
from fp8compile.backends import triton as lowering
from fp8compile.backends.cublaslt import SCALED_MM_CUBLASLT
from fp8compile.backends.triton import lower_to_triton, regions_of, stored
from fp8compile.backends.tuning import CublasltAlgorithm, GemmShape
from fp8compile.backends.words import FILL, TRACK
from fp8compile.compile import compile_graph
from fp8compile.internals import is_tangent
from fp8compile.ir import aten
from fp8compile.options import parse_options
from fp8compile.passes import (
    add_in_gemms,
    drop_unused_outputs,
    grow_regions,
    run_final_passes,
    split_regions,
)
from fp8compile.quantized_weights import WEIGHTS_GRAPH
from tests.helpers import interpret
from tests.models import MLP, Residual
from tests.passes.common import residual


@pytest.fixture(autouse=True)
def _without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(lowering, "choose_gemm", lambda shape, device_index: None)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def lowered(
    model: nn.Module, x: Tensor, recipe: str = "delayed", least_bytes: int = 2**24, **kwargs: Any
) -> dict[str, fx.GraphModule]:
    """The forward and the backward graph as Inductor gets them on a GPU."""
    found: dict[str, fx.GraphModule] = {}

    def keep(gm: fx.GraphModule, example_inputs: Any, **_: Any) -> Callable[..., Any]:
        graph = fx.Graph()
        graph.output(graph.graph_copy(gm.graph, {}))
        copy = fx.GraphModule(gm, graph)
        drop_unused_outputs(copy)
        grow_regions(copy)
        split_regions(copy, least_bytes)
        lower_to_triton(copy)
        way = "backward" if any(is_tangent(node) for node in gm.graph.nodes) else "forward"
        found["weights" if WEIGHTS_GRAPH in gm.meta else way] = copy
        return interpret(gm, example_inputs)

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        options = parse_options({"recipe": recipe})
        return compile_graph(gm, example_inputs, options, inner_compile=keep)

    output = torch.compile(model, backend=backend, **kwargs)(x)
    if output.requires_grad:
        output.sum().backward()
    return found


def kernel_of(node: fx.Node) -> Any:
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    return kernel_side_table.get_kernel(node.kwargs["kernel_idx"]).fn.fn


def launched(gm: fx.GraphModule) -> Counter[str]:
    """How often each kernel of regions and GEMMs is launched, by name."""
    nodes = [node for node in gm.graph.nodes if "triton_kernel" in str(node.target)]
    count = Counter(kernel_of(node).__name__ for node in nodes)
    assert count.pop(FILL, 0) <= 1 >= count.pop(TRACK, 0)
    return count


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_nothing_of_the_fp8_ir_is_left(dynamic: bool) -> None:
    graphs = lowered(MLP(bias=True).bfloat16(), torch.randn(32, 64).bfloat16(), dynamic=dynamic)
    assert set(graphs) == {"forward", "backward"}
    for gm in graphs.values():
        gm.graph.lint()
        assert not [n for n in gm.graph.nodes if n.op == "call_module"]
        assert not [n for n in gm.graph.nodes if "fp8." in str(n.target)]
        assert sum("_scaled_mm" in str(n.target) for n in gm.graph.nodes) >= 2
        # Inductor of torch 2.11 looks up what every size is, used or not.
        arithmetic = [n for n in gm.graph.nodes if n.target in vars(operator).values()]
        assert all("val" in n.meta for n in arithmetic)


def test_an_algorithm_of_cublaslt_is_an_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the operands as the casts write them, both K-major."""
    shapes = []

    def choose(shape: GemmShape, device_index: int) -> CublasltAlgorithm:
        shapes.append(shape)
        return CublasltAlgorithm(len(shapes))

    monkeypatch.setattr(lowering, "choose_gemm", choose)
    graphs = lowered(MLP(bias=True).bfloat16(), torch.randn(32, 64).bfloat16())
    found = []
    for gm in graphs.values():
        gm.graph.lint()
        assert not [n for n in gm.graph.nodes if "aten._scaled_mm" in str(n.target)]
        for node in gm.graph.find_nodes(op="call_function", target=SCALED_MM_CUBLASLT):
            a, b, _, _, bias, addend, out_dtype, fast_accum, algorithm, _, _ = node.args
            (m, k), (n, same_k) = a.meta["val"].shape, b.meta["val"].shape
            assert k == same_k and fast_accum
            assert node.meta["val"].shape == (m, n) and node.meta["val"].dtype == out_dtype
            shape = shapes[algorithm - 1]
            assert (shape.m, shape.n, shape.k, shape.fixed) == (m, n, k, True)
            assert (shape.bias is None) == (bias is None) and addend is None
            found.append(algorithm)
    assert sorted(found) == list(range(1, len(shapes) + 1)) and len(found) >= 4


@pytest.mark.parametrize("choice", [CublasltAlgorithm(2), None], ids=str)
def test_an_addend_goes_to_cublaslt_or_is_added_apart(
    choice: CublasltAlgorithm | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowering, "choose_gemm", lambda shape, _: choice if shape.adds else None)
    gm = residual()
    assert add_in_gemms(gm, lambda gemm: True) == 1
    gm.recompile()
    inputs = [torch.randn(shape).bfloat16() for shape in ((2, 8, 64), (16, 32), (64, 32))]
    want = gm(*inputs)
    lowering.lower_to_triton(gm)
    gm.graph.lint()
    if choice is None:
        assert len(gm.graph.find_nodes(op="call_function", target=aten._scaled_mm.default)) == 1
        (total,) = gm.graph.find_nodes(op="call_function", target=aten.add.Tensor)
        assert [node.name for node in total.all_input_nodes] == ["add_fp8_product_lt", "x_rows"]
        return
    gm.recompile()
    (sums,) = gm.graph.find_nodes(op="call_function", target=SCALED_MM_CUBLASLT)
    assert sums.args[4:] == (None, sums.args[5], torch.bfloat16, True, 2, 0, 0)
    assert sums.args[5].name == "x_rows"
    assert all(map(torch.equal, gm(*inputs), want))


def test_of_unknown_sizes_no_algorithm_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[GemmShape] = []
    monkeypatch.setattr(lowering, "choose_gemm", lambda shape, device: shapes.append(shape))
    lowered(MLP(bias=True).bfloat16(), torch.randn(32, 64).bfloat16(), dynamic=True)
    assert shapes and not any(shape.fixed for shape in shapes)


def test_the_launches_of_a_block() -> None:
    graphs = lowered(MLP(bias=True).bfloat16(), torch.randn(32, 64).bfloat16())
    # Both weights in one; the norm; the activation.
    assert sorted(launched(graphs["forward"])) == ["fp8_bundle", "fp8_exp", "fp8_rsqrt_mean"]
    backward = launched(graphs["backward"])
    assert backward["fp8_bundle"] == 1 and set(backward.values()) == {1}
    # The sums for bias gradients, those of gate and up together, are completed by what makes them.
    assert not [name for name in backward if name.endswith("_column_sums")]
    assert len([name for name in backward if name.endswith("_colsum")]) == 2


def test_single_numbers_are_words_of_one_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which launches take one view of, and GEMMs by cuBLASLt none."""
    monkeypatch.setattr(lowering, "choose_gemm", lambda shape, device: CublasltAlgorithm(1))
    graphs = lowered(MLP(bias=True).bfloat16(), torch.randn(32, 64).bfloat16())
    for gm in graphs.values():
        made = gm.graph.find_nodes(op="call_function", target=aten.empty.memory_format)
        assert min(node.meta["val"].numel() for node in made) > 1
        words = made[0]
        for node in gm.graph.nodes:
            if "triton_kernel" in str(node.target):
                views = [n for n in node.all_input_nodes if n.target is aten.slice.Tensor]
                assert len(views) <= 1 and all(view.args[0] is words for view in views)
            if node.target is SCALED_MM_CUBLASLT:
                assert node.args[2] is node.args[3] is words and node.args[-2] != node.args[-1]
                assert node.args[-2] % 4 == node.args[-1] % 4 == 0  # cuBLASLt wants 16 bytes
    fill, *_, track = (n for n in graphs["forward"].graph.nodes if "triton_kernel" in str(n.target))
    assert [kernel_of(node).__name__ for node in (fill, track)] == [FILL, TRACK]


def test_weights_are_cast_in_one_launch_in_inference_too() -> None:
    with torch.no_grad():
        graphs = lowered(MLP(bias=True).bfloat16(), torch.randn(32, 64).bfloat16())
    assert sorted(launched(graphs["forward"])) == ["fp8_exp", "fp8_rsqrt_mean"]
    assert launched(graphs["weights"]) == {"fp8_bundle": 1}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_the_launches_of_a_region_in_parts(dynamic: bool) -> None:
    x = torch.randn(32, 64).bfloat16().requires_grad_()
    kwargs = {"recipe": "current", "dynamic": dynamic}
    whole = lowered(Residual().bfloat16(), x, **kwargs)["backward"]
    parts = lowered(Residual().bfloat16(), x, least_bytes=1, **kwargs)["backward"]
    parts.graph.lint()
    new, old = launched(parts) - launched(whole), launched(whole) - launched(parts)
    # What looks for an amax is gone; one kernel stores the gradient, and one casts it.
    assert [name for name in old if name.endswith("_amax")]
    stored = [name for name in new if not name.endswith("_column_sums")]
    assert sorted(stored) == ["fp8_cast", "fp8_value_colsum"]
    assert not [n for n in parts.graph.nodes if "fp8." in str(n.target)]


class Block(nn.Module):
    """Norms and SwiGLU over tokens of several sequences, without GEMMs that can be merged."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.up = nn.RMSNorm(32), nn.Linear(32, 48), nn.Linear(32, 48, False)
        self.down, self.second, self.head = nn.Linear(48, 32), nn.LayerNorm(32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        x = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return self.head(self.second(x))


def results(model: nn.Module, sizes: list[tuple[int, int]], unknown: set[int], lower: bool) -> Any:
    """What training steps with inputs ``[*size, 32]`` give, whose dimensions are symbols that are
    ``unknown``; and how large the regions are.
    """
    regions: list[int] = []

    def inner(gm: fx.GraphModule, example_inputs: Any, **_: Any) -> Callable[..., Any]:
        run_final_passes(gm, "forward", fused=lower)
        regions.extend(len(region.gm.graph.nodes) for region in regions_of(gm).values())
        if lower:
            lower_to_triton(gm)
            gm.recompile()
        return interpret(gm, example_inputs)

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        options = parse_options({"recipe": "current", "decline_slower": False})
        return compile_graph(gm, example_inputs, options, inner_compile=inner)

    torch._dynamo.reset()
    compiled, found = torch.compile(model, backend=backend), []
    for index, size in enumerate(sizes):
        x = torch.randn(*size, 32, generator=torch.Generator().manual_seed(index))
        for dim in unknown:
            torch._dynamo.maybe_mark_dynamic(x, dim)
        x.requires_grad_()
        model.zero_grad()
        out = compiled(x)
        out.square().sum().backward()
        found.append([out.detach(), x.grad, *(p.grad.clone() for p in model.parameters())])
    return found, regions


@pytest.mark.filterwarnings("ignore:FP8 is emulated here")
@pytest.mark.parametrize("unknown", [set(), {0}, {1}, {0, 1}], ids=str)
def test_the_launches_compute_what_the_reference_does(
    unknown: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes may be known at run time only: kernels are the same, and are not made again."""
    monkeypatch.setattr(lowering, "choose_gemm", lambda shape, _: CublasltAlgorithm(0))
    monkeypatch.setattr(fused, "_MULTIPROCESSORS", 2)  # a search has programs for each
    model = Block()
    sizes = [(3, 8), (3 + 2 * (0 in unknown), 8 + 2 * (1 in unknown))]
    reference, _ = results(model, sizes, unknown, lower=False)
    launched, regions = results(model, sizes, unknown, lower=True)
    for want, got in zip(reference, launched, strict=True):
        for first, second in zip(want, got, strict=True):
            torch.testing.assert_close(first, second)
    _, known = results(model, sizes[:1], set(), lower=True)
    assert (regions == known) == (len(unknown) < 2)  # views with two are left to Inductor


class Pooled(nn.Module):
    """The mean over tokens: its gradient is one row, expanded over them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.head = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.linear(x)).mean(1))


def test_what_kernels_read_is_written_once() -> None:
    """Inductor would write a value that it computes once per launch that takes it."""
    graphs = lowered(Pooled().bfloat16(), torch.randn(4, 32, 64).bfloat16().requires_grad_())
    for gm in graphs.values():
        written = [n for n in gm.graph.nodes if "force_stride_order" in str(n.target)]
        assert written and all(n.users for n in written)
        for launch in (n for n in gm.graph.nodes if "triton_kernel" in str(n.target)):
            for tensor in launch.kwargs["kwargs"].values():
                assert stored(tensor).op == "placeholder" or stored(tensor).target in IN_MEMORY


IN_MEMORY = {
    aten.empty.memory_format,
    aten.full.default,
    aten.slice.Tensor,  # of a placeholder, or of the zeroed words
    torch.ops.prims.inductor_force_stride_order.default,
}


def test_of_a_view_its_base_is_stored() -> None:
    """An expanded value has no memory of its own that could be written."""
    graph = fx.Graph()
    row = graph.call_function(aten.relu.default, (graph.placeholder("x"),))
    flat = graph.call_function(aten.view.default, (row, [4, 1, 64]))
    wide = graph.call_function(aten.expand.default, (flat, [4, 32, 64]))
    assert stored(wide) is row and stored(row) is row
