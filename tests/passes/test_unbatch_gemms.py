"""unbatch_gemms: what ATen makes a batched matmul of is one GEMM again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

import fp8compile
from fp8compile.ir import gemms, is_backward
from fp8compile.passes import find_gemms, merge_gemms, unbatch_gemms
from tests.helpers import trace_joint
from tests.models import sqnr_db
from tests.passes.common import Pair, aten, check_pass, lines_of

BF16 = torch.bfloat16


class Mixed(nn.Module):
    """A linear layer without gradient, over what ``change`` makes of its input."""

    def __init__(self, change: Callable[[Tensor], Tensor], bias: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 64, bias=bias, dtype=BF16).requires_grad_(False)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.change(x))
        return y


def swap(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def test_forward_and_backward() -> None:
    joint = trace_joint(Mixed(swap), torch.randn(4, 32, 8, dtype=BF16, requires_grad=True))
    assert check_pass(joint.gm, unbatch_gemms) == 2
    assert_expected_inline(
        lines_of(joint.gm),
        """\
x : bf16[4, 32, 8]
linear_weight : bf16[64, 32]
scale : f32[12]
amax_fwd : f32[12]
amax_bwd : f32[12]
tangents_1 : bf16[4, 8, 64]
permute : bf16[4, 8, 32] = aten.permute(x, [0, 2, 1])
permute_1 : bf16[32, 64] = aten.permute(linear_weight, [1, 0])
bmm_copy : bf16[4, 8, 32] = aten.clone(permute, memory_format=torch.contiguous_format)
bmm_rows : bf16[32, 32] = aten.view(bmm_copy, [-1, 32])
bmm_mm : bf16[32, 64] = aten.mm(bmm_rows, permute_1)
bmm_view : bf16[4, 8, 64] = aten.view(bmm_mm, [4, 8, 64])
view_2 : bf16[4, 8, 64] = aten.view(bmm_view, [4, 8, 64])
bmm_1_rows : bf16[32, 64] = aten.view(tangents_1, [-1, 64])
bmm_1_mm : bf16[32, 32] = aten.mm(bmm_1_rows, linear_weight)
bmm_1_view : bf16[4, 8, 32] = aten.view(bmm_1_mm, [4, 8, 32])
view_4 : bf16[4, 8, 32] = aten.view(bmm_1_view, [4, 8, 32])
permute_3 : bf16[4, 32, 8] = aten.permute(view_4, [0, 2, 1])
return [view_2, permute_3, None, None, None, None]""",
    )
    assert find_gemms(joint.gm, sites=joint.sites) == 2
    assert [is_backward(node) for node, _ in gemms(joint.gm)] == [False, True]


@pytest.mark.parametrize(
    ("change", "shape", "copied"),
    [
        (lambda x: x[:, -1:], (4, 8, 32), False),
        (lambda x: x[:, -3:], (4, 8, 32), True),
        (swap, (4, 32, 8), True),
        (lambda x: x.permute(2, 0, 1, 3), (3, 5, 2, 32), True),
        (lambda x: x[..., :32], (4, 8, 48), False),
    ],
    ids=["last token", "last tokens", "transposed", "4-D", "columns"],
)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_results_are_the_same(
    change: Callable[[Tensor], Tensor], shape: tuple[int, ...], copied: bool, bias: bool
) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=BF16)
    gm = trace_joint(Mixed(change, bias), x).gm
    values = [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")]
    given = [torch.randn(v.shape).to(v.dtype) for v in values]
    want = fx.Interpreter(gm).run(*given)
    assert unbatch_gemms(gm) == 1 and unbatch_gemms(gm) == 0
    assert not gm.graph.find_nodes(op="call_function", target=aten.bmm.default)
    assert bool(gm.graph.find_nodes(op="call_function", target=aten.clone.default)) is copied
    got = fx.Interpreter(gm).run(*given)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_gemms_of_one_input_are_merged_behind_it() -> None:
    class Swapped(Pair):
        def forward(self, x: Tensor) -> object:
            return super().forward(x.transpose(1, 2))

    model = Swapped().requires_grad_(False)
    joint = trace_joint(model, torch.randn(4, 32, 8, dtype=BF16))
    assert unbatch_gemms(joint.gm) == 2
    assert find_gemms(joint.gm, sites=joint.sites) == 2
    assert merge_gemms(joint.gm) == 1


def test_batches_of_two_activations_stay() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.transpose(1, 2)) @ x

    gm = trace_joint(Attention(), torch.randn(4, 16, 32, dtype=BF16)).gm
    before = lines_of(gm)
    assert check_pass(gm, unbatch_gemms) == 0
    assert lines_of(gm) == before


class ToHeads(nn.Module):
    """A linear layer as an einsum, whose output is in heads."""

    def __init__(self, equation: str = "bti,ihk->bthk") -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(32, 4, 16, dtype=BF16))
        self.equation = equation

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum(self.equation, x, self.w)


def test_an_einsum_is_a_product_of_matrices() -> None:
    joint = trace_joint(ToHeads(), torch.randn(4, 8, 32, dtype=BF16, requires_grad=True))
    assert check_pass(joint.gm, unbatch_gemms) == 3
    assert_expected_inline(
        lines_of(joint.gm, "view_matrix", "view_1_matrix", "bmm_mm", "bmm_1_mm", "bmm_2_mm"),
        """\
view_matrix : bf16[32, 32] = aten.view(x, [32, 32])
view_1_matrix : bf16[32, 64] = aten.view(w, [32, 64])
bmm_mm : bf16[32, 64] = aten.mm(view_matrix, view_1_matrix)
bmm_1_mm : bf16[32, 64] = aten.mm(view_matrix_t, view_5_matrix)
bmm_2_mm : bf16[32, 32] = aten.mm(view_5_matrix, view_1_matrix_t)""",
    )


@pytest.mark.parametrize(
    ("change", "shape"),
    [(swap, (4, 32, 8)), (lambda x: x[..., ::2], (4, 8, 64)), (torch.tanh, (4, 8, 32))],
    ids=["transposed", "columns", "contiguous"],
)
@pytest.mark.parametrize("equation", ["bti,ihk->bthk", "bti,ihk->kbht", "bti,ihk->hkbt"])
def test_results_of_an_einsum_are_the_same(
    equation: str, change: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    class Changed(ToHeads):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(change(x))

    torch.manual_seed(0)
    x = torch.randn(shape, dtype=BF16, requires_grad=True)
    gm = trace_joint(Changed(equation), x).gm
    values = [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")]
    given = [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype).normal_() for v in values]
    want = fx.Interpreter(gm).run(*given)
    assert unbatch_gemms(gm) == 3 and unbatch_gemms(gm) == 0
    for a, b in zip(fx.Interpreter(gm).run(*given), want, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_the_layer_runs_in_fp8(dynamic: bool, frozen: bool) -> None:
    torch.manual_seed(0)
    model = Mixed(swap)
    x = torch.randn(4, 32, 8, dtype=BF16)
    with torch.no_grad():
        want = model(x)
        if frozen:
            fp8compile.freeze(model)
        compiled = torch.compile(
            model, backend="fp8", dynamic=dynamic, options={"recipe": "rowwise", "strict": True}
        )
        assert 24 < sqnr_db(want, compiled(x)) < 40
        if dynamic:
            more = torch.randn(6, 32, 12, dtype=BF16)
            assert sqnr_db(model(more), compiled(more)) > 24
