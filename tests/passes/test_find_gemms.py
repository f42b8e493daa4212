"""find_gemms: which GEMM is which."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fp8compile.ir import base_of, gemms, operands
from fp8compile.passes import find_gemms, unbatch_gemms
from fp8compile.passes.find_gemms import unsited_matmuls
from fp8compile.recipe import Operand
from tests.helpers import trace, trace_joint
from tests.passes.common import aten, before, check_pass, fprop, lines_of


def roles(gm: torch.fx.GraphModule) -> list[str]:
    return [
        f"{info.site.fqn} {info.gemm} {info.left.operand} {info.right.operand}"
        for _, info in gemms(gm)
    ]


def test_marks_the_three_gemms_of_a_linear_layer() -> None:
    gm, run = before("find_gemms")
    assert check_pass(gm, run) == 3
    assert_expected_inline(
        lines_of(gm, "mm", "mm_1", "mm_2"),
        """\
mm : bf16[16, 64] = aten.mm(x, permute) # w fprop = input x weight^T
mm_1 : bf16[64, 32] = aten.mm(permute_1, x) # w wgrad = grad_output^T x input
mm_2 : bf16[16, 32] = aten.mm(tangents_1, permute_3) # w dgrad = grad_output x weight""",
    )


class Weight(nn.Module):
    """Multiplies with a weight stored as [in, out], on the side it is told."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(32, 64) if how != "left" else torch.randn(64, 32))
        self.b = nn.Parameter(torch.randn(64))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "left":
            return self.w @ x
        if self.how == "addmm":
            return torch.addmm(self.b, x, self.w)
        if self.how == "@":
            return x @ self.w
        return {"matmul": torch.matmul, "mm": torch.mm}[self.how](x, self.w)


def test_weights_stored_as_in_out() -> None:
    for how in ("matmul", "@", "mm", "addmm"):
        joint = trace_joint(Weight(how), torch.randn(16, 32, requires_grad=True))
        find_gemms(joint.gm, sites=joint.sites)
        assert sorted(roles(joint.gm)) == [
            "w dgrad grad_output weight",
            "w fprop input weight",
            "w wgrad input grad_output",
        ], how


def test_a_weight_on_the_left() -> None:
    joint = trace_joint(Weight("left"), torch.randn(32, 16, requires_grad=True))
    find_gemms(joint.gm, sites=joint.sites)
    assert sorted(roles(joint.gm)) == [
        "w dgrad weight grad_output",
        "w fprop weight input",
        "w wgrad grad_output input",
    ]


@pytest.mark.parametrize("order", ["x, w", "w, x"])
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("result", ["bo", "ob"])
def test_the_weight_of_an_einsum_is_known_in_whichever_order_aten_multiplies(
    order: str, rows: int, result: str
) -> None:
    class Einsum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(48, 32))

        def forward(self, x: Tensor) -> Tensor:
            if order == "x, w":
                return torch.einsum(f"bi,oi->{result}", x, self.w)
            return torch.einsum(f"oi,bi->{result}", self.w, x)

    joint = trace_joint(Einsum(), torch.randn(rows, 32, requires_grad=True))
    unbatch_gemms(joint.gm)
    assert find_gemms(joint.gm, sites=joint.sites) >= 2  # from 2.12 an outer product is none
    for node, info in gemms(joint.gm):
        edges = zip(operands(node), (info.left, info.right), strict=True)
        named = {edge.operand: str(base_of(value)[0]) for value, edge in edges}
        assert named.get(Operand.WEIGHT, "w") == "w"
        assert named.get(Operand.INPUT, "x") == "x"


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda y: self.b(F.relu(self.a(y))), x, use_reentrant=False)


def test_an_input_that_was_written_in_place() -> None:
    """Every reader reshapes it anew, and so does each backward."""

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Parameter(torch.randn(32, 32)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            h = x @ self.a
            h.add_(1)
            return (h @ self.b) * (h @ self.c)

    gm, run = before("find_gemms", trace_joint(InPlace(), torch.randn(2, 16, 32)))
    assert check_pass(gm, run) == 8  # no gradient of x
    assert not unsited_matmuls(gm)
    found = [f"{info.name} {info.gemm}" for _, info in gemms(gm)]
    assert {"a wgrad", "b wgrad", "c wgrad"} <= {*found}


def test_sites_inside_a_checkpointed_region() -> None:
    joint = trace_joint(Checkpointed(), torch.randn(16, 32, requires_grad=True))
    find_gemms(joint.gm, sites=joint.sites)
    assert [role.rsplit(" ", 2)[0] for role in sorted(roles(joint.gm))] == [
        "a dgrad", "a fprop", "a wgrad", "b dgrad", "b fprop", "b wgrad",
    ]  # fmt: skip


def test_an_untagged_graph_has_a_site_per_gemm() -> None:
    gm = fprop()
    assert check_pass(gm, find_gemms) == 1
    assert roles(gm) == ["mm fprop input weight"]


def test_leaves_batched_matmuls_alone_and_says_why() -> None:
    gm = trace(lambda a, b: aten.bmm(a, b), a=torch.randn(2, 16, 16), b=torch.randn(2, 16, 16))
    assert check_pass(gm, find_gemms) == 0
    assert [why for _, why in unsited_matmuls(gm)] == ["batched matmul of two activations"]


def test_leaves_grouped_matmuls_alone_and_says_why() -> None:
    gm = trace(
        lambda x, w, offsets: aten._grouped_mm(x, w, offsets),
        x=torch.randn(32, 16).bfloat16(), w=torch.randn(2, 16, 32).bfloat16(),
        offsets=torch.tensor([16, 32], dtype=torch.int32),
    )  # fmt: skip
    assert check_pass(gm, find_gemms) == 0
    assert [why for _, why in unsited_matmuls(gm)] == ["grouped matmul of experts"]


def test_a_matrix_times_a_batch_says_why() -> None:
    class Left(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(16, 32), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.w @ x

    joint = trace_joint(Left(), torch.randn(2, 32, 16))
    assert unbatch_gemms(joint.gm) == 0
    assert find_gemms(joint.gm, sites=joint.sites) == 0
    ((_, why),) = unsited_matmuls(joint.gm)
    assert why.startswith("traced as a batched matmul: one matrix from the left")


def test_leaves_a_scaled_addmm_alone_and_says_why() -> None:
    gm = trace(
        lambda b, x, w: aten.addmm(b, x, w, beta=0.5),
        b=torch.randn(64), x=torch.randn(16, 32), w=torch.randn(32, 64),
    )  # fmt: skip
    find_gemms(gm)
    assert [info.reason for _, info in gemms(gm)] == ["addmm with {'beta': 0.5}"]
