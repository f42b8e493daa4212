"""insert_casts: the GEMMs become scaled ones, and compute the same up to quantization."""

from __future__ import annotations

import operator

import pytest
import torch
from expecttest import assert_expected_inline
from torch import fx

from fp8compile import RECIPES, Recipe
from fp8compile.ir import QUANTIZE, SCALED_MM
from fp8compile.passes import choose_formats, choose_precision, find_gemms, insert_casts
from tests.helpers import trace
from tests.models import sqnr_db
from tests.passes.common import aten, before, check_pass, fprop, lines_of

RECIPE = RECIPES["current"]


def rewrite(gm: fx.GraphModule, skip: bool = False, recipe: Recipe = RECIPE) -> int:
    find_gemms(gm)
    choose_precision(gm, skips=lambda fqn: skip)
    choose_formats(gm, recipe=recipe)
    return check_pass(gm, lambda g: insert_casts(g, recipe=recipe))


def test_rewrites_fprop() -> None:
    gm = fprop()
    assert rewrite(gm) == 1
    assert_expected_inline(
        lines_of(gm),
        """\
x : bf16[16, 32]
w : bf16[64, 32]
x_q : (e4m3[16, 32], e4m3[32, 16], f32[1], f32[1], f32[1]) = fp8.quantize(x, None, 0, e4m3)
x_fp8 : e4m3[16, 32] = x_q[0]
x_scale_inv : f32[1] = x_q[2]
w_q : (e4m3[64, 32], e4m3[32, 64], f32[1], f32[1], f32[1]) = fp8.quantize(w, None, 1, e4m3)
w_fp8 : e4m3[64, 32] = w_q[0]
w_scale_inv : f32[1] = w_q[2]
mm_fp8 : bf16[16, 64] = fp8.scaled_mm(x_fp8, w_fp8, x_scale_inv, w_scale_inv, None, bf16, True) # mm fprop = input e4m3 x weight^T e4m3
return mm_fp8""",  # noqa: E501
    )


def test_rewrites_fprop_with_a_scale_per_block() -> None:
    """Either copy has a scale_inv of its own; the operands of one row each lie block by block."""
    gm = fprop()
    assert rewrite(gm, recipe=RECIPES["blockwise"]) == 1
    assert_expected_inline(
        lines_of(gm),
        """\
x : bf16[16, 32]
w : bf16[64, 32]
x_q : (e4m3[16, 128], e4m3[32, 128], f32[1, 16], f32[1, 32]) = fp8.quantize_blocks(x, [1, 128], False, e4m3)
x_fp8 : e4m3[16, 128] = x_q[0]
x_scale_inv : f32[1, 16] = x_q[2]
w_q : (e4m3[64, 128], e4m3[32, 128], f32[1, 1], f32[1, 1]) = fp8.quantize_blocks(w, [128, 128], False, e4m3)
w_fp8 : e4m3[64, 128] = w_q[0]
w_scale_inv : f32[1, 1] = w_q[2]
mm_fp8 : bf16[16, 64] = fp8.scaled_mm_blocks(x_fp8, w_fp8, x_scale_inv, w_scale_inv, None, bf16, [1, 128], [128, 128], False) # mm fprop = input e4m3:1x128 x weight^T e4m3:128x128
return mm_fp8""",  # noqa: E501
    )


def test_a_transposed_copy_comes_with_its_own_scales() -> None:
    x, g = torch.randn(160, 32), torch.randn(160, 48)
    gm = trace(lambda x, g: aten.mm(aten.permute(g, [1, 0]), x), x=x, g=g)
    exact = gm(x, g)
    assert rewrite(gm, recipe=RECIPES["mx"]) == 1
    assert {node.args[1] for node in gm.graph.nodes if node.target is operator.getitem} == {1, 3}
    gm.recompile()
    assert 25 < sqnr_db(exact, gm(x, g)) < 40


def test_leaves_gemms_in_high_precision_alone() -> None:
    gm = fprop()
    text = lines_of(gm)
    assert rewrite(gm, skip=True) == 0
    assert [line.split(" #")[0] for line in lines_of(gm).splitlines()] == text.splitlines()


LAYOUTS = {
    "x @ w": lambda x, w: aten.mm(x, w),
    "x.T @ w": lambda x, w: aten.mm(aten.permute(x, [1, 0]), w),
    "x @ w.T": lambda x, w: aten.mm(x, aten.permute(w, [1, 0])),
    "x.T @ w.T": lambda x, w: aten.mm(aten.permute(x, [1, 0]), aten.permute(w, [1, 0])),
    "x.T.T @ w": lambda x, w: aten.mm(aten.t(aten.t(x)), w),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_numerics_in_every_layout(layout: str) -> None:
    x = torch.randn(*((48, 32) if layout.startswith("x.T ") else (32, 48)))
    w = torch.randn(*((64, 48) if layout.endswith("w.T") else (48, 64)))
    gm = trace(LAYOUTS[layout], x=x, w=w)
    exact = gm(x, w)
    assert rewrite(gm) == 1
    gm.recompile()
    assert 25 < sqnr_db(exact, gm(x, w)) < 40


@pytest.mark.parametrize("bias_shape", [(64,), (16, 64), (1, 64)])
def test_a_bias(bias_shape: tuple[int, ...]) -> None:
    b, x, w = torch.randn(bias_shape), torch.randn(16, 32), torch.randn(32, 64)
    gm = trace(lambda b, x, w: aten.addmm(b, x, w), b=b, x=x, w=w)
    exact = gm(b, x, w)
    assert rewrite(gm) == 1
    gm.recompile()
    assert sqnr_db(exact, gm(b, x, w)) > 25
    scaled = next(node for node in gm.graph.nodes if node.target is SCALED_MM)
    assert (scaled.args[4] is not None) == (len(bias_shape) == 1), "only a 1-D bias is fused"


def test_a_weight_is_cast_once_more_in_the_backward() -> None:
    gm, run = before("insert_casts")
    run(gm)
    tags = [
        node.meta["partitioner_tag"]
        for node in gm.graph.nodes
        if node.target is QUANTIZE and str(node.args[0]) == "w"
    ]
    assert tags == ["is_forward", "must_be_in_backward"]
