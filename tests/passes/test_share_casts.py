"""share_casts: a value is cast once per format."""

from __future__ import annotations

import operator

import torch
from expecttest import assert_expected_inline
from torch import fx

from fp8compile import RECIPES, Format
from fp8compile.ir import QUANTIZE, emit
from fp8compile.passes import joint_passes, run_passes, share_casts
from fp8compile.passes.pipeline import pass_name
from tests.helpers import trace_joint
from tests.models import MLP
from tests.passes.common import before, check_pass, fprop, lines_of


def casts(gm: fx.GraphModule) -> list[str]:
    return [str(n.args[0]) for n in gm.graph.nodes if n.target is QUANTIZE]


def test_one_cast_serves_forward_and_backward() -> None:
    gm, run = before("share_casts")
    assert check_pass(gm, run) == 2
    assert_expected_inline(
        lines_of(gm, "x_q", "x_fp8", "x_fp8_t", "w_q", "w_q_1", "tangents_1_q"),
        """\
x_q : (e4m3[16, 32], e4m3[32, 16], f32[1], f32[1], f32[1]) = fp8.quantize(x, scale, 0, e4m3)
x_fp8 : e4m3[16, 32] = x_q[0]
x_fp8_t : e4m3[32, 16] = x_q[1]
w_q : (e4m3[64, 32], e4m3[32, 64], f32[1], f32[1], f32[1]) = fp8.quantize(w, scale, 1, e4m3)
tangents_1_q : (e5m2[16, 64], e5m2[64, 16], f32[1], f32[1], f32[1]) = fp8.quantize(tangents_1, scale, 2, e5m2)
w_q_1 : (e4m3[64, 32], e4m3[32, 64], f32[1], f32[1], f32[1]) = fp8.quantize(w, scale, 1, e4m3)""",  # noqa: E501
    )


def test_an_input_that_two_layers_share_is_cast_once() -> None:
    joint = trace_joint(MLP(), torch.randn(4, 16, 64))
    passes = joint_passes(recipe=RECIPES["delayed"], sites=joint.sites, state=joint.state)
    left_out = ("merge_gemms", "plan_saved")  # one cast less, and two that backward repeats
    run_passes(joint.gm, [run for run in passes if pass_name(run) not in left_out])
    # gate and up share one input; each of the three weights is cast forward and backward.
    assert len(casts(joint.gm)) == 2 + 3 + 3 + 3
    assert len(set(casts(joint.gm))) == 2 + 3 + 3


def test_two_formats_of_one_value_stay_apart() -> None:
    gm = fprop()
    x = next(iter(gm.graph.nodes))
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        nodes = [emit(gm.graph, QUANTIZE, (x, None, 0, f.dtype), "x_q") for f in Format]
        items = [emit(gm.graph, operator.getitem, (node, 0), "x_fp8") for node in nodes]
    output.args = ((output.args[0], *items),)
    assert share_casts(gm) == 0
    assert casts(gm) == ["x", "x"]


def test_numerics_are_exact() -> None:
    gm, run = before("share_casts")
    torch.manual_seed(0)
    inputs = [
        torch.randn(n.meta["val"].shape).to(n.meta["val"].dtype).abs()
        for n in gm.graph.find_nodes(op="placeholder")
    ]
    expected = fx.Interpreter(gm).run(*inputs, enable_io_processing=False)
    run(gm)
    shared = fx.Interpreter(gm).run(*inputs, enable_io_processing=False)
    for a, b in zip(expected, shared, strict=True):
        assert a is b is None or torch.equal(a, b)
