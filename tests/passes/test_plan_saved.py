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
