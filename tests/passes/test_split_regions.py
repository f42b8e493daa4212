"""split_regions: which regions become two, and what each part computes."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx

from fp8compile.ir import format_graph
from fp8compile.passes import drop_unused_outputs, grow_regions, split_regions
from tests.helpers import trace_final
from tests.passes.common import lines_of

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
Outputs = tuple[Tensor, ...]
ALWAYS = -sys.maxsize
COPIES = {"row-major": (True, False), "both": (True, True)}


def norm_backward(
    g: Tensor, x: Tensor, other: Tensor, rstd: Tensor, cast: Callable[[Tensor], Outputs]
) -> Outputs:
    """The gradient of a norm, with that of the residual, which is stored as well as cast."""
    normed = x * rstd
    d = (g - normed * (g * normed).mean(-1, keepdim=True)) * rstd + other
    return *cast(d), d, (g * normed).sum(0)


def norm_backward_and_input(
    g: Tensor, x: Tensor, other: Tensor, rstd: Tensor, cast: Callable[[Tensor], Outputs]
) -> Outputs:
    """The same, where the input of the GEMM before is made and cast again."""
    return *cast(x * rstd), *norm_backward(g, x, other, rstd, cast)


def residual_norm(x: Tensor, o: Tensor, cast: Callable[[Tensor], Outputs]) -> Outputs:
    h = x + o
    return *cast(h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5)), h


def doubled(x: Tensor, cast: Callable[[Tensor], Outputs]) -> Outputs:
    """A value that is made of one matrix: to read it is no less than to compute it."""
    y = x * 2
    return *cast(y), y


def gated(x: Tensor, y: Tensor, cast: Callable[[Tensor], Outputs]) -> Outputs:
    """Nothing is stored but what is cast."""
    return cast(x.sigmoid() * y)


def two_values(x: Tensor, y: Tensor, cast: Callable[[Tensor], Outputs]) -> Outputs:
    """Two casts, of which each reads both of the values that are stored, and has its own scale."""
    a, b = x + y, x - y
    return *cast(a * b), *cast(a.exp() * b), a, b


def by_head(x: Tensor, y: Tensor, cast: Callable[[Tensor], Outputs]) -> Outputs:
    """What is stored lies in memory in another order of dimensions than its own."""
    heads = (x * y).unflatten(-1, (4, 12)).transpose(0, 1).exp()
    return *cast(heads.transpose(0, 1).flatten(-2)), heads


FUNCTIONS: dict[str, tuple[Callable[..., Outputs], int]] = {
    "norm_backward": (norm_backward, 3),
    "norm_backward_and_input": (norm_backward_and_input, 3),
    "residual_norm": (residual_norm, 2),
    "doubled": (doubled, 1),
    "gated": (gated, 2),
    "two_values": (two_values, 2),
    "by_head": (by_head, 2),
}


def tensorwise(
    scale: Tensor | None, slot: int, copies: tuple[bool, bool]
) -> Callable[[Tensor], Outputs]:
    def cast(x: Tensor) -> Outputs:
        q = torch.ops.fp8.quantize(x, scale, slot, E5M2, *copies)
        return q[: 1 + copies[1]] + q[2:3]

    return cast


def in_blocks(block: tuple[int, int], copies: tuple[bool, bool]) -> Callable[[Tensor], Outputs]:
    def cast(x: Tensor) -> Outputs:
        q = torch.ops.fp8.quantize_blocks(x, block, False, E4M3, *copies)
        return tuple(part for part, wanted in zip(q, copies * 2, strict=True) if wanted)

    return cast


def traced(
    name: str, kind: str, copies: str, dtype: torch.dtype = torch.float32, m: int = 50
) -> tuple[fx.GraphModule, list[Tensor]]:
    """A graph with one region, and values for its inputs."""
    fn, matrices = FUNCTIONS[name]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(m, 48, generator=generator).to(dtype) for _ in range(matrices)]
    if name.startswith("norm_backward"):
        inputs.append(torch.rand(m, 1, generator=generator).to(dtype) + 0.5)
    scale = torch.tensor([30.0, 500.0, 0.0])

    def whole(*args: Tensor) -> Outputs:
        if kind == "delayed":
            return fn(*args[:-1], tensorwise(args[-1], 1, COPIES[copies]))
        blocks = {"rows": (1, 0), "blocks": (1, 128)}
        if kind in blocks:
            return fn(*args, in_blocks(blocks[kind], COPIES[copies]))
        return fn(*args, tensorwise(None, 0, COPIES[copies]))

    inputs += [scale] if kind == "delayed" else []
    named = dict(zip(("a", "b", "c", "d", "e"), inputs, strict=False))
    gm = trace_final(lambda **given: whole(*given.values()), **named)
    drop_unused_outputs(gm)
    grow_regions(gm)
    return gm, inputs


def regions(gm: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in gm.graph.find_nodes(op="call_module")]


def test_the_gradient_of_a_norm_is_stored_and_then_cast() -> None:
    gm, _ = traced("norm_backward", "delayed", "both")
    assert split_regions(gm, 1) == 1
    assert_expected_inline(
        lines_of(gm),
        """\
a : f32[50, 48]
b : f32[50, 48]
c : f32[50, 48]
d : f32[50, 1]
e : f32[3]
region_0_part_0 : (f32[50, 48], f32[48]) = region_0_part_0(a, b, c, d)
add_out : f32[50, 48] = region_0_part_0[0]
sum_1_out : f32[48] = region_0_part_0[1]
region_0_part_1 : (e5m2[50, 48], e5m2[48, 64], f32[1]) = region_0_part_1(e, add_out)
getitem : e5m2[50, 48] = region_0_part_1[0]
getitem_1 : e5m2[48, 64] = region_0_part_1[1]
getitem_2 : f32[1] = region_0_part_1[2]
return (getitem, getitem_1, getitem_2, add_out, sum_1_out)""",
    )
    stores, casts = (gm.get_submodule(name) for name in regions(gm))
    assert isinstance(stores, fx.GraphModule) and isinstance(casts, fx.GraphModule)
    assert_expected_inline(
        lines_of(stores),
        """\
input_1 : f32[50, 48]
input_2 : f32[50, 48]
input_3 : f32[50, 48]
input_4 : f32[50, 1]
mul_tensor : f32[50, 48] = aten.mul.Tensor(input_2, input_4)
mul_tensor_1 : f32[50, 48] = aten.mul.Tensor(input_1, mul_tensor)
mean_dim : f32[50, 1] = aten.mean.dim(mul_tensor_1, [-1], True)
mul_tensor_2 : f32[50, 48] = aten.mul.Tensor(mul_tensor, mean_dim)
sub_tensor : f32[50, 48] = aten.sub.Tensor(input_1, mul_tensor_2)
mul_tensor_3 : f32[50, 48] = aten.mul.Tensor(sub_tensor, input_4)
add_tensor : f32[50, 48] = aten.add.Tensor(mul_tensor_3, input_3)
mul_tensor_4 : f32[50, 48] = aten.mul.Tensor(input_1, mul_tensor)
sum_dim_int_list : f32[48] = aten.sum.dim_IntList(mul_tensor_4, [0])
return (add_tensor, sum_dim_int_list)""",
    )
    assert "= fp8.quantize(stored, input_5, 1, e5m2)" in lines_of(casts)


def test_a_current_scale_is_found_where_the_value_is_computed() -> None:
    gm, _ = traced("residual_norm", "current", "row-major")
    assert split_regions(gm, 1) == 1
    assert_expected_inline(
        lines_of(gm),
        """\
a : f32[50, 48]
b : f32[50, 48]
region_0_part_0 : (f32[50, 48], f32[1]) = region_0_part_0(a, b)
add_out : f32[50, 48] = region_0_part_0[0]
quantize_scale : f32[1] = region_0_part_0[1]
region_0_part_1 : (e5m2[50, 48], f32[1]) = region_0_part_1(add_out, quantize_scale)
getitem : e5m2[50, 48] = region_0_part_1[0]
getitem_2 : f32[1] = region_0_part_1[1]
return (getitem, getitem_2, add_out)""",
    )
    casts = gm.get_submodule(regions(gm)[1])
    assert isinstance(casts, fx.GraphModule)
    assert "= aten.rsqrt(add_tensor_1)" in lines_of(casts)  # the norm again, of what is stored
    assert "= fp8.quantize(mul_tensor, scale, 0, e5m2, True, False)" in lines_of(casts)


# What its kernels read of a region, and of its parts: in matrices.
SPLIT = {
    # The sums over rows read g and x before d can be computed by tiles: 5 against 3 + 1.
    ("norm_backward", "delayed", "both"),
    # 5, and what tiles lose that use sums, against 3 + 1 + 1.
    ("norm_backward_and_input", "delayed", "both"),
    ("norm_backward_and_input", "current", "both"),  # 6 against 3 + 1 + 1
    ("norm_backward_and_input", "current", "row-major"),
    ("norm_backward_and_input", "rows", "both"),  # 8 against 3 + 2 + 2
    ("norm_backward_and_input", "blocks", "both"),  # 8 against 3 + 1 + 1
    ("norm_backward", "current", "both"),  # 6 against 3 + 1
    ("norm_backward", "current", "row-major"),
    ("norm_backward", "rows", "both"),  # 8 against 3 + 2
    ("norm_backward", "blocks", "both"),
    ("residual_norm", "delayed", "both"),  # 4, and more of them sums, against 2 + 2
    ("residual_norm", "current", "row-major"),  # 4 against 2 + 1
    ("residual_norm", "rows", "both"),  # 6 against 2 + 3, with the sums over rows
    ("residual_norm", "blocks", "both"),  # 6 against 2 + 2
}


@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize("kind", ["delayed", "current", "rows", "blocks"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_only_what_is_read_less_is_split(name: str, kind: str, copies: str) -> None:
    gm, _ = traced(name, kind, copies)
    before = format_graph(gm)
    assert split_regions(gm, 1) == ((name, kind, copies) in SPLIT)
    assert (format_graph(gm) == before) == ((name, kind, copies) not in SPLIT)
    gm.graph.lint()


@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize("kind", ["delayed", "current", "rows", "blocks"])
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "gated"])
def test_results_are_the_same_bit_for_bit(name: str, kind: str, copies: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        gm, inputs = traced(name, kind, copies, dtype)
        want = gm(*inputs)
        assert split_regions(gm, ALWAYS) == 1
        gm.graph.lint()
        for expected, found in zip(want, gm(*inputs), strict=True):
            assert expected.stride() == found.stride()
            bits = (x.contiguous().view(torch.uint8) for x in (expected, found))
            assert torch.equal(*bits)


def test_small_matrices_are_not_worth_a_launch() -> None:
    for rows, count in ((50, 0), (2**18, 1)):  # 25 MB are spared
        gm, _ = traced("norm_backward", "current", "both", torch.bfloat16, rows)
        assert split_regions(gm) == count


def test_a_part_is_not_split_again() -> None:
    gm, _ = traced("norm_backward", "current", "both")
    assert [split_regions(gm, ALWAYS) for _ in range(2)] == [1, 0]


def test_what_nothing_takes_is_left_out() -> None:
    gm, inputs = traced("norm_backward", "current", "both")
    want = gm(*inputs)
    output = gm.graph.output_node()
    *kept, total = output.args[0]
    output.args = (tuple(kept),)
    gm.graph.erase_node(total)
    assert split_regions(gm, 1) == 1
    for expected, found in zip(want, gm(*inputs), strict=False):
        assert torch.equal(expected.view(torch.uint8), found.view(torch.uint8))


def test_layers_that_look_alike_have_parts_that_look_alike() -> None:
    """Then one kernel does for all."""

    def layers(a: Tensor, b: Tensor, v: Tensor, w: Tensor) -> Outputs:
        cast = tensorwise(None, 0, COPIES["row-major"])
        *first, h = residual_norm(a @ v, b @ w, cast)
        return *first, *residual_norm(h @ v, h @ w, cast)

    inputs = {name: torch.randn(48, 48) for name in "abvw"}
    gm = trace_final(layers, **inputs)
    drop_unused_outputs(gm)
    grow_regions(gm)
    assert split_regions(gm, 1) == 2
    texts = [format_graph(gm.get_submodule(name)) for name in regions(gm)]
    assert len(texts) == 4 and len(set(texts)) == 2
