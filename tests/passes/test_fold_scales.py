"""fold_scales: constant factors move into scales, and multiply no matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fp8compile
from fp8compile import RECIPES, Recipe
from fp8compile.ir import QUANTIZE, constant_factor, is_cast
from fp8compile.passes import (
    choose_formats,
    choose_precision,
    find_gemms,
    fold_scales,
    insert_casts,
    pipeline,
    share_casts,
)
from tests.helpers import compile_interpreted, trace, trace_joint
from tests.models import sqnr_db
from tests.passes.common import Linear, aten, before, check_pass, lines_of

BF16 = torch.bfloat16


def cast_graph(
    fn: Callable[..., Any], recipe: Recipe = RECIPES["current"], **inputs: Tensor
) -> fx.GraphModule:
    """The graph of a function of bf16 matrices, with its GEMMs in FP8."""
    torch.manual_seed(0)
    shapes = {"x": (16, 32), "w": (64, 32), "v": (64, 32)}
    given = inputs or {name: torch.randn(shape).to(BF16) for name, shape in shapes.items()}
    gm = trace(fn, **given)
    find_gemms(gm)
    choose_precision(gm)
    choose_formats(gm, recipe=recipe)
    insert_casts(gm, recipe=recipe)
    return gm


def results(gm: fx.GraphModule) -> list[Tensor]:
    torch.manual_seed(1)
    values = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    out = fx.Interpreter(gm).run(*(torch.randn(v.shape).to(v.dtype) for v in values))
    return list(out) if isinstance(out, list | tuple) else [out]


def folded(gm: fx.GraphModule, rewrites: int, exact: bool = True) -> fx.GraphModule:
    """Run the pass; what the graph computes stays the same."""
    expected = results(gm)
    assert check_pass(gm, fold_scales) == rewrites
    for want, got in zip(expected, results(gm), strict=True):
        assert torch.equal(want, got) if exact else sqnr_db(want, got) > 45
    return gm


def factors(gm: fx.GraphModule) -> list[str]:
    """The nodes that multiply by a constant."""
    return [node.name for node in gm.graph.nodes if constant_factor(node)]


def linear(x: Tensor, w: Tensor) -> Tensor:
    return aten.mm(x, aten.permute(w, [1, 0]))


# --- a GEMM's scale_inv ---------------------------------------------------------------------------


def test_a_factor_of_what_a_gemm_returns() -> None:
    gm = folded(cast_graph(lambda x, w, v: linear(x, w) * 0.125), 1)
    assert_expected_inline(
        lines_of(gm),
        """\
x : bf16[16, 32]
w : bf16[64, 32]
v : bf16[64, 32]
x_q : (e4m3[16, 32], e4m3[32, 16], f32[1], f32[1], f32[1]) = fp8.quantize(x, None, 0, e4m3)
x_fp8 : e4m3[16, 32] = x_q[0]
x_scale_inv : f32[1] = x_q[2]
w_q : (e4m3[64, 32], e4m3[32, 64], f32[1], f32[1], f32[1]) = fp8.quantize(w, None, 1, e4m3)
w_fp8 : e4m3[64, 32] = w_q[0]
w_scale_inv : f32[1] = w_q[2]
w_scale_inv_scaled : f32[1] = aten.mul.Tensor(w_scale_inv, 0.125)
mm_fp8 : bf16[16, 64] = fp8.scaled_mm(x_fp8, w_fp8, x_scale_inv, w_scale_inv_scaled, None, bf16, True) # mm fprop = input e4m3 x weight^T e4m3
return mm_fp8""",  # noqa: E501
    )


def test_a_chain_of_factors_goes_through_views_and_transposes() -> None:
    def fn(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return aten.permute(aten.view(linear(x, w) * 0.25, [4, 4, 64]) / 2, [0, 2, 1]) * 3

    gm = folded(cast_graph(fn), 3, exact=False)
    assert_expected_inline(
        lines_of(gm, "w_scale_inv_scaled", "mm_fp8", "view", "permute_1"),
        """\
w_scale_inv_scaled : f32[1] = aten.mul.Tensor(w_scale_inv, 0.375)
mm_fp8 : bf16[16, 64] = fp8.scaled_mm(x_fp8, w_fp8, x_scale_inv, w_scale_inv_scaled, None, bf16, True) # mm fprop = input e4m3 x weight^T e4m3
view : bf16[4, 4, 64] = aten.view(mm_fp8, [4, 4, 64])
permute_1 : bf16[4, 64, 4] = aten.permute(view, [0, 2, 1])""",  # noqa: E501
    )
    assert factors(gm) == ["w_scale_inv_scaled"]


def test_a_factor_of_what_a_gemm_in_high_precision_reads() -> None:
    def fn(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return aten.bmm(aten.view(linear(x, w) * 0.5, [1, 16, 64]), aten.view(v, [1, 64, 32]))

    gm = folded(cast_graph(fn), 1)
    assert factors(gm) == ["w_scale_inv_scaled"]


def test_a_factor_that_is_a_tensor() -> None:
    def fn(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return linear(x, w) / torch.full([], 8.0)

    assert factors(folded(cast_graph(fn), 1)) == ["w_scale_inv_scaled"]


@pytest.mark.parametrize(("recipe", "fewer"), [("rowwise", "x"), ("blockwise", "w"), ("mx", "x")])
def test_of_scales_per_block_the_fewer_are_multiplied(recipe: str, fewer: str) -> None:
    gm = cast_graph(lambda x, w, v: linear(x, w) * 0.125, RECIPES[recipe])
    assert factors(folded(gm, 1)) == [f"{fewer}_scale_inv_scaled"]


def test_scales_that_are_powers_of_two_stay_so() -> None:
    gm = cast_graph(lambda x, w, v: linear(x, w) * 0.1, RECIPES["mx"])
    assert factors(folded(gm, 0)) == ["mul"]


def test_a_gradient_that_is_multiplied() -> None:
    class Scaled(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.w * 0.5)

    x = torch.randn(16, 32, dtype=BF16, requires_grad=True)
    gm, run = before("fold_scales", trace_joint(Scaled(), x))
    assert check_pass(gm, run) == 1
    assert_expected_inline(
        lines_of(gm, *factors(gm), "mm_1_fp8"),
        """\
mul : bf16[64, 32] = aten.mul.Tensor(w, 0.5)
x_scale_inv_1_scaled : f32[1] = aten.mul.Tensor(x_scale_inv_1, 0.5)
mm_1_fp8 : bf16[64, 32] = fp8.scaled_mm(tangents_1_fp8_t, x_fp8_t, tangents_1_scale_inv, x_scale_inv_1_scaled, None, bf16, True) # w wgrad = grad_output^T e5m2 x input e4m3""",  # noqa: E501
    )


LEFT_ALONE: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "a pointwise operator reads it": lambda x, w, v: (linear(x, w) * 0.125).tanh(),
    "a cast reads it": lambda x, w, v: linear(linear(x, w) * 0.125, aten.permute(v, [1, 0])),
    "a bias": lambda x, w, v: aten.addmm(v[:, 0], x, aten.permute(w, [1, 0])) * 0.125,
    "the sum of all": lambda x, w, v: aten.sum(linear(x, w) * 0.125),
    "others read the GEMM's output": lambda x, w, v: (y := linear(x, w), y * 0.125),
    "others read a view of it": lambda x, w, v: (
        y := aten.view(linear(x, w), [-1]),
        aten.view(y * 0.125, [16, 64]),
    ),
    "a part of the output": lambda x, w, v: aten.slice(linear(x, w), 1, 0, 32) * 0.125,
    "a negative factor": lambda x, w, v: linear(x, w) * -0.125,
    "a factor of 0": lambda x, w, v: linear(x, w) * 0,
    "a division by 0": lambda x, w, v: linear(x, w) / 0,
    "a factor that is too large": lambda x, w, v: linear(x, w) * 2.0**40,
    "a factor that is not constant": lambda x, w, v: linear(x, w) * v[0, 0],
    "another dtype": lambda x, w, v: linear(x, w).float() * 0.125,
    "rounded down": lambda x, w, v: aten.div(linear(x, w), 8, rounding_mode="floor"),
}


@pytest.mark.parametrize("what", LEFT_ALONE)
def test_left_alone(what: str) -> None:
    gm = cast_graph(LEFT_ALONE[what])
    text = lines_of(gm)
    assert fold_scales(gm) == 0
    assert lines_of(gm) == text


def test_the_parts_of_a_merged_gemm_have_one_scale() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = (nn.Linear(32, 64, bias=False, dtype=BF16) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) * 0.125 + self.k(x).tanh()

    gm, run = before("fold_scales", trace_joint(Parts(), torch.randn(16, 32, dtype=BF16)))
    assert any("mm_merged" in node.name for node in gm.graph.nodes)
    assert check_pass(gm, run) == 0


# --- attention ------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Attention as Whisper and OPT write it: the query is multiplied, not the scores."""

    def __init__(self, combine: Callable[[Tensor], Any] = lambda q: None, scale: float = 1.0):
        super().__init__()
        self.q, self.v = nn.Linear(32, 32), nn.Linear(32, 32)
        self.k = nn.Linear(32, 32, bias=False)  # its gradient would be 0
        self.combine, self.scale = combine, scale

    def forward(self, x: Tensor) -> Any:
        split = (2, 8, 2, 16)
        q = (self.q(x) * 0.25).view(split).transpose(1, 2)
        k, v = (layer(x).view(split).transpose(1, 2) for layer in (self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return out.transpose(1, 2).reshape(2, 8, 32), self.combine(q)


def attention_joint(*args: Any) -> tuple[fx.GraphModule, Callable[[fx.GraphModule], int]]:
    return before("fold_scales", trace_joint(Attention(*args), torch.randn(2, 8, 32)))


def test_attention_multiplies_by_the_factor_of_its_query() -> None:
    gm, run = attention_joint()
    assert len(factors(gm)) == 2  # forward, and the gradient
    assert check_pass(gm, run) == 2
    assert factors(gm) == []
    calls = [node for node in gm.graph.nodes if "dot_product" in node.name and node.kwargs]
    assert_expected_inline(
        lines_of(gm, *(node.name for node in calls)),
        """\
_scaled_dot_product_flash_attention_for_cpu : (f32[2, 2, 8, 16], f32[2, 2, 8]) = aten._scaled_dot_product_flash_attention_for_cpu(permute_1, permute_3, permute_5, scale=0.25)
_scaled_dot_product_flash_attention_for_cpu_backward : (f32[2, 2, 8, 16], f32[2, 2, 8, 16], f32[2, 2, 8, 16]) = aten._scaled_dot_product_flash_attention_for_cpu_backward(permute_7, permute_1, permute_3, permute_5, alias_1, getitem_1, 0.0, False, scale=0.25)""",  # noqa: E501
    )


@pytest.mark.parametrize(
    "combine", [lambda q: q, lambda q: q.tanh(), lambda q: (q * 2).sum()], ids=["it", "tanh", "sum"]
)
def test_a_query_that_others_read_as_well(combine: Callable[[Tensor], Any]) -> None:
    gm, run = attention_joint(combine)
    text = lines_of(gm)
    assert check_pass(gm, run) == 0
    assert lines_of(gm) == text


KINDS: dict[str, tuple[tuple[Any, ...], int]] = {
    # What follows query, key and value; how many results of the forward its backward takes.
    "flash_attention_for_cpu": ((0.0, True), 2),
    "flash_attention": ((0.0, True, False), 9),
    "efficient_attention": ((None, True, 0.0, True), 4),
    "cudnn_attention": ((None, True, 0.0, True, False), 9),
}


def _backward(kind: str, g: Tensor, q: Tensor, k: Tensor, v: Tensor, found: Any, s: float) -> Any:
    """The gradients of query and key, by the operator's own backward."""
    call = getattr(aten, f"_scaled_dot_product_{kind}_backward")
    out, lse, *rest = found
    if kind == "flash_attention_for_cpu":
        grads = call(g, q, k, v, out, lse, 0.0, True, scale=s)
    elif kind == "flash_attention":
        grads = call(g, q, k, v, out, lse, *rest[:4], 0.0, True, rest[4], rest[5], scale=s)
    elif kind == "efficient_attention":
        mask = [True, True, True, False]
        grads = call(g, q, k, v, None, out, lse, *rest, 0.0, mask, True, scale=s)
    else:
        cu, seed = rest[:4], rest[4:6]
        grads = call(g, q, k, v, out, lse, *seed, None, *cu, 0.0, True, scale=s)
    return grads[:2]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_attention(kind: str) -> None:
    """Query and key, forward and backward. Only that for a CPU can be run here."""
    more, results_taken = KINDS[kind]

    def fn(g: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Any:
        q, k = q * 0.25, k * 3
        found = getattr(aten, f"_scaled_dot_product_{kind}")(q, k, v, *more, scale=0.5)
        q_grad, k_grad = _backward(kind, g, q, k, v, found[:results_taken], 0.5)
        return found[0], q_grad * 0.25, k_grad * 3

    torch.manual_seed(0)
    inputs = {name: torch.randn(2, 2, 16, 16) for name in "gqkv"}
    gm = trace(fn, **inputs)
    on_cpu = kind.endswith("cpu")
    expected = gm(*inputs.values()) if on_cpu else ()
    assert check_pass(gm, fold_scales) == 4
    assert factors(gm) == []
    scales = [node.kwargs["scale"] for node in gm.graph.nodes if "scale" in node.kwargs]
    assert scales == [0.375, 0.375]
    gm.recompile()
    for want, got in zip(expected, gm(*inputs.values()) if on_cpu else (), strict=True):
        torch.testing.assert_close(got, want)


ATTENTION_LEFT_ALONE: dict[str, Callable[..., Any]] = {
    "value": lambda q, k, v: attend(q, k, v * 0.5),
    "a negative factor": lambda q, k, v: attend(q * -0.5, k, v),
    "query and key are one": lambda q, k, v: attend(p := q * 0.5, p, v),
    "query and key are views of one": lambda q, k, v: attend(
        p := q * 0.5, aten.permute(p, [0, 1, 3, 2]), v
    ),
    "mask": lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, attn_mask=q[..., :1] * 0.5
    )[0],
}


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]
    return out


@pytest.mark.parametrize("what", ATTENTION_LEFT_ALONE)
def test_attention_left_alone(what: str) -> None:
    gm = trace(ATTENTION_LEFT_ALONE[what], **{name: torch.randn(2, 2, 16, 16) for name in "qkv"})
    text = lines_of(gm)
    assert check_pass(gm, fold_scales) == 0
    assert lines_of(gm) == text


def test_a_gradient_that_others_read_as_well() -> None:
    def fn(g: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Any:
        p = q * 0.25
        found = aten._scaled_dot_product_flash_attention_for_cpu(p, k, v)
        grad = _backward("flash_attention_for_cpu", g, p, k, v, found, 0.25)[0]
        return grad * 0.25, grad.tanh()

    gm = trace(fn, **{name: torch.randn(2, 2, 16, 16) for name in "gqkv"})
    assert check_pass(gm, fold_scales) == 0


# --- a cast ---------------------------------------------------------------------------------------


def test_a_cast_of_a_multiple_is_that_of_the_value() -> None:
    gm = folded(cast_graph(lambda x, w, v: (linear(x, w), linear(x * 0.5, v))), 1)
    assert check_pass(gm, share_casts) == 1
    assert_expected_inline(
        lines_of(gm),
        """\
x : bf16[16, 32]
w : bf16[64, 32]
v : bf16[64, 32]
x_q : (e4m3[16, 32], e4m3[32, 16], f32[1], f32[1], f32[1]) = fp8.quantize(x, None, 0, e4m3)
x_fp8 : e4m3[16, 32] = x_q[0]
x_scale_inv : f32[1] = x_q[2]
w_q : (e4m3[64, 32], e4m3[32, 64], f32[1], f32[1], f32[1]) = fp8.quantize(w, None, 1, e4m3)
w_fp8 : e4m3[64, 32] = w_q[0]
w_scale_inv : f32[1] = w_q[2]
mm_fp8 : bf16[16, 64] = fp8.scaled_mm(x_fp8, w_fp8, x_scale_inv, w_scale_inv, None, bf16, True) # mm fprop = input e4m3 x weight^T e4m3
v_q : (e4m3[64, 32], e4m3[32, 64], f32[1], f32[1], f32[1]) = fp8.quantize(v, None, 13, e4m3)
v_fp8 : e4m3[64, 32] = v_q[0]
v_scale_inv : f32[1] = v_q[2]
mul_scale_inv_scaled : f32[1] = aten.mul.Tensor(x_scale_inv, 0.5)
mm_1_fp8 : bf16[16, 64] = fp8.scaled_mm(x_fp8, v_fp8, mul_scale_inv_scaled, v_scale_inv, None, bf16, True) # mm_1 fprop = input e4m3 x weight^T e4m3
return (mm_fp8, mm_1_fp8)""",  # noqa: E501
    )


def test_what_a_cast_no_longer_reads_is_one_factor_of_a_chain() -> None:
    def fn(x: Tensor, w: Tensor, v: Tensor) -> Any:
        y = x * 0.125
        return linear(x, w), linear(y, w), linear(y * 0.125, v), linear(y / 2 * 0.3, v)

    gm = folded(cast_graph(fn), 4)
    (product,) = (
        n for n in gm.graph.nodes if n.target is aten.mul.Tensor and n.args[0].name == "x"
    )
    assert product.args[1] == 0.125 / 2 * 0.3


def test_a_cast_of_a_transposed_multiple() -> None:
    """By any order of the two: one cast writes both copies."""

    def fn(x: Tensor, w: Tensor, v: Tensor) -> Any:
        return aten.mm(aten.permute(w, [1, 0]) * 0.25, v), linear(x, w)

    gm = folded(cast_graph(fn), 1)
    assert check_pass(gm, share_casts) == 1
    assert [str(node.args[0]) for node in gm.graph.nodes if is_cast(node)].count("w") == 1


@pytest.mark.parametrize("recipe", ["rowwise", "blockwise", "mx"])
def test_casts_with_a_scale_per_block(recipe: str) -> None:
    def fn(x: Tensor, w: Tensor, v: Tensor) -> Any:
        return linear(x * 4, w), linear(x, v), aten.mm(aten.permute(x * 2, [1, 0]) * 0.5, x)

    gm = cast_graph(fn, RECIPES[recipe])
    expected = results(gm)
    assert check_pass(gm, fold_scales) > 0
    share_casts(gm)
    casts = [str(node.args[0]) for node in gm.graph.nodes if is_cast(node)]
    as_weight = ["x"] if recipe == "blockwise" else []  # which has larger blocks
    assert sorted(casts) == ["v", "w", "x", *as_weight]
    assert all(map(torch.equal, expected, results(gm)))


def test_a_view_of_the_value_is_moved_in_front_of_the_cast() -> None:
    def fn(x: Tensor, w: Tensor, v: Tensor) -> Any:
        deep = aten.view(x, [2, 8, 32])
        first = linear(aten.view(deep * 2, [16, 32]), w)
        return (
            first,
            linear(aten.view(deep.neg().neg(), [16, 32]), v),
            linear(aten.view(deep, [16, 32]), v),
        )

    gm = folded(cast_graph(fn), 1)
    assert check_pass(gm, share_casts) == 2  # and that of v


CASTS_LEFT_ALONE: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "x is not cast": lambda x, w, v: linear(x * 0.5, w),
    "not a power of two": lambda x, w, v: (linear(x, w), linear(x * 0.3, v)),
    "a sum": lambda x, w, v: (linear(x, w), linear(x + 0.5, v)),
    "another shape": lambda x, w, v: (
        linear(x, w),
        linear(aten.view(x * 0.5, [8, 64]), aten.permute(v, [1, 0])),
    ),
}


@pytest.mark.parametrize("what", CASTS_LEFT_ALONE)
def test_casts_left_alone(what: str) -> None:
    gm = cast_graph(CASTS_LEFT_ALONE[what])
    text = lines_of(gm)
    assert fold_scales(gm) == 0
    assert lines_of(gm) == text


class Adapted(nn.Module):
    """LoRA: the gradient of the branch is a multiple of that of the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(32, 64, bias=False)
        self.a = nn.Linear(32, 8, bias=False)  # too narrow to be merged
        self.b = nn.Linear(8, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w(x) + 2 * self.b(self.a(x).relu())


@pytest.mark.parametrize(("recipe", "rewrites"), [("current", 2), ("blockwise", 2), ("delayed", 0)])
def test_a_gradient_on_its_way_into_a_cast(recipe: str, rewrites: int) -> None:
    """A delayed scale stays: its slot has the history of the multiple."""
    joint = trace_joint(Adapted(), torch.randn(16, 32), options={"recipe": recipe})
    passes = pipeline.joint_passes(recipe=RECIPES[recipe], sites=joint.sites, state=joint.state)
    counts = pipeline.run_passes(joint.gm, passes)
    assert counts["fold_scales"] == rewrites
    casts = [node for node in joint.gm.graph.nodes if is_cast(node)]
    of_gradients = [node for node in casts if "tangents" in str(node.args[0])]
    assert len(of_gradients) == 1
    assert (QUANTIZE in {node.target for node in casts}) == (recipe != "blockwise")


# --- end to end -----------------------------------------------------------------------------------


class Everything(nn.Module):
    """Every rule at once."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.adapted = Attention(), Adapted()
        self.head = nn.Linear(64, 48, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.adapted(self.attention(x)[0].view(16, 32))
        return self.head(y) / 3 * 0.5


def _trained(recipe: str) -> tuple[list[Tensor], int]:
    torch.manual_seed(0)
    model, x = Everything(), torch.randn(2, 8, 32, requires_grad=True)
    counts: list[int] = []

    def run_passes(*args: Any, **kwargs: Any) -> dict[str, int]:
        found = pipeline.run_passes(*args, **kwargs)
        counts.append(found["fold_scales"])
        return found

    torch._dynamo.reset()
    with mock.patch("fp8compile.compile.run_passes", run_passes):
        out = compile_interpreted(model, {"recipe": recipe})(x)
    out.square().sum().backward()
    return [out, x.grad, *(p.grad for p in model.parameters())], sum(counts)  # type: ignore[list-item]


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_a_model_computes_the_same(recipe: str) -> None:
    got, rewrites = _trained(recipe)
    with mock.patch.object(pipeline, "fold_scales", _nothing):
        want, none = _trained(recipe)
    assert rewrites >= 4 > none
    for a, b in zip(want, got, strict=True):
        assert sqnr_db(a, b) > 60


class Factors(nn.Module):
    """Of an output, as of logits, and of an input that another layer takes as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.other = (nn.Linear(128, n, bias=False) for n in (256, 48))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(x) / 3, self.other(x * 0.5)


@pytest.mark.parametrize("rows", [16, 512], ids=("few rows", "many rows"))
@pytest.mark.parametrize("recipe", ["rowwise", "blockwise", "current"])
def test_frozen_weights_which_nothing_casts(recipe: str, rows: int) -> None:
    torch.manual_seed(0)
    model, x = Factors(), torch.randn(rows, 128)
    results = []
    for _ in range(2):
        torch._dynamo.reset()
        with torch.no_grad():
            results.append(compile_interpreted(model, {"recipe": recipe})(x))
        fp8compile.freeze(model, recipe)
    for before_freezing, frozen in zip(*results, strict=True):
        assert torch.equal(before_freezing, frozen)


def _nothing(gm: fx.GraphModule) -> int:
    return 0


_nothing.__name__ = "fold_scales"
