"""Models and comparisons that the habits share.

The oracle of most is the plain loop: the same model, compiled in the same way, trained with one
forward, one backward and one ``optimizer.step()`` a step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fp8compile
from fp8compile.scaling import ScalingState
from fp8compile.states import states_of
from tests.helpers import compile_interpreted
from tests.models import sqnr_db

EMULATED = "ignore:FP8 is emulated here"
INPUT, WEIGHT, GRAD_OUTPUT = range(3)
WIDTH, HIDDEN = 32, 64


def mlp(bias: bool = True) -> nn.Sequential:
    """Two sites."""
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN, bias), nn.Tanh(), nn.Linear(HIDDEN, WIDTH, bias))


def twins(model: nn.Module, count: int = 2) -> list[Any]:
    """Copies that share nothing, the first of which is the model itself."""
    return [model, *(copy.deepcopy(model) for _ in range(count - 1))]


def batch(rows: int = 16, width: int = WIDTH) -> Tensor:
    return torch.randn(rows, width)


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def loss_of(out: Tensor) -> Tensor:
    return out.square().mean()


def plain_loop(
    model: nn.Module,
    batches: Iterable[Tensor],
    optimizer: torch.optim.Optimizer | None = None,
    call: Callable[..., Tensor] | None = None,
) -> list[float]:
    """The plain loop, in FP8; returns its losses."""
    call = compile_interpreted(model) if call is None else call
    optimizer = sgd(model) if optimizer is None else optimizer
    losses = []
    for x in batches:
        loss = loss_of(call(x))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def step_in_backward(model: nn.Module, lr: float = 0.1) -> list[torch.optim.Optimizer]:
    """One optimizer per parameter, which steps as soon as its gradient is there."""
    optimizers = []
    for parameter in model.parameters():
        optimizer = torch.optim.SGD([parameter], lr=lr)
        optimizers.append(optimizer)

        def step(p: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(step)
    return optimizers


def only_state(model: nn.Module) -> ScalingState:
    states = states_of(model)
    assert len(states) == 1
    return states[0]


def scale(model: nn.Module, weight: str) -> Tensor:
    return fp8compile.state_dict(model)[f"{weight}.scale"]


def history(model: nn.Module, weight: str, operand: int) -> list[float]:
    """The amax of an operand in each step that has one, from oldest to newest."""
    amax = fp8compile.state_dict(model)[f"{weight}.amax_history"][:, operand]
    return amax[amax > 0].tolist()


def assert_same_training(model: nn.Module, other: nn.Module) -> None:
    """Weights, gradients, scales and amax histories are the same, bit for bit."""
    assert_equal(model.state_dict(), other.state_dict())
    assert_equal(gradients(model), gradients(other))
    assert_same_scaling(model, other)


def assert_same_scaling(model: nn.Module, other: nn.Module) -> None:
    left, right = fp8compile.state_dict(model), fp8compile.state_dict(other)
    assert left
    assert_equal(left, right)
    updates = [[state.updates for state in states_of(m)] for m in (model, other)]
    assert max(updates[0]) == max(updates[1]) > 0


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_near(reference: Tensor | Sequence[Tensor], value: Tensor, db: float = 25.0) -> None:
    """The same up to FP8's noise, and not more than that: it has really been FP8."""
    quality = sqnr_db(reference.detach(), value.detach())
    assert db <= quality < 60, f"{quality:.1f} dB"
