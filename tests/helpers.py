"""How the tests trace, compile without code generation, and compare."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from functorch.compile import make_boxed_func
from torch import fx, nn
from torch._inductor.decomposition import select_decomp_table
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from fp8compile.compile import GraphCompiler, compile_graph
from fp8compile.internals import last_inputs
from fp8compile.ir import Site
from fp8compile.observer import Observer
from fp8compile.options import parse_options
from fp8compile.passes import StateNodes, drop_unused_outputs
from fp8compile.report import Row


def interpret(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
    """In place of Inductor's code generation: run the final graph node by node."""
    return make_boxed_func(gm.forward)


class Rows(Observer):
    """Keeps what the passes decide, of all graphs together."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def on_rows(self, rows: Sequence[Row]) -> None:
        self.rows += rows


def compile_interpreted(
    model: Callable[..., Any], options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Callable[..., Any]:
    """``torch.compile(model, backend="fp8")`` without Inductor's code: same graphs, much faster."""

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        parsed = parse_options(options)
        return compile_graph(gm, example_inputs, parsed, inner_compile=interpret)

    return torch.compile(model, backend=backend, **kwargs)


def trace(fn: Callable[..., Any], **inputs: torch.Tensor) -> fx.GraphModule:
    """The ATen graph of a function, with its inputs under their own names."""
    gm = make_fx(fn, tracing_mode="fake")(*inputs.values())
    for node, name in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
        node._rename(name)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def trace_final(fn: Callable[..., Any], **inputs: torch.Tensor | None) -> fx.GraphModule:
    """A function's graph as Inductor would compile it, before ``grow_regions``."""
    given = {name: value for name, value in inputs.items() if value is not None}

    def call(*values: torch.Tensor) -> Any:
        return fn(**{**inputs, **dict(zip(given, values, strict=True))})

    decompositions = select_decomp_table()
    gm = make_fx(call, tracing_mode="fake", decomposition_table=decompositions)(*given.values())
    gm = make_fx(functionalize(gm), tracing_mode="fake")(*given.values())
    for node, name in zip(gm.graph.find_nodes(op="placeholder"), given, strict=True):
        node._rename(name)
    gm.graph.eliminate_dead_code()
    drop_unused_outputs(gm)
    gm.recompile()
    return gm


@dataclass
class Joint:
    """A joint graph as the passes get it."""

    gm: fx.GraphModule
    sites: list[Site]
    state: StateNodes | None


def trace_joint(
    model: nn.Module, *inputs: Any, options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Joint:
    """The joint graph of a model, before the passes, with parameters under their own names."""
    captured: list[Joint] = []

    def capture(self: GraphCompiler, gm: fx.GraphModule) -> None:
        gm = copy.deepcopy(gm)
        inputs = {"delayed": 3, "static": 1}.get(parse_options(options).recipe.scaling.value)
        state = StateNodes(*last_inputs(gm, inputs)) if inputs and self.sites else None
        for name, node in vars(state).items() if state else ():
            if node is not None:
                node._rename(name)
        _name_parameters(gm, model)
        captured.append(Joint(gm, self.sites, state))

    torch._dynamo.reset()
    with mock.patch.object(GraphCompiler, "joint", capture):
        compile_interpreted(model, options, **kwargs)(*inputs)
    assert len(captured) == 1, f"{len(captured)} graphs"
    return captured[0]


def _name_parameters(gm: fx.GraphModule, model: nn.Module) -> None:
    """Call the graph inputs by what they are: parameters first, as AOTAutograd orders them."""
    shapes = {str(tuple(p.shape)): n.replace(".", "_") for n, p in model.named_parameters()}
    for node in gm.graph.find_nodes(op="placeholder"):
        if not isinstance(node.meta["val"], torch.Tensor):
            continue  # a symbolic size
        if node.name.startswith("primals_"):
            node._rename(shapes.get(str(tuple(node.meta["val"].shape)), "x"))
        elif node.name.startswith("tangents_"):
            node._rename(node.name)
