"""Find the user's modules behind the parameters that a compiled graph is called with.

``torch.compile`` hands a backend a graph and its inputs, not the model. The model is still there,
though: its call is on the Python stack, both when a graph is compiled and when it runs.
"""

from __future__ import annotations

import gc
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, takewhile
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel

from .internals import source_name
from .untouched import ARGS, KWARGS


def calling_module(parameter: Tensor) -> nn.Module | None:
    """The outermost module on the call stack that holds the parameter, or None."""
    found: nn.Module | None = None
    for module in _calling_modules():
        if module is not found and any(p is parameter for p in module.parameters()):
            found = module
    return found


def calling_replicas() -> Any:
    """The process group of the DistributedDataParallel that is being called, or None."""
    called = (m for m in _calling_modules() if isinstance(m, DistributedDataParallel))
    return next((module.process_group for module in called), None)


def calling_shards() -> str:
    """The class of a module that is being called and that FSDP shards, or ""."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not there: nothing is sharded
    kinds = () if fsdp is None else (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)
    return next((type(m).__name__ for m in _calling_modules() if isinstance(m, kinds)), "")


def _calling_modules() -> Iterator[nn.Module]:
    """The modules on the call stack, innermost first, as the user made them."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in ("_wrapped_call_impl", "_call_impl", "__call__"):
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module):
                yield getattr(module, "_orig_mod", module)
        frame = frame.f_back  # type: ignore[assignment]


def owners_of(parameters: Sequence[Tensor]) -> list[nn.Module]:
    """The modules that have one of the parameters as their own attribute."""
    wanted = {id(parameter) for parameter in parameters}
    root = calling_module(parameters[0]) if parameters else None
    owners = [] if root is None else _owners_among(root.modules(), wanted)
    held = {id(p) for owner in owners for p in owner._parameters.values()}
    missing = [parameter for parameter in parameters if id(parameter) not in held]
    return owners + (_owners_by_reference(missing) if missing else [])


def _owners_among(modules: Iterable[nn.Module], wanted: set[int]) -> list[nn.Module]:
    return [m for m in modules if not wanted.isdisjoint(map(id, m._parameters.values()))]


def _owners_by_reference(parameters: Sequence[Tensor]) -> list[nn.Module]:
    """Where a function was compiled no module is called, but one still refers to its parameter."""
    holders = [found for found in gc.get_referrers(*parameters) if isinstance(found, dict)]
    above = gc.get_referrers(*holders) if holders else []
    attributes = [found for found in above if isinstance(found, dict)]
    above += gc.get_referrers(*attributes) if attributes else []
    modules = {id(found): found for found in above if isinstance(found, nn.Module)}
    return _owners_among(modules.values(), {id(parameter) for parameter in parameters})


class SiteNames:
    """Fully qualified names for the sites of a graph.

    With ``root`` they are those of ``root.named_modules()``; otherwise they are taken from the
    names that Dynamo gave the parameters. What is an argument goes by the name that ``root`` has
    for it, also where ``untouched.fresh`` stands in front.
    """

    def __init__(self, root: nn.Module | None, parameters: dict[fx.Node, Tensor]) -> None:
        self._root = root
        self._parameters = parameters
        self._names: dict[int, list[str]] = {}
        self._modules: dict[str, list[str]] = {}  # as Dynamo tells modules apart
        if root is not None:
            held = (root.named_parameters, root.named_buffers)
            for name, tensor in chain(*(named(remove_duplicate=False) for named in held)):
                self._names.setdefault(id(tensor), []).append(name)
            for name, module in root.named_modules(remove_duplicate=False):
                self._modules.setdefault(str(id(module)), []).append(name)

    def __call__(self, call: fx.Node, weight: fx.Node | None) -> str:
        path = self._called_in(call)
        if weight is None:
            return path or call.name
        names = self._names.get(id(self._parameters.get(weight)))
        if not names:
            name = _argument(cleaned(source_name(weight)), self._root)
            return _without_weight(name) or path or weight.name
        # A tied weight has several names; the one that is called here ends as the module path does.
        # Either may be longer: the path starts at what Dynamo compiles, the name at the root.
        sites = [_without_weight(name) for name in names]
        return max(sites, key=lambda site: _shared_end(site, path))

    def _called_in(self, call: fx.Node) -> str:
        """The module that a node was traced in, by the name that ``root`` has for it: Dynamo's
        begins with the variable, or at the module, in which it began to trace.
        """
        path = module_path(call) or ""
        key = next(reversed(call.meta.get("nn_module_stack") or {}), "")
        names = self._modules.get(key.partition("@")[0], [path])  # "@1": it is called again
        return max(names, key=lambda name: _shared_end(name, path))


def module_path(node: fx.Node) -> str | None:
    """The module that a node was traced in, or whose backward it is, by Dynamo; None if unknown."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    return cleaned(str(list(stack.values())[-1][0])) if stack else None


def _argument(name: str, root: nn.Module | None) -> str:
    """``fresh_args.0`` -> ``x`` where that is the first argument of ``root``."""
    variable, _, rest = name.partition(".")
    if root is None or variable not in (ARGS, KWARGS):
        return name
    kinds, parameters = inspect.Parameter, inspect.signature(root.forward).parameters

    def those(*wanted: Any) -> list[str]:
        return [name for name, parameter in parameters.items() if parameter.kind in wanted]

    positional = those(kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
    first, _, rest = rest.partition(".")
    if variable == ARGS and int(first) < len(positional):
        first = positional[int(first)]
    elif variable == ARGS:
        first = f"{those(kinds.VAR_POSITIONAL)[0]}.{int(first) - len(positional)}"
    elif first not in (*positional, *those(kinds.KEYWORD_ONLY)):
        first = f"{those(kinds.VAR_KEYWORD)[0]}.{first}"
    return f"{first}.{rest}" if rest else first


def _shared_end(site: str, path: str) -> int:
    """How many parts two dotted names have in common at their end."""
    pairs = zip(reversed(site.split(".")), reversed(path.split(".")), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _without_weight(name: str) -> str:
    return name.removesuffix(".weight")


def cleaned(source: str) -> str:
    """``L['self']._modules['layers']._modules['0']`` -> ``layers.0``."""
    source = re.sub(r"\._(?:modules|parameters)\['([^']+)'\]", r".\1", source)
    source = re.sub(r"\['([^']+)'\]|\[(\d+)\]", lambda m: "." + (m[1] or m[2]), source)
    source = re.sub(r"^[LG]\.", "", source)
    return re.sub(r"^(?:self|fn|model|mod)(?:\.|$)", "", source)
