"""A model that was looked at is the model it was before."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fp8compile
from fp8compile.untouched import left_as_it_was, modules_behind, without_data


class Trainer:
    """An object with a model, whose method is compiled."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def loss(self, x: Tensor) -> Tensor:
        return self.model(x).square().mean()


def call_with(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def callables(model: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
    """What people compile, each a way to call the model."""

    def inner(x: Tensor) -> Tensor:
        return model(x)

    return {
        "module": model,
        "its method": model.forward,
        "closure": lambda x: model(x),
        "closure of a closure": lambda x: inner(x),
        "partial": functools.partial(call_with, model),
        "method of another": Trainer(model).loss,
    }


KINDS = tuple(callables(nn.Identity()))


@pytest.mark.parametrize("kind", KINDS)
def test_modules_behind(kind: str) -> None:
    model = nn.BatchNorm1d(4)
    assert model in modules_behind(callables(model)[kind])


def test_functions_that_name_each_other_or_nothing_yet() -> None:
    def first(x: Tensor, depth: int) -> Tensor:
        return second(x, depth - 1) if depth else x

    assert modules_behind(first) == []  # the cell of ``second`` is empty

    def second(x: Tensor, depth: int) -> Tensor:
        return first(model(x), depth)

    model = nn.Identity()
    assert modules_behind(first) == [model]


@pytest.mark.parametrize("kind", KINDS)
def test_buffers_and_gradients_are_put_back(kind: str) -> None:
    model = nn.BatchNorm1d(4)
    call = callables(model)[kind]
    before = {name: value.clone() for name, value in model.named_buffers()}
    with left_as_it_was(call):
        call(torch.randn(8, 4) + 3).sum().backward()
        assert model.num_batches_tracked == 1 and model.weight.grad is not None
    for name, value in model.named_buffers():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert model.weight.grad is None


class Average(nn.Module):
    """A moving average, kept by assigning a buffer anew."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)
        self.register_buffer("mean", torch.zeros(32))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        return y - self.mean


def test_a_buffer_that_is_assigned_anew_is_put_back() -> None:
    model = Average()
    mean = model.mean
    with left_as_it_was(model):
        model(torch.ones(8, 32))
        assert model.mean is not mean
    assert model.mean is mean and not mean.any()


LOOKS: dict[str, Callable[[nn.Module, Tensor, Path], object]] = {
    "explain": lambda model, x, _: fp8compile.explain(model, x),
    "view": lambda model, x, folder: fp8compile.view(model, x, path=folder / "graph.html"),
    "profile": lambda model, x, _: fp8compile.profile(model, [x], sensitivity=False),
    "calibrate": lambda model, x, _: fp8compile.calibrate(model, [x]),
    "measure": lambda model, x, _: fp8compile.Monitor(model).measure(x),
}


@pytest.mark.filterwarnings("ignore:FP8 is emulated here")
@pytest.mark.parametrize("name", LOOKS)
def test_who_looks_leaves_an_assigned_buffer_as_it_was(name: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = Average()
    LOOKS[name](model, torch.ones(8, 32), tmp_path)
    assert not model.state_dict()["mean"].any()


@pytest.mark.parametrize("inside", [False, True])
def test_buffers_made_in_inference_mode(inside: bool) -> None:
    with torch.inference_mode():
        model = nn.BatchNorm1d(4)
    with torch.inference_mode(inside), left_as_it_was(model.train(inside)), torch.no_grad():
        model(torch.ones(8, 4))
    assert not model.running_mean.any()


@pytest.mark.parametrize("kind", KINDS)
def test_meta_tensors_are_replaced_and_put_back(kind: str) -> None:
    with torch.device("meta"):
        model, x = nn.BatchNorm1d(4), torch.zeros(8, 4)
    weight, mean, call = model.weight, model.running_mean, callables(model)[kind]
    with without_data(call, (x,)) as (given,):
        assert given.device.type != "meta" and model.weight.device == given.device
        assert model.running_mean is not mean and call(given).device == given.device
    assert model.weight is weight and model.running_mean is mean


def test_script_modules_are_left_as_they_were() -> None:
    model = torch.jit.script(nn.BatchNorm1d(4))
    with left_as_it_was(model):
        model(torch.randn(8, 4))
    assert model.num_batches_tracked == 0 and torch.equal(model.running_mean, torch.zeros(4))
