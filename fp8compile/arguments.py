"""What our functions are called with: a model or a function, or what ``torch.compile`` made of it.

``import fp8compile`` loads it, so it loads neither Dynamo nor Inductor.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .errors import OptionError


def uncompiled(target: Any) -> Any:
    """The module or function that ``torch.compile`` was given, if this is what it returned."""
    original = getattr(target, "_orig_mod", target)
    return getattr(original, "_torchdynamo_orig_callable", original)


def checked_model(model: Any, what: str) -> nn.Module:
    """The same of a module. OptionError for anything else, which ``what`` was called with."""
    model = uncompiled(model)
    if not isinstance(model, nn.Module):
        raise OptionError(f"{what} takes a model, an nn.Module, and no {type(model).__name__}")
    return model


def checked_callable(target: Any, what: str) -> Any:
    """The same of a module or a function."""
    target = uncompiled(target)
    if not callable(target):
        raise OptionError(f"{what} takes a model or a function, and no {type(target).__name__}")
    return target
