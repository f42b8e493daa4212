"""Find out what the compiler does with a model: compile it without making code."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from .. import internals
from ..arguments import checked_callable
from ..backends import kernel_rows
from ..compile import compile_graph
from ..errors import own_errors
from ..observer import FinalGraphs, Observer
from ..options import parse_options
from ..passes import run_final_passes
from ..recipe import Gemm
from ..report import WEIGHTS, EdgeRow, KernelRow, Row, SavedRow
from ..untouched import fresh, left_as_it_was, without_data
from .explanation import Explanation
from .seen import edge_rows, saved_rows
from .timed import measure_step, with_gemm_times, with_kernel_times


def explain(
    model: Callable[..., Any],
    *inputs: Any,
    options: Mapping[str, Any] | None = None,
    measure: bool = False,
    **kwargs: Any,
) -> Explanation:
    """What ``torch.compile(model, backend="fp8", options=options)(*inputs)`` would run in FP8.

    One row per GEMM of each site, forward and backward: its name, sizes, formats and kernel, or
    the reason why it stays in high precision; then the matmuls that belong to no site. Besides, the
    fused kernels, what forward keeps for backward, and the FP8 operands with their scales, which
    are known after training, be ``model`` the compiled one or not.

    The model is traced and run once, in its own precision. Its parameters, buffers and gradients,
    its scaling state and the random number generators are left as they were. Where parameters or
    inputs are meta or fake tensors nothing is computed: they are traced as if they were on a GPU,
    or on a CPU if there is none.

    ``measure``: also compile it, in its own precision and in FP8, and run some steps of either
    under a profiler, which needs a GPU; a step is a forward and, where there are gradients, a
    backward.

    Warns where PyTorch cannot trace the model at all, so that nothing is compiled.

    Raises OptionError and RecipeError for what is wrong with the options, and OptionError for
    ``measure`` without a GPU that has FP8.
    """
    parsed = replace(parse_options(options), strict=False)
    graphs: list[_Graph] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(_Graph(example_inputs))
        compile_graph(
            gm,
            example_inputs,
            parsed,
            inner_compile=_no_code,
            observer=graphs[-1],
            root=target if isinstance(target, nn.Module) else None,
        )
        return gm.forward

    target = checked_callable(model, "explain")
    times = measure_step(target, inputs, kwargs, options) if measure else None
    with (
        own_errors(),
        left_as_it_was(target),
        without_data(target, (inputs, kwargs)) as (args, named),
    ):
        torch.compile(fresh(target), backend=backend, dynamic=False)(*args, **named)
    if not graphs:
        name = getattr(target, "__name__", type(target).__name__)
        warnings.warn(
            f"PyTorch traced no graph of {name}, which runs as it is with any backend: something "
            "that it cannot trace, such as an nn.LSTM or a module of torch.jit, keeps it from all "
            "that is called around; TORCH_LOGS=graph_breaks says what. Call that in a function "
            "under torch.compiler.disable, or compile the layers beside it one by one",
            stacklevel=2,
        )
    explanation = Explanation(
        tuple(_by_site([row for graph in graphs for row in graph.rows])),
        parsed.recipe,
        tuple(row for graph in graphs for row in graph.kernels),
        _by_format([row for graph in graphs for row in graph.saved]),
        tuple(row for graph in graphs for row in graph.edges),
    )
    if times is None:
        return explanation
    return replace(
        explanation,
        rows=with_gemm_times(explanation.rows, times),
        kernels=with_kernel_times(explanation.kernels, times),
        measured=times.measured,
    )


@dataclass
class _Graph(Observer):
    """What one graph of a model showed."""

    example_inputs: Sequence[Any]
    rows: list[Row] = field(default_factory=list)
    kernels: list[KernelRow] = field(default_factory=list)
    saved: list[SavedRow] = field(default_factory=list)
    edges: list[EdgeRow] = field(default_factory=list)

    def on_rows(self, rows: Sequence[Row]) -> None:
        self.rows += rows

    def on_final(self, final: FinalGraphs) -> None:
        found = {WEIGHTS: final.weights, "forward": final.forward, "backward": final.backward}
        graphs = {direction: gm for direction, gm in found.items() if gm is not None}
        self.saved += saved_rows(final.forward, final.saved)
        self.edges += edge_rows(list(graphs.values()), final.sites, self.example_inputs)
        for direction, gm in graphs.items():
            gm = fx.GraphModule(gm, internals.copy_of(gm.graph))
            run_final_passes(gm, direction, fused=True)
            self.kernels += kernel_rows(gm, direction, final.predict_for)


def _by_format(rows: Sequence[SavedRow]) -> tuple[SavedRow, ...]:
    """One row per format over all graphs."""
    formats = dict.fromkeys(row.format for row in rows)
    return tuple(_sum([r for r in rows if r.format == name]) for name in formats)


def _sum(rows: Sequence[SavedRow]) -> SavedRow:
    known = [row.bytes for row in rows if isinstance(row.bytes, int)]
    total = sum(known) if len(known) == len(rows) else " + ".join(str(row.bytes) for row in rows)
    return SavedRow(rows[0].format, sum(row.tensors for row in rows), total)


def _by_site(rows: Sequence[Row]) -> list[Row]:
    """Sites in the order of their first GEMM, each with fprop, dgrad and wgrad in this order."""
    sites = {row.fqn: i for i, row in reversed(list(enumerate(rows)))}
    roles = {str(gemm): i for i, gemm in enumerate(Gemm)}
    return sorted(rows, key=lambda row: (sites[row.fqn], roles.get(row.gemm, len(roles))))


def _no_code(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
    """In place of Inductor's code generation: the graphs are only looked at."""
    return gm.forward
