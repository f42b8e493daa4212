"""Import timm where torchvision is missing, or cannot be imported beside this PyTorch.

timm's models need nothing of torchvision, but ``import timm`` imports timm's data pipeline, which
names torchvision's transforms and data sets. Here these names exist while timm is imported, and
are empty. ``pip install --no-deps timm`` installs timm without torchvision, which would bring a
PyTorch of its own choice.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

INSTALL = "timm is not installed: pip install --no-deps timm"
_MODULES = (
    "torchvision",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.models.feature_extraction",
    "torchvision.ops",
    "torchvision.ops.misc",
    "torchvision.transforms",
    "torchvision.transforms.functional",
)


class _Empty(type):
    """The type of what stands in for torchvision's classes; it has every public attribute."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("_"):
            raise AttributeError(name)
        return name


class _StandIn(ModuleType):
    """A module in which every public name that is not a submodule is an empty class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        setattr(self, name, _Empty(name, (), {}))
        return self.__dict__[name]


def import_timm() -> ModuleType:
    """The timm package; ImportError, with the command that installs it, if there is none."""
    if importlib.util.find_spec("timm") is None:
        raise ImportError(INSTALL)
    with _torchvision_stand_in():
        return importlib.import_module("timm")


@contextmanager
def _torchvision_stand_in() -> Iterator[None]:
    """Have ``import torchvision`` succeed for as long as timm is imported, and no longer."""
    known = {name: sys.modules[name] for name in sys.modules if name.split(".")[0] == _MODULES[0]}
    modules = {name: _StandIn(name) for name in _MODULES}
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in _MODULES:
            del sys.modules[name]
        sys.modules.update(known)
