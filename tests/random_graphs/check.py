"""Check a program: compiled in FP8, against eager with fake-quantized matmuls.

Two steps of training are run, the second with the scales that the first has left, and one of
inference. In each:

- Every pass leaves a valid graph, and finds nothing to do the second time.
- With sums made by GEMMs and regions grown, the forward and the backward graph compute the same,
  bit for bit.
- What comes out is of the same kind as in eager: shapes, dtypes, strides, what shares memory.
- Outputs, gradients, buffers and amax are those of ``FakeQuantized``, to ``CLOSE_DB`` or to what
  rounding errors make of them.
- Every GEMM of a site is in FP8 that has no reason not to be.
"""

from __future__ import annotations

import copy
import statistics
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any
from unittest import mock

import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn
from torch._dynamo import maybe_mark_dynamic
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.compile_fx import compile_fx
from torch.utils._python_dispatch import TorchDispatchMode

from fp8compile import Format, Operand, OptionError, Recipe, profile
from fp8compile import compile as compiler
from fp8compile.internals import is_tangent
from fp8compile.ir import QUANTIZE, Site, format_graph
from fp8compile.options import AUTO, FP8_BOTH, parse_options
from fp8compile.passes import add_in_gemms, grow_regions, split_regions
from fp8compile.passes.pipeline import Pass, pass_name
from fp8compile.recipe import Scaling
from fp8compile.scaling import rule_of
from tests.backends.common import Calls, assert_close
from tests.helpers import interpret
from tests.models import sqnr_db

from .fake_quantized import FakeQuantized, Plan, WithRoundingErrors
from .programs import Program

CLOSE_DB = 60.0  # float32 sums in another order stay far below
# An error may have this many times the power of what rounding errors make of a result in so many
# runs; or in so many more, for one FP8 number that comes to be another is as rare as it is large.
ROUNDING_MARGIN, RUNS = 4.0, (8, 64)
AMAX = "amax of the step"  # its name among the results
# A module, which its function hides; cuDNN's limits are those of large programs only.
_BACKWARD_OF_ATTENTION = sys.modules["fp8compile.passes.cast_attention_backward"]


@dataclass
class Tally:
    """What the checked programs held. ``eager_db``: how close results are to eager without FP8."""

    programs: int = 0
    gemms: Counter[str] = field(default_factory=Counter)
    results: Counter[str] = field(default_factory=Counter)
    eager_db: list[float] = field(default_factory=list)
    sums: int = 0
    regions: int = 0
    split: int = 0
    kernels: int = 0

    def __str__(self) -> str:
        median = f"{statistics.median(self.eager_db):.1f} dB" if self.eager_db else "none"
        return (
            f"{self.programs} graphs passed\n"
            f"GEMMs: {_listed(self.gemms)}\n"
            f"results, compared with fake quantization: {_listed(self.results)}\n"
            f"results that differ from eager without FP8: {len(self.eager_db)}, median {median}\n"
            f"{self.sums} sums made by GEMMs\n"
            f"{self.regions} regions interpreted, {self.split} of them in parts, "
            f"{self.kernels} run as Triton kernels"
        )


def _is_exact(gemm: fx.Node) -> bool:
    """Whether a sum is the same if the GEMM makes it: its output is not rounded."""
    return bool(gemm.meta["val"].dtype == torch.float32)


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts.most_common())


def check(program: Program, tally: Tally | None = None, *, kernels: bool = False) -> None:
    """Raise AssertionError if a program does not do in FP8 what it does in eager.

    ``kernels``: run the Triton kernel of every region, too.
    """
    tally = Tally() if tally is None else tally
    torch._dynamo.reset()
    model, eager = program.build(), program.build()
    anything_may_match = mock.patch.object(compiler, "_check_globs")
    with warnings.catch_warnings(), anything_may_match:
        warnings.simplefilter("ignore")
        options = {**program.options, **_formats(program)}
        training, inference = (_Compiled(model, program, options, tally, kernels) for _ in range(2))
        for step, compiled in enumerate((training, training, inference)):
            with torch.no_grad() if compiled is inference else nullcontext():
                _check_step(compiled, model, eager, step, tally)
    tally.programs += 1


def _formats(program: Program) -> dict[str, Any]:
    """The options that let formats be chosen, by a profile of the first step."""
    model = program.build()

    def loss_of(call: Callable[..., Any], batch: Sequence[Tensor]) -> Tensor:
        return random_loss(_outputs(call(*batch)))

    if program.formats != AUTO:
        return {}
    batches = [program.make_inputs(0)]
    try:
        found = profile(model, batches, step=loss_of, options=program.options, sensitivity=False)
    except OptionError as error:  # no GEMM in FP8
        assert "nothing to profile" in str(error)
        return {}
    return {"profile": found, "formats": AUTO}


def _check_step(
    compiled: _Compiled, model: nn.Module, eager: nn.Module, step: int, tally: Tally
) -> None:
    before, got = copy.deepcopy(eager), run(compiled, model, compiled.program.make_inputs(step))
    state, scale = compiled.state, compiled.scale
    runs = _Runs(compiled.program, step, before, compiled.plan, scale)
    want, counts = runs.fake_quantized(FakeQuantized, eager)
    if state is not None:
        got.tensors[AMAX] = torch.maximum(state.amax_fwd, state.amax_bwd)
        if state.rule.scaling is Scaling.DELAYED:
            state.update()
    else:
        del want.tensors[AMAX]
    tally.gemms.update(counts)
    tally.results.update(_assert_same_results(want, got, runs))
    _assert_same_kind(got, runs)
    pairs = [(value, got.tensors[name]) for name, value in runs.eager.tensors.items()]
    tally.eager_db += [sqnr_db(x, y) for x, y in pairs if not torch.equal(x, y)]


@dataclass
class _Runs:
    """Other runs of a step, in eager: ``model`` is as it was before, ``scale`` as it was used."""

    program: Program
    step: int
    model: nn.Module
    plan: Plan
    scale: Tensor | None
    _rounded: list[Results] = field(default_factory=list)

    def fake_quantized(
        self, kind: type[FakeQuantized], model: nn.Module
    ) -> tuple[Results, Counter[str]]:
        mode = kind(self.plan, self.scale)
        found = run(lambda *x: mode.call(model, x), model, self.program.make_inputs(self.step))
        found.tensors[AMAX] = mode.amax
        return found, mode.counts

    @cached_property
    def eager(self) -> Results:
        model = copy.deepcopy(self.model)
        return run(model, model, self.program.make_inputs(self.step))

    @cached_property
    def without_fp8(self) -> Results:
        """As torch.compile does it, with its decompositions, in high precision."""
        model = copy.deepcopy(self.model)
        compiled = torch.compile(model, backend=_without_fp8)
        return run(compiled, model, self.program.make_inputs(self.step))

    def with_rounding_errors(self, count: int) -> list[Results]:
        while len(self._rounded) < count:
            model = copy.deepcopy(self.model)
            self._rounded.append(self.fake_quantized(WithRoundingErrors, model)[0])
        return self._rounded[:count]

    def rounding(self, name: str, reference: Tensor, count: int) -> float:
        """The power of what rounding errors, and decompositions, make of a result in ``count``
        runs.
        """
        found = self.with_rounding_errors(count)
        largest = max(_power(run.tensors[name] - reference) for run in found)
        if name == AMAX:
            return largest
        return largest + _power(self.without_fp8.tensors[name] - self.eager.tensors[name])


def _without_fp8(gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
    return compile_fx(gm, examples, inner_compile=interpret)


# --- compiling ------------------------------------------------------------------------------------


class _Compiled:
    """A module compiled without Inductor's code, and checked on the way."""

    def __init__(
        self,
        model: nn.Module,
        program: Program,
        options: Mapping[str, Any],
        tally: Tally,
        kernels: bool,
    ) -> None:
        self.program = program
        self.options = parse_options({**options, "decline_slower": False})
        self.plan = Plan()  # that of the only graph; an empty one if there is nothing to compile
        self._graph: Any = None
        self._tally, self._kernels = tally, kernels
        self._static = _StaticScales()
        self._run = torch.compile(model, backend=self._backend, fullgraph=True)

    @property
    def state(self) -> Any:
        """The scaling state, if it has one."""
        return getattr(self._graph, "_state", None)

    @property
    def scale(self) -> Tensor | None:
        """The scales that the last call has used, until the state moves."""
        if self.state is None:
            return None
        is_static = self.state.rule.scaling is Scaling.STATIC
        return (
            self._static.in_slots(len(self.state.scale)) if is_static else self.state.scale.clone()
        )

    def __call__(self, *inputs: Any) -> Any:
        rewrite, run_passes = compiler.GraphCompiler.joint, compiler.run_passes

        def joint(graph: compiler.GraphCompiler, gm: fx.GraphModule) -> None:
            training = any(is_tangent(node) for node in gm.graph.nodes)
            rewrite(graph, gm)
            recipes = [self._recipe_of(site) for site in graph.sites]
            rule = rule_of(recipes)
            observes = training and rule is not None and rule.scaling is Scaling.DELAYED
            self.plan = Plan.of(gm, graph.sites, recipes, observes)

        def run_twice(gm: fx.GraphModule, passes: Sequence[Pass], **kwargs: Any) -> Any:
            return run_passes(gm, [_twice(run) for run in passes], **kwargs)

        for value in inputs if self.program.unknown_batch else ():
            if value.dim() > 1:
                maybe_mark_dynamic(value, 0)
        with (
            mock.patch.object(compiler.GraphCompiler, "joint", joint),
            mock.patch.object(compiler, "run_passes", run_twice),
            mock.patch.multiple(_BACKWARD_OF_ATTENTION, HEADS=range(129), TOKENS=1),
        ):
            try:
                return self._run(*inputs)
            except BackendCompilerFailed as error:
                raise error.inner_exception from error

    def _recipe_of(self, site: Site) -> Recipe:
        """By the options; but for gradients that attention's backward has in E4M3."""
        own = self.options.own_recipe(site.fqn)
        recipe = own or self.options.recipe
        if own is None and self.options.attention == FP8_BOTH and site.recipe is not None:
            formats = {**dict(recipe.formats), Operand.GRAD_OUTPUT: Format.E4M3}
            recipe = replace(recipe, name=site.recipe.name, formats=tuple(formats.items()))
            assert recipe == site.recipe
        return recipe

    def _backend(self, gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        final = self._final
        self._graph = compiler.compile_graph(gm, examples, self.options, inner_compile=final)
        return self._graph

    def _final(self, gm: fx.GraphModule, examples: Any, **_: Any) -> Callable[..., Any]:
        """In place of Inductor: the graph's code, checked against the graph with regions."""
        grown = fx.GraphModule(gm, fx.Graph())
        grown.graph.output(grown.graph.graph_copy(gm.graph, {}))
        self._tally.sums += _twice(partial(add_in_gemms, pays=_is_exact))(grown)
        self._tally.regions += _twice(grow_regions)(grown)
        self._tally.split += _twice(partial(split_regions, least_bytes=-sys.maxsize))(grown)
        assert not grown.graph.find_nodes(op="call_function", target=QUANTIZE)

        def run(*args: Any) -> Any:
            again = [_twin(arg) for arg in args]
            with self._static:
                out = gm.forward(*args)
            calls = Calls(grown)
            _assert_same_bits("a result of a graph with regions", out, calls.run(*again))
            _assert_same_bits("an argument of a graph with regions", args, again)
            # Kernels of unknown sizes are run in tests/backends/test_triton.py.
            known = self._kernels and not self.program.unknown_batch
            for case in calls.cases if known else ():
                assert_close(case.run(), case.oracle())
                self._tally.kernels += 1
            return out

        return make_boxed_func(run)


class _StaticScales(TorchDispatchMode):
    """Notes the scales that casts are given, by slot; gradients' are computed in the graph."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[int, Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        # One number is a scale that was found in forward: it has no slot.
        if func is QUANTIZE and args[1] is not None and args[1].numel() > 1:
            self._found[args[2]] = args[1][args[2]].clone()
        return func(*args, **(kwargs or {}))

    def in_slots(self, slots: int) -> Tensor:
        scale = torch.zeros(slots)
        for slot, found in self._found.items():
            scale[slot] = found
        return scale


def _twice(run: Pass) -> Pass:
    """A pass that is run a second time, and has to leave the graph alone then."""

    def twice(gm: fx.GraphModule) -> int:
        count = run(gm)
        gm.graph.lint()
        text = format_graph(gm)
        assert run(gm) == 0 and format_graph(gm) == text, f"{pass_name(run)} is not idempotent"
        return count

    twice.__name__ = pass_name(run)
    return twice


def _twin(value: Any) -> Any:
    """The same tensor in memory of its own."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(value)


def _assert_same_bits(what: str, wanted: Any, found: Any) -> None:
    for i, (want, got) in enumerate(zip(wanted, found, strict=True)):
        if not isinstance(want, Tensor):
            assert want == got, f"{what}: number {i}"
            continue
        kinds = [(x.shape, x.dtype, x.stride()) for x in (want, got)]
        assert kinds[0] == kinds[1], f"{what}: number {i} is {kinds[1]}, not {kinds[0]}"
        if want.numel() == 0:  # whose strides may be anything
            continue
        bits = [x.contiguous().flatten().view(torch.uint8) for x in (want, got)]
        assert torch.equal(*bits), f"{what}: number {i} differs"


# --- running --------------------------------------------------------------------------------------


@dataclass
class Results:
    """All that one call of a program, and its backward, leave behind.

    ``kinds``: what is there besides numbers.
    """

    tensors: dict[str, Tensor]
    kinds: list[Any]


def run(call: Callable[..., Any], model: nn.Module, inputs: Sequence[Tensor]) -> Results:
    """Call, go backward if anything needs a gradient, and collect."""
    leaves = dict(model.named_parameters()) | {f"input {i}": x for i, x in enumerate(inputs)}
    for leaf in leaves.values():
        leaf.grad = None
    outputs = _outputs(call(*inputs))
    loss = random_loss(outputs)
    if loss.requires_grad:
        loss.backward()
    found = {f"output {i}": value for i, value in enumerate(outputs)}
    found |= leaves | dict(model.named_buffers())
    kinds: list[Any] = [(tuple(x.shape), x.dtype, _strides(x), x.requires_grad) for x in outputs]
    kinds += _aliases(found)
    found |= {f"gradient of {n}": x.grad for n, x in leaves.items() if x.grad is not None}
    kinds += [(name, tuple(x.shape), x.dtype) for name, x in found.items()]
    return Results({n: x.detach().clone() for n, x in found.items()}, kinds)


def _outputs(out: Any) -> list[Tensor]:
    return list(out) if isinstance(out, tuple) else [out]


def random_loss(outputs: Sequence[Tensor]) -> Tensor:
    """A loss whose gradients are random numbers, but always the same."""
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros(())
    for value in outputs:
        direction = torch.randn(value.shape, generator=generator)
        if value.requires_grad:
            loss = loss + (value.float() * direction).sum()
    return loss


def _aliases(tensors: dict[str, Tensor]) -> list[tuple[str, str]]:
    """The pairs of tensors that share memory."""
    memory = {name: x.untyped_storage().data_ptr() for name, x in tensors.items()}
    names = [name for name in memory if memory[name]]
    pairs = ((a, b) for i, a in enumerate(names) for b in names[:i])
    return [(a, b) for a, b in pairs if memory[a] == memory[b]]


# --- comparing ------------------------------------------------------------------------------------


def _assert_same_results(want: Results, got: Results, runs: _Runs) -> Counter[str]:
    """Raise AssertionError for what differs by more than rounding; counts how close the rest is."""
    assert want.tensors.keys() == got.tensors.keys(), want.tensors.keys() ^ got.tensors.keys()
    counts: Counter[str] = Counter()
    for name, reference in want.tensors.items():
        value = got.tensors[name]
        assert (value.shape, value.dtype) == (reference.shape, reference.dtype), name
        if torch.equal(value, reference):
            counts["equal bit for bit"] += 1
        elif (found_db := sqnr_db(reference, value)) >= CLOSE_DB:
            counts[f"within {CLOSE_DB:.0f} dB"] += 1
        else:
            power = _power(value - reference) / ROUNDING_MARGIN
            is_rounding = any(power <= runs.rounding(name, reference, count) for count in RUNS)
            assert is_rounding, f"{name}: {found_db:.1f} dB, more than rounding errors make"
            counts["as close as rounding errors allow"] += 1
    return counts


def _strides(x: Tensor) -> tuple[int, ...]:
    """Those that matter: a dimension of one element is never stepped along."""
    return tuple(step for size, step in zip(x.shape, x.stride(), strict=True) if size != 1)


def _power(x: Tensor) -> float:
    return float(x.double().square().sum())


def _assert_same_kind(got: Results, runs: _Runs) -> None:
    """Shapes, strides, what shares memory: as in eager, or else as torch.compile has them."""
    if got.kinds != runs.eager.kinds:
        without = runs.without_fp8.kinds
        different = [kinds for kinds in zip(got.kinds, without, strict=True) if len({*kinds}) > 1]
        assert not different, f"found, and without FP8: {different}"
