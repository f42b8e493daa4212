"""scale_few_rows: products of a few rows are scaled by what reads them."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx

from fp8compile import RECIPES
from fp8compile.ir import SCALED_MM, SCALED_MM_BLOCKS, is_cast
from fp8compile.passes import (
    drop_unused_outputs,
    grow_regions,
    joint_passes,
    run_passes,
    scale_few_rows,
)
from tests.helpers import trace
from tests.passes.common import aten, check_pass, lines_of


def linear(
    m: int = 16,
    n: int = 64,
    recipe: str = "rowwise",
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = False,
) -> tuple[fx.GraphModule, list[Tensor]]:
    """``relu(x @ w.T + b)`` with its GEMM in FP8, and inputs for it."""
    inputs = {"x": torch.randn(m, 128).to(dtype), "w": torch.randn(n, 128).to(dtype)}
    if bias:
        inputs["b"] = torch.randn(n).to(dtype)

    def plain(x: Tensor, w: Tensor) -> Tensor:
        return aten.relu(aten.mm(x, aten.permute(w, [1, 0])))

    def biased(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return aten.relu(aten.addmm(b, x, aten.permute(w, [1, 0])))

    gm = trace(biased if bias else plain, **inputs)
    run_passes(gm, joint_passes(recipe=RECIPES[recipe], training=False))
    drop_unused_outputs(gm)
    return gm, list(inputs.values())


def test_the_scales_are_factors_of_the_product() -> None:
    gm, _ = linear(bias=True)
    assert check_pass(gm, scale_few_rows) == 1
    assert_expected_inline(
        lines_of(gm),
        """\
x : bf16[16, 128]
w : bf16[64, 128]
b : bf16[64]
x_q : (e4m3[16, 128], e4m3[0], f32[1, 16], f32[0]) = fp8.quantize_blocks(x, [1, 0], False, e4m3, True, False)
x_fp8 : e4m3[16, 128] = x_q[0]
x_scale_inv : f32[1, 16] = x_q[2]
w_q : (e4m3[64, 128], e4m3[0], f32[1, 64], f32[0]) = fp8.quantize_blocks(w, [1, 0], False, e4m3, True, False)
w_fp8 : e4m3[64, 128] = w_q[0]
w_scale_inv : f32[1, 64] = w_q[2]
addmm_sums : f32[16, 64] = fp8.scaled_mm(x_fp8, w_fp8, None, None, None, f32, True) # addmm fprop = input e4m3:rowwise x weight^T e4m3:rowwise
x_scales : f32[16, 1] = aten.permute(x_scale_inv, [1, 0])
addmm_by_x : f32[16, 64] = aten.mul.Tensor(addmm_sums, x_scales)
addmm_by_w : f32[16, 64] = aten.mul.Tensor(addmm_by_x, w_scale_inv)
addmm_biased : f32[16, 64] = aten.add.Tensor(addmm_by_w, b)
addmm_converted : bf16[16, 64] = prims.convert_element_type(addmm_biased, bf16)
relu : bf16[16, 64] = aten.relu(addmm_converted)
return relu""",  # noqa: E501
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("m", [1, 16, 61, 127])
def test_results_are_the_same(m: int, dtype: torch.dtype, bias: bool) -> None:
    gm, inputs = linear(m, dtype=dtype, bias=bias)
    want = fx.Interpreter(gm).run(*inputs)
    assert scale_few_rows(gm) == 1
    got = fx.Interpreter(gm).run(*inputs)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("m", "n", "recipe"),
    [(128, 64, "rowwise"), (16, 50, "rowwise"), (16, 64, "blockwise"), (16, 64, "current")],
)
def test_others_are_left_alone(m: int, n: int, recipe: str) -> None:
    gm, _ = linear(m, n, recipe)
    before = lines_of(gm)
    assert check_pass(gm, scale_few_rows) == 0
    assert lines_of(gm) == before


def test_the_factors_become_part_of_the_region_behind() -> None:
    """What casts a product of few rows reads its sums, and scales them itself."""
    x, w, v = (torch.randn(rows, 96).bfloat16() for rows in (16, 96, 48))

    def fn(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        y = aten.relu(aten.mm(x, aten.permute(w, [1, 0])))
        return aten.mm(y, aten.permute(v, [1, 0]))

    gm = trace(fn, x=x, w=w, v=v)
    run_passes(gm, joint_passes(recipe=RECIPES["rowwise"], training=False))
    drop_unused_outputs(gm)
    assert scale_few_rows(gm) == 2 and scale_few_rows(gm) == 0
    grow_regions(gm)
    read = [
        [str(value.meta["val"].dtype) for value in call.all_input_nodes]
        for call in gm.graph.find_nodes(op="call_module")
        if any(is_cast(n) for n in gm.get_submodule(call.target).graph.nodes)
    ]
    assert sorted(map(sorted, read)) == sorted([["torch.bfloat16"]] * 3 + [["torch.float32"] * 3])
    assert not gm.graph.find_nodes(op="call_function", target=SCALED_MM_BLOCKS)
    assert len(gm.graph.find_nodes(op="call_function", target=SCALED_MM)) == 2
