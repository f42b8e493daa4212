"""From ``path/to/file.py:name`` to a model and its inputs."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..errors import OptionError

_LEGAL = "path/to/file.py:name or package.module:name"
_GIVES = "(model, inputs), with the inputs as a tuple"


def load(target: str, device: str | None) -> tuple[Any, tuple[Any, ...]]:
    """The model and the inputs that a target names, made on a device if one is given.

    Raises OptionError where there is no such file, module, name or device, or where it gives
    something else.
    """
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise OptionError(f"SCRIPT_OR_MODEL={target!r}: write {_LEGAL}")
    where = _device(device)
    with where if where is not None else contextlib.nullcontext():
        found = getattr(_module(place), name, None)
        if found is None:
            raise OptionError(f"{place} has no {name!r}; it has {_names(_module(place))}")
        made = found() if callable(found) and not isinstance(found, nn.Module) else found
    model, inputs = _checked(made, target)
    return (model, inputs) if where is None else (_moved(model, where), _moved(inputs, where))


def parse_json(text: str | None) -> dict[str, Any]:
    """The options in a JSON object. Raises OptionError if it is none."""
    try:
        options = json.loads(text or "{}")
    except ValueError as error:
        raise OptionError(f"--options={text!r} is not JSON: {error}") from error
    if not isinstance(options, dict):
        raise OptionError(f"""--options={text!r}: write an object, such as '{{"strict": true}}'""")
    return options


def _device(name: str | None) -> torch.device | None:
    try:
        device = None if name is None else torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"--device={name!r}: {str(error).splitlines()[0]}") from error
    if device is not None and device.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"--device={name!r}: there is no GPU here; write cpu or meta")
    return device


def _module(place: str) -> ModuleType:
    if place.endswith(".py"):
        return _from_file(Path(place))
    sys.path.insert(0, "")  # as python -m does
    try:
        return importlib.import_module(place)
    except ImportError as error:
        raise OptionError(f"{place!r} cannot be imported: {error}; write {_LEGAL}") from error
    finally:
        sys.path.remove("")


def _from_file(path: Path) -> ModuleType:
    """Run a script as a module, with its folder on the path."""
    if not path.is_file():
        raise OptionError(f"there is no file {str(path)!r}; write {_LEGAL}")
    path = path.resolve()
    name = _module_name(path)
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # what dataclasses and pickles look for
    sys.path.insert(0, str(path.parent))
    spec.loader.exec_module(module)
    return module


def _module_name(path: Path) -> str:
    """The script's own, or if another module has that, as for a script random.py, one that is free
    or the script's already.
    """
    names = itertools.chain([path.stem], (f"{path.stem}_{n}" for n in itertools.count(2)))
    file = str(path)
    return next(
        name
        for name in names
        if name not in sys.modules or getattr(sys.modules[name], "__file__", None) == file
    )


def _names(module: ModuleType) -> str:
    names = [name for name, value in vars(module).items() if _is_own(value, module)]
    return ", ".join(names) or "no functions or models"


def _is_own(value: Any, module: ModuleType) -> bool:
    own = getattr(value, "__module__", None) == module.__name__
    return isinstance(value, tuple | nn.Module) or (callable(value) and own)


def _checked(made: Any, target: str) -> tuple[Any, tuple[Any, ...]]:
    if isinstance(made, tuple) and len(made) == 2 and callable(made[0]):
        model, inputs = made
        if isinstance(inputs, tuple | list):
            return model, tuple(inputs)
        got = f"the inputs as a {type(inputs).__name__}"
    else:
        got = f"a {type(made).__name__}"
    raise OptionError(f"{target} gives {got}; it must give {_GIVES}")


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, nn.Module):
        return value.to(device)
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, value)
