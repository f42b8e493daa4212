"""The guard rails of delayed scaling: what a jump does to one edge, in the steps after it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fp8compile
from fp8compile import Recipe
from fp8compile.states import states_of
from tests.helpers import compile_interpreted
from tests.models import sqnr_db

pytestmark = [
    pytest.mark.filterwarnings("ignore:FP8 is emulated here"),
    pytest.mark.usefixtures("fresh_dynamo"),
]
INPUT, WEIGHT, GRAD_OUTPUT = range(3)
SHORT = 4  # steps of history
SPIKE = 1e5


class Run:
    """A layer under training steps: its output's SQNR against float32, and its gradient's."""

    def __init__(self, **limits: float) -> None:
        self.layer = nn.Linear(64, 32, bias=False)
        recipe = Recipe("short", history_len=SHORT, **limits)
        self.compiled = compile_interpreted(self.layer, {"recipe": recipe})
        self.x, self.gradient = torch.randn(48, 64), torch.randn(48, 32)

    def step(self, factor: float = 1.0, gradient_factor: float = 1.0) -> tuple[float, float]:
        x, gradient = factor * self.x, gradient_factor * self.gradient
        out = self.compiled(x)
        out.backward(gradient)
        found = self.layer.weight.grad
        assert found is not None
        self.layer.weight.grad = None
        fp8compile.update_scales(self.layer)
        expected = self.layer(x).detach()
        return sqnr_db(expected, out.detach()), sqnr_db(gradient.t() @ x, found)

    @property
    def scale(self) -> Tensor:
        return fp8compile.state_dict(self.layer)["weight.scale"]


def test_after_a_spike_every_step_is_right_and_the_edge_recovers_by_itself() -> None:
    run = Run()
    before = min(run.step() for _ in range(2))
    scale = run.scale
    assert run.step(SPIKE)[0] < 5  # it is clipped: nothing knew
    for _ in range(SHORT):
        assert run.scale[INPUT] == 0  # current scaling, of this edge alone
        assert torch.equal(run.scale[WEIGHT:], scale[WEIGHT:])
        assert run.step() == pytest.approx(before, abs=0.01)
    assert torch.equal(run.scale, scale)
    assert fp8compile.events(run.layer) == {"weight.input": (0, 1, 1)}


def test_without_it_numbers_round_to_zero_until_the_spike_is_forgotten() -> None:
    run = Run(jump_limit=torch.inf)
    before = min(run.step() for _ in range(2))
    run.step(SPIKE)
    assert run.step() == pytest.approx(before, abs=0.01)  # the saturation limit's doing
    for _ in range(SHORT - 1):
        assert max(run.step()) < 10
    assert run.step() == pytest.approx(before, abs=0.01)
    assert fp8compile.events(run.layer) == {"weight.input": (0, 1, 0)}


def test_without_any_the_step_after_the_spike_is_lost_too() -> None:
    run = Run(jump_limit=torch.inf, saturation_limit=torch.inf)
    run.step()
    run.step(SPIKE)
    assert max(run.step()) < 10


def test_the_second_of_two_spikes_is_not_even_clipped() -> None:
    run = Run()
    before = min(run.step() for _ in range(2))
    run.step(SPIKE)
    for factor in (1.0, SPIKE, 1.0, 1.0, SPIKE, 1.0):
        assert run.step(factor) == pytest.approx(before, abs=0.01)


def test_a_spike_of_the_gradient() -> None:
    run = Run()
    before = min(run.step() for _ in range(2))
    run.step(gradient_factor=SPIKE)
    for _ in range(SHORT):
        assert (run.scale == 0).tolist() == [False, False, True]
        assert run.step() == pytest.approx(before, abs=0.01)
    assert run.scale.all()
    assert fp8compile.events(run.layer) == {"weight.grad_output": (0, 1, 1)}


def test_falling_back_and_recovering_compiles_nothing() -> None:
    run = Run()
    run.step()
    known = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for factor in (1.0, SPIKE, *[1.0] * 6, 1 / SPIKE, 1.0):
            run.step(factor)
            known.append(bool(run.scale[INPUT]))
    assert known == [True, *[False] * 4, *[True] * 3, False, False]
    assert fp8compile.events(run.layer)["weight.input"].jumped == 2


def test_a_checkpoint_in_between_changes_nothing() -> None:
    run, resumed = Run(), Run()
    resumed.x, resumed.gradient = run.x, run.gradient
    for factor in (1.0, SPIKE, 1.0):
        run.step(factor)
    resumed.layer.load_state_dict(run.layer.state_dict())
    fp8compile.load_state_dict(resumed.layer, fp8compile.state_dict(run.layer))
    for _ in range(SHORT + 1):
        assert torch.equal(run.scale, resumed.scale)
        assert run.step() == resumed.step()
    assert run.scale.all()


def test_ordinary_training_trips_none() -> None:
    """Not even by a weight that starts at zero, and the gradients behind it."""
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    nn.init.zeros_(model[2].weight)
    compiled = compile_interpreted(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(40):
        x = torch.randn(64, 64)
        (compiled(x) - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    (state,) = states_of(model)
    assert state.updates == 40 and not state.events[2].any()
