"""plan_saved: what is kept for backward."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from fp8compile.ir import QUANTIZE
from tests.helpers import trace_joint
from tests.passes.common import before, check_pass


def saved(gm: fx.GraphModule) -> list[str]:
    policy = CheckpointPolicy.MUST_SAVE
    return [node.name for node in gm.graph.nodes if node.meta.get("recompute") is policy]


def test_the_transposed_copy_and_its_scale_inv_are_kept() -> None:
    gm, run = before("plan_saved")
    assert check_pass(gm, run) == 2
    assert sorted(saved(gm)) == ["x_fp8_t", "x_scale_inv"]


class Gated(nn.Module):
    """SwiGLU: its own backward needs gate and up in high precision."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(32, 64, bias=False) for _ in range(2))
        self.down = nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def casts(gm: fx.GraphModule) -> list[str]:
    return [node.name for node in gm.graph.nodes if node.target is QUANTIZE]


def test_what_backward_can_cast_again_is_not_kept() -> None:
    joint = trace_joint(Gated(), torch.randn(16, 32, requires_grad=True))
    gm, run = before("plan_saved", joint)
    before_it = casts(gm)
    check_pass(gm, run)
    (again,) = set(casts(gm)) - set(before_it)
    (node,) = (n for n in gm.graph.nodes if n.name == again)
    assert node.args[4:] == (False, True)  # only the transposed copy, which wgrad takes
    assert node.meta["partitioner_tag"] == "must_be_in_backward"
    (first,) = (n for n in gm.graph.nodes if again == f"{n.name}_again")
    assert first.args[4:] == (True, False)
    assert not any(name.startswith(first.args[0].name) for name in saved(gm))


def test_the_value_that_is_cast_again_is_computed_again() -> None:
    joint = trace_joint(Gated(), torch.randn(16, 32, requires_grad=True))
    gm, run = before("plan_saved", joint)
    run(gm)
    (node,) = (n for n in gm.graph.nodes if n.name.endswith("_again"))
    value = node.args[0]
    assert value.meta["recompute"] is CheckpointPolicy.MUST_RECOMPUTE
    assert all(
        n.meta.get("recompute") is not CheckpointPolicy.MUST_RECOMPUTE
        for n in gm.graph.nodes
        if "scaled_mm" in str(n.target)
    )


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(32, 32, bias=False) for _ in range(3))
        self.norm = nn.RMSNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) + self.b(x.relu())
        return h + self.c(self.norm(h))


def test_a_residual_sum_is_kept_rather_than_its_terms() -> None:
    joint = trace_joint(Residual(), torch.randn(16, 32, requires_grad=True))
    gm, run = before("plan_saved", joint)
    run(gm)
    sums = [name for name in saved(gm) if name.startswith("add")]
    assert len(sums) == 1


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 64, bias=False), nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda y: self.b(F.relu(self.a(F.silu(y)))), x, use_reentrant=False)


def test_a_checkpointed_region_recomputes_its_casts() -> None:
    joint = trace_joint(Checkpointed(), torch.randn(16, 32, requires_grad=True))
    gm, run = before("plan_saved", joint)
    run(gm)
    assert saved(gm) == []
    casts = [n for n in gm.graph.nodes if n.target is QUANTIZE and n.args[3] == torch.float8_e4m3fn]
    inputs = [n for n in casts if n.args[0].op != "placeholder"]
    assert len(inputs) == 2
    assert all(n.meta["recompute"] is CheckpointPolicy.PREFER_RECOMPUTE for n in inputs)
