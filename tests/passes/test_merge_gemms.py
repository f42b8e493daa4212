"""merge_gemms: GEMMs that share an input become one, in every direction or in none."""

from __future__ import annotations

import sys
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fp8compile
from fp8compile import RECIPES
from fp8compile.ir import evaluate, gemms
from fp8compile.passes import find_gemms, joint_passes, merge_gemms, run_passes
from fp8compile.passes.merge_gemms import _kind
from tests.helpers import Joint, compile_interpreted, trace, trace_joint
from tests.models import MLP, Attention, Layer, sqnr_db
from tests.passes.common import Pair, aten, before, check_pass, lines_of, pair_joint


def names(gm: fx.GraphModule) -> list[str]:
    return [f"{info.name} {info.gemm}" for _, info in gemms(gm)]


def values(gm: fx.GraphModule) -> list[Tensor | None]:
    """The outputs for inputs drawn from a fixed seed."""
    torch.manual_seed(0)
    inputs = [
        torch.randn(n.meta["val"].shape).to(n.meta["val"].dtype)
        for n in gm.graph.find_nodes(op="placeholder")
    ]
    return list(fx.Interpreter(gm).run(*inputs, enable_io_processing=False))


def assert_merges(joint: Joint, groups: int = 1) -> fx.GraphModule:
    """So many groups are merged; outputs stay the same, and every ``meta["val"]`` is right."""
    gm, run = before("merge_gemms", joint)
    expected = values(gm)
    assert check_pass(gm, run) == groups
    for old, new in zip(expected, values(gm), strict=True):
        assert old is new is None or sqnr_db(old, new) > 40
    for node in gm.graph.nodes:
        if node.op == "call_function":
            assert _kind(node.meta["val"]) == _kind(evaluate(node)), node
    return gm


def assert_left_alone(joint: Joint) -> None:
    gm, run = before("merge_gemms", joint)
    text = lines_of(gm)
    assert check_pass(gm, run) == 0
    assert lines_of(gm) == text


# --- what is merged -----------------------------------------------------------------------------


def test_one_gemm_in_each_direction() -> None:
    gm, run = before("merge_gemms", pair_joint())
    assert check_pass(gm, run) == 1
    assert_expected_inline(
        lines_of(gm),
        """\
w1 : bf16[64, 32]
x : bf16[16, 32]
w2 : bf16[48, 32]
scale : f32[24]
amax_fwd : f32[24]
amax_bwd : f32[24]
tangents_1 : bf16[16, 112]
w1_cat : bf16[112, 32] = aten.cat([w1, w2])
w1_cat_t : bf16[32, 112] = aten.permute(w1_cat, [1, 0])
mm_merged : bf16[16, 112] = aten.mm(x, w1_cat_t) # {w1,w2} fprop = input x weight^T
mm_slice : bf16[16, 64] = aten.slice.Tensor(mm_merged, 1, 0, 64)
mm_1_slice : bf16[16, 48] = aten.slice.Tensor(mm_merged, 1, 64, 112)
tanh : bf16[16, 64] = aten.tanh(mm_slice)
alias : bf16[16, 64] = aten.alias(tanh)
sigmoid : bf16[16, 48] = aten.sigmoid(mm_1_slice)
alias_1 : bf16[16, 48] = aten.alias(sigmoid)
cat : bf16[16, 112] = aten.cat([tanh, sigmoid], -1)
slice_1 : bf16[16, 64] = aten.slice.Tensor(tangents_1, 1, 0, 64)
slice_2 : bf16[16, 48] = aten.slice.Tensor(tangents_1, 1, 64, 112)
alias_2 : bf16[16, 48] = aten.alias(alias_1)
convert_element_type_4 : f32[16, 48] = prims.convert_element_type(slice_2, f32)
convert_element_type_5 : f32[16, 48] = prims.convert_element_type(alias_2, f32)
sub : f32[16, 48] = aten.sub.Tensor(1, convert_element_type_5)
mul : f32[16, 48] = aten.mul.Tensor(convert_element_type_5, sub)
mul_1 : f32[16, 48] = aten.mul.Tensor(convert_element_type_4, mul)
convert_element_type_6 : bf16[16, 48] = prims.convert_element_type(mul_1, bf16)
alias_3 : bf16[16, 64] = aten.alias(alias)
convert_element_type_7 : f32[16, 64] = prims.convert_element_type(slice_1, f32)
convert_element_type_8 : f32[16, 64] = prims.convert_element_type(alias_3, f32)
mul_2 : f32[16, 64] = aten.mul.Tensor(convert_element_type_8, convert_element_type_8)
sub_1 : f32[16, 64] = aten.sub.Tensor(1, mul_2)
mul_3 : f32[16, 64] = aten.mul.Tensor(convert_element_type_7, sub_1)
convert_element_type_9 : bf16[16, 64] = prims.convert_element_type(mul_3, bf16)
convert_element_type_9_cat : bf16[16, 112] = aten.cat([convert_element_type_9, convert_element_type_6], 1)
w1_cat_1 : bf16[112, 32] = aten.cat([w1, w2], 0)
mm_5_merged : bf16[16, 32] = aten.mm(convert_element_type_9_cat, w1_cat_1) # {w1,w2} dgrad = grad_output x weight
convert_element_type_9_cat_t : bf16[112, 16] = aten.permute(convert_element_type_9_cat, [1, 0])
mm_4_merged : bf16[112, 32] = aten.mm(convert_element_type_9_cat_t, x) # {w1,w2} wgrad = grad_output^T x input
mm_4_slice : bf16[64, 32] = aten.slice.Tensor(mm_4_merged, 0, 0, 64)
mm_2_slice : bf16[48, 32] = aten.slice.Tensor(mm_4_merged, 0, 64, 112)
permute_3 : bf16[32, 48] = aten.permute(mm_2_slice, [1, 0])
permute_5 : bf16[48, 32] = aten.permute(permute_3, [1, 0])
permute_7 : bf16[32, 64] = aten.permute(mm_4_slice, [1, 0])
permute_9 : bf16[64, 32] = aten.permute(permute_7, [1, 0])
return [cat, permute_9, mm_5_merged, permute_5, None, None, None]""",  # noqa: E501
    )


@pytest.mark.parametrize("bias", [False, True])
def test_gate_and_up(bias: bool) -> None:
    gm = assert_merges(trace_joint(MLP(bias=bias), torch.randn(2, 16, 64, requires_grad=True)))
    assert sorted(names(gm)) == [
        f"{site} {gemm}" for site in ("down", "{gate,up}") for gemm in ("dgrad", "fprop", "wgrad")
    ]


def test_q_k_and_v() -> None:
    inputs = (torch.randn(2, 16, 64, requires_grad=True), torch.randn(16, 32), torch.randn(16, 32))
    gm = assert_merges(trace_joint(Attention(64, 2, 1), *inputs))
    assert "{wq,wk,wv} dgrad" in names(gm) and len(names(gm)) == 6
    info = next(info for _, info in gemms(gm))
    assert (info.m, info.n, info.k) == (32, 128, 64)
    assert [site.fqn for site in info.sites] == ["wq", "wk", "wv"]


def test_a_part_that_outlives_the_others_is_copied() -> None:
    inputs = (torch.randn(2, 16, 64), torch.randn(16, 32), torch.randn(16, 32))
    gm = assert_merges(trace_joint(Layer(64, 2, 1, 128), *inputs), groups=2)
    # Backward reads v, gate and up as they are; only of q, k and v it does not read all.
    copies = [node for node in gm.graph.nodes if node.target is aten.clone.default]
    assert [str(node) for node in copies] == ["mm_2_copy"]


def test_other_parts_of_the_sum_stay() -> None:
    class Residual(Pair):
        def forward(self, x: Tensor) -> object:
            h = x.tanh()
            return h + super().forward(h)[0] @ self.w1.tanh()  # type: ignore[index]

    gm = assert_merges(pair_joint(Residual(lambda a, b: (a.tanh() * b.sum(),))))
    assert "{w1,w2} dgrad" in names(gm)


def test_weights_stored_either_way_round() -> None:
    class Matmul(Pair):
        def forward(self, x: Tensor) -> object:
            return self.combine(F.linear(x, self.w1), x @ self.w2.t())

    gm = assert_merges(pair_joint(Matmul()))
    assert names(gm) == ["{w1,w2} fprop", "{w1,w2} dgrad", "{w1,w2} wgrad"]


def test_an_input_without_gradient_has_no_dgrad() -> None:
    gm = assert_merges(pair_joint(requires_grad=False))
    assert names(gm) == ["{w1,w2} fprop", "{w1,w2} wgrad"]


def test_frozen_weights_have_no_wgrad() -> None:
    gm = assert_merges(pair_joint(Pair().requires_grad_(False)))
    assert names(gm) == ["{w1,w2} fprop", "{w1,w2} dgrad"]


def test_inference() -> None:
    def fn(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        return aten.mm(x, w1.t()).relu().sum() + aten.mm(x, w2.t()).relu().sum()

    gm = trace(fn, x=torch.randn(16, 32), w1=torch.randn(64, 32), w2=torch.randn(48, 32))
    find_gemms(gm)
    assert check_pass(gm, merge_gemms) == 1
    assert names(gm) == ["{mm,mm_1} fprop"]


def test_a_view_that_a_strided_value_does_not_have_becomes_a_copy() -> None:
    joined = Pair(lambda a, b: torch.cat([a.view(-1).tanh(), b.tanh().view(-1)]))
    gm = assert_merges(pair_joint(joined))
    assert [n.target for n in gm.graph.nodes if n.name == "view"] == [aten.reshape.default]


@torch.library.custom_op("fp8_tests::dense", mutates_args=())
def dense(x: Tensor) -> Tensor:
    return x.tanh()


@dense.register_fake
def _(x: Tensor) -> Tensor:
    assert x.is_contiguous()
    return torch.empty_like(x)


def test_an_operator_that_takes_no_strided_value_gets_a_copy() -> None:
    def fn(x: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
        return dense(aten.mm(x, w1.t())), aten.mm(x, w2.t()).tanh()

    gm = trace(fn, x=torch.randn(16, 32), w1=torch.randn(64, 32), w2=torch.randn(48, 32))
    find_gemms(gm)
    assert check_pass(gm, merge_gemms) == 1
    assert [str(n.args[0]) for n in gm.graph.nodes if "dense" in n.name] == ["mm_slice_copy"]


def test_the_weights_are_concatenated_once_more_in_the_backward() -> None:
    gm = assert_merges(pair_joint())
    weights = [n for n in gm.graph.nodes if n.target is aten.cat.default and "w1" in n.name]
    assert [n.meta["partitioner_tag"] for n in weights] == ["is_forward", "must_be_in_backward"]
    # The partitioner takes equal nodes for one, and would keep it.
    assert len({str(n.args) for n in weights}) == 2


def test_the_merged_gemms_become_fp8() -> None:
    joint = pair_joint()
    recipe = RECIPES["delayed"]
    counts = run_passes(joint.gm, joint_passes(recipe=recipe, sites=joint.sites, state=joint.state))
    assert (counts["merge_gemms"], counts["insert_casts"]) == (1, 3)
    assert find_gemms(joint.gm, sites=joint.sites) == 0


@pytest.mark.filterwarnings("ignore:FP8 is emulated here")
def test_scales_of_training_without_merging_fit_inference_with_it() -> None:
    torch.manual_seed(0)
    model = MLP(64, 128)
    with torch.no_grad():
        model.up.weight.mul_(3)
    training = compile_interpreted(model)
    with mock.patch.object(sys.modules[merge_gemms.__module__], "_may_merge", return_value=False):
        training(torch.randn(32, 64)).sum().backward()
    fp8compile.update_scales(model)
    assert len(fp8compile.state_dict(model)) == 6
    torch._dynamo.reset()
    x = torch.randn(32, 64)
    with torch.no_grad():
        assert sqnr_db(model(x) - x, compile_interpreted(model)(x) - x) > 20


# --- what is left alone -------------------------------------------------------------------------


class TwoInputs(Pair):
    """The second input is another value."""

    def forward(self, x: Tensor) -> object:
        return self.combine(F.linear(x, self.w1), F.linear(x.tanh(), self.w2))


class TwoViews(Pair):
    """One value, but not to tag_sites, which gave each site a scaling state of its own."""

    def forward(self, x: Tensor) -> object:
        return self.combine(F.linear(x.view(16, 32), self.w1), F.linear(x.view(16, 32), self.w2))


class SameWeight(Pair):
    def forward(self, x: Tensor) -> object:
        return self.combine(F.linear(x, self.w1), F.linear(x, self.w1))


class Hypernetwork(Pair):
    """The second weight is made from the first output."""

    def forward(self, x: Tensor) -> object:
        first = F.linear(x, self.w1)
        return self.combine(first, F.linear(x, first.view(32, 32).tanh()))


class Narrow(Pair):
    """The second GEMM stays in high precision."""

    def forward(self, x: Tensor) -> object:
        return self.combine(F.linear(x, self.w1), F.linear(x, self.w2[:17]))


def frozen_first() -> Pair:
    model = Pair()
    model.w1.requires_grad_(False)
    return model


NEAR_MISSES: dict[str, Callable[[], nn.Module]] = {
    "another_input": TwoInputs,
    "two_views_of_an_input": TwoViews,
    "the_same_weight_twice": SameWeight,
    "one_uses_the_other": Hypernetwork,
    "one_in_high_precision": Narrow,
    "one_weight_frozen": frozen_first,
    "output_returned": lambda: Pair(lambda a, b: (a, b.tanh() + a.sum())),
    "view_of_output_returned": lambda: Pair(lambda a, b: (a.tanh() + b.sum(), b.view(2, 8, 48))),
    "gradients_of_two_outputs": lambda: Pair(lambda a, b: (a.tanh(), b.sigmoid())),
}


@pytest.mark.parametrize("miss", NEAR_MISSES)
def test_near_misses_are_left_alone(miss: str) -> None:
    assert_left_alone(pair_joint(NEAR_MISSES[miss]()))


def test_random_numbers_keep_their_order() -> None:
    def fn(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        random = aten.bernoulli(aten.mm(x, w1.t()).sigmoid())
        return aten.mm(x, w2.t()).relu().sum() + random.sum()

    gm = trace(fn, x=torch.randn(16, 32), w1=torch.randn(64, 32), w2=torch.randn(48, 32))
    find_gemms(gm)
    assert check_pass(gm, merge_gemms) == 0


def test_a_width_that_is_no_multiple_of_16() -> None:
    assert_left_alone(pair_joint(Pair(width=40)))


def test_dgrads_that_are_not_summed_in_one_place() -> None:
    joint = pair_joint()
    gm, run = before("merge_gemms", joint)
    dgrad = next(node for node, info in gemms(gm) if str(info.gemm) == "dgrad")
    output = gm.graph.output_node()
    output.args = ([*output.args[0], dgrad],)  # type: ignore[misc]
    text = lines_of(gm)
    assert run(gm) == 0
    assert lines_of(gm) == text
