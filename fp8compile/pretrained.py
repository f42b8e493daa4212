"""Models of transformers, which nobody has who has not imported it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NoReturn

from torch import nn

from .errors import FrozenError


def is_pretrained(model: object) -> bool:
    """Whether this is a ``PreTrainedModel``."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def guard_saving(model: nn.Module, is_frozen: Callable[[nn.Module], bool]) -> None:
    """Have ``save_pretrained`` of a model, and of models in it, refuse as long as it is frozen.

    It would write FP8 weights beside a configuration that speaks of none: read again, they are
    taken as they are, without their scales.
    """
    for module in model.modules():
        if not is_pretrained(module):
            continue
        held: dict[str, Any] = module.__dict__
        if held.get("save_pretrained") is _refuse:
            del held["save_pretrained"]
        if "save_pretrained" not in held and any(map(is_frozen, module.modules())):
            held["save_pretrained"] = _refuse


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise FrozenError(
        "the model is frozen in FP8, and transformers would write its weights without saying so; "
        "call fp8compile.save_pretrained(model, path), whose checkpoint transformers loads, or "
        "fp8compile.unfreeze(model) first"
    )
