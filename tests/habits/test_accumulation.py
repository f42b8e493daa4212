"""Several forwards or backwards for one optimizer step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fp8compile
from fp8compile import Recipe
from fp8compile.ir import SLOTS_PER_SITE
from tests.habits.common import (
    EMULATED,
    GRAD_OUTPUT,
    INPUT,
    assert_equal,
    assert_near,
    assert_same_scaling,
    batch,
    gradients,
    history,
    loss_of,
    mlp,
    only_state,
    plain_loop,
    scale,
    sgd,
    twins,
)
from tests.helpers import compile_interpreted
from tests.models import sqnr_db

pytestmark = pytest.mark.filterwarnings(EMULATED)


def largest(*values: Tensor) -> float:
    return max(float(x.abs().amax()) for x in values)


def accumulate(
    call: Callable[..., Tensor], optimizer: torch.optim.Optimizer, micro_batches: list[Tensor]
) -> None:
    for x in micro_batches:
        (loss_of(call(x)) * len(x) / sum(map(len, micro_batches))).backward()
    optimizer.step()


@pytest.mark.parametrize("sizes", [(16, 32, 16), (32, 32, 8), (16, 17, 31)], ids=str)
def test_uneven_micro_batches_share_one_state(sizes: tuple[int, ...]) -> None:
    """The second size makes Dynamo compile again, with a symbolic number of rows.

    The largest value is in another micro-batch each step.
    """
    model, reference = twins(mlp())
    compiled, optimizer = compile_interpreted(model), sgd(model)
    seen = []
    for step in range(3):
        model.zero_grad()
        reference.zero_grad()
        reference.load_state_dict(model.state_dict())
        micro_batches = [batch(size) for size in sizes]
        micro_batches[step] *= 3 / largest(micro_batches[step])
        seen.append(largest(*micro_batches))
        accumulate(reference, sgd(reference, lr=0.0), micro_batches)
        accumulate(compiled, optimizer, micro_batches)
        for name, gradient in gradients(reference).items():
            assert sqnr_db(gradient, gradients(model)[name]) >= 18, name
    assert only_state(model).updates == 3
    assert history(model, "0.weight", INPUT) == seen
    # With a symbolic number of rows wgrad is not FP8, but dgrad is, and casts the gradient.
    assert len(history(model, "2.weight", GRAD_OUTPUT)) == 3


def test_the_order_of_micro_batches_does_not_matter_to_the_scales() -> None:
    models = twins(mlp())
    x, y = batch(), 5 * batch()
    for model, order in zip(models, ([x, y], [y, x]), strict=True):
        accumulate(compile_interpreted(model), sgd(model, lr=0.0), order)
    assert_same_scaling(*models)


def test_one_backward_for_several_forwards() -> None:
    one_each, together = models = twins(mlp())
    x, y = batch(), 3 * batch()
    for model in models:
        compiled = compile_interpreted(model)
        if model is together:
            (loss_of(compiled(x)) + loss_of(compiled(y))).backward()
        else:
            loss_of(compiled(x)).backward()
            loss_of(compiled(y)).backward()
        fp8compile.update_scales(model)
    assert_same_scaling(*models)
    for name, gradient in gradients(one_each).items():  # summed in another order
        torch.testing.assert_close(gradient, gradients(together)[name])


def test_a_step_that_used_some_forwards_only() -> None:
    """What a forward without a backward has seen counts; gradients it has none."""
    model, x = mlp(), batch()
    compiled = compile_interpreted(model)
    compiled(7 * x)
    loss_of(compiled(x)).backward()
    gradient_amax = only_state(model).amax_bwd.clone()
    fp8compile.update_scales(model)
    assert history(model, "0.weight", INPUT) == [largest(7 * x)]
    assert history(model, "2.weight", GRAD_OUTPUT) == [
        float(gradient_amax[SLOTS_PER_SITE + GRAD_OUTPUT])
    ]


@torch._functorch.config.patch(donated_buffer=False)
def test_retain_graph_over_an_update() -> None:
    """What was saved in FP8 keeps its scale_inv, though the scales have moved by a factor of 4."""
    model, x = mlp(), batch()
    compiled = compile_interpreted(model, {"recipe": Recipe("short", history_len=1)})
    loss_of(compiled(4 * x)).backward()
    fp8compile.update_scales(model)
    loss = loss_of(compiled(x))
    found = []
    for _ in range(2):
        model.zero_grad()
        loss.backward(retain_graph=True)
        found.append(gradients(model))
        fp8compile.update_scales(model)
    torch.testing.assert_close(scale(model, "0.weight")[INPUT], 448 / x.abs().amax())
    for name, gradient in found[0].items():
        assert sqnr_db(gradient, found[1][name]) >= 20, name


def test_retain_graph_after_a_backward_without_it_raises_what_it_does_without_fp8() -> None:
    errors = []
    for compile_it in (lambda m: torch.compile(m, backend="aot_eager"), compile_interpreted):
        torch._dynamo.reset()
        compiled, x = compile_it(mlp()), batch()
        loss_of(compiled(x)).backward()
        with pytest.raises(RuntimeError) as error:
            loss_of(compiled(x)).backward(retain_graph=True)
        errors.append(str(error.value))
    assert "donated buffers" in errors[0] and errors[1] == errors[0]


class Twice(nn.Module):
    """One layer at two places, with inputs of different magnitude."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(10 * torch.tanh(self.fc(x)))


class Unrolled(nn.Module):
    """The same numbers from two layers with equal weights."""

    def __init__(self, twice: Twice) -> None:
        super().__init__()
        self.first, self.second = twice.fc, copy.deepcopy(twice.fc)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(10 * torch.tanh(self.first(x)))


def test_a_module_used_twice_in_one_graph_is_as_two() -> None:
    twice = Twice()
    unrolled = Unrolled(copy.deepcopy(twice))
    for _ in range(3):
        x = batch()
        for model in (twice, unrolled):
            model.zero_grad()
            loss_of(compile_interpreted(model)(x)).backward()
            fp8compile.update_scales(model)
    used, layers = fp8compile.state_dict(twice), fp8compile.state_dict(unrolled)
    for entry in ("scale", "amax_history"):
        assert torch.equal(used[f"fc.weight.{entry}"], layers[f"first.weight.{entry}"])
        assert torch.equal(used[f"fc.weight#1.{entry}"], layers[f"second.weight.{entry}"])
    both = unrolled.first.weight.grad + unrolled.second.weight.grad
    torch.testing.assert_close(twice.fc.weight.grad, both)


def test_a_compiled_module_called_twice_in_a_step_has_one_scale() -> None:
    """Two calls of one graph: their amax go into the same slot, and the larger one counts."""
    model, x = nn.Linear(32, 32), batch()
    compiled = compile_interpreted(model)
    loss_of(compiled(torch.tanh(compiled(x)))).backward()
    fp8compile.update_scales(model)
    assert history(model, "weight", INPUT) == [largest(x)]
    assert only_state(model).updates == 1


# --- gradients of gradients ---------------------------------------------------------------------


def gradient_penalty(call: Callable[..., Tensor], x: Tensor) -> None:
    (gradient,) = torch.autograd.grad(call(x).sum(), x, create_graph=True)
    gradient.square().mean().backward()


def test_double_backward_raises_what_it_does_without_fp8() -> None:
    errors = []
    for compile_it in (lambda m: torch.compile(m, backend="aot_eager"), compile_interpreted):
        torch._dynamo.reset()
        with pytest.raises(RuntimeError) as error:
            gradient_penalty(compile_it(mlp()), batch().requires_grad_())
        errors.append(str(error.value))
    assert "double backward" in errors[0] and errors[1] == errors[0]


def test_create_graph_without_a_second_backward() -> None:
    """Some meta-learning code asks for the graph and never uses it."""
    losses = []
    for create_graph in (False, True):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model, x = mlp(), batch()
        loss = loss_of(compile_interpreted(model)(x))
        found = torch.autograd.grad(loss, list(model.parameters()), create_graph=create_graph)
        losses.append({str(i): g.detach() for i, g in enumerate(found)})
    assert_equal(*losses)


def test_gradients_of_the_input_alone() -> None:
    """As adversarial training and saliency maps ask for them."""
    model = mlp()
    x = batch().requires_grad_()
    (expected,) = torch.autograd.grad(loss_of(model(x)), x)
    compiled = compile_interpreted(model)
    (actual,) = torch.autograd.grad(loss_of(compiled(x)), x)
    assert_near(expected, actual, db=20)
    assert gradients(model) == {}
    plain_loop(model, [x.detach()], call=compiled)
    assert only_state(model).updates == 1


def test_a_backward_that_fails_leaves_the_next_step_alone() -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            raise ValueError("no gradient today")

    failed, plain = models = twins(mlp())
    x = batch()
    calls = [compile_interpreted(model) for model in models]
    with pytest.raises(ValueError, match="no gradient today"):
        loss_of(Fails.apply(calls[0](x))).backward()
    for model, call in zip(models, calls, strict=True):
        plain_loop(model, [x, x], call=call)
    assert_equal(failed.state_dict(), plain.state_dict())
    assert_same_scaling(*models)
