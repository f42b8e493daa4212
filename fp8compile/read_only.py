"""A tensor that was computed for whoever asked for it: what is written to it would be lost."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from .errors import FrozenError
from .internals import WithoutSubclasses, are_aliases, is_traced

_OPERATORS = "add|sub|mul|div|truediv|floordiv|mod|pow|and|or|xor|lshift|rshift"
_WRITES = re.compile(rf"__setitem__|__set__|__i({_OPERATORS})__|.*[^_]_")
_REQUIRES_GRAD: Any = Tensor.requires_grad
_BASE: Any = Tensor._base
MESSAGE = (
    "the weight is frozen in FP8, and {what} would write to a dequantized copy only, and be lost; "
    "call fp8compile.unfreeze(model) first, and freeze again afterwards, or assign a new one: "
    "module.weight = nn.Parameter(...)"
)


class ReadOnly(Tensor):
    """A tensor that raises FrozenError where eager code writes to it, or to a view of it.

    What is computed from it are ordinary tensors.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # what Dynamo was given as an input
            with WithoutSubclasses():
                return func(*args, **kwargs)
        if _writes(func, args, kwargs):
            raise FrozenError(MESSAGE.format(what=_name(func)))
        given = tree_map_only(cls, ordinary, (tuple(args), dict(kwargs)))
        result = func(*given[0], **given[1])
        if func == _BASE.__get__:  # Dynamo of torch 2.11 asks for it until there is none
            return result
        ours = [x for x in tree_leaves((args, kwargs)) if isinstance(x, cls)]

        def guarded(x: Tensor) -> Tensor:
            return read_only(x) if any(are_aliases(x, each) for each in ours) else x

        return tree_map_only(Tensor, guarded, result)


def read_only(x: Tensor) -> Tensor:
    """The same values; as it is where it is traced, or of a class of its own."""
    return x if type(x) is not Tensor or is_traced() else x.as_subclass(ReadOnly)


def ordinary(x: Tensor) -> Tensor:
    """The same values, which may be written to."""
    with WithoutSubclasses():
        return x.as_subclass(Tensor)


def with_ordinary(run: Callable[..., Any], examples: Sequence[Any]) -> Callable[..., Any]:
    """A graph that gets ordinary tensors for the read-only ones among its inputs: AOTAutograd lets
    no custom operator run on a class that it does not know.
    """
    places = {i for i, x in enumerate(examples) if isinstance(x, ReadOnly)}
    if not places:
        return run
    return lambda *args: run(*(ordinary(x) if i in places else x for i, x in enumerate(args)))


def _writes(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a function changes what it is given; not whether gradients are wanted of it."""
    name = func.__name__
    if func == _REQUIRES_GRAD.__set__ or name == "requires_grad_":
        return bool(kwargs.get("requires_grad", args[1] if len(args) > 1 else True))
    named = _WRITES.fullmatch(name) is not None
    return named or kwargs.get("out") is not None or bool(kwargs.get("inplace"))


def _name(func: Any) -> str:
    if func.__name__ != "__set__":
        return str(func.__name__)
    return f"assigning {func.__self__.__name__}"
