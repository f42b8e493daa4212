"""What the casts of a model's operands lose with the scales they have now, edge by edge."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..edge_records import dequantized
from ..errors import OptionError
from ..formats import Format
from ..histogram import OCTAVES, places_of
from ..ir import Edge, GemmInfo
from ..named_state import named_states, site_of
from ..ops import SATURATED, current_scale
from ..options import Options
from ..profiling import watch
from ..recipe import Granularity, Operand, Recipe, Scaling
from ..records import Record
from ..scaling import slots_of

BINS_PER_OCTAVE = 4
BINS = BINS_PER_OCTAVE * len(OCTAVES)

EdgeName = tuple[str, str]  # site and operand


@dataclass
class Measured:
    """One edge of a run: sums over the GEMMs that take it.

    ``sites``: those that share it, in order. ``amax``. ``scale``: of a tensorwise cast; None where
    there are many. ``elements``, ``nonzero``, ``clipped``, ``underflowed``: how many; clipped are
    those that saturation changes by more than rounding does. ``power``, ``error``: sums of squares
    of the value and of what the cast changes. ``counts``: how many magnitudes lie in each bin,
    ``BINS_PER_OCTAVE`` to an octave of ``OCTAVES``.
    """

    sites: tuple[str, ...]
    format: Format
    scale: float | None
    amax: float = 0.0
    elements: int = 0
    nonzero: int = 0
    clipped: int = 0
    underflowed: int = 0
    power: float = 0.0
    error: float = 0.0
    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.int64))

    def add(self, x: Tensor, y: Tensor, clipped: Tensor) -> None:
        """Count a value and what its cast makes of it, ``f32[rows, K]`` each."""
        self.amax = (
            torch.tensor([self.amax, x.abs().amax()], dtype=torch.float32).amax().item()
        )  # NaN, if one is
        self.elements += x.numel()
        self.nonzero += int((x != 0).sum())
        self.clipped += int(clipped.sum())
        self.underflowed += int(((x != 0) & (y == 0)).sum())
        self.power += float(x.double().square().sum())
        self.error += float((y - x).double().square().sum())
        self.counts += places_of(x.abs(), BINS_PER_OCTAVE).bincount(minlength=BINS).cpu()

    @property
    def sqnr_db(self) -> float | None:
        """See Record."""
        if not self.power or not math.isfinite(self.power):
            return None
        return 10 * math.log10(self.power / self.error) if self.error else math.inf

    def record(self, step: int, name: EdgeName) -> Record:
        """It as a Record."""
        return Record(
            step,
            *name,
            self.format,
            amax=self.amax if math.isfinite(self.amax) else None,
            scale=self.scale,
            saturated_share=self.clipped / max(1, self.elements),
            underflowed_share=self.underflowed / max(1, self.nonzero),
            sqnr_db=self.sqnr_db,
        )


def measure(
    model: nn.Module, run: Callable[[Callable[..., Any]], Any], options: Options
) -> dict[EdgeName, Measured]:
    """Run a model once, in its own precision, and cast every operand as its recipe says.

    ``run(call)`` calls ``call`` in place of the model, and returns a scalar loss if gradients are
    to be measured, too. A delayed scale is the one of the model's state; where that knows none, as
    with other recipes, the cast finds its own. Raises OptionError if the state is that of other
    recipes, or no GEMM is in FP8.
    """
    scales = _known_scales(model, options)
    found: dict[EdgeName, Measured] = {}
    uses: dict[tuple[int, str], list[int]] = {}  # graph and name -> the sites of that name

    def look(
        graph: int,
        info: GemmInfo,
        edge: Edge,
        recipe: Recipe,
        value: Tensor,
        static_scale: Tensor | None,
    ) -> None:
        same = uses.setdefault((graph, info.site.fqn), [])
        if info.site.index not in same:
            same.append(info.site.index)
        use = same.index(info.site.index)
        name = (_use_of(info.site.fqn, use), str(edge.operand))
        x, to = value.float(), recipe.format_of(edge.operand)
        if not x.numel():
            return
        scale = current_scale(x.abs().amax(), to.max)
        if static_scale is not None and static_scale > 0:
            scale = static_scale
        elif scales.get(name):
            scale = torch.full_like(scale, scales[name])
        is_one = edge.granularity is Granularity.TENSOR
        new = Measured(tuple(s.fqn for s in info.sites), to, float(scale) if is_one else None)
        y, _ = dequantized(x, edge.granularity, recipe, to, scale)
        found.setdefault(name, new).add(x, y, (x.abs() * scale > SATURATED * to.max) & is_one)

    watch(model, None, look, step=lambda call, _: run(call), options=options)
    if not found:
        raise OptionError("no GEMM of this model can run in FP8: there is nothing to measure")
    return found


def _use_of(fqn: str, use: int) -> str:
    return f"{fqn}#{use}" if use else fqn


def _known_scales(model: nn.Module, options: Options) -> Mapping[EdgeName, float]:
    """The delayed scales, of the states most often updated; 0 where a cast finds its own."""
    known: dict[EdgeName, float] = {}
    own: set[str] = set()  # sites with a state of this compile
    others: dict[str, Recipe] = {}  # and with one of another
    states = sorted(named_states(model), key=lambda named: named[1].updates)
    on_host = {id(state): state.scale.tolist() for _, state, _ in states}
    for key, state, index in states:
        site, recipe = site_of(key), state.recipes[index]
        if recipe != _recipe_of(site, options):
            others[site] = recipe
            continue
        own.add(site)
        if recipe.scaling is Scaling.DELAYED:
            values = on_host[id(state)][slots_of(index)]
            known |= {(site, str(operand)): values[operand.value] for operand in Operand}
    for site, recipe in others.items():
        chosen = _recipe_of(site, options)
        if site not in own and chosen.scaling is not Scaling.CURRENT:
            raise OptionError(
                f"the scaling state of {site} is that of the recipe {recipe}, but the Monitor's "
                f"options say {chosen}: give it the options that the model was compiled with, "
                "Monitor(model, options=...)"
            )
    return known


def _recipe_of(site: str, options: Options) -> Recipe:
    return options.own_recipe(site.partition("#")[0]) or options.recipe
