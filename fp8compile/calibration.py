"""Static scales for inference: run some batches, and keep what each FP8 operand needs.

The scales go into the scaling state that delayed scaling reads. Without gradients a compiled graph
looks for no amax where it finds a scale there, so that calibrating once is all that there is to do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import checked_model
from .errors import OptionError, ScalingStateError
from .histogram import Histogram
from .ir import SLOTS_PER_SITE
from .named_state import named_states
from .observers import MAX, OBSERVERS, Observed, chosen_amax
from .ops import current_scale
from .options import Options, parse_options
from .profiling import look_at_casts
from .recipe import RECIPES, Operand, Recipe, Scaling
from .scaling import HISTORY, SCALE, ScalingState
from .states import parked_entries, states_by_weight
from .untouched import Step, checked_batches


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    observer: str = MAX,
    percentile: float = 99.99,
    step: Step | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Give a model static scales, found on a few batches, for inference without an amax pass.

    Every batch is run once in the model's own precision and mode, without gradients. For each input
    that would be FP8 the ``observer`` chooses an amax from what it held in all batches, and the
    scale ``FP8_MAX / amax`` (arXiv 2209.05433, section 3.1) goes into the model's scaling state;
    those of weights are always found from their own amax. Calls of
    ``torch.compile(model, backend="fp8")`` without gradients then use these scales, compiled before
    or after, with the same ``options``. ``fp8compile.state_dict`` saves them.

    ``observer``: ``"max"``, the largest magnitude; ``"percentile"``, the one that ``percentile`` %
    of all elements do not exceed, to 1.1 %; ``"mse"``, the amax with the smallest mean squared
    error of the cast, from a histogram of magnitudes. What exceeds the chosen amax is clipped.
    ``batches`` and ``step``: as for ``fp8compile.profile``. ``options``: those of the compile; its
    recipe must be one of delayed scaling, which is what keeps scales.

    Returns the chosen amax by name, as in ``fp8compile.events``: ``layers.0.wq.weight.input``.
    Sites with the same input share their scales, and stand under the name of the first. An operand
    that held nothing but zeros keeps the scale it had.

    Training goes on from there as if a step with these batches had been its last: the largest
    magnitude, whatever the observer chose, is the newest amax of the history, and the only one.
    Scales and histories of gradients, and events, stay. Parameters, buffers and random number
    generators are left as they were.

    Raises OptionError for wrong options, a model without data, as on meta, no batch, or nothing to
    calibrate; ScalingStateError for an operand that is not finite. Then the state, too, is as it
    was.
    """
    model = checked_model(model, "calibrate")
    chosen, given = parse_options(options), checked_batches(batches)
    _check(observer, percentile, chosen)
    found = _Found(model, observer, percentile)
    look_at_casts(model, found.checked(given), found.look, step=step, options=chosen)
    if not found.batches:
        raise OptionError("calibrate needs at least one batch")
    if not found.sites:
        raise OptionError(
            "no GEMM of this model can run in FP8 with a scale that is kept: there is nothing to "
            "calibrate; fp8compile.explain(model, *inputs) says why"
        )
    with torch.inference_mode(False), torch.no_grad():
        return found.keep()


def _check(observer: str, percentile: float, options: Options) -> None:
    if observer not in OBSERVERS:
        raise OptionError(f"observer={observer!r}; choose one of {list(OBSERVERS)}")
    number = isinstance(percentile, int | float) and not isinstance(percentile, bool)
    if not number or not 0 < percentile <= 100:
        raise OptionError(f"percentile={percentile!r}; give a share of all elements, such as 99.99")
    if all(recipe.scaling is not Scaling.DELAYED for recipe in options.recipes):
        legal = [name for name, r in RECIPES.items() if r.scaling is Scaling.DELAYED]
        raise OptionError(
            f"the recipe {options.recipe} has no scales that calibration could set; choose one of "
            f"delayed scaling: {legal}, or a Recipe with Scaling.DELAYED"
        )


@dataclass
class _Site:
    """What the casts of a site have seen, or of the several that share its slots.

    ``weight`` and ``use``: which use of a parameter it is in its graph, whichever graph that is.
    Without a parameter it is known only by its place in the state.
    """

    state: ScalingState
    index: int
    weight: Tensor | None
    use: int
    seen: dict[Operand, Observed] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        return self.state.recipes[self.index]

    def places(self) -> Iterator[tuple[ScalingState, int]]:
        """Where its scales are kept: in the states of all graphs that have it."""
        if self.weight is None:
            yield self.state, self.index
            return
        for state in states_by_weight.get(self.weight, ()):
            for index, (weight, use) in enumerate(zip(state.weights(), state.uses(), strict=True)):
                same = weight is self.weight and use == self.use
                if same and state.recipes[index] == self.recipe:
                    yield state, index


class _Found:
    """The sites of a model, as they are found."""

    def __init__(self, model: nn.Module, observer: str, percentile: float) -> None:
        self._model, self._observer, self._percentile = model, observer, percentile
        self.sites: dict[tuple[int, int], _Site] = {}
        self.batches = 0

    def checked(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches, one by one; each has been finite when the next is asked for."""
        for batch in batches:
            yield batch
            self._check_finite()
            self.batches += 1

    def look(self, state: ScalingState, slot: int, x: Tensor) -> None:
        """See what a cast takes."""
        index, operand = slot // SLOTS_PER_SITE, Operand(slot % SLOTS_PER_SITE)
        weight, use = state.weights()[index], state.uses()[index]
        key = (id(state), index) if weight is None else (id(weight), use)
        site = self.sites.setdefault(key, _Site(state, index, weight, use))
        wants = self._observer != MAX and operand is Operand.INPUT
        new = Observed(Histogram(x.device) if wants else None)
        site.seen.setdefault(operand, new).add(x)

    def _check_finite(self) -> None:
        for site in self.sites.values():
            for operand, seen in site.seen.items():
                if not math.isfinite(seen.amax):
                    raise ScalingStateError(
                        f"{self._name_of(site)}.{operand} is not finite in batch {self.batches} "
                        "(counted from 0), and has no scale. Leave out such batches, or skip the "
                        "site: options={'skip': [...]}; the scaling state is as it was"
                    )

    def _name_of(self, site: _Site) -> str:
        places = list(site.places())
        named = (key for key, *place in named_states(self._model) if tuple(place) in places)
        return next(named, f"site {site.index}, without a parameter")

    def keep(self) -> dict[str, float]:
        """Write the scales into all states that have these sites; the amax of inputs by name."""
        chosen = {}
        for state in {state for site in self.sites.values() for state, _ in site.places()}:
            if state.weights_changed:
                state.forget_weights()
        for site in self.sites.values():
            amaxes = {operand: self._chosen(site, operand) for operand in site.seen}
            if amaxes.get(Operand.INPUT):
                chosen[f"{self._name_of(site)}.{Operand.INPUT}"] = amaxes[Operand.INPUT]
            for state, index in site.places():
                entry = state.site_entry(index)
                for operand, amax in amaxes.items():
                    if amax:  # not where there were only zeros
                        _set(entry, operand, amax, site)
                state.set_site_entry(index, entry)
                state.keep_changed_weights()
                state.observed = False
            parked = parked_entries.get(site.weight, {}) if site.weight is not None else {}
            if parked.get(site.use) is not None:  # for graphs that are still to come
                parked[site.use] = entry
        return chosen

    def _chosen(self, site: _Site, operand: Operand) -> float:
        to = site.recipe.format_of(operand)
        return chosen_amax(site.seen[operand], self._observer, self._percentile, to)


def _set(entry: Mapping[str, Tensor], operand: Operand, amax: float, site: _Site) -> None:
    """Put a scale into what is saved of a site, and what training shall know of the operand."""
    fp8_max = site.recipe.format_of(operand).max
    entry[SCALE][operand.value] = current_scale(torch.tensor(amax, dtype=torch.float32), fp8_max)
    entry[HISTORY][:, operand.value] = 0.0
    entry[HISTORY][-1, operand.value] = site.seen[operand].amax
