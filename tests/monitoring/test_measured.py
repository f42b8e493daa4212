"""What `Monitor.measure` finds in the tensors of one batch."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fp8compile
from fp8compile import Format, Monitor, OptionError
from fp8compile.ops import SATURATED
from fp8compile.recipe import RECIPES
from tests.helpers import compile_interpreted
from tests.models import sqnr_db
from tests.monitoring.common import ROLES, sgd, squares, train, two_layers

pytestmark = pytest.mark.filterwarnings("ignore:FP8 is emulated here")


def test_measure_casts_with_the_scales_of_the_state() -> None:
    """A batch four times as large as those of training is clipped, by its own count."""
    model = two_layers()
    compiled, optimizer = compile_interpreted(model), sgd(model)
    monitor = Monitor(model, every=1)
    train(compiled, optimizer, 2)
    scale = float(fp8compile.state_dict(model)["0.weight.scale"][0])
    x = 4 * torch.randn(16, 32)
    x[0, :8] = 0.0
    x[1, 0] = 1e-6
    found = {(r.site, r.operand): r for r in monitor.measure(x, step=squares)}
    assert set(found) == {(site, role) for site in ("0", "2") for role in ROLES}
    record = found["0", "input"]
    assert (record.scale, record.amax, record.step) == (scale, float(x.abs().max()), 2)
    clipped = (x.abs() * scale > SATURATED * Format.E4M3.max).float().mean()
    assert record.saturated_share == pytest.approx(float(clipped)) and clipped > 0
    cast = (x * scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() / scale
    assert record.underflowed_share == pytest.approx(1 / (16 * 32 - 8))
    assert record.sqnr_db == pytest.approx(sqnr_db(x, cast), abs=1e-3)
    assert record.events is None and record.is_measured
    histogram = monitor.measured["0", "input"]
    assert int(histogram.counts.sum()) == histogram.nonzero == 16 * 32 - 8


def test_measure_leaves_everything_as_it_was() -> None:
    model = two_layers()
    compiled, optimizer = compile_interpreted(model), sgd(model)
    monitor = Monitor(model, every=100)
    train(compiled, optimizer, 2)
    state = {key: value.clone() for key, value in fp8compile.state_dict(model).items()}
    gradients, generator = [p.grad for p in model.parameters()], torch.get_rng_state()
    monitor.measure(torch.randn(16, 32, generator=torch.Generator()), step=squares)
    assert all(torch.equal(value, state[k]) for k, value in fp8compile.state_dict(model).items())
    assert [p.grad for p in model.parameters()] == gradients
    assert torch.equal(torch.get_rng_state(), generator) and monitor.step == 2


@pytest.mark.parametrize("recipe", ["current", "static", "rowwise", "blockwise", "mx"])
def test_measure_knows_every_recipe(recipe: str) -> None:
    model = two_layers()
    monitor = Monitor(model, options={"recipe": recipe})
    x = torch.randn(16, 32)
    found = {(r.site, r.operand): r for r in monitor.measure(x, step=squares)}
    assert set(found) == {(site, role) for site in ("0", "2") for role in ROLES}
    one_scale = RECIPES[recipe].is_tensorwise
    for record in found.values():
        assert (record.scale is not None) == one_scale and record.saturated_share == 0
        floor = 28 if record.format is Format.E4M3 else 22
        assert record.sqnr_db is not None and floor < record.sqnr_db < 45


@pytest.mark.parametrize("factor", [1e-9, 1e9])
def test_static_scales_are_measured_as_they_follow_the_loss(factor: float) -> None:
    model, options = two_layers(), {"recipe": "static"}
    train(compile_interpreted(model, options), sgd(model), 1)

    def step(call: Callable[..., Tensor], x: Tensor) -> Tensor:
        return factor * call(x).square().mean()

    records = Monitor(model, options=options).measure(torch.randn(16, 32), step=step)
    gradients = [r for r in records if r.operand == "grad_output"]
    assert len(gradients) == 2
    assert all(r.saturated_share == 0 and r.sqnr_db > 22 for r in gradients)


def test_measure_of_what_is_not_finite_or_zero() -> None:
    model = nn.Linear(32, 32)
    monitor = Monitor(model)
    for value, amax in ((math.nan, None), (math.inf, None), (0.0, 0.0)):
        record = monitor.measure(torch.full((16, 32), value))[0]
        assert (record.amax, record.sqnr_db, record.underflowed_share) == (amax, None, 0.0)


def test_measure_with_the_options_of_another_compile() -> None:
    model = two_layers()
    train(compile_interpreted(model, {"recipe": "e4m3_only"}), sgd(model), 1)
    with pytest.raises(OptionError, match=r"e4m3_only .* options say delayed .* Monitor\(model, o"):
        Monitor(model).measure(torch.randn(16, 32))
    assert Monitor(model, options={"recipe": "e4m3_only"}).measure(torch.randn(16, 32))


def test_measure_of_a_model_without_gemms() -> None:
    model = nn.LayerNorm(32)
    with pytest.raises(OptionError, match="nothing to measure"):
        Monitor(model).measure(torch.randn(16, 32))
