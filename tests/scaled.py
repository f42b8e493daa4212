"""A small model to train, and what its scaling states hold."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fp8compile.scaling import ScalingState
from fp8compile.states import states_of

INPUT, WEIGHT, GRAD_OUTPUT = range(3)
E4M3_MAX, E5M2_MAX = 448.0, 57344.0


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))


def train(call: Callable[..., Tensor], *inputs: Tensor) -> None:
    """One forward and backward for each input."""
    for x in inputs:
        call(x).square().mean().backward()


def only_state(model: nn.Module) -> ScalingState:
    states = states_of(model)
    assert len(states) == 1
    return states[0]


def snapshot(model: nn.Module) -> list[Tensor | int]:
    """Everything in the states of a model that a later step could depend on."""
    found: list[Tensor | int] = []
    for s in states_of(model):
        tensors = (s.scale, s.amax_fwd, s.amax_bwd, s.history, s.events)
        found += [*(t.clone() for t in tensors), s.position, s.updates]
    return found


def same(left: list[Tensor | int], right: list[Tensor | int]) -> bool:
    pairs = zip(left, right, strict=True)
    return all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs)
