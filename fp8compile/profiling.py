"""Measure what a model's edges hold, and what each group of sites loses in FP8.

The compiled graphs are run node by node, with every cast left out: values stay in high precision
until a GEMM takes them. A GEMM looks at its operands, casts them to either format to see what is
lost, and multiplies them in FP8 only if that is the experiment.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import internals
from .arguments import checked_callable, uncompiled
from .compile import compile_graph
from .compiled_graph import CompiledGraph
from .edge_records import EdgeRecord
from .errors import OptionError, own_errors
from .ir import (
    CASTS,
    QUANTIZE_BLOCKS,
    SCALED_MMS,
    Edge,
    GemmInfo,
    Site,
    args_of,
    gemm_info,
    takes_slot,
)
from .observer import Observer
from .options import HIGH_PRECISION, RECIPE, Options, parse_options
from .profiles import Group, Profile
from .progress import progress
from .recipe import Gemm, Granularity, Operand, Recipe, Scaling
from .report import Row
from .scaling import ScalingState
from .untouched import Step, check_has_data, checked_batches, fresh, left_as_it_was, plain_step

# Given the graph's number, a GEMM, one of its edges, the recipe, the operand as ``[rows, K]``, and
# its static scale, ``f32[]``, which for gradients follows from those that enter the graph, or None.
Look = Callable[[int, GemmInfo, Edge, Recipe, Tensor, Tensor | None], None]
# Given the state that a cast has its scale from, the slot, and the value that it casts.
LookAtCast = Callable[[ScalingState, int, Tensor], None]


def profile(
    model: Callable[..., Any],
    batches: Iterable[Any],
    *,
    step: Step | None = None,
    options: Mapping[str, Any] | None = None,
    sensitivity: bool = True,
) -> Profile:
    """See what a model's GEMMs would lose in FP8; for ``formats="auto"`` and ``error_budget_db``.

    Every batch is run once in the model's own precision, which shows what the edges hold. With
    ``sensitivity``, the first batch is run once more for each group of sites that take one input,
    with only that group in FP8, which shows what it costs outputs and gradients.

    ``batches``: what ``model`` is called with: a tensor, a tuple of arguments or a dict of keyword
    arguments. ``step(call, batch)``: how to use a batch, if not like that: it calls ``call`` in
    place of the model and returns the loss. Without a scalar loss, the result of ``step``, there is
    no backward, and nothing is known of gradients. A model in eval mode without a ``step`` is run
    without gradients, as are all under ``torch.no_grad()``: the profile is then for inference, of
    which only outputs count, and in which weights are cast once. ``options``: those of the compile
    that the profile is for; its recipe, ``overrides``, ``skip`` and ``logits`` count.

    Parameters, gradients, buffers, scaling state and random number generators are left as they
    were. Raises OptionError for wrong options and a model without data, as on meta, and where there
    is no batch or nothing to profile.
    """
    chosen = parse_options(options)
    runs = _Runs(checked_callable(model, "profile"), step or plain_step, chosen)
    given = list(checked_batches(batches))
    if not given:
        raise OptionError("profile needs at least one batch")
    with own_errors(), left_as_it_was(runs.model), _gradients(runs.model, step):
        runs.observe(given)
        if not runs.records:
            raise OptionError("no GEMM of this model can run in FP8: there is nothing to profile")
        noise = runs.noise_of_each(given[0]) if sensitivity else {}
    return runs.result(noise)


def watch(
    model: Callable[..., Any], batch: Any, look: Look, *, step: Step | None, options: Options
) -> None:
    """Run a batch in the model's own precision and let ``look`` see the operands of its FP8 GEMMs.

    ``batch`` and ``step`` are as in ``profile``, and as much is left as it was, but that a model
    with static scales has the state that the compiled one would have given it.
    """
    runs = _Runs(uncompiled(model), step or plain_step, options, look)
    with own_errors(), left_as_it_was(runs.model):
        runs.observe([batch])


def look_at_casts(
    model: nn.Module,
    batches: Iterable[Any],
    look: LookAtCast,
    *,
    step: Step | None,
    options: Options,
) -> None:
    """Run batches in the model's own precision, without gradients, and let ``look`` see what every
    cast takes whose scale is kept in a state.

    ``batches`` and ``step`` are as in ``profile``, and as much is left as it was, but that the
    model has the states that the same calls of the compiled model would have given it.
    """
    runs = _Runs(uncompiled(model), step or plain_step, options, look_at_cast=look)
    with own_errors(), left_as_it_was(runs.model), torch.no_grad():
        for batch in progress(batches, "calibrating"):
            runs.run(batch)


def _gradients(model: Any, step: Step | None) -> AbstractContextManager[Any]:
    serves = step is None and isinstance(model, nn.Module) and not model.training
    return torch.set_grad_enabled(torch.is_grad_enabled() and not serves)


@dataclass
class _Record:
    """What is collected about a group."""

    sites: dict[str, None] = field(default_factory=dict)  # in order
    edges: dict[Operand, EdgeRecord] = field(default_factory=dict)


class _Runs(Observer):
    """A model, compiled for looking at it."""

    def __init__(
        self,
        model: Callable[..., Any],
        step: Step,
        options: Options,
        look: Look | None = None,
        look_at_cast: LookAtCast | None = None,
    ) -> None:
        check_has_data(model)
        self.model, self.step, self.options = model, step, options
        self.look = look  # in place of making records
        self.look_at_cast = look_at_cast
        self.state: ScalingState | None = None  # of the graph that runs
        # A group goes by the name of its first site: other sizes may be another graph.
        self.records: dict[str, _Record] = defaultdict(_Record)
        self.names: dict[tuple[int, int], str] = {}  # by graph and leader
        self.rows: list[Sequence[Row]] = []  # of each graph
        self.sites: dict[str, None] = {}  # of all graphs, in order
        self.in_fp8: str | None = None
        self.observing = False
        self._graphs = itertools.count()
        self._outputs: list[Tensor] = []
        torch_model = torch.compile(fresh(model), backend=self._compile)

        def call(*args: Any, **kwargs: Any) -> Any:
            outputs = torch_model(*args, **kwargs)
            self._outputs += _floats(outputs)
            return outputs

        self.call = call

    def _compile(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        number = next(self._graphs)

        def interpret(gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
            return internals.boxed(_WithoutCasts(gm, number, self).run)

        root = self.model if isinstance(self.model, nn.Module) else None
        run = compile_graph(
            gm,
            example_inputs,
            self._options(),
            inner_compile=interpret,
            observer=self,
            root=root,
            weights_once=False,  # the casts are what is looked at
        )

        def call(*args: Any) -> Any:
            self.state = run.state_of(args) if isinstance(run, CompiledGraph) else None
            return run(*args)

        return call

    def _options(self) -> Options:
        if self.look_at_cast is not None:
            return _all_in_fp8(self.options)
        return _without_history(self.options, keep_static=self.look is not None)

    def on_sites(self, sites: Sequence[Site]) -> None:
        self.sites |= dict.fromkeys(site.fqn for site in sites)

    def on_rows(self, rows: Sequence[Row]) -> None:
        self.rows.append(rows)

    def recipe_of(self, fqn: str) -> Recipe:
        return self.options.own_recipe(fqn) or self.options.recipe

    def cast(self, slot: int, x: Tensor) -> None:
        if self.look_at_cast is not None and self.state is not None:
            self.look_at_cast(self.state, slot, x.detach())

    def observe(self, batches: Sequence[Any]) -> None:
        self.observing = True
        for batch in progress(batches, "observing batches"):
            self.run(batch)
        self.observing = False

    def noise_of_each(self, batch: Any) -> dict[str, tuple[float, float | None]]:
        """What outputs and gradients lose with only one group in FP8."""
        outputs, gradients = self.run(batch)
        noise: dict[str, tuple[float, float | None]] = {}
        for key in progress(list(self.records), "casting one group at a time"):
            self.in_fp8 = key
            seen, grads = self.run(batch)
            lost = [_noise(a, b) for a, b in zip(gradients, grads, strict=True)]
            known = [each for each in lost if each is not None]
            total = _noise(_flat(outputs), _flat(seen)) or 0.0
            noise[key] = total, sum(known) / len(known) if known else None
        self.in_fp8 = None
        return noise

    def run(self, batch: Any) -> tuple[list[Tensor], list[Tensor]]:
        """One step: the model's outputs and the gradients of its parameters, if there is a loss."""
        parameters = list(self.model.parameters()) if isinstance(self.model, nn.Module) else []
        for parameter in parameters:
            parameter.grad = None
        self._outputs = []
        torch.manual_seed(0)  # the same dropout in every run
        loss = self.step(self.call, batch)
        if isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad:
            loss.backward()
        outputs = [output.detach() for output in self._outputs]
        return outputs, [p.grad for p in parameters if p.grad is not None]

    def result(self, noise: Mapping[str, tuple[float, float | None]]) -> Profile:
        groups = []
        for key, record in self.records.items():
            output, gradient = noise.get(key, (None, None))
            edges = {str(operand): edge.seen() for operand, edge in record.edges.items()}
            sites = tuple(record.sites)
            groups.append(Group(sites, edges, output, gradient, self._saved_us(sites)))
        profiled = {site for group in groups for site in group.sites}
        rows = list(itertools.chain(*self.rows))
        others = [site for site in self.sites if site not in profiled]
        device = next((row.predicted_for for row in rows if row.predicted_for), "")
        return Profile(tuple(groups), tuple(others), device)

    def _saved_us(self, sites: Sequence[str]) -> float | None:
        """What FP8 saves in the first graph that has these sites."""
        for rows in self.rows:
            times = [(r.high_us, r.fp8_us) for r in rows if r.sites and r.sites[0] in sites]
            saved = [high - fp8 for high, fp8 in times if high is not None and fp8 is not None]
            if saved:
                return sum(saved)
        return None


class _WithoutCasts(fx.Interpreter):
    """Runs a graph with its values in high precision up to the GEMMs that take them."""

    def __init__(self, gm: fx.GraphModule, number: int, runs: _Runs) -> None:
        super().__init__(gm)
        self._number, self._runs = number, runs
        self._scales: dict[Any, Tensor] = {}  # of the casts that do not find their own

    def run_node(self, n: fx.Node) -> Any:
        if n.target not in (*CASTS, *SCALED_MMS):
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        if takes_slot(n):
            self._runs.cast(args[2], args[0])
            self._scales[n] = args[1][args[2]]
        if n.target in CASTS:  # what fold_scales has made of a scale_inv is then a factor
            one = args[0].new_ones(1, dtype=torch.float32)
            return args[0], args[0].t(), *[one] * (len(CASTS[n.target]) - 2)
        info = gemm_info(n)
        assert info is not None
        return self._multiply(info, n, args)

    def _multiply(self, info: GemmInfo, n: fx.Node, args: Sequence[Any]) -> Tensor:
        a, b, a_factor, b_factor, bias, dtype, *blocks_and_fast = args
        leader = info.site.leader_of(Operand.GRAD_OUTPUT)
        key = self._runs.names.setdefault((self._number, leader), info.site.fqn)
        recipe = self._runs.recipe_of(info.site.fqn)
        if self._runs.observing:
            self._observe(key, info, recipe, n, a, b)
        if self._runs.in_fp8 == key:
            a, a_scale_inv = _quantized(a, info.left, recipe)
            b, b_scale_inv = _quantized(b, info.right, recipe)
            scales = a_scale_inv * a_factor, b_scale_inv * b_factor
            target: Any = n.target
            return target(a, b, *scales, bias, dtype, *blocks_and_fast)
        if bias is not None:
            return torch.addmm(bias.to(a.dtype), a, b.t()).to(dtype)
        factor = float(a_factor * b_factor)
        return (a @ b.t() if factor == 1 else (a @ b.t()) * factor).to(dtype)

    def _observe(
        self, key: str, info: GemmInfo, recipe: Recipe, n: fx.Node, a: Tensor, b: Tensor
    ) -> None:
        record = self._runs.records[key]
        record.sites |= dict.fromkeys(site.fqn for site in info.sites)
        for edge, value, copy in zip((info.left, info.right), (a, b), args_of(n), strict=False):
            # Once as the recipe's own GEMM takes it, and gradients in both GEMMs that do.
            if info.gemm is not Gemm.FPROP and edge.operand is not Operand.GRAD_OUTPUT:
                continue
            if self._runs.look is not None:
                scale = self._scales.get(args_of(copy)[0])
                self._runs.look(self._number, info, edge, recipe, value.detach(), scale)
            else:
                seen = record.edges.setdefault(edge.operand, EdgeRecord(edge, recipe))
                seen.add(value.detach())


def _quantized(x: Tensor, edge: Edge, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """The row-major copy and its scale_inv, as a cast makes them that finds its own scale."""
    assert edge.format is not None
    if edge.granularity is Granularity.TENSOR:
        q, _, scale_inv, _, _ = torch.ops.fp8.quantize(x, None, 0, edge.format.dtype, True, False)
        return q, scale_inv
    how = list(edge.granularity.block), recipe.power_of_two, edge.format.dtype
    q, _, scale_inv, _ = QUANTIZE_BLOCKS(x, *how, True, False)
    return q, scale_inv


# --- small things -------------------------------------------------------------------------------


def _all_in_fp8(options: Options) -> Options:
    """The same choices, with every legal GEMM in FP8 and every scale kept that may be."""
    return replace(
        options,
        strict=False,
        dump=None,
        kernels="reference",
        inductor={},
        decline_slower=False,
        scaling=RECIPE,
        attention=HIGH_PRECISION,
        own_passes=(),
    )


def _without_history(options: Options, *, keep_static: bool) -> Options:
    """The same choices, with every legal GEMM in FP8 and no scaling state, or only a static one."""

    def current(recipe: Recipe) -> Recipe:
        keep = keep_static and recipe.scaling is Scaling.STATIC
        return recipe if keep else replace(recipe, scaling=Scaling.CURRENT)

    return Options(
        recipe=current(options.recipe),
        overrides=tuple((glob, current(recipe)) for glob, recipe in options.overrides),
        skip=options.skip,
        kernels="reference",
        decline_slower=False,
        logits=options.logits,
    )


def _floats(outputs: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(outputs)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat(
        [tensor.flatten().float() for tensor in tensors] or [torch.zeros(0, dtype=torch.float32)]
    )


def _noise(reference: Tensor, other: Tensor) -> float | None:
    """The power of the difference over that of the reference; None if that is zero."""
    power = float(reference.double().square().sum())
    return float((other - reference).double().square().sum()) / power if power else None
