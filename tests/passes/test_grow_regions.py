"""grow_regions: what becomes one kernel, and what stays outside."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from fp8compile import regions
from fp8compile.ir import QUANTIZE, format_graph
from fp8compile.passes import grow_regions
from tests.helpers import trace_final
from tests.passes.common import lines_of

module = importlib.import_module("fp8compile.passes.grow_regions")  # behind the function's name
E5M2 = torch.float8_e5m2
Outputs = tuple[Tensor, ...]


def quantize(
    x: Tensor, scale: Tensor, slot: int = 0, format: torch.dtype = torch.float8_e4m3fn
) -> Outputs:
    return torch.ops.fp8.quantize(x, scale, slot, format)[:4]


def rms(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * w


def multiply(a: Outputs, b: Outputs) -> Tensor:
    return torch.ops.fp8.scaled_mm(a[0], b[0], a[2], b[2], None, torch.float32, True)


# --- the graphs -----------------------------------------------------------------------------------


def norm(x: Tensor, o: Tensor, w: Tensor, scale: Tensor) -> Outputs:
    """A residual sum, which the next block reads, and its norm."""
    h = x + o
    q, _, scale_inv, amax = quantize(rms(h, w), scale, 1)
    return q, scale_inv, amax, h


def swiglu(gate_up: Tensor, scale: Tensor) -> Outputs:
    """The halves of one matrix, which two merged GEMMs have written."""
    gate, up = gate_up.chunk(2, -1)
    return quantize(F.silu(gate) * up, scale)[:3]


def two_casts(x: Tensor, y: Tensor, scale: Tensor) -> Outputs:
    """Two values of the same matrices, in two formats."""
    return (*quantize(x * y, scale)[0::2], *quantize(x + y, scale, 1, E5M2)[1:3])


def chained(x: Tensor, w: Tensor, scale: Tensor) -> Outputs:
    """The second cast reads x as well, but needs the product of the first."""
    first = quantize(x, scale)
    product = multiply(first, quantize(w, scale, 1))
    return quantize(product * x, scale, 2)[0::2]


def weight_gradient(g: Tensor, x: Tensor, scale: Tensor) -> Outputs:
    """A sum in float32 whose result is wanted in bfloat16, and one that is wanted in both."""
    a, b = (g * x).sum(0), g.sum(0)
    return (*quantize(g * x, scale, 0, E5M2)[:3], a.bfloat16(), b.bfloat16(), b)


def bias_gradient(g: Tensor, x: Tensor, scale: Tensor) -> Outputs:
    d = g * x
    return (*quantize(d, scale, 0, E5M2)[:3], d.sum(0))


def recomputed(x: Tensor, scale: Tensor) -> Outputs:
    """-x is needed by a kernel of Inductor's, too, which can read x instead."""
    h = -x
    return (*quantize(h, scale)[0::2], h.exp().cumsum(0))


def other_axis(x: Tensor, scale: Tensor) -> Outputs:
    """A kernel does not have whole columns at hand."""
    return quantize(x / x.abs().amax(0), scale)[0::2]


def opaque_between(x: Tensor, scale: Tensor) -> Outputs:
    """exp(x) cannot be written by a region that reads what is computed from it."""
    h = x.exp()
    return (*quantize(h * 2, scale)[0::2], *quantize(h * h.cumsum(0), scale, 1)[0::2], h)


def scale_of_another(x: Tensor, scale: Tensor) -> Outputs:
    """The second cast reads what the first does, but needs its scale first."""
    h = x.exp()
    first = torch.ops.fp8.quantize(h, scale, 2, torch.float8_e4m3fn)
    second = torch.ops.fp8.quantize(h, first[4], 0, torch.float8_e5m2)
    return first[0], first[2], second[1], second[2]


def weights(a: Tensor, b: Tensor, scale: Tensor) -> Outputs:
    return quantize(torch.cat([a, b]), scale)[:3]


def viewed(x: Tensor, scale: Tensor) -> Outputs:
    """An operator that no kernel computes reads a view of what is cast."""
    value = x.neg()
    return (*quantize(value, scale)[0::2], value.view(4, 4, 32).permute(1, 0, 2).cumsum(0))


def by_head(x: Tensor, scale: Tensor) -> Outputs:
    """Rotated queries: cast token by token, and kept, head by head, for attention's backward."""
    heads = x.view(2, 8, 4, 8).transpose(1, 2)
    rotated = heads * torch.cat([-heads[..., 4:], heads[..., :4]], -1)
    return (*quantize(rotated.transpose(1, 2).reshape(16, 32), scale)[0::2], rotated)


SIZES = {
    "norm": (norm, {"x": (2, 8, 32), "o": (2, 8, 32), "w": (32,)}),
    "swiglu": (swiglu, {"gate_up": (16, 64)}),
    "two_casts": (two_casts, {"x": (16, 32), "y": (16, 32)}),
    "scale_of_another": (scale_of_another, {"x": (16, 32)}),
    "chained": (chained, {"x": (32, 32), "w": (32, 32)}),
    "weight_gradient": (weight_gradient, {"g": (16, 32), "x": (16, 32)}),
    "bias_gradient": (bias_gradient, {"g": (16, 32), "x": (16, 32)}),
    "recomputed": (recomputed, {"x": (16, 32)}),
    "viewed": (viewed, {"x": (16, 32)}),
    "by_head": (by_head, {"x": (16, 32)}),
    "other_axis": (other_axis, {"x": (16, 32)}),
    "opaque_between": (opaque_between, {"x": (16, 32)}),
    "weights": (weights, {"a": (16, 32), "b": (48, 32)}),
}


def graph(name: str) -> tuple[fx.GraphModule, list[Tensor]]:
    """The graph before the pass, and values for its inputs."""
    fn, shapes = SIZES[name]
    generator = torch.Generator().manual_seed(0)
    inputs = {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    if name == "norm":
        fn = lambda x, o, w, scale: norm(x.flatten(0, 1), o.flatten(0, 1), w, scale)  # noqa: E731
    scale = torch.tensor([30.0, 500.0, 0.0])
    return trace_final(fn, **inputs, scale=scale), [*inputs.values(), scale]


def grown(name: str) -> fx.GraphModule:
    gm, _ = graph(name)
    grow_regions(gm)
    return gm


def region_text(name: str) -> str:
    """The graph of the only region."""
    gm = grown(name)
    (call,) = gm.graph.find_nodes(op="call_module")
    return lines_of(gm.get_submodule(call.target))


# --- what becomes of them -----------------------------------------------------------------------


def test_a_norm_writes_the_residual_sum_that_others_need() -> None:
    assert_expected_inline(
        region_text("norm"),
        """\
input_1 : f32[2, 8, 32]
input_2 : f32[2, 8, 32]
input_3 : f32[32]
input_4 : f32[3]
view_default : f32[16, 32] = aten.view(input_1, [16, 32])
view_default_1 : f32[16, 32] = aten.view(input_2, [16, 32])
add_tensor : f32[16, 32] = aten.add.Tensor(view_default, view_default_1)
pow_tensor_scalar : f32[16, 32] = aten.pow.Tensor_Scalar(add_tensor, 2)
mean_dim : f32[16, 1] = aten.mean.dim(pow_tensor_scalar, [-1], True)
add_tensor_1 : f32[16, 1] = aten.add.Tensor(mean_dim, 1e-05)
rsqrt_default : f32[16, 1] = aten.rsqrt(add_tensor_1)
mul_tensor : f32[16, 32] = aten.mul.Tensor(add_tensor, rsqrt_default)
mul_tensor_1 : f32[16, 32] = aten.mul.Tensor(mul_tensor, input_3)
quantize_default : (e4m3[16, 32], e4m3[0], f32[1], f32[1], f32[1]) = fp8.quantize(mul_tensor_1, input_4, 1, e4m3, True, False)
getitem : e4m3[16, 32] = quantize_default[0]
getitem_1 : f32[1] = quantize_default[2]
getitem_2 : f32[1] = quantize_default[3]
return (getitem, getitem_1, getitem_2, add_tensor)""",  # noqa: E501
    )


def test_outside_only_the_call_is_left() -> None:
    assert_expected_inline(
        lines_of(grown("norm")),
        """\
x : f32[2, 8, 32]
o : f32[2, 8, 32]
w : f32[32]
scale : f32[3]
region_0 : (e4m3[16, 32], f32[1], f32[1], f32[16, 32]) = region_0(x, o, w, scale)
getitem : e4m3[16, 32] = region_0[0]
getitem_2 : f32[1] = region_0[1]
getitem_3 : f32[1] = region_0[2]
add_out : f32[16, 32] = region_0[3]
return (getitem, getitem_2, getitem_3, add_out)""",
    )


def test_the_halves_of_a_merged_matrix_are_read_in_place() -> None:
    assert_expected_inline(
        region_text("swiglu"),
        """\
input_1 : f32[16, 64]
input_2 : f32[3]
split_tensor : (f32[16, 32], f32[16, 32]) = aten.split.Tensor(input_1, 32, -1)
getitem : f32[16, 32] = split_tensor[0]
getitem_1 : f32[16, 32] = split_tensor[1]
neg_default : f32[16, 32] = aten.neg(getitem)
exp_default : f32[16, 32] = aten.exp(neg_default)
add_tensor : f32[16, 32] = aten.add.Tensor(exp_default, 1)
div_tensor : f32[16, 32] = aten.div.Tensor(getitem, add_tensor)
mul_tensor : f32[16, 32] = aten.mul.Tensor(div_tensor, getitem_1)
quantize_default : (e4m3[16, 32], e4m3[32, 16], f32[1], f32[1], f32[1]) = fp8.quantize(mul_tensor, input_2, 0, e4m3)
getitem_2 : e4m3[16, 32] = quantize_default[0]
getitem_3 : e4m3[32, 16] = quantize_default[1]
getitem_4 : f32[1] = quantize_default[2]
return (getitem_2, getitem_3, getitem_4)""",  # noqa: E501
    )


def test_casts_of_the_same_matrices_share_a_region() -> None:
    assert_expected_inline(
        region_text("two_casts"),
        """\
input_1 : f32[16, 32]
input_2 : f32[16, 32]
input_3 : f32[3]
mul_tensor : f32[16, 32] = aten.mul.Tensor(input_1, input_2)
quantize_default : (e4m3[16, 32], e4m3[0], f32[1], f32[1], f32[1]) = fp8.quantize(mul_tensor, input_3, 0, e4m3, True, False)
add_tensor : f32[16, 32] = aten.add.Tensor(input_1, input_2)
quantize_default_1 : (e5m2[0], e5m2[32, 16], f32[1], f32[1], f32[1]) = fp8.quantize(add_tensor, input_3, 1, e5m2, False, True)
getitem : e4m3[16, 32] = quantize_default[0]
getitem_1 : f32[1] = quantize_default[2]
getitem_2 : e5m2[32, 16] = quantize_default_1[1]
getitem_3 : f32[1] = quantize_default_1[2]
return (getitem, getitem_1, getitem_2, getitem_3)""",  # noqa: E501
    )


def test_casts_that_depend_on_each_other_stay_apart() -> None:
    assert_expected_inline(
        lines_of(grown("chained")),
        """\
x : f32[32, 32]
w : f32[32, 32]
scale : f32[3]
region_0 : (e4m3[32, 32], f32[1]) = region_0(x, scale)
getitem : e4m3[32, 32] = region_0[0]
getitem_2 : f32[1] = region_0[1]
region_1 : (e4m3[32, 32], f32[1]) = region_1(w, scale)
getitem_5 : e4m3[32, 32] = region_1[0]
getitem_7 : f32[1] = region_1[1]
scaled_mm : f32[32, 32] = fp8.scaled_mm(getitem, getitem_5, getitem_2, getitem_7, None, f32, True)
region_2 : (e4m3[32, 32], f32[1]) = region_2(x, scale, scaled_mm)
getitem_10 : e4m3[32, 32] = region_2[0]
getitem_12 : f32[1] = region_2[1]
return (getitem_10, getitem_12)""",
    )


def test_a_sum_over_columns_joins() -> None:
    assert_expected_inline(
        region_text("bias_gradient"),
        """\
input_1 : f32[16, 32]
input_2 : f32[16, 32]
input_3 : f32[3]
mul_tensor : f32[16, 32] = aten.mul.Tensor(input_1, input_2)
quantize_default : (e5m2[16, 32], e5m2[32, 16], f32[1], f32[1], f32[1]) = fp8.quantize(mul_tensor, input_3, 0, e5m2)
sum_dim_int_list : f32[32] = aten.sum.dim_IntList(mul_tensor, [0])
getitem : e5m2[16, 32] = quantize_default[0]
getitem_1 : e5m2[32, 16] = quantize_default[1]
getitem_2 : f32[1] = quantize_default[2]
return (getitem, getitem_1, getitem_2, sum_dim_int_list)""",  # noqa: E501
    )


def test_a_sum_over_columns_joins_with_its_conversion() -> None:
    assert_expected_inline(
        region_text("weight_gradient"),
        """\
input_1 : f32[16, 32]
input_2 : f32[16, 32]
input_3 : f32[3]
mul_tensor : f32[16, 32] = aten.mul.Tensor(input_1, input_2)
sum_dim_int_list : f32[32] = aten.sum.dim_IntList(mul_tensor, [0])
sum_dim_int_list_1 : f32[32] = aten.sum.dim_IntList(input_1, [0])
mul_tensor_1 : f32[16, 32] = aten.mul.Tensor(input_1, input_2)
quantize_default : (e5m2[16, 32], e5m2[32, 16], f32[1], f32[1], f32[1]) = fp8.quantize(mul_tensor_1, input_3, 0, e5m2)
convert_element_type_default : bf16[32] = prims.convert_element_type(sum_dim_int_list, bf16)
getitem : e5m2[16, 32] = quantize_default[0]
getitem_1 : e5m2[32, 16] = quantize_default[1]
getitem_2 : f32[1] = quantize_default[2]
return (getitem, getitem_1, getitem_2, convert_element_type_default, sum_dim_int_list_1)""",  # noqa: E501
    )


def test_a_value_is_computed_again_rather_than_written() -> None:
    assert_expected_inline(
        lines_of(grown("recomputed")),
        """\
x : f32[16, 32]
scale : f32[3]
neg : f32[16, 32] = aten.neg(x)
region_0 : (e4m3[16, 32], f32[1]) = region_0(x, scale)
getitem : e4m3[16, 32] = region_0[0]
getitem_2 : f32[1] = region_0[1]
exp : f32[16, 32] = aten.exp(neg)
cumsum : f32[16, 32] = aten.cumsum(exp, 0)
return (getitem, getitem_2, cumsum)""",
    )


def test_a_value_of_which_a_view_is_read_is_written() -> None:
    assert_expected_inline(
        lines_of(grown("viewed")),
        """\
x : f32[16, 32]
scale : f32[3]
region_0 : (e4m3[16, 32], f32[1], f32[16, 32]) = region_0(x, scale)
getitem : e4m3[16, 32] = region_0[0]
getitem_2 : f32[1] = region_0[1]
neg_out : f32[16, 32] = region_0[2]
view : f32[4, 4, 32] = aten.view(neg_out, [4, 4, 32])
permute : f32[4, 4, 32] = aten.permute(view, [1, 0, 2])
cumsum : f32[4, 4, 32] = aten.cumsum(permute, 0)
return (getitem, getitem_2, cumsum)""",
    )


def test_a_value_is_written_in_the_order_in_which_memory_holds_it() -> None:
    assert_expected_inline(
        lines_of(grown("by_head")),
        """\
x : f32[16, 32]
scale : f32[3]
region_0 : (e4m3[16, 32], f32[1], f32[2, 8, 4, 8]) = region_0(x, scale)
getitem : e4m3[16, 32] = region_0[0]
getitem_2 : f32[1] = region_0[1]
mul_out : f32[2, 8, 4, 8] = region_0[2]
mul_out_permuted : f32[2, 4, 8, 8] = aten.permute(mul_out, [0, 2, 1, 3])
return (getitem, getitem_2, mul_out_permuted)""",
    )


def test_a_view_with_one_unknown_size_is_computed() -> None:
    def fn(x: Tensor) -> Tensor:
        rows = x.exp().view(-1, 32)
        return torch.ops.fp8.quantize(rows, None, 0, torch.float8_e4m3fn, True, False)[0]

    def again(x: Tensor) -> Tensor:
        return fn(x.neg().view(-1, 32).cos().view(x.shape))  # the last view has two unknown sizes

    def computed(fn: Callable[[Tensor], Tensor]) -> list[str]:
        gm = make_fx(fn, tracing_mode="symbolic")(torch.randn(3, 5, 32))
        assert grow_regions(gm) == 1
        gm.graph.lint()
        gm.recompile()
        x = torch.randn(4, 7, 32)
        assert torch.equal(gm(x).view(torch.uint8), fn(x).view(torch.uint8))
        (region,) = (
            gm.get_submodule(str(n.target)) for n in gm.graph.nodes if n.op == "call_module"
        )
        return re.findall(r"aten\.(\w+)", region.code)

    assert computed(fn) == ["exp", "view"]
    assert computed(again) == ["exp", "view"]


def test_a_reduction_over_another_axis_stays_outside() -> None:
    assert_expected_inline(
        lines_of(grown("other_axis")),
        """\
x : f32[16, 32]
scale : f32[3]
abs_1 : f32[16, 32] = aten.abs(x)
amax : f32[32] = aten.amax(abs_1, [0])
region_0 : (e4m3[16, 32], f32[1]) = region_0(x, scale, amax)
getitem : e4m3[16, 32] = region_0[0]
getitem_2 : f32[1] = region_0[1]
return (getitem, getitem_2)""",
    )


def test_a_cast_that_takes_the_scale_of_another_is_apart() -> None:
    gm = grown("scale_of_another")
    first, second = gm.graph.find_nodes(op="call_module")
    assert {arg.args[0] for arg in second.args if arg.op == "call_function"} >= {first}


def test_no_region_writes_what_it_depends_on() -> None:
    assert_expected_inline(
        lines_of(grown("opaque_between")),
        """\
x : f32[16, 32]
scale : f32[3]
exp : f32[16, 32] = aten.exp(x)
cumsum : f32[16, 32] = aten.cumsum(exp, 0)
region_0 : (e4m3[16, 32], f32[1], e4m3[16, 32], f32[1]) = region_0(scale, exp, cumsum)
getitem : e4m3[16, 32] = region_0[0]
getitem_2 : f32[1] = region_0[1]
getitem_5 : e4m3[16, 32] = region_0[2]
getitem_7 : f32[1] = region_0[3]
return (getitem, getitem_2, getitem_5, getitem_7, exp)""",
    )


def test_a_concatenation_is_read_part_by_part() -> None:
    assert_expected_inline(
        region_text("weights"),
        """\
input_1 : f32[16, 32]
input_2 : f32[48, 32]
input_3 : f32[3]
cat_default : f32[64, 32] = aten.cat([input_1, input_2])
quantize_default : (e4m3[64, 32], e4m3[32, 64], f32[1], f32[1], f32[1]) = fp8.quantize(cat_default, input_3, 0, e4m3)
getitem : e4m3[64, 32] = quantize_default[0]
getitem_1 : e4m3[32, 64] = quantize_default[1]
getitem_2 : f32[1] = quantize_default[2]
return (getitem, getitem_1, getitem_2)""",  # noqa: E501
    )


@pytest.mark.parametrize("name", SIZES)
def test_results_are_the_same_bit_for_bit(name: str) -> None:
    gm, inputs = graph(name)
    assert_same_after_growing(gm, inputs)


def assert_same_after_growing(gm: fx.GraphModule, inputs: list[Tensor]) -> None:
    """And nothing is left to do for a second run."""
    want = fx.Interpreter(gm).run(*inputs)
    count = grow_regions(gm)
    gm.graph.lint()
    assert count == len(gm.graph.find_nodes(op="call_module"))
    assert not gm.graph.find_nodes(op="call_function", target=QUANTIZE)
    for old, new in zip(want, fx.Interpreter(gm).run(*inputs), strict=True):
        assert (old.shape, old.dtype, old.stride()) == (new.shape, new.dtype, new.stride())
        assert torch.equal(*(x.contiguous().view(torch.uint8) for x in (old, new)))
    text = format_graph(gm)
    assert grow_regions(gm) == 0 and format_graph(gm) == text


def test_layers_that_look_alike_have_regions_that_look_alike() -> None:
    def fn(x: Tensor, w: Tensor, scale: Tensor) -> Outputs:
        other = quantize(w, scale, 2)
        for slot in range(4):
            x = multiply(quantize(rms(x, w[0]), scale, slot), other) + x
        return (x,)

    gm = trace_final(fn, x=torch.randn(32, 32), w=torch.randn(32, 32), scale=torch.ones(3))
    grow_regions(gm)
    first, second = (format_graph(gm.get_submodule(f"region_{i}")) for i in (3, 4))
    assert first != second == first.replace(", 2, e4m3", ", 3, e4m3")


def test_work_grows_with_layers_and_not_with_their_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers read one table, as rotary embeddings do, and have a sum over columns each."""

    def work(layers: int) -> int:
        def fn(x: Tensor, w: Tensor, table: Tensor, scale: Tensor) -> Outputs:
            other, sums = quantize(w, scale, 2), []
            for slot in range(layers):
                sums.append((x * table).sum(0))
                x = multiply(quantize(x * table, scale, slot), other)
            return (x, *sums)

        sizes = {"x": (32, 32), "w": (32, 32), "table": (32, 32), "scale": (layers,)}
        gm = trace_final(fn, **{name: torch.randn(size) for name, size in sizes.items()})
        looks = 0

        def reads(*args: Any) -> Any:
            nonlocal looks
            looks += 1
            return regions.reads(*args)

        monkeypatch.setattr(module, "reads", reads)
        assert grow_regions(gm) == layers + 1
        return looks

    four, eight, sixteen = work(4), work(8), work(16)
    assert 0 < sixteen - eight <= 2 * (eight - four)


def test_a_kernel_reads_no_more_matrices_than_its_registers_hold() -> None:
    def fn(scale: Tensor, **matrices: Tensor) -> Outputs:
        return quantize(sum(matrices.values()), scale)[0::2]

    for count, inputs in ((8, 9), (9, 2)):  # with the scale
        matrices = {f"x{i}": torch.randn(16, 32) for i in range(count)}
        gm = trace_final(fn, **matrices, scale=torch.ones(1))
        grow_regions(gm)
        (call,) = gm.graph.find_nodes(op="call_module")
        assert len(call.args) == inputs


# --- random graphs ------------------------------------------------------------------------------

PURE: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda x, y: x + y,
    lambda x, y: x * y,
    lambda x, y: -x,
    lambda x, y: x.sigmoid(),
    lambda x, y: torch.where(x > 0, x, y),
    lambda x, y: rms(x, y[0]),
    lambda x, y: x - y.mean(-1, keepdim=True),
    lambda x, y: x.cumsum(0) / 8,  # nothing that a kernel computes
    lambda x, y: x.t(),
    lambda x, y: torch.cat([x[:, 16:], y[:, :16]], 1),
    lambda x, y: (x.view(32, 2, 16) * 2).view(32, 32),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_any_graph_keeps_its_results(data: st.DataObject) -> None:
    picks: list[int] = []

    def pick(items: list[Tensor] | list[Outputs] | tuple[object, ...]) -> object:
        """The same choice whenever the function is traced."""
        if len(picks) <= position[0]:
            picks.append(data.draw(st.integers(0, 10_000)))
        position[0] += 1
        return items[picks[position[0] - 1] % len(items)]

    def fn(scale: Tensor, **given: Tensor) -> Outputs:
        position[0] = 0
        values, casts, results = [*given.values()], [], []
        for _ in range(10):
            x, y = pick(values[-4:]), pick(values)
            kind = pick(("pure", "pure", "pure", "cast", "cast", "product", "sum", "result"))
            if kind == "cast":
                casts.append(quantize(x, scale, len(casts) % 2))
            elif kind == "product" and casts:
                values.append(multiply(pick(casts), pick(casts)) / 8)
            elif kind == "sum":
                results.append(x.sum(0))
            elif kind == "result":
                results.append(x)
            elif kind == "pure":
                values.append(pick(PURE)(x, y))
        taken = [cast[:2] if pick((True, False)) else cast[1:] for cast in casts]
        return (*results, *(item for cast in taken for item in cast), values[-1])

    position = [0]
    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(32, 32, generator=generator) for name in "xyz"}
    scale = torch.tensor([30.0, 0.0])
    gm = trace_final(fn, scale=scale, **inputs)
    assert_same_after_growing(gm, [scale, *inputs.values()])
