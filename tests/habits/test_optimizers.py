"""Whoever steps, and however often: the scales move once per step, by what the step has seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

import fp8compile
from fp8compile.ir import SLOTS_PER_SITE
from tests.habits.common import (
    EMULATED,
    GRAD_OUTPUT,
    INPUT,
    assert_same_training,
    batch,
    gradients,
    history,
    loss_of,
    mlp,
    only_state,
    plain_loop,
    sgd,
    step_in_backward,
    twins,
)
from tests.helpers import compile_interpreted
from tests.models import sqnr_db

pytestmark = pytest.mark.filterwarnings(EMULATED)

# --- every optimizer ----------------------------------------------------------------------------

MATRICES_ONLY = ("Muon",)
NOT_HERE = {"SparseAdam": "takes sparse gradients only", "LBFGS": "takes a closure; below"}


def optimizers() -> list[str]:
    found = [
        name
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    ]
    return sorted(set(found) - {"Optimizer"} - NOT_HERE.keys())


@pytest.mark.parametrize("name", optimizers())
def test_one_update_per_step_of_any_optimizer(name: str) -> None:
    model = mlp(bias=name not in MATRICES_ONLY)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=1e-3)
    x = batch()
    plain_loop(model, [x, 2 * x, 3 * x], optimizer)
    largest = float(x.abs().amax())
    assert history(model, "0.weight", INPUT) == pytest.approx([largest, 2 * largest, 3 * largest])
    assert only_state(model).updates == 3


@pytest.mark.parametrize("flags", [{"foreach": True}, {"fused": True}], ids=str)
def test_flags_of_an_optimizer_change_nothing(flags: dict[str, bool]) -> None:
    models = twins(mlp())
    x = batch()
    for model, given in zip(models, ({}, flags), strict=True):
        plain_loop(model, [x, x], torch.optim.SGD(model.parameters(), lr=0.1, **given))
    for value, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(value, other)
    assert only_state(models[1]).updates == 2


def test_a_closure_that_is_evaluated_several_times_is_one_step() -> None:
    model, x = mlp(), batch()
    compiled = compile_interpreted(model)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(compiled(x))
        loss.backward()
        calls.append(float(loss.detach()))
        return loss

    for step in range(1, 4):
        optimizer.step(closure)
        assert only_state(model).updates == step
    assert len(calls) > 3 and calls[-1] < calls[0]
    assert len(history(model, "0.weight", INPUT)) == 3


def test_a_closure_of_a_first_order_optimizer_is_the_plain_loop() -> None:
    closed, plain = models = twins(mlp())
    x = batch()
    plain_loop(plain, [x, x])
    compiled, optimizer = compile_interpreted(closed), sgd(closed)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(compiled(x))
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    optimizer.zero_grad()
    assert_same_training(*models)


def test_clipped_gradients_do_not_change_what_was_seen() -> None:
    """Amax is taken where the gradient is cast, before anything is done to it."""
    models = twins(mlp())
    x = batch()
    for model, norm in zip(models, (1e-6, 1e6), strict=True):
        compiled, optimizer = compile_interpreted(model), sgd(model)
        for _ in range(2):
            loss_of(compiled(x)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), norm)
            optimizer.step()
            optimizer.zero_grad()
    found = [history(model, "2.weight", GRAD_OUTPUT) for model in models]
    assert found[0][0] == found[1][0] and len(found[0]) == 2


# --- loops without one --------------------------------------------------------------------------


def test_a_loop_of_ones_own_is_the_plain_loop() -> None:
    own, plain = models = twins(mlp())
    x = batch()
    plain_loop(plain, [x, 2 * x])
    compiled = compile_interpreted(own)
    for scaled in (x, 2 * x):
        loss_of(compiled(scaled)).backward()
        with torch.no_grad():
            for parameter in own.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
        fp8compile.update_scales(own)
    for value, other in zip(own.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(value, other)
    assert len(history(own, "0.weight", INPUT)) == 2 and len(models) == 2


def test_a_step_that_is_skipped_carries_its_amax_on() -> None:
    """As when a loop of one's own drops a step: the next one takes the larger of both."""
    model, x = mlp(), batch()
    compiled, optimizer = compile_interpreted(model), sgd(model)
    loss_of(compiled(5 * x)).backward()
    optimizer.zero_grad()
    plain_loop(model, [x], optimizer, compiled)
    assert history(model, "0.weight", INPUT) == pytest.approx([5 * float(x.abs().amax())])
    assert only_state(model).updates == 1


# --- optimizers inside backward -----------------------------------------------------------------


@pytest.mark.parametrize("graphs", ["one", "several"])
def test_one_optimizer_per_parameter_in_backward_is_the_plain_loop(graphs: str) -> None:
    inside, plain = models = [Blocks(graphs == "several") for _ in range(2)]
    inside.load_state_dict(plain.state_dict())
    batches = [(1 + step) * batch() for step in range(3)]
    plain_loop(plain, batches, call=plain.call())
    hooked = step_in_backward(inside)
    call = inside.call()
    for x in batches:
        loss_of(call(x)).backward()
    assert len(hooked) == 8
    assert_same_training(*models)
    assert {s.updates for s in fp8compile.states.states_of(inside)} == {3}


class Blocks(nn.Module):
    def __init__(self, one_by_one: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(mlp(), mlp())
        self.one_by_one = one_by_one

    def call(self) -> Callable[[Tensor], Tensor]:
        if not self.one_by_one:
            return compile_interpreted(self.blocks)
        first, second = (compile_interpreted(block) for block in self.blocks)
        return lambda x: second(first(x))


def test_optimizers_in_backward_with_a_block_that_is_called_twice() -> None:
    """The first gradient is complete only after both calls: so is what the update takes."""
    inside, plain = models = twins(nn.Linear(32, 32))
    batches = [batch(), 2 * batch()]
    calls = [compile_interpreted(model) for model in models]
    step_in_backward(inside)
    optimizer = sgd(plain)
    for x in batches:
        for model, call in zip(models, calls, strict=True):
            loss_of(call(torch.tanh(call(x)))).backward()
            if model is plain:
                optimizer.step()
                optimizer.zero_grad()
    assert_same_training(*models)


def test_optimizers_in_backward_with_micro_batches_step_at_each() -> None:
    """Each backward is a step then, and moves the scales."""
    model = mlp()
    compiled = compile_interpreted(model)
    step_in_backward(model)
    for _ in range(4):
        loss_of(compiled(batch())).backward()
    assert only_state(model).updates == 4


# --- mixed precision ----------------------------------------------------------------------------


def scaled_loop(
    model: nn.Module,
    call: Callable[..., Tensor],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    x: Tensor,
    factors: Iterable[float],
) -> list[bool]:
    """The loop of PyTorch's documentation, with a factor on each loss; returns what was skipped."""
    skipped = []
    for factor in factors:
        before = {n: p.clone() for n, p in model.named_parameters()}
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = factor * loss_of(call(x).float())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        skipped.append(all(torch.equal(before[n], p) for n, p in model.named_parameters()))
    return skipped


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_gradient_scaler_skips(fused: bool) -> None:
    """A fused optimizer is stepped even then, others are not: the event is counted either way."""
    model = mlp()
    compiled = compile_interpreted(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x = batch()
    assert scaled_loop(model, compiled, optimizer, scaler, x, [1, 1]) == [False, False]
    scales = only_state(model).scale.clone()
    assert scaled_loop(model, compiled, optimizer, scaler, x, [float("inf")]) == [True]
    assert scaler.get_scale() == 2.0**9
    assert scaled_loop(model, compiled, optimizer, scaler, x, [1, 1]) == [False, False]
    found = fp8compile.events(model)
    assert found["2.weight.grad_output"].not_finite == 1
    assert found["0.weight.grad_output"].not_finite == 1
    state = only_state(model)
    assert state.scale.isfinite().all()
    for site in (0, 1):  # the gradients' scales did not move
        slot = SLOTS_PER_SITE * site + GRAD_OUTPUT
        assert scales[slot] / 4 <= state.scale[slot] <= 4 * scales[slot]
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_loss_scale_grows() -> None:
    """Twice the loss scale is twice the gradient: one step saturates and is counted."""
    model, reference = twins(mlp())
    compiled, x = compile_interpreted(model), batch()
    loss_of(reference(x)).backward()
    quality = []
    for loss_scale in (1.0, 1.0, 2.0, 2.0):
        model.zero_grad()
        (loss_scale * loss_of(compiled(x))).backward()
        fp8compile.update_scales(model)
        gradient = gradients(model)["2.weight"] / loss_scale
        quality.append(sqnr_db(gradients(reference)["2.weight"], gradient))
    assert fp8compile.events(model)["2.weight.grad_output"] == (0, 1, 0)
    assert min(quality[0], quality[1], quality[3]) >= 20 and 10 < quality[2] < quality[3]


# --- around the optimizer -----------------------------------------------------------------------


def test_a_schedule_and_a_warm_up_of_zero() -> None:
    model, x = mlp(), batch()
    optimizer = sgd(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step < 2 else 1.0)
    compiled = compile_interpreted(model)
    before = model[0].weight.clone()
    for step in range(4):
        plain_loop(model, [x], optimizer, compiled)
        schedule.step()
        assert torch.equal(model[0].weight, before) == (step < 2)
    assert only_state(model).updates == 4


def test_two_parameter_groups_and_one_added_later() -> None:
    model, x = mlp(), batch()
    compiled = compile_interpreted(model)
    model[2].requires_grad_(False)
    optimizer = torch.optim.SGD([{"params": model[0].weight, "lr": 0.0}], lr=0.1)
    optimizer.add_param_group({"params": [model[0].bias]})
    plain_loop(model, [x], optimizer, compiled)
    model[2].requires_grad_(True)
    optimizer.add_param_group({"params": model[2].parameters()})
    plain_loop(model, [x], optimizer, compiled)
    assert only_state(model).updates == 2


def test_an_optimizer_of_another_model_moves_nothing() -> None:
    model, other = mlp(), nn.Linear(4, 4)
    loss_of(compile_interpreted(model)(batch())).backward()
    other(torch.ones(4)).sum().backward()
    sgd(other).step()
    assert only_state(model).updates == 0


def test_a_generator_and_a_discriminator() -> None:
    """The discriminator is called while the generator trains: that step is not its own."""
    generator, discriminator = mlp(), mlp()
    steps = [sgd(generator), sgd(discriminator)]
    make, judge = compile_interpreted(generator), compile_interpreted(discriminator)
    for step in range(1, 4):
        noise, real = batch(), batch()
        (loss_of(judge(real)) + loss_of(judge(make(noise).detach()))).backward()
        steps[1].step()
        steps[1].zero_grad()
        assert only_state(discriminator).updates == step
        assert only_state(generator).updates == step - 1
        loss_of(judge(make(noise))).backward()
        steps[0].step()
        steps[0].zero_grad()
        assert only_state(generator).updates == only_state(discriminator).updates == step
