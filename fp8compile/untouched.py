"""Run a model without leaving a trace in it, nor in what Dynamo knows of it."""

from __future__ import annotations

import contextlib
import functools
import itertools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .errors import OptionError
from .internals import has_no_data, stand_ins

_calls = itertools.count()
Step = Callable[[Callable[..., Any], Any], Any]  # what is done with a model and a batch
ARGS, KWARGS = "fresh_args", "fresh_kwargs"  # how Dynamo calls what ``fresh`` passes on


def fresh(model: Callable[..., Any]) -> Callable[..., Any]:
    """A copy with a code object of its own: what Dynamo remembers of the model stays untouched."""

    def call(*fresh_args: Any, **fresh_kwargs: Any) -> Any:
        return model(*fresh_args, **fresh_kwargs)

    function = model if isinstance(model, types.FunctionType) else call
    code = function.__code__.replace(co_name=f"fresh_{next(_calls)}")
    copy = types.FunctionType(code, function.__globals__, closure=function.__closure__)
    copy.__defaults__, copy.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return copy


def modules_behind(target: Any) -> list[nn.Module]:
    """The modules that a call of ``target`` can use: itself, or those that a function has captured
    or finds among its globals, and those that belong to a method's object.
    """
    found: list[nn.Module] = []
    seen: set[int] = set()
    left = [target]
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found.append(value)
        elif isinstance(value, functools.partial):
            left += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, types.MethodType):
            left += [value.__func__, value.__self__]
            left += list(getattr(value.__self__, "__dict__", {}).values())
        elif isinstance(value, types.FunctionType):
            left += _captured(value)
    return found


def _captured(function: types.FunctionType) -> list[Any]:
    """What a function's code names of its surroundings; some of it may not be there yet."""
    known = function.__globals__
    values = [known[name] for name in function.__code__.co_names if name in known]
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty cell
            values.append(cell.cell_contents)
    return values


def plain_step(call: Callable[..., Any], batch: Any) -> Any:
    """Call with a batch: a mapping gives keyword arguments, a tuple or list positional ones."""
    if isinstance(batch, Mapping):
        return call(**batch)
    return call(*batch) if isinstance(batch, tuple | list) else call(batch)


def checked_batches(batches: Iterable[Any]) -> Iterable[Any]:
    """The batches; OptionError for a single one, whose rows or names would be taken for batches,
    and for what is none.
    """
    several = hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")  # as a Dataset has
    if isinstance(batches, Tensor | Mapping | str) or not several:
        given = type(batches).__name__
        raise OptionError(
            f"batches is of type {given}; give a list of what the model is called with, such as "
            "[x], of tensors, tuples of arguments or dicts of keyword arguments"
        )
    return batches


@contextlib.contextmanager
def left_as_it_was(model: Any) -> Iterator[None]:
    """Put back the buffers and gradients of all modules behind a model, and the state of the random
    number generators. A buffer that was assigned anew is the tensor again that it was.
    """
    modules = nn.ModuleList(modules_behind(model))
    buffers = [(buffer, buffer.detach().clone()) for buffer in modules.buffers()]
    held = [(module._buffers, dict(module._buffers)) for module in modules.modules()]
    gradients = [(parameter, parameter.grad) for parameter in modules.parameters()]
    with torch.random.fork_rng():
        try:
            yield
        finally:
            for names, tensors in held:
                for name, tensor in tensors.items():  # a script module's names have no update
                    names[name] = tensor
            for buffer, value in buffers:
                # Nothing else may write to a tensor that was made in inference mode.
                with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                    buffer.copy_(value)
            for parameter, gradient in gradients:
                parameter.grad = gradient


def check_has_data(model: Any) -> None:
    """Raise OptionError for a model whose tensors are meta or fake: it cannot be run."""
    modules = nn.ModuleList(modules_behind(model))
    for name, tensor in itertools.chain(modules.named_parameters(), modules.named_buffers()):
        if has_no_data(tensor):
            raise OptionError(
                f"{name.partition('.')[2]} has no data (it is on meta, or fake), and what tensors "
                "hold is what is looked at: fill the model first, as with fp8compile.load; "
                "fp8compile.explain and view need no data"
            )


@contextlib.contextmanager
def without_data(model: Any, inputs: Any) -> Iterator[Any]:
    """Where a model or its inputs have no data, put tensors that can be traced in all places.

    Yields the inputs. What is put there stands on a GPU, or on a CPU if there is none, which
    decides as what it is traced.
    """
    owners: list[dict[str, Any]] = []
    for m in nn.ModuleList(modules_behind(model)).modules():
        owners += [m._parameters, m._buffers, m.__dict__]
    found = [(held, n, x) for held in owners for n, x in held.items() if isinstance(x, Tensor)]
    if not any(map(has_no_data, [*(x for _, _, x in found), *tree_leaves(inputs)])):
        yield inputs
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    make = stand_ins()
    made: dict[int, Any] = {}

    def stand_in(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) not in made:  # weights that are tied stay so
            made[id(x)] = make(x, device)
        return made[id(x)]

    try:
        for held, name, x in found:
            held[name] = stand_in(x)
        yield tree_map(stand_in, inputs)
    finally:
        for held, name, x in found:
            held[name] = x
