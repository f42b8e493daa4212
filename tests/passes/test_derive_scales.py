"""derive_scales: an expression for every slot, and a graph as it was."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

from fp8compile.formats import Format
from fp8compile.ir import QUANTIZE, SLOTS_PER_SITE, format_graph
from fp8compile.passes import STATIC_SCALES
from fp8compile.passes.derive_scales import MARGIN
from fp8compile.passes.pipeline import Pass
from tests.helpers import trace_joint
from tests.passes.common import Linear, Pair, before, check_pass, linear_joint, lines_of

E4M3 = Format.E4M3


def static(model: nn.Module, *inputs: Tensor) -> tuple[fx.GraphModule, Pass]:
    joint = trace_joint(model, *inputs, options={"recipe": "static"})
    return before("derive_scales", joint, "static")


def test_every_cast_gets_a_remark() -> None:
    gm, run = before("derive_scales", linear_joint(recipe="static"), "static")
    before_it = {node.name for node in gm.graph.nodes}
    assert check_pass(gm, run) == 4  # x, w in forward and in backward, and the gradient
    casts = [node.name for node in gm.graph.nodes if node.target is QUANTIZE]
    new = [node.name for node in gm.graph.nodes if node.name not in before_it]
    assert_expected_inline(
        lines_of(gm, *new),
        """\
tangents_1_abs : bf16[16, 64] = aten.abs(tangents_1)
tangents_1_amax : bf16[] = aten.amax(tangents_1_abs)
tangents_1_amax_f32 : f32[] = prims.convert_element_type(tangents_1_amax, f32)
tangents_1_ratio : f32[] = aten.div.Tensor(tangents_1_amax_f32, 0.0625)
scale_most : f32[] = aten.full([], 8.507059173023462e+37)
scale_ratio : f32[12] = aten.div.Tensor(scale, tangents_1_ratio)
scale_bwd : f32[12] = aten.minimum(scale_ratio, scale_most)""",
    )
    scales = {n.name: n.args[1].name for n in gm.graph.nodes if n.target is QUANTIZE}
    assert {name for name, scale in scales.items() if scale == "scale_bwd"} == {"tangents_1_q"}
    text = lines_of(gm, *casts)
    remarks = [line.split("  # ")[-1].split(" # ")[-1] for line in text.splitlines()]
    assert_expected_inline(
        "\n".join(f"{name}: {remark}" for name, remark in zip(casts, remarks, strict=True)),
        """\
x_q: amax = 3.53
w_q: amax = amax_w
tangents_1_q: amax = 0.0625
w_q_1: amax = amax_w""",
    )


class Chain(Linear):
    """A value that is computed from two weights."""

    def __init__(self) -> None:
        super().__init__(64, 32)
        self.w2 = nn.Parameter(torch.randn(16, 64, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(super().forward(x) ** 2, self.w2)


def test_expressions_are_in_the_statistics_of_the_weights() -> None:
    gm, run = static(Chain(), torch.randn(16, 32, dtype=torch.bfloat16))
    run(gm)
    cast = next(n for n in gm.graph.nodes if n.target is QUANTIZE and n.args[2] == SLOTS_PER_SITE)
    amax = str(cast.meta["amax"].evalf(3))
    assert_expected_inline(amax, """3.72*var_pow_1**0.5 + Abs(var_mm_fp8)""")
    w, w2 = torch.full((64, 32), 0.5), torch.full((16, 64), -3.0)
    w[:32] *= -1  # mean 0, variance 1/4
    inputs = gm.graph.find_nodes(op="placeholder")
    args = [{"w": w, "w2": w2}.get(node.name) for node in inputs]
    scale = gm.meta[STATIC_SCALES].derived(args, 2 * SLOTS_PER_SITE)
    # y of variance 32 / 4; y^2 has the mean 8 and the variance 2 * 8^2, and 16 * 64 elements
    largest = 8 + (2 * torch.tensor(1024.0).log()).sqrt() * 128**0.5
    assert float(scale[SLOTS_PER_SITE]) == pytest.approx(
        E4M3.max / MARGIN[E4M3] / float(largest), rel=1e-5
    )
    assert float(scale[1]) == pytest.approx(E4M3.max / MARGIN[E4M3] / 0.5)
    assert float(scale[SLOTS_PER_SITE + 1]) == pytest.approx(E4M3.max / MARGIN[E4M3] / 3)
    assert not scale.view(2, -1)[:, 3:].any()  # no operand has these


@pytest.mark.parametrize("width", [48, 40], ids=["merged", "apart"])
def test_sites_that_share_a_slot_have_the_largest_of_their_values(width: int) -> None:
    gm, run = static(Pair(width=width), torch.randn(16, 32, dtype=torch.bfloat16))
    run(gm)
    weights = {"w1": torch.ones(4, 4), "w2": torch.full((4, 4), 8.0)}
    args = [weights.get(node.name) for node in gm.graph.find_nodes(op="placeholder")]
    scale = gm.meta[STATIC_SCALES].derived(args, 2 * SLOTS_PER_SITE)
    assert float(scale[1]) == pytest.approx(E4M3.max / MARGIN[E4M3] / 8)


def test_what_is_no_positive_number_is_left_to_the_cast() -> None:
    gm, run = static(Linear(), torch.randn(16, 32, dtype=torch.bfloat16))
    run(gm)
    inputs = gm.graph.find_nodes(op="placeholder")
    for number in (0.0, float("nan"), float("inf"), 1e-45):
        args = [torch.full((64, 32), number) if n.name == "w" else None for n in inputs]
        scale = gm.meta[STATIC_SCALES].derived(args, 4)
        assert scale.isfinite().all() and scale[0] > 0
        assert (scale[1] > 0) == (number == 1e-45)
    assert "amax = amax_w" in format_graph(gm)
