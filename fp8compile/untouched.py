"""Run a model without leaving a trace in it, nor in what Dynamo knows of it."""

from __future__ import annotations

import contextlib
import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

_calls = itertools.count()
ARGS, KWARGS = "fresh_args", "fresh_kwargs"  # how Dynamo calls what ``fresh`` passes on


def fresh(target: Callable[..., Any]) -> Callable[..., Any]:
    """A copy with a code object of its own: what Dynamo remembers of the target stays untouched."""

    def call(*fresh_args: Any, **fresh_kwargs: Any) -> Any:
        return target(*fresh_args, **fresh_kwargs)

    function = target if isinstance(target, types.FunctionType) else call
    code = function.__code__.replace(co_name=f"fresh_{next(_calls)}")
    copy = types.FunctionType(code, function.__globals__, closure=function.__closure__)
    copy.__defaults__, copy.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return copy


@contextlib.contextmanager
def left_as_it_was(model: Any) -> Iterator[None]:
    """Put back buffers, gradients and the state of the random number generators."""
    module = model if isinstance(model, nn.Module) else nn.Module()
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    with torch.random.fork_rng():
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            for parameter, gradient in gradients:
                parameter.grad = gradient
