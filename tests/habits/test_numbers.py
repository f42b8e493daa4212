"""Numbers that hurt: in the input, a weight or the gradient, for one step of a run.

The oracle for the step itself is eager, row by row; for the steps behind it, the run without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fp8compile
from fp8compile import Recipe
from tests.habits.common import (
    EMULATED,
    GRAD_OUTPUT,
    HIDDEN,
    INPUT,
    WEIGHT,
    WIDTH,
    assert_near,
    batch,
    gradients,
    history,
    mlp,
    only_state,
    scale,
    twins,
)
from tests.helpers import compile_interpreted
from tests.models import sqnr_db

pytestmark = pytest.mark.filterwarnings(EMULATED)
RECIPES = pytest.mark.parametrize("recipe", ["delayed", "current"])
OPERANDS = pytest.mark.parametrize("operand", [INPUT, WEIGHT, GRAD_OUTPUT], ids="xwg".__getitem__)
ROW = 3  # where one bad value is put


def at_one_place(value: float) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x[ROW, 5] = value
        return x

    return change


def everywhere(value: float) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.full_like(x, value)


FINITE: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": everywhere(0.0),
    "constant": everywhere(0.25),
    "denormal": lambda x: x * 1e-39,
    "smallest": everywhere(2.0**-149),
    "tiny": lambda x: x * 1e-30,
    "outlier_1e4": at_one_place(1e4),
    "outlier_1e30": at_one_place(1e30),
    "huge": lambda x: x * 1e30,
    "maximum": lambda x: at_one_place(torch.finfo(x.dtype).max)(x),
}
NOT_FINITE = {"nan": torch.nan, "inf": torch.inf, "minus_inf": -torch.inf}


class Run:
    """A linear layer, one step at a time, in FP8 or in eager."""

    def __init__(self, layer: nn.Linear, call: Callable[[Tensor], Tensor]) -> None:
        self.layer, self.call = layer, call

    def step(self, x: Tensor, weight: Tensor, gradient: Tensor) -> dict[str, Tensor]:
        """Output and gradients of these operands; the scales move."""
        with torch.no_grad():
            self.layer.weight.copy_(weight)
        self.layer.zero_grad()
        x = x.clone().requires_grad_()
        out = self.call(x)
        out.backward(gradient)
        fp8compile.update_scales(self.layer)
        assert x.grad is not None and self.layer.weight.grad is not None
        return {"out": out.detach(), "x": x.grad, "weight": self.layer.weight.grad.clone()}


def runs(recipe: Any, dtype: torch.dtype = torch.float32) -> tuple[Run, Run]:
    layer, reference = twins(nn.Linear(WIDTH, HIDDEN, bias=False, dtype=dtype))
    return Run(layer, compile_interpreted(layer, {"recipe": recipe})), Run(reference, reference)


def operands(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [x.to(dtype) for x in (batch(32), batch(HIDDEN) / 8, batch(32, HIDDEN) / 8)]


def changed(good: list[Tensor], operand: int, change: Callable[[Tensor], Tensor]) -> list[Tensor]:
    return [change(x) if index == operand else x for index, x in enumerate(good)]


def assert_good(step: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    for name, expected in reference.items():
        assert_near(expected, step[name], db=25.0 if name == "out" else 22.0)


# --- one step, and those behind it --------------------------------------------------------------


@RECIPES
@OPERANDS
@pytest.mark.parametrize("case", FINITE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_finite_step_gives_finite_numbers_and_scales(
    dtype: torch.dtype, case: str, operand: int, recipe: str
) -> None:
    """Where eager's are: an outlier or a change of magnitude costs precision, not the run."""
    run, eager = runs(recipe, dtype)
    good = operands(dtype)
    bad = changed(good, operand, FINITE[case])
    for inputs in (good, good, bad, bad):
        step, reference = run.step(*inputs), eager.step(*inputs)
        for name, expected in reference.items():
            assert (step[name].isfinite() | ~expected.isfinite()).all(), name
    if recipe == "delayed":
        state = only_state(run.layer)
        assert state.scale.isfinite().all() and (state.events[0] == 0).all()
        jumped = state.events[2, :3] > 0  # then there is none, and each cast finds its own
        assert torch.equal(scale(run.layer, "weight") > 0, ~jumped)


@OPERANDS
@pytest.mark.parametrize("case", FINITE)
def test_current_scaling_forgets_at_once(case: str, operand: int) -> None:
    run, eager = runs("current")
    good = operands()
    run.step(*changed(good, operand, FINITE[case]))
    assert_good(run.step(*good), eager.step(*good))


@OPERANDS
@pytest.mark.parametrize("case", ["zero", "constant", "denormal", "smallest", "tiny"])
def test_a_step_with_smaller_numbers_leaves_the_delayed_scale(case: str, operand: int) -> None:
    """The larger amax is still in the history: the next step is as if nothing had been. Much
    smaller ones are a jump, unless they are zeros.
    """
    run, eager = runs("delayed")
    good = operands()
    run.step(*good)
    before = scale(run.layer, "weight")
    run.step(*changed(good, operand, FINITE[case]))
    jumped = case in ("denormal", "smallest", "tiny")
    before[operand] *= not jumped
    assert torch.equal(scale(run.layer, "weight"), before)
    assert [tuple(found) for found in fp8compile.events(run.layer).values()] == [(0, 0, 1)] * jumped
    assert_good(run.step(*good), eager.step(*good))


@OPERANDS
@pytest.mark.parametrize("case", ["zero", "constant", "denormal", "smallest", "tiny"])
def test_a_run_that_starts_with_smaller_numbers(case: str, operand: int) -> None:
    """After zeros there is no scale yet; after tiny numbers one step saturates, and is counted."""
    run, eager = runs("delayed")
    good = operands()
    bad = changed(good, operand, FINITE[case])
    run.step(*bad)
    assert (scale(run.layer, "weight")[operand] == 0) == (case == "zero")
    first = run.step(*good)
    assert all(value.isfinite().all() for value in first.values())
    if case == "zero":
        assert_good(first, eager.step(*good))
    else:
        name = f"weight.{('input', 'weight', 'grad_output')[operand]}"
        assert fp8compile.events(run.layer) == {name: (0, 1, case != "constant")}
    assert_good(run.step(*good), eager.step(*good))


@OPERANDS
def test_without_the_guard_rail_a_spike_costs_range_until_it_is_forgotten(operand: int) -> None:
    """A step with 1000 times the numbers is clipped; the next finds its own scale; then the history
    takes 10 bits of range for a while.
    """
    run, eager = runs(Recipe("short", history_len=4, jump_limit=torch.inf))
    good = operands()
    run.step(*good)
    before = scale(run.layer, "weight")[operand]
    spike = changed(good, operand, lambda x: 1000 * x)
    assert all(value.isfinite().all() for value in run.step(*spike).values())
    assert len(fp8compile.events(run.layer)) == 1
    assert scale(run.layer, "weight")[operand] == 0
    assert_good(run.step(*good), eager.step(*good))
    torch.testing.assert_close(scale(run.layer, "weight")[operand], before / 1000)
    for _ in range(3):
        step, reference = run.step(*good), eager.step(*good)
        assert all(sqnr_db(reference[name], step[name]) > 10 for name in step)
    assert scale(run.layer, "weight")[operand] == before
    assert_good(run.step(*good), eager.step(*good))
    assert len(fp8compile.events(run.layer)) == 1


# --- not finite ---------------------------------------------------------------------------------


@RECIPES
@OPERANDS
@pytest.mark.parametrize("case", NOT_FINITE)
def test_what_is_not_finite_is_seen_exactly_where_eager_has_it(
    case: str, operand: int, recipe: str
) -> None:
    """In its row or column of each product, and nowhere else; the rest of the step is good."""
    run, eager = runs(recipe)
    good = operands()
    bad = changed(good, operand, at_one_place(NOT_FINITE[case]))
    for inputs in (bad, good, bad):  # as the first step, and with a scale
        step, reference = run.step(*inputs), eager.step(*inputs)
        for name, expected in reference.items():
            finite = expected.isfinite()
            assert torch.equal(step[name].isfinite(), finite), name
            assert sqnr_db(expected[finite], step[name][finite]) >= 22, name


@OPERANDS
@pytest.mark.parametrize("case", NOT_FINITE)
def test_a_step_that_is_not_finite_is_counted_and_forgotten(case: str, operand: int) -> None:
    run, eager = runs("delayed")
    good = operands()
    run.step(*good)
    before = scale(run.layer, "weight")
    run.step(*changed(good, operand, at_one_place(NOT_FINITE[case])))
    assert torch.equal(scale(run.layer, "weight"), before)
    name = f"weight.{('input', 'weight', 'grad_output')[operand]}"
    assert fp8compile.events(run.layer) == {name: (1, 0, 0)}
    assert_good(run.step(*good), eager.step(*good))
    assert len(history(run.layer, "weight", operand)) == 2


@RECIPES
def test_everything_is_nan(recipe: str) -> None:
    run, eager = runs(recipe)
    good = operands()
    run.step(*(torch.full_like(x, torch.nan) for x in good))
    assert_good(run.step(*good), eager.step(*good))


@RECIPES
@pytest.mark.parametrize("case", ["nan", "inf", "spike"])
def test_a_run_with_a_bad_batch_that_is_skipped_ends_as_the_run_without(
    case: str, recipe: str
) -> None:
    """The loop everyone has: look at the loss or the gradient norm, and leave the step out."""
    bad = {"nan": at_one_place(torch.nan), "inf": at_one_place(torch.inf), "spike": None}[case]
    models = twins(mlp())
    losses: list[list[float]] = [[], []]
    good = batch()
    for model, kept, has_bad in zip(models, losses, (True, False), strict=True):
        compiled = compile_interpreted(model, {"recipe": recipe})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for step in range(12):
            is_bad = has_bad and step == 4
            for x in ([1000 * good if bad is None else bad(good)] if is_bad else []) + [good]:
                loss = compiled(x).square().mean()
                loss.backward()
                norm = torch.nn.utils.get_total_norm(list(gradients(model).values()))
                if norm.isfinite() and x is good:
                    optimizer.step()
                    kept.append(float(loss.detach()))
                else:
                    fp8compile.update_scales(model)
                optimizer.zero_grad()
    with_bad, without = map(torch.tensor, losses)
    assert with_bad.shape == without.shape == (12,)
    assert without[-1] < 0.7 * without[0]
    if recipe == "current":
        assert torch.equal(with_bad, without)
    torch.testing.assert_close(with_bad, without, rtol=0.03 if case == "spike" else 0.01, atol=0.0)
