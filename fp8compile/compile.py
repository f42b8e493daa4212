"""The backend: ``torch.compile(model, backend="fp8", options={...})``.

The way of a model, top to bottom: ``fp8`` tags the Dynamo graph's sites and appends the scaling
state as inputs; ``GraphCompiler.joint`` runs the passes on the joint graph; PyTorch's partitioner
splits it; ``GraphCompiler.lowered`` puts in the kernels; Inductor compiles the rest; the returned
``CompiledGraph`` looks up the scaling state of the weights it is called with.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import internals
from .backends import (
    TRITON,
    check_attention,
    device_constants,
    kernel_name,
    library_versions,
    lower,
    resolve_kernels,
    sums_in_gemms,
)
from .compiled_graph import CompiledGraph, is_parameter
from .cost import DEVICES, Device
from .dump import Dump
from .errors import OptionError, PassError, StrictError
from .ir import SLOTS_PER_SITE, Site, args_of, format_graph
from .modules import SiteNames, calling_module, calling_shards
from .observer import FinalGraphs, Observer
from .options import (
    AUTO,
    FALLBACK,
    FP8,
    FP8_BOTH,
    HIGH_PRECISION,
    RECIPE,
    Options,
    parse_options,
)
from .passes import (
    STATIC_SCALES,
    StateNodes,
    joint_passes,
    keep_logits,
    naming_errors,
    refine_attention_gradients,
    run_final_passes,
    run_passes,
    tag_sites,
    with_own_passes,
)
from .passes.cast_attention import attention_calls
from .passes.cast_attention_backward import attention_backwards
from .passes.choose_precision import KEPT, SKIPPED, SLOWER
from .passes.find_gemms import NO_FP8_FORM, unsited_matmuls
from .passes.keep_logits import LOGITS
from .profiles import BUDGET
from .quantized_weights import WEIGHTS_GRAPH, QuantizedWeights, split_weights
from .read_only import with_ordinary
from .recipe import Recipe, Scaling
from .report import Row, gemm_rows, other_rows, text_of
from .scaling import rule_of
from .static import StaticScales

log = logging.getLogger(__name__)

STATE_INPUTS = ("fp8_scale", "fp8_amax_fwd", "fp8_amax_bwd")


def fp8(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph with its matmuls in FP8. See Options for what can be chosen.

    Raises OptionError and RecipeError for what is wrong with the options, PassError if a pass
    fails, StrictError under ``strict`` for what stays in high precision.
    """
    return compile_graph(gm, example_inputs, parse_options(options, mode))


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    *,
    inner_compile: Callable[..., Any] | None = None,
    observer: Observer | None = None,
    root: nn.Module | None = None,
    weights_once: bool = True,
) -> Callable[..., Any]:
    """``fp8`` with parsed options, and what ``explain``, ``view`` and the tests need besides.

    ``inner_compile`` replaces Inductor's code generation; ``observer`` is told what happens;
    ``root`` is the model that names come from, if it is not to be looked for; ``weights_once``:
    whether a graph without gradients keeps its cast weights, which all graphs of a model share, and
    takes frozen ones as they are; or has a cast in front of every operand.
    """
    gm = internals.clone_dynamo_graph(gm)
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    tensors = dict(zip(inputs, example_inputs, strict=True))
    root = root or _root(example_inputs)
    tag_sites(gm, name_of=SiteNames(root, tensors), recipe_of=options.own_recipe)
    if options.logits == HIGH_PRECISION:
        keep_logits(gm)
    if options.attention == FP8_BOTH and options.formats == RECIPE:
        refine_attention_gradients(gm, recipe=options.recipe)
    _keep(gm, options)
    sites: list[Site] = gm.meta["fp8_sites"]
    if observer is not None:
        observer.on_sites(sites)
    _check_globs(options, sites, root)
    device = _device(sites, example_inputs)
    kernels = resolve_kernels(options.kernels, device)
    if options.attention != HIGH_PRECISION:
        check_attention(kernels)
    predict_for = _predict_for(options, kernels, device, report=observer is not None)
    inference = not torch.is_grad_enabled() or not any(map(_requires_grad, example_inputs))
    compiler = GraphCompiler(
        options,
        sites,
        kernels,
        predict_for,
        inference,
        observer=observer or Observer(),
        weights_once=weights_once,
    )
    recipes = [site.recipe or options.recipe for site in sites]
    rule = rule_of(recipes)
    static = rule is not None and rule.scaling is Scaling.STATIC
    compiler.measured = _measured(inputs, example_inputs, sites) if static else ()
    if rule is not None:
        _check_not_sharded(rule)
    state_examples: list[Tensor] = []
    if rule is not None:
        names = STATE_INPUTS[:1] if static else STATE_INPUTS
        slots = SLOTS_PER_SITE * len(sites)
        state_examples = [torch.zeros(slots, dtype=torch.float32, device=device) for _ in names]
        for name, example in zip(names, state_examples, strict=True):
            internals.add_input(gm, name, example)
    start = time.perf_counter()
    run = internals.compile_with_inductor(
        gm,
        [*example_inputs, *state_examples],
        joint=compiler.joint,
        lowered=compiler.lowered,
        key=compiler.cache_key(),
        patches=options.inductor,
        use_caches=_may_be_cached(options, inner_compile),
        cache_code_only=compiler.inference,
        inner_compile=inner_compile,
        around=compiler.quantizing_weights_once,
        on_split=compiler.split if observer is not None else None,
    )
    compiler.finish(time.perf_counter() - start)
    run = with_ordinary(run, example_inputs)
    if rule is None:
        return run
    return CompiledGraph(run, sites, recipes, device, example_inputs, compiler.static)


@dataclass
class GraphCompiler:
    """What happens to one Dynamo graph between Inductor's hooks."""

    options: Options
    sites: list[Site]
    kernels: str
    predict_for: Device | None = None
    inference: bool = False
    measured: Sequence[bool] = ()  # per input: whether static scales are found from its statistics
    static: StaticScales | None = None
    observer: Observer = field(default_factory=Observer)
    rows: list[Row] = field(default_factory=list)
    fell_back: bool = False
    weights_once: bool = True

    def __post_init__(self) -> None:
        self.dump = Dump(self.options.dump) if self.options.dump else None

    def cache_key(self) -> str:
        """Everything the compiled code depends on, besides the graph itself."""
        skipped = tuple(self.options.skips(site.fqn) for site in self.sites)
        parts = (self.options.cache_key(), self.sites, skipped, self.kernels, self.predict_for)
        return f"{internals.source_hash()}{parts}{library_versions(self.kernels)}"

    def joint(self, gm: fx.GraphModule) -> None:
        """Rewrite the joint graph, or the only graph when there is no backward."""
        with self._undoing(gm, "stays in its own precision"):
            self._rewrite(gm)

    def _rewrite(self, gm: fx.GraphModule) -> None:
        state = statistics_of = None
        rule = rule_of([site.recipe or self.options.recipe for site in self.sites])
        if rule is not None and rule.scaling is Scaling.STATIC:
            *inputs, scale = internals.inputs_of(gm)
            state = StateNodes(scale)
            statistics_of = self._measured_among(inputs)
        elif rule is not None:
            state = StateNodes(*internals.last_inputs(gm, len(STATE_INPUTS)))
        for node in (state.scale, state.amax_bwd) if state else ():
            if node is not None:
                internals.mutated_between_forward_and_backward(node)
        training = any(internals.is_tangent(node) for node in gm.graph.nodes)
        passes = joint_passes(
            recipe=self.options.recipe,
            sites=self.sites,
            skips=self.options.skips,
            state=state,
            training=training,
            device=self.predict_for,
            decline_slower=_declines(self.options, self.kernels),
            choose_scales=self.options.scaling == AUTO,
            store_in_fp8=self.options.save_activations == FP8,
            statistics_of=statistics_of,
            take_frozen=self.weights_once,
            attention_in_fp8=self.options.attention != HIGH_PRECISION,
            attention_backward_in_fp8=self.options.attention == FP8_BOTH,
        )
        passes = with_own_passes(passes, self.options.own_passes)
        self._show("joint", gm)
        internals.trace_artifact("fp8_joint_before_passes", lambda: format_graph(gm))
        with self._dumping_failures(gm):
            run_passes(gm, passes, after_each=self._show)
        internals.trace_artifact("fp8_joint_after_passes", lambda: format_graph(gm))
        self.static = gm.meta.pop(STATIC_SCALES, None)
        self._report(gm)

    def split(self, forward: fx.GraphModule, backward: fx.GraphModule, outputs: int) -> None:
        """Tell of the final graphs; ``outputs``: how many are not kept for backward."""
        saved = args_of(forward.graph.output_node())[0][outputs:]
        sites = tuple(self.sites)
        self.observer.on_final(FinalGraphs(forward, sites, self.predict_for, backward, saved))

    def _measured_among(self, inputs: Sequence[fx.Node]) -> dict[fx.Node, int] | None:
        """The inputs whose statistics static scales are found from, with their positions."""
        if len(inputs) != len(self.measured):  # some alias each other, and are passed as one
            log.warning("no static scales: the graph's inputs are not those that it is called with")
            return None
        return {node: i for i, node in enumerate(inputs) if self.measured[i]}

    def _show(self, name: str, gm: fx.GraphModule) -> None:
        if self.dump is not None:
            self.dump.graph(name, gm)
        self.observer.on_graph(name, gm)

    @contextlib.contextmanager
    def _dumping_failures(self, gm: fx.GraphModule) -> Iterator[None]:
        """Dump the graph that a pass leaves behind when it fails, if it can be written as text."""
        try:
            yield
        except PassError as error:
            with contextlib.suppress(Exception):
                if self.dump is not None:
                    self.dump.graph(f"{error.pass_name}.failed", gm)
            raise

    def lowered(self, gm: fx.GraphModule) -> None:
        """Put the kernels into a forward, backward or inference graph.

        What is only looked at has its regions, wherever that is, and no kernels.
        """
        direction = "backward" if _is_backward_graph(gm) else "forward"
        if WEIGHTS_GRAPH in gm.meta:
            direction = "weights"
        sources: dict[str, str] = {}
        with self._undoing(gm, "runs the reference bodies of its FP8 operators"):
            fused = self.kernels == TRITON or self.observer.only_looks
            adds = None if self.observer.only_looks else sums_in_gemms(self.kernels)
            run_final_passes(gm, direction, fused=fused, adds=adds)
            self._show(direction, gm)
            if not self.observer.only_looks:
                with naming_errors(f"lowering ({direction})"):
                    sources = lower(gm, self.kernels)
        gm.recompile()
        log.debug("%s graph: %d fused kernels", direction, len(sources))
        internals.trace_artifact(f"fp8_{direction}_graph", lambda: format_graph(gm))
        if self.dump is not None and sources:
            self.dump.graph(f"{direction}.kernels", gm)
            for name, source in sources.items():
                self.dump.text(f"{name}.py", source)

    def quantizing_weights_once(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """Inductor's code generation, with the weights of an inference graph cast outside of it."""

        def compile_inner(gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
            if not kwargs.get("is_inference"):
                return inner(gm, inputs, **kwargs)
            static = kwargs.get("static_input_idxs", ())
            once = self.weights_once and not self.observer.only_looks
            split = split_weights(gm, static) if once else None
            weights_graph = None if split is None else split.weights
            sites = tuple(self.sites)
            self.observer.on_final(FinalGraphs(gm, sites, self.predict_for, weights=weights_graph))
            if split is None:
                return inner(gm, inputs, **kwargs)
            taken = [inputs[i] for i in split.positions]
            weights = internals.compile_aside(inner, split.weights, taken, kwargs)
            more = range(len(inputs), len(inputs) + len(split.outputs))
            kwargs["static_input_idxs"] = [*static, *more]
            main = inner(gm, [*inputs, *split.outputs], **kwargs)
            return QuantizedWeights(main, weights, split)

        return functools.wraps(inner)(compile_inner)

    @contextlib.contextmanager
    def _undoing(self, gm: fx.GraphModule, then: str) -> Iterator[None]:
        """Under ``on_error="fallback"`` a pass that fails leaves the graph as it was."""
        if self.options.on_error != FALLBACK:
            yield
            return
        before = internals.copy_of(gm.graph)
        try:
            yield
        except PassError as error:
            gm.graph, self.fell_back = before, True
            warnings.warn(f"{error}\non_error='fallback': the graph {then}", stacklevel=2)

    def _report(self, gm: fx.GraphModule) -> None:
        rows = gemm_rows(gm, partial(kernel_name, kernels=self.kernels))
        self.rows = rows
        attention, backwards = attention_calls(gm), attention_backwards(gm)
        others = other_rows(unsited_matmuls(gm) + attention + backwards)
        internals.trace_artifact("fp8_gemms", lambda: text_of(rows + others))
        left_out = [row for row in rows + others if row.reason and not _by_choice(row)]
        left_out = [row for row in left_out if row.reason not in NO_FP8_FORM]
        if self.options.strict and left_out:
            lines = "\n  ".join(f"{r.fqn} {r.gemm}: {r.reason}" for r in left_out)
            raise StrictError(f"strict=True, but these stay in high precision:\n  {lines}")
        for what, calls in (("attention", attention), ("attention's backward", backwards)):
            kept = sorted({why for _, why in calls if why and not why.startswith(SLOWER)})
            if kept:
                warnings.warn(f"{what} stays in high precision: {'; '.join(kept)}", stacklevel=2)
        if not any(row.is_fp8 for row in rows):
            _nothing_to_do(self.options, rows + others)
        self.observer.on_rows(rows + others)

    def finish(self, seconds: float) -> None:
        """Say in one line what was compiled."""
        if not self.rows and not self.fell_back:  # Inductor had it all in its cache
            log.info("%d sites, compiled before, %.1f s", len(self.sites), seconds)
            return
        log.info(
            "compiled %d sites: %d of %d GEMMs in FP8 (%s kernels), %.1f s",
            len(self.sites),
            sum(row.is_fp8 for row in self.rows),
            len(self.rows),
            self.kernels,
            seconds,
        )


def _may_be_cached(options: Options, inner_compile: Callable[..., Any] | None) -> bool:
    """Not with a dump or static scales, which need the passes to run; nor with passes of the
    user's, whose source nobody hashes; nor what is not Inductor's code; nor a graph that may have
    fallen back: from the cache it would do so without a word.
    """
    static = any(recipe.scaling is Scaling.STATIC for recipe in options.recipes)
    passes_run = options.dump is not None or static or bool(options.own_passes)
    return not passes_run and inner_compile is None and options.on_error != FALLBACK


def _measured(
    inputs: Sequence[fx.Node], example_inputs: Sequence[Any], sites: Sequence[Site]
) -> list[bool]:
    """Which inputs are parameters, buffers or weights, and so the same at every call."""
    weights = {site.weight for site in sites}
    return [
        isinstance(x, Tensor)
        and x.is_floating_point()
        and (is_parameter(x) or internals.is_static_input(node) or position in weights)
        for position, (node, x) in enumerate(zip(inputs, example_inputs, strict=True))
    ]


def _requires_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _root(example_inputs: Sequence[Any]) -> nn.Module | None:
    parameter = next((x for x in example_inputs if is_parameter(x)), None)
    return None if parameter is None else calling_module(parameter)


def _device(sites: Sequence[Site], example_inputs: Sequence[Any]) -> torch.device:
    weights = [example_inputs[site.weight] for site in sites if site.weight is not None]
    tensors = [x for x in (*weights, *example_inputs) if isinstance(x, Tensor)]
    return tensors[0].device if tensors else torch.device("cpu")


def _is_backward_graph(gm: fx.GraphModule) -> bool:
    return any(internals.is_tangent(node) for node in gm.graph.nodes)


def _keep(gm: fx.GraphModule, options: Options) -> None:
    """Give the sites that the error budget keeps in high precision the reason.

    Raises OptionError for a site that the profile does not know: of it nothing follows.
    """
    if options.profile is None or options.error_budget_db is None:
        return
    reasons = options.kept_by_budget()
    sites = gm.meta["fp8_sites"]
    for site in sites:
        if site.reason is None:
            options.profile.group_of(site.fqn)
    gm.meta["fp8_sites"] = [replace(s, reason=s.reason or reasons.get(s.fqn)) for s in sites]


def _check_globs(options: Options, sites: Sequence[Site], root: nn.Module | None) -> None:
    """Raise OptionError for a glob that matches no site, nor any module of the model.

    Without a model, as where a function is compiled, other graphs of it may hold the site: then
    there is only a warning, and none from a graph without sites. So may those of a model, but a
    glob for a module none of whose sites it matches is worth a warning.
    """
    found = sorted({site.fqn for site in sites})
    if root is None and not found:
        return
    modules = [] if root is None else [n for n, m in root.named_modules() if m._parameters]
    globs = [("overrides", glob) for glob, _ in options.overrides]
    if not callable(options.skip):
        globs += [("skip", glob) for glob in options.skip]
    for option, glob in globs:
        if any(fnmatchcase(name, glob) for name in found):
            continue
        meant = [name for name in modules if fnmatchcase(name, glob)]
        inside = [site for site in found if site.startswith(tuple(f"{name}." for name in meant))]
        if inside:
            warnings.warn(
                f"{option}={glob!r} matches a module, but none of its sites {inside}; "
                f"{f'{glob}.*'!r} does",
                stacklevel=2,
            )
        if meant:  # other graphs of the same model may hold the site
            continue
        if root is not None:
            raise OptionError(f"{option}={glob!r} matches nothing; the sites are {found}")
        warnings.warn(
            f"{option}={glob!r} matches nothing in this graph of a function, whose sites are "
            f"{found}; if it is for none of its other graphs either, it is misspelt",
            stacklevel=2,
        )


def _check_not_sharded(rule: Recipe) -> None:
    """Raise OptionError where a weight's scaling state could neither move nor be saved."""
    shards = calling_shards()
    if shards:
        raise OptionError(
            f"FSDP shards {shards}: its optimizer does not hold the weights that the graph "
            f"multiplies with, so the scales of the recipe {rule.name!r} could neither "
            "move nor be found again; choose options={'recipe': 'current'}"
        )


def _predict_for(
    options: Options, kernels: str, device: torch.device, report: bool
) -> Device | None:
    """The device that costs are predicted for, or None if nobody asks for them."""
    if isinstance(options.decline_slower, str):
        return DEVICES[options.decline_slower]
    asked = report or options.scaling == AUTO or _declines(options, kernels)
    return device_constants(device) if asked else None


def _declines(options: Options, kernels: str) -> bool:
    """Emulation is for looking at FP8's numerics: there, only a named device declines."""
    if isinstance(options.decline_slower, str):
        return True
    return options.decline_slower and kernels == TRITON


def _by_choice(row: Row) -> bool:
    """Whether a GEMM that could be FP8 is not: strict is about those that cannot."""
    return row.reason in (SKIPPED, KEPT, LOGITS) or row.reason.startswith((SLOWER, BUDGET))


def _nothing_to_do(options: Options, rows: Sequence[Row]) -> None:
    if not rows:  # such as what lies between two graph breaks: nothing there could be FP8
        log.info("this graph has no matmul")
        return
    why = "; ".join(sorted({f"{row.fqn}: {row.reason}" for row in rows}))
    message = f"no GEMM of this graph runs in FP8 ({why})"
    could = [row for row in rows if row.reason not in NO_FP8_FORM]
    ours = any(row.reason.startswith((SLOWER, LOGITS, BUDGET, SKIPPED)) for row in could)
    if ours and all(map(_by_choice, could)):  # as it should be
        log.info("%s", message)
        return
    if options.strict:
        raise StrictError(message)
    warnings.warn(message, stacklevel=2)
