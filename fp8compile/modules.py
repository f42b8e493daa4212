"""Find the user's modules behind the parameters that a compiled graph is called with.

``torch.compile`` hands a backend a graph and its inputs, not the model. The model is still there,
though: its call is on the Python stack, both when a graph is compiled and when it runs.
"""

from __future__ import annotations

import gc
import re
import sys
from itertools import takewhile
from types import FrameType

from torch import Tensor, fx, nn

from .internals import source_name


def calling_module(parameter: Tensor) -> nn.Module | None:
    """The outermost module on the call stack that holds the parameter, or None."""
    found: nn.Module | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in ("_wrapped_call_impl", "_call_impl", "__call__"):
            module = frame.f_locals.get("self")
            if (
                isinstance(module, nn.Module)
                and module is not found
                and any(p is parameter for p in module.parameters())
            ):
                found = module
        frame = frame.f_back
    return None if found is None else getattr(found, "_orig_mod", found)


def owner_of(parameter: Tensor) -> nn.Module | None:
    """The module that has the parameter as its own attribute, or None."""
    root = calling_module(parameter)
    for module in () if root is None else root.modules():
        if any(p is parameter for p in module._parameters.values()):
            return module
    # A function was compiled: no module is called, but one still refers to its parameter.
    for holder in gc.get_referrers(parameter):
        for owner in gc.get_referrers(holder) if isinstance(holder, dict) else ():
            candidates = gc.get_referrers(owner) if isinstance(owner, dict) else [owner]
            for module in candidates:
                if isinstance(module, nn.Module) and module._parameters is holder:
                    return module
    return None


class SiteNames:
    """Fully qualified names for the sites of a graph.

    With ``root`` they are those of ``root.named_modules()``; otherwise they are taken from the
    names that Dynamo gave the parameters.
    """

    def __init__(self, root: nn.Module | None, parameters: dict[fx.Node, Tensor]) -> None:
        self._parameters = parameters
        self._names: dict[int, list[str]] = {}
        if root is not None:
            for name, parameter in root.named_parameters(remove_duplicate=False):
                self._names.setdefault(id(parameter), []).append(name)

    def __call__(self, call: fx.Node, weight: fx.Node | None) -> str:
        path = _module_path(call)
        if weight is None:
            return path or call.name
        names = self._names.get(id(self._parameters.get(weight)))
        if not names:
            return _without_weight(_clean(source_name(weight))) or path or weight.name
        # A tied weight has several names; the one that is called here ends as the module path does.
        # Either may be longer: the path starts at what Dynamo compiles, the name at the root.
        sites = [_without_weight(name) for name in names]
        return max(sites, key=lambda site: _shared_end(site, path))


def _module_path(call: fx.Node) -> str:
    stack = call.meta.get("nn_module_stack") or {}
    return _clean(str(list(stack.values())[-1][0])) if stack else ""


def _shared_end(site: str, path: str) -> int:
    """How many parts two dotted names have in common at their end."""
    pairs = zip(reversed(site.split(".")), reversed(path.split(".")), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _without_weight(name: str) -> str:
    return name.removesuffix(".weight")


def _clean(source: str) -> str:
    """``L['self']._modules['layers']._modules['0']`` -> ``layers.0``."""
    source = re.sub(r"\._(?:modules|parameters)\['([^']+)'\]", r".\1", source)
    source = re.sub(r"\['([^']+)'\]|\[(\d+)\]", lambda m: "." + (m[1] or m[2]), source)
    source = re.sub(r"^[LG]\.", "", source)
    return re.sub(r"^(?:self|fn|model|mod)(?:\.|$)", "", source)
