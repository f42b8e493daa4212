"""keep_scales: backward casts with the scale that forward has found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

import fp8compile
from fp8compile.ir import QUANTIZE, is_backward, takes_slot
from tests.helpers import Joint, trace_joint
from tests.models import MLP
from tests.passes.common import Pair, before, check_pass, linear_joint
from tests.passes.test_plan_saved import Checkpointed, Gated

CURRENT = {"recipe": "current"}


def casts(gm: fx.GraphModule, backward: bool) -> dict[str, fx.Node]:
    """The casts of one direction, by what they cast."""
    found = (n for n in gm.graph.nodes if n.target is QUANTIZE and is_backward(n) is backward)
    return {node.args[0].name: node for node in found}


def kept(joint: Joint) -> tuple[fx.GraphModule, int]:
    gm, run = before("keep_scales", joint, "current")
    return gm, check_pass(gm, run)


def test_a_weight_is_looked_at_once() -> None:
    gm, rewrites = kept(linear_joint(recipe="current"))
    assert rewrites == 1
    first, again = casts(gm, False)["w"], casts(gm, True)["w"]
    assert first.args[1] is None and not takes_slot(again)
    scale = again.args[1]
    assert scale.args == (first, 4) and scale.meta["recompute"] is CheckpointPolicy.MUST_SAVE
    assert casts(gm, True)["tangents_1"].args[1] is None  # a gradient is cast in backward only


def test_weights_that_backward_puts_together_once_more() -> None:
    x = torch.randn(16, 32, dtype=torch.bfloat16, requires_grad=True)
    gm, rewrites = kept(trace_joint(Pair(), x, options=CURRENT))
    assert rewrites == 1
    first, again = casts(gm, False)["w1_cat"], casts(gm, True)["w1_cat_1"]
    assert again.args[1].args[0] is first


def test_what_is_cast_again() -> None:
    x = torch.randn(16, 32, requires_grad=True)
    gm, rewrites = kept(trace_joint(Gated(), x, options=CURRENT))
    assert rewrites == 3  # two weights, of which one is two, and the input of the last
    (again,) = [cast for cast in casts(gm, True).values() if cast.name.endswith("_again")]
    assert again.args[1].name == f"{again.args[0].name}_scale_used"


def test_a_checkpointed_region_casts_its_weights_with_it() -> None:
    x = torch.randn(16, 32, requires_grad=True)
    gm, rewrites = kept(trace_joint(Checkpointed(), x, options=CURRENT))
    taken = {n.args[0].op for n in gm.graph.nodes if n.target is QUANTIZE and n.args[1] is not None}
    assert rewrites == 2 and taken == {"placeholder"}  # the partitioner repeats all else


@pytest.mark.parametrize("recipe", ["delayed", "rowwise"])
def test_other_scales_stay(recipe: str) -> None:
    gm, run = before("keep_scales", linear_joint(recipe=recipe), recipe)
    assert run(gm) == 0


def test_results_are_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    def step() -> list[torch.Tensor]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Sequential(MLP(32, 64), nn.Linear(32, 48))
        x = torch.randn(16, 32, requires_grad=True)
        compiled = torch.compile(model, backend="fp8", options={**CURRENT, "kernels": "reference"})
        out = compiled(x)
        out.square().sum().backward()
        return [out, x.grad, *(p.grad for p in model.parameters())]

    found = step()
    monkeypatch.setattr(fp8compile.passes.pipeline, "keep_scales", lambda gm: 0)
    assert all(torch.equal(a, b) for a, b in zip(found, step(), strict=True))


class CheckpointedPair(Pair):
    def forward(self, x: Tensor) -> object:
        return checkpoint(super().forward, x, use_reentrant=False)


def test_weights_put_together_in_a_checkpointed_region() -> None:
    def step(wrapped: type[Pair]) -> list[torch.Tensor]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = wrapped(lambda a, b: a.tanh().sum() + b.sigmoid().sum())
        x = torch.randn(16, 32, dtype=torch.bfloat16, requires_grad=True)
        torch.compile(model, backend="fp8", options=CURRENT)(x).backward()
        return [x.grad, model.w1.grad, model.w2.grad]

    assert all(map(torch.equal, step(Pair), step(CheckpointedPair)))
