"""store_activations: what backward needs in high precision is kept in FP8."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fp8compile import RECIPES
from fp8compile.ir import DEQUANTIZE_GROUPS, QUANTIZE_GROUPS
from fp8compile.passes import joint_passes, store_activations
from fp8compile.verify import verify
from tests.helpers import compile_interpreted, trace_joint
from tests.models import sqnr_db
from tests.passes.common import before

STORE = {"save_activations": "fp8"}
store_all = partial(store_activations, min_numel=1)


class GatedMLP(nn.Module):
    """A norm, SwiGLU and a residual sum: what a Llama layer has besides attention."""

    def __init__(self, width: int = 128, ff: int = 256) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(width))
        self.gate, self.up = (nn.Linear(width, ff, bias=False) for _ in range(2))
        self.down = nn.Linear(ff, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x, x.shape[-1:], self.norm)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def planned(model: nn.Module, x: Tensor) -> fx.GraphModule:
    """A joint graph with all passes run but this one."""
    gm, plan = before("plan_saved", trace_joint(model, x))
    plan(gm)
    return gm


def stored(gm: fx.GraphModule) -> list[str]:
    return [n.args[0].name for n in gm.graph.nodes if n.target is QUANTIZE_GROUPS]


def test_gate_and_up_are_stored_and_nothing_of_the_inputs() -> None:
    gm = planned(GatedMLP().bfloat16(), torch.randn(32, 128, dtype=torch.bfloat16))
    assert store_all(gm) == len(stored(gm)) == 2
    assert all("slice" in name for name in stored(gm))  # of the merged GEMM: gate, and up
    verify(gm)


def test_the_sum_that_a_norm_reads_is_stored() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(GatedMLP(), GatedMLP())

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    gm = planned(Two().bfloat16(), torch.randn(32, 128, dtype=torch.bfloat16, requires_grad=True))
    store_all(gm)
    assert sum("add" in name for name in stored(gm)) == 1


def test_backward_reads_only_what_is_stored() -> None:
    gm = planned(GatedMLP().bfloat16(), torch.randn(32, 128, dtype=torch.bfloat16))
    store_all(gm)
    back = [n for n in gm.graph.nodes if n.target is DEQUANTIZE_GROUPS]
    assert back
    assert all("backward" in n.meta["partitioner_tag"] for n in back)
    for name in stored(gm):
        (node,) = (n for n in gm.graph.nodes if n.name == name)
        readers = [user for user in node.users if "backward" in user.meta["partitioner_tag"]]
        assert readers == []


class Attention(nn.Module):
    """Heads of 128, which could be stored: attention reads its own output in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(256, 768, bias=False), nn.Linear(256, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 128)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.o(y.transpose(1, 2).flatten(2)).sigmoid()


def test_what_attention_reads_is_left_alone() -> None:
    x = torch.randn(2, 64, 256, dtype=torch.bfloat16)
    gm = planned(Attention().bfloat16(), x)
    assert store_all(gm) == 1  # what the sigmoid is computed from
    assert "getitem" not in stored(gm)[0]


def test_rows_that_hold_no_whole_group_are_left_alone() -> None:
    model = GatedMLP(width=64, ff=80).bfloat16()
    gm = planned(model, torch.randn(32, 64, dtype=torch.bfloat16, requires_grad=True))
    assert store_all(gm) == 0


def test_small_values_are_left_alone() -> None:
    gm = planned(GatedMLP().bfloat16(), torch.randn(32, 128, dtype=torch.bfloat16))
    assert store_activations(gm) == 0


def test_a_second_run_does_nothing() -> None:
    gm = planned(GatedMLP().bfloat16(), torch.randn(32, 128, dtype=torch.bfloat16))
    assert store_all(gm) > 0
    assert store_all(gm) == 0


def test_it_is_off_unless_it_is_asked_for() -> None:
    names = [getattr(p, "func", p).__name__ for p in joint_passes(recipe=RECIPES["delayed"])]
    assert "store_activations" not in names


def gradients(call: nn.Module, model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    out = call(x)
    out.float().square().mean().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_the_forward_is_unchanged_and_gradients_meet_the_gate() -> None:
    torch.manual_seed(0)
    model, x = GatedMLP(256, 512), torch.randn(256, 256)
    _, exact = gradients(model, model, x)
    model, x = model.bfloat16(), x.bfloat16()
    torch._dynamo.reset()
    out, usual = gradients(compile_interpreted(model), model, x)
    torch._dynamo.reset()
    out_stored, from_stored = gradients(compile_interpreted(model, STORE), model, x)
    assert torch.equal(out, out_stored)
    assert not torch.equal(usual["gate.weight"], from_stored["gate.weight"])
    quality = {name: sqnr_db(exact[name], from_stored[name].float()) for name in exact}
    assert min(quality.values()) >= 18.0  # the gate of every gradient
