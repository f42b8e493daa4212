"""take_frozen_weights: a weight that is FP8 already is not cast."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

import fp8compile
from fp8compile import RECIPES, Granularity
from fp8compile.frozen import quantize_weight
from fp8compile.ir import CAT_ROWS, DEQUANTIZE, QUANTIZE_BLOCKS, args_of, is_backward
from fp8compile.passes import joint_passes, run_passes, take_frozen_weights
from tests.helpers import trace_joint
from tests.passes.common import check_pass, frozen_fprop, lines_of


def test_the_gemm_takes_what_was_dequantized() -> None:
    gm = frozen_fprop()
    assert check_pass(gm, take_frozen_weights) == 1
    assert_expected_inline(
        lines_of(gm),
        """\
x : bf16[16, 32]
w_frozen : e4m3[64, 32]
w_scale : f32[64, 1]
x_q : (e4m3[16, 32], e4m3[32, 16], f32[1, 16], f32[1, 32]) = fp8.quantize_blocks(x, [1, 0], False, e4m3)
x_fp8 : e4m3[16, 32] = x_q[0]
x_scale_inv : f32[1, 16] = x_q[2]
w_frozen_scale_inv : f32[1, 64] = aten.view(w_scale, [1, 64])
mm_fp8 : bf16[16, 64] = fp8.scaled_mm_blocks(x_fp8, w_frozen, x_scale_inv, w_frozen_scale_inv, None, bf16, [1, 0], [1, 0], True) # mm fprop = input e4m3:rowwise x weight^T e4m3:rowwise
neg : bf16[16, 64] = aten.neg(mm_fp8)
return [neg]""",  # noqa: E501
    )


def test_several_weights_are_put_together_with_their_scales() -> None:
    gm = frozen_fprop(widths=(64, 48))
    assert check_pass(gm, take_frozen_weights) == 1
    assert_expected_inline(
        lines_of(gm),
        """\
x : bf16[16, 32]
w1_frozen : e4m3[64, 32]
w1_scale : f32[64, 1]
w2_frozen : e4m3[48, 32]
w2_scale : f32[48, 1]
x_q : (e4m3[16, 32], e4m3[32, 16], f32[1, 16], f32[1, 32]) = fp8.quantize_blocks(x, [1, 0], False, e4m3)
x_fp8 : e4m3[16, 32] = x_q[0]
x_scale_inv : f32[1, 16] = x_q[2]
w1_cat_frozen : e4m3[112, 32] = fp8.cat_rows([w1_frozen, w2_frozen])
w1_cat_frozen_scale : f32[112, 1] = aten.cat([w1_scale, w2_scale])
w1_cat_frozen_scale_inv : f32[1, 112] = aten.view(w1_cat_frozen_scale, [1, 112])
mm_merged_fp8 : bf16[16, 112] = fp8.scaled_mm_blocks(x_fp8, w1_cat_frozen, x_scale_inv, w1_cat_frozen_scale_inv, None, bf16, [1, 0], [1, 0], True) # {mm,mm_1} fprop = input e4m3:rowwise x weight^T e4m3:rowwise
mm_slice : bf16[16, 64] = aten.slice.Tensor(mm_merged_fp8, 1, 0, 64)
mm_1_slice : bf16[16, 48] = aten.slice.Tensor(mm_merged_fp8, 1, 64, 112)
neg : bf16[16, 64] = aten.neg(mm_slice)
neg_1 : bf16[16, 48] = aten.neg(mm_1_slice)
return [neg, neg_1]""",  # noqa: E501
    )


@pytest.mark.parametrize("recipe", ["blockwise", "current", "mx"])
def test_a_cast_with_other_scales_is_left_alone(recipe: str) -> None:
    gm = frozen_fprop(recipe, k=128)
    before = lines_of(gm)
    assert check_pass(gm, take_frozen_weights) == 0
    assert lines_of(gm) == before


def test_a_cast_that_pads_rows_is_left_alone() -> None:
    gm = frozen_fprop(k=40)
    assert check_pass(gm, take_frozen_weights) == 0
    assert len(gm.graph.find_nodes(op="call_function", target=DEQUANTIZE)) == 1


def test_the_product_is_that_of_the_frozen_weights() -> None:
    gm = frozen_fprop(widths=(64, 48))
    x, frozen = torch.randn(16, 32).bfloat16(), []
    for width in (64, 48):
        weight = torch.randn(width, 32).bfloat16()
        frozen.append(quantize_weight(weight, Granularity.ROW))
    take_frozen_weights(gm)
    gm.recompile()
    e4m3, rows = torch.float8_e4m3fn, [1, 0]
    x_fp8, _, x_scale_inv, _ = torch.ops.fp8.quantize_blocks(x, rows, False, e4m3, True, False)
    for got, (q, scale) in zip(gm(x, *frozen[0], *frozen[1]), frozen, strict=True):
        args = (x_fp8, q, x_scale_inv, scale.t(), None, torch.bfloat16, rows, rows, True)
        want = torch.ops.fp8.scaled_mm_blocks(*args)
        torch.testing.assert_close(-got, want, rtol=2**-8, atol=1e-6)


def test_backward_dequantizes_again() -> None:
    """What it casts is the transposed weight; no weight in high precision is kept for it."""
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).bfloat16()
    fp8compile.freeze(model)
    x = torch.randn(16, 32).bfloat16().requires_grad_()
    joint = trace_joint(model, x, options={"recipe": "rowwise"})
    passes = joint_passes(recipe=RECIPES["rowwise"], sites=joint.sites)
    run_passes(joint.gm, passes)
    found = joint.gm.graph.find_nodes(op="call_function", target=DEQUANTIZE)
    assert len(found) == 2 and all(map(is_backward, found))
    casts = joint.gm.graph.find_nodes(op="call_function", target=QUANTIZE_BLOCKS)
    assert [args_of(n)[0] in found for n in casts].count(True) == 2
    assert not joint.gm.graph.find_nodes(op="call_function", target=CAT_ROWS)
