"""Compare a model's step, compiled in FP8, with the same step in eager PyTorch.

A step is a forward, and a backward from a fixed random direction on the float outputs. Four are
run: eager float32 (the reference), eager float64, the compiled one, and one in simulated FP8
(``simulation.py``). For every output and every gradient:

- It is compared if it has *signal*: float32 and float64 must agree on it to ``SIGNAL_DB``. Some
  gradients are mathematically zero, such as that of a key's bias in softmax attention, or of a
  bias in front of a batch norm; what is computed there is rounding noise.
- The compiled step must agree with the simulated one, ``AGREEMENT_DB`` better than that one agrees
  with the reference: they round the same values, and differ only where a sum in another order
  makes one round to the next value. This tells bugs from noise. In most models the two agree to
  100 dB; where one such value spreads, as in T5, far less. How far it may spread is found by
  simulating again with weights that differ by one rounding: the compiled step need not agree
  better than such steps do. (Which value it is depends on the CPU, whose vectors sum in their own
  order: Swin agreed to 62 dB on one, to 18 on another.) It is asked for in float32 on a CPU: in
  bfloat16, what is fused is not rounded in between, and many values round to the next.
- An output must reach ``OUTPUT_DB`` against the reference, a gradient ``GRADIENT_DB``. Where an
  architecture loses more than that in FP8, what the simulation reaches is the gate; and where
  Inductor's code loses more in the model's own precision, what that reaches. (In bfloat16 the
  gradient of a convolution in front of a batch norm has 27.6 dB in eager, and 18.8 in Inductor.)
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fp8compile.compile import compile_graph
from fp8compile.options import parse_options
from fp8compile.recipe import Gemm
from fp8compile.report import Row
from tests.helpers import Rows, interpret
from tests.models import sqnr_db

from .models import DYNAMIC, build
from .simulation import SimulatedFp8

OUTPUT_DB, GRADIENT_DB = 25.0, 18.0
SIGNAL_DB = 60.0  # float32 reaches 100 to 140
AGREEMENT_DB = 3.0  # half of the noise, at most, may be the compiler's own
EXACT_DB = 60.0  # enough agreement where FP8 brings no noise
SLACK_DB = 1.5  # how far the noise may be from that of the simulation, where the two agree
LOOSE_SLACK_DB = 3.0  # and where they round other values

_NUDGES = 4  # with each of them, other values round to the next

_OTHERS = re.compile(r"\(other: (?P<count>\d+) x (?P<op>.+)\)")  # a row for several matmuls

Step = dict[str, Tensor]  # the outputs and gradients of a step, by name


@dataclass(frozen=True)
class Settings:
    """How models are compiled: where, in which dtype, with how many layers, and
    whether Inductor generates code."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    inductor: bool = False
    layers: int = 2

    @property
    def is_exact(self) -> bool:
        """Whether the compiled and the simulated step compute the same float32 operations."""
        return self.dtype is torch.float32 and self.device == "cpu"


@dataclass(frozen=True)
class Quality:
    """How good one tensor of the compiled step is, in dB.

    ``fp8``: compiled against the reference; ``simulated``: simulated FP8 against the reference;
    ``agreement``: compiled against simulated; ``signal``: the reference against float64; ``plain``:
    compiled by Inductor in the model's own precision, against the reference; ``stable``: simulated
    against simulated with weights that differ by one rounding, where that was asked.
    """

    name: str
    fp8: float
    simulated: float
    agreement: float
    signal: float
    plain: float = math.inf
    stable: float = math.inf

    @property
    def is_output(self) -> bool:
        return self.name.startswith("output")

    @property
    def has_signal(self) -> bool:
        return self.signal >= SIGNAL_DB

    def problem(self, exact: bool) -> str | None:
        """What is wrong with it, or None. ``exact``: it must agree with the simulation, too."""
        if not self.has_signal:
            return None
        slack = SLACK_DB if exact else LOOSE_SLACK_DB
        gate = min(OUTPUT_DB if self.is_output else GRADIENT_DB, self.simulated - slack)
        gate = min(gate, self.plain - slack)
        if not self.fp8 >= gate:
            return f"{self.name}: {self.fp8:.1f} dB, the gate is {gate:.1f}"
        gate = min(EXACT_DB, self.simulated + AGREEMENT_DB, self.stable - SLACK_DB)
        if exact and not self.agreement >= gate:
            agrees = f"agrees with simulated FP8 to {self.agreement:.1f} dB"
            return f"{self.name}: {agrees}, the gate is {gate:.1f}"
        return None


@dataclass(frozen=True)
class Report:
    """What became of a model."""

    name: str
    graphs: int
    rows: tuple[Row, ...]
    qualities: tuple[Quality, ...]
    exact: bool

    @property
    def gemms(self) -> list[Row]:
        return [row for row in self.rows if row.k != ""]

    @property
    def in_fp8(self) -> int:
        return sum(row.is_fp8 for row in self.gemms)

    @property
    def left_out(self) -> Counter[str]:
        """Why GEMMs, and matmuls that belong to no site, are not in FP8, with their numbers."""
        counts: Counter[str] = Counter()
        for row in self.rows:
            if others := _OTHERS.fullmatch(row.fqn):
                counts[f"{others['op']}: {row.reason}"] += int(others["count"])
            elif not row.is_fp8:
                counts[f"{row.gemm}: {row.reason}"] += 1
        return counts

    @property
    def without_signal(self) -> int:
        return sum(not quality.has_signal for quality in self.qualities)

    def worst(self, is_output: bool) -> Quality:
        """The output or the gradient with the most noise."""
        found = [q for q in self.qualities if q.has_signal and q.is_output is is_output]
        assert found, f"float32 and float64 agree on nothing to {SIGNAL_DB:.0f} dB"
        return min(found, key=lambda quality: quality.fp8)

    @property
    def problems(self) -> list[str]:
        found = (quality.problem(self.exact) for quality in self.qualities)
        return [text for text in found if text is not None]


def check(name: str, settings: Settings = Settings()) -> Report:
    """Compile a model of the zoo and compare it. Raises whatever compiling it raises."""
    torch._dynamo.reset()
    model, inputs = build(name, settings.layers)
    model = model.to(settings.device, settings.dtype)
    inputs = {key: _moved(value, settings.device, settings.dtype) for key, value in inputs.items()}

    observer = Rows()
    graphs: list[fx.GraphModule] = []
    # The passes, which report what they do, would not run for a graph that is in the cache.
    no_cache = {"fx_graph_cache": False} if settings.inductor else {}
    options = parse_options({"decline_slower": False, "inductor": no_cache})

    def backend(gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        inner = None if settings.inductor else interpret
        return compile_graph(gm, examples, options, inner_compile=inner, observer=observer)

    compiled = copy.deepcopy(model)
    call = torch.compile(compiled, backend=backend, dynamic=True if name in DYNAMIC else None)
    actual = step(call, compiled, inputs)
    simulated = _simulated(model, inputs, observer.rows)
    plain = _compiled_in_own_precision(model, inputs) if settings.inductor else None
    reference, precise = (_eager(model, inputs, d) for d in (torch.float32, torch.float64))
    assert actual.keys() == simulated.keys() == reference.keys() == precise.keys()
    qualities = [
        Quality(
            key,
            fp8=sqnr_db(reference[key], actual[key]),
            simulated=sqnr_db(reference[key], simulated[key]),
            agreement=sqnr_db(simulated[key], actual[key]),
            signal=sqnr_db(precise[key], reference[key]),
            plain=math.inf if plain is None else sqnr_db(reference[key], plain[key]),
        )
        for key in reference
    ]
    if any(quality.problem(settings.is_exact) for quality in qualities) and settings.is_exact:
        stable = _stability(model, inputs, observer.rows, simulated)
        qualities = [replace(quality, stable=stable[quality.name]) for quality in qualities]
    return Report(name, len(graphs), tuple(observer.rows), tuple(qualities), settings.is_exact)


def step(call: Callable[..., Any], model: nn.Module, inputs: Mapping[str, Any]) -> Step:
    """The float outputs of a call, and the gradients of all that takes part in it."""
    leaves = dict(model.named_parameters())
    leaves |= {key: value for key, value in inputs.items() if value.requires_grad}
    for leaf in leaves.values():
        leaf.grad = None
    outputs = _float_tensors(call(**inputs))
    generator = torch.Generator().manual_seed(1)
    trained = [value for value in outputs.values() if value.requires_grad]
    # What bfloat16 holds is the same direction in every dtype.
    directions = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in trained]
    torch.autograd.backward(trained, directions)
    found = {f"output{name}": value.detach() for name, value in outputs.items()}
    return found | {n: x.grad for n, x in leaves.items() if x.grad is not None}


def _float_tensors(output: Any) -> dict[str, Tensor]:
    """Every float tensor in what a model returns, by its path there."""
    plain = _as_dicts(output)
    leaves, _ = pytree.tree_flatten_with_path(plain)
    tensors = {pytree.keystr(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}
    return {path: tensor for path, tensor in tensors.items() if tensor.is_floating_point()}


def _as_dicts(output: Any) -> Any:
    """transformers' output classes as plain dictionaries."""
    if isinstance(output, Mapping):
        return {key: _as_dicts(value) for key, value in output.items()}
    return output


def _eager(model: nn.Module, inputs: Mapping[str, Any], dtype: torch.dtype) -> Step:
    """The step of a model in eager PyTorch, with its parameters converted."""
    model = copy.deepcopy(model).to(dtype)
    if dtype is torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped matmul knows no float64
    # By default, float32 convolutions on a GPU round their inputs to TF32: no reference.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return step(model, model, {key: _moved(x, x.device, dtype) for key, x in inputs.items()})


def _compiled_in_own_precision(model: nn.Module, inputs: Mapping[str, Any]) -> Step:
    torch._dynamo.reset()
    model = copy.deepcopy(model)
    return step(torch.compile(model), model, inputs)


def _simulated(model: nn.Module, inputs: Mapping[str, Any], rows: Sequence[Row]) -> Step:
    """The step in simulated FP8, with the merged GEMMs of ``rows``."""
    model = copy.deepcopy(model)
    sites = [row.sites for row in rows if row.gemm == str(Gemm.FPROP) and len(row.sites) > 1]
    merged = [[model.get_submodule(name).weight for name in group] for group in sites]
    with SimulatedFp8(merged):
        return step(model, model, inputs)


def _stability(
    model: nn.Module, inputs: Mapping[str, Any], rows: Sequence[Row], simulated: Step
) -> dict[str, float]:
    """How far the simulated step agrees with those of weights one rounding away, in dB."""
    found = []
    for seed in range(_NUDGES):
        generator = torch.Generator().manual_seed(seed)
        nudged = copy.deepcopy(model)
        with torch.no_grad():
            for weight in nudged.parameters():
                weight.mul_(1 + 2**-23 * torch.randn(weight.shape, generator=generator))
        found.append(_simulated(nudged, inputs, rows))
    return {key: min(sqnr_db(x, other[key]) for other in found) for key, x in simulated.items()}


def _moved(value: Tensor, device: Any, dtype: torch.dtype) -> Tensor:
    """An input on another device, in another dtype if it is a float."""
    if not value.is_floating_point():
        return value.to(device)
    return value.detach().to(device, dtype).requires_grad_(value.requires_grad)
