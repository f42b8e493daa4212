"""The delayed scales of what attention takes in FP8: where they lie, and that they are kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fp8compile
from fp8compile import ScalingStateError
from fp8compile.ir import ATTENTION_SLOT, QUANTIZE, SLOTS_PER_SITE, args_of
from tests.helpers import compile_interpreted
from tests.scaled import only_state

pytestmark = [
    pytest.mark.filterwarnings("ignore:FP8 is emulated here"),
    pytest.mark.usefixtures("fresh_dynamo"),
]
OPTIONS = {"attention": "fp8", "decline_slower": False}


class Attention(nn.Module):
    """Projections of their own, and factors that no other GEMM has to do with."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(64, 64, bias=False) for _ in range(4))
        self.norm = nn.RMSNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (4, 16)) for w in (self.wq, self.wk, self.wv))
        heads = (value.transpose(1, 2) for value in (self.norm(q), k, v))
        y = F.scaled_dot_product_attention(*heads, is_causal=True)
        return self.wo(y.transpose(1, 2).flatten(2))


class Fused(Attention):
    """One projection for all three."""

    def __init__(self) -> None:
        super().__init__()
        self.wqkv = nn.Linear(64, 192)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.wqkv(x).unflatten(-1, (12, 16)).transpose(1, 2).chunk(3, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(y.transpose(1, 2).flatten(2))


def heads_cast(model: nn.Module, x: Tensor, **options: Any) -> list[int | None]:
    """The slot of each cast of a query, key or value in the joint graph; None: its own scale."""
    found: list[int | None] = []

    def look(gm: fx.GraphModule) -> int:
        for node in gm.graph.nodes:
            if node.target is QUANTIZE and args_of(node)[0].name.endswith("_rows"):
                found.append(None if args_of(node)[1] is None else args_of(node)[2])
        return 0

    compile_interpreted(model, {**OPTIONS, **options, "own_passes": {"cast_attention": look}})(x)
    return found


def train(call: Callable[[Tensor], Tensor], model: nn.Module, steps: int) -> list[Tensor]:
    """The losses of steps on data of a fixed seed."""
    generator, losses = torch.Generator().manual_seed(1), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        x = torch.randn(2, 32, 64, generator=generator)
        losses.append(call(x).square().mean())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def of_attention(tensor: Tensor) -> Tensor:
    return tensor[..., ATTENTION_SLOT::SLOTS_PER_SITE]


@pytest.mark.parametrize(
    ("make", "options", "slots"),
    [
        (Attention, {}, [3, 15, 27]),
        (Attention, {"overrides": {"wk": "current"}}, [3, None, 27]),
        (Attention, {"recipe": "current"}, [None] * 3),
        (Attention, {"recipe": "static"}, [None] * 3),
        (Attention, {"recipe": "rowwise"}, [None] * 3),
        (Fused, {}, [None] * 3),  # which are of three sizes
    ],
)
def test_the_slots(make: type[nn.Module], options: dict[str, Any], slots: list[int | None]) -> None:
    assert heads_cast(make(), torch.randn(2, 32, 64, requires_grad=True), **options) == slots


def test_a_step_takes_the_scales_of_those_before() -> None:
    model = Attention()
    compiled = compile_interpreted(model, OPTIONS)
    x = torch.randn(2, 32, 64)
    compiled(x).sum().backward()
    state = only_state(model)
    assert not of_attention(state.scale).any()
    fp8compile.update_scales(model)
    with torch.no_grad():
        values = (model.norm(model.wq(x).unflatten(-1, (4, 16))), model.wk(x), model.wv(x))
        amaxes = torch.stack([value.abs().amax() for value in values])
        unlike = torch.randn(2, 32, 64) / 64
        first = compiled(unlike)
    torch.testing.assert_close(of_attention(state.scale)[:3], 448 / amaxes, rtol=0.05, atol=0)
    assert not of_attention(state.scale)[3]  # attention takes nothing of wo's
    state.scale[ATTENTION_SLOT::SLOTS_PER_SITE] *= 2**-9
    with torch.no_grad():
        assert not torch.equal(first, compiled(unlike))  # these are the scales that it takes


def test_resumed_training_continues_bit_for_bit() -> None:
    model = Attention()
    compiled = compile_interpreted(model, OPTIONS)
    train(compiled, model, 3)
    saved = fp8compile.state_dict(model)
    shapes = {key: tuple(value.shape) for key, value in saved.items() if key.endswith("scale")}
    assert shapes == {f"w{x}.weight.scale": (3 + (x != "o"),) for x in "qkvo"}
    torch._dynamo.reset()
    fresh = copy.deepcopy(model)
    fp8compile.load_state_dict(fresh, saved)
    again = train(compile_interpreted(fresh, OPTIONS), fresh, 3)
    assert all(map(torch.equal, again, train(compiled, model, 3)))
    after = fp8compile.state_dict(fresh)
    assert all(
        torch.equal(value, after[key]) for key, value in fp8compile.state_dict(model).items()
    )


def test_a_state_from_before_attention_was_fp8_loads() -> None:
    model = Attention()
    train(compile_interpreted(model), model, 1)
    saved = fp8compile.state_dict(model)
    assert {value.shape[-1] for value in saved.values()} == {3}
    torch._dynamo.reset()
    fresh = copy.deepcopy(model)
    fp8compile.load_state_dict(fresh, saved)
    train(compile_interpreted(fresh, OPTIONS), fresh, 1)
    known = of_attention(only_state(fresh).scale)[:3].clone()
    fp8compile.load_state_dict(fresh, saved)
    assert known.all() and torch.equal(of_attention(only_state(fresh).scale)[:3], known)
    mixed = fp8compile.state_dict(fresh) | {"wq.weight.scale": torch.ones(3)}
    with pytest.raises(ScalingStateError, match=r"wq\.weight"):
        fp8compile.load_state_dict(fresh, mixed)


def test_values_that_outgrow_their_scale_are_told() -> None:
    model = Attention()
    compiled = compile_interpreted(model, OPTIONS)
    train(compiled, model, 2)
    with torch.no_grad():
        model.wv.weight.mul_(64)
    only_state(model).keep_changed_weights()
    train(compiled, model, 1)
    found = fp8compile.events(model)
    assert found["wv.weight.attention"].saturated == 1
    assert "wq.weight.attention" not in found and "wo.weight.attention" not in found


def test_calibration_is_of_operands_alone() -> None:
    model = Attention()
    compiled = compile_interpreted(model, OPTIONS)
    train(compiled, model, 1)
    known, batch = of_attention(only_state(model).scale).clone(), torch.randn(2, 32, 64)
    plain, found = (
        fp8compile.calibrate(model, [batch], options={**OPTIONS, "attention": attention})
        for attention in ("high_precision", "fp8")
    )
    assert found == plain  # nor is wo's input what FP8 attention makes of it
    assert torch.equal(of_attention(only_state(model).scale), known)
