"""What a scaling state holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fp8compile
from fp8compile import Recipe
from tests.helpers import compile_interpreted
from tests.models import sqnr_db
from tests.scaled import (
    E4M3_MAX,
    E5M2_MAX,
    INPUT,
    WEIGHT,
    only_state,
    train,
    two_layers,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:FP8 is emulated here"),
    pytest.mark.usefixtures("fresh_dynamo"),
]


def test_scales_are_the_formats_maximum_over_the_amax() -> None:
    model, x = nn.Linear(32, 64), torch.randn(16, 32)
    compiled = compile_interpreted(model)
    out = compiled(x)
    gradient = torch.randn_like(out)
    out.backward(gradient)
    fp8compile.update_scales(model)
    amax = torch.stack([x.abs().amax(), model.weight.detach().abs().amax(), gradient.abs().amax()])
    state = fp8compile.state_dict(model)
    expected = torch.tensor([E4M3_MAX, E4M3_MAX, E5M2_MAX]) / amax
    torch.testing.assert_close(state["weight.scale"], expected, rtol=1e-6, atol=0)
    assert torch.equal(state["weight.amax_history"][-1], amax)
    assert torch.count_nonzero(state["weight.amax_history"][:-1]) == 0


def test_first_step_is_as_good_as_the_tenth() -> None:
    model, x = two_layers(), torch.randn(16, 32)
    compiled = compile_interpreted(model)
    expected = model(x).detach()
    quality = []
    for _ in range(10):
        out = compiled(x)
        quality.append(sqnr_db(expected, out.detach()))
        out.sum().backward()
        fp8compile.update_scales(model)
    assert min(quality) >= 25
    assert abs(quality[0] - quality[9]) <= 0.5


def test_a_delayed_scale_is_really_used() -> None:
    model, x = nn.Linear(32, 64, bias=False), torch.randn(16, 32)
    compiled = compile_interpreted(model)
    train(compiled, x)
    fp8compile.update_scales(model)
    grown = 100 * x  # saturates: the scale still is that of x
    assert sqnr_db(model(grown).detach(), compiled(grown).detach()) < 3
    fp8compile.update_scales(model)
    assert sqnr_db(model(grown).detach(), compiled(grown).detach()) >= 25


def test_history_keeps_sixteen_steps_from_oldest_to_newest() -> None:
    model = nn.Linear(32, 64)
    compiled = compile_interpreted(model)
    x = torch.randn(16, 32)
    x /= x.abs().amax()
    for step in range(1, 20):
        train(compiled, step * x)
        fp8compile.update_scales(model)
    history = fp8compile.state_dict(model)["weight.amax_history"][:, INPUT]
    torch.testing.assert_close(history, torch.arange(4.0, 20.0))


def test_a_peak_is_forgotten_after_sixteen_steps() -> None:
    model, x = nn.Linear(32, 64), torch.randn(16, 32)
    x /= x.abs().amax()
    compiled = compile_interpreted(model)
    scales = []
    for step in range(18):
        train(compiled, 8 * x if step == 0 else x)
        fp8compile.update_scales(model)
        scales.append(float(fp8compile.state_dict(model)["weight.scale"][INPUT]))
    assert scales == [E4M3_MAX / 8] * 16 + [E4M3_MAX] * 2


def test_a_recipe_with_a_shorter_history() -> None:
    model = nn.Linear(32, 64)
    compiled = compile_interpreted(model, {"recipe": Recipe("short", history_len=2)})
    for _ in range(3):
        train(compiled, torch.randn(16, 32))
        fp8compile.update_scales(model)
    assert fp8compile.state_dict(model)["weight.amax_history"].shape == (2, 3)


def test_zero_amax_keeps_the_last_scale() -> None:
    model = nn.Linear(32, 64, bias=False)
    compiled = compile_interpreted(model, {"recipe": Recipe("short", history_len=2)})
    train(compiled, torch.randn(16, 32))
    fp8compile.update_scales(model)
    before = fp8compile.state_dict(model)["weight.scale"]
    for _ in range(3):  # the history has forgotten the first step
        train(compiled, torch.zeros(16, 32))
        fp8compile.update_scales(model)
    after = fp8compile.state_dict(model)["weight.scale"]
    assert after[INPUT] == before[INPUT] and after.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_step_is_counted_and_leaves_the_scales(bad: float) -> None:
    model, x = nn.Linear(32, 64, bias=False), torch.randn(16, 32)
    compiled = compile_interpreted(model)
    compiled(x).sum().backward()
    fp8compile.update_scales(model)
    state = only_state(model)
    scale = state.scale.clone()
    poisoned = x.clone()
    poisoned[0, 0] = bad
    out = compiled(poisoned)
    assert not out[0].isfinite().any() and out[1:].isfinite().all()
    out.sum().backward()
    fp8compile.update_scales(model)
    assert torch.equal(state.scale, scale)
    assert state.events[0, INPUT] == 1 and state.events[0, WEIGHT] == 0
    model.zero_grad()
    clean = compiled(x)  # and the next step is as if nothing had happened
    assert sqnr_db(model(x).detach(), clean.detach()) >= 25
    clean.sum().backward()
    fp8compile.update_scales(model)
    assert torch.equal(state.scale, scale) and state.events[0, INPUT] == 1
    assert model.weight.grad is not None and model.weight.grad.isfinite().all()


def test_events_are_read_by_name() -> None:
    model, x = two_layers(), torch.randn(16, 32)
    compiled = compile_interpreted(model)
    assert fp8compile.events(compiled) == {}
    for magnitude in (1, 1, 3, 3):  # outgrows its scale once; the weights never do
        train(compiled, magnitude * x)
        fp8compile.update_scales(model)
    found = fp8compile.events(compiled)
    assert found["0.weight.input"] == fp8compile.Events(not_finite=0, saturated=1, jumped=0)
    assert not any(name.endswith("weight.weight") for name in found)
    train(compiled, torch.full_like(x, torch.nan))
    fp8compile.update_scales(model)
    assert fp8compile.events(model)["0.weight.input"] == (1, 1, 0)
    assert fp8compile.events(model)["2.weight.grad_output"].not_finite == 1


def test_a_module_used_twice_has_events_of_both_uses() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 32)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.fc(x) + self.fc(y)

    model, x = Twice(), torch.randn(16, 32)
    compiled = compile_interpreted(model)
    for y in (-x, 5 * x):
        compiled(x, y).sum().backward()
        fp8compile.update_scales(model)
    assert fp8compile.events(model) == {"fc.weight#1.input": (0, 1, 0)}


def test_a_bad_first_step_leaves_no_scale() -> None:
    model, x = nn.Linear(32, 64), torch.randn(16, 32)
    compiled = compile_interpreted(model)
    train(compiled, torch.full_like(x, torch.nan))
    fp8compile.update_scales(model)
    assert only_state(model).scale[INPUT] == 0
    assert sqnr_db(model(x).detach(), compiled(x).detach()) >= 25
