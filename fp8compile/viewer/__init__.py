"""Write the graph of a model, before and after each pass, as a page to look at."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from .. import internals
from ..arguments import checked_callable
from ..compile import compile_graph
from ..errors import own_errors
from ..modules import cleaned, module_path
from ..options import parse_options
from ..untouched import fresh, left_as_it_was, without_data
from .collect import Collector
from .page import check_writable, write_page
from .records import Names


def view(
    model: Callable[..., Any],
    *inputs: Any,
    path: str | Path = "graph.html",
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Path:
    """Write a page with the graph of ``torch.compile(model, backend="fp8", options=options)``.

    It shows forward and backward together, by layer, before the passes, after each of them, and
    with the regions that become kernels, whose Triton source it holds; these are shown as on an
    FP8 GPU, whatever the model is on. The page is one file and loads nothing. The model and its
    inputs may be meta or fake tensors.

    The model is traced and run once, in its own precision, and left as it was, as by ``explain``;
    where it or its inputs have no data, nothing is computed.

    Returns the path of the page. Raises OptionError and RecipeError for what is wrong with the
    options, and OptionError for a path that cannot be written.
    """
    check_writable(path)
    parsed = replace(parse_options(options), strict=False)
    collectors: list[Collector] = []
    target = checked_callable(model, "view")
    root = target if isinstance(target, nn.Module) else None
    known: dict[int, str] = {}

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        collector = Collector(_names(gm, example_inputs, known, root))
        collectors.append(collector)
        compile_graph(
            gm,
            example_inputs,
            parsed,
            inner_compile=internals.only_final_graphs,
            observer=collector,
            root=root,
        )
        return gm.forward

    with (
        own_errors(),
        left_as_it_was(target),
        without_data(target, (inputs, kwargs)) as (args, named),
        internals.backward_compiled_early(),
    ):
        known.update(_names_of_weights(root))
        known.update(_names_of_arguments(target, args, named))
        torch.compile(fresh(target), backend=backend, dynamic=False)(*args, **named)
    rows = [row for collector in collectors for row in collector.rows]
    return write_page(Path(path), collectors, rows, title=_title(target), recipe=str(parsed.recipe))


def _names_of_weights(root: nn.Module | None) -> dict[int, str]:
    if root is None:
        return {}
    tensors = (*root.named_buffers(), *root.named_parameters())
    return {id(tensor): name for name, tensor in tensors}


def _names_of_arguments(
    target: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[int, str]:
    """What the model calls the tensors that it is given."""
    call = target.forward if isinstance(target, nn.Module) else target
    try:
        given = inspect.signature(call).bind(*inputs, **kwargs).arguments
    except (TypeError, ValueError):  # it will say so itself when it is called
        return {}
    return {id(value): name for name, value in given.items() if isinstance(value, Tensor)}


def _names(
    gm: fx.GraphModule, example_inputs: Sequence[Any], known: Mapping[int, str], root: Any
) -> Names:
    """The names of a Dynamo graph's inputs and modules: those of the root, where it is known."""
    holders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    inputs, modules = [], {}
    for node, value in zip(holders, example_inputs, strict=True):
        name = known.get(id(value)) or cleaned(internals.source_name(node)) or node.name
        inputs.append(name)
        if isinstance(value, nn.Parameter) or internals.is_static_input(node):
            modules[name] = name.rpartition(".")[0]
    paths = {name for name, _ in root.named_modules()} if root is not None else set()

    def path_of(node: fx.Node) -> str | None:
        path = module_path(node)
        return path and _without_prefix(path, paths)

    return Names(inputs, modules, path_of)


def _without_prefix(path: str, known: Collection[str]) -> str:
    """A path from the root, without what stands before it where the root is called from outside."""
    parts = path.split(".")
    ends = (".".join(parts[i:]) for i in range(len(parts) + 1))
    return next((end for end in ends if end in known), path)


def _title(target: Any) -> str:
    return (
        type(target).__name__ if isinstance(target, nn.Module) else getattr(target, "__name__", "")
    )
