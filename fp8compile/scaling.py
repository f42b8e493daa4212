"""A scaling state: the scales and amax histories of the sites of a compiled graph.

Inside the graph it is only read (``scale``) and max-accumulated (``amax_fwd``, ``amax_bwd``).
Everything else happens once per optimizer step, see states.py. A scale of 0 means that no amax is
known, none seen yet or one that has outgrown the history or jumped; the cast then uses current
scaling, so that the first step is right, and so are those after a jump.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .formats import Format
from .ir import ATTENTION_SLOT, SLOT_NAMES, SLOTS_PER_SITE
from .recipe import Operand, Recipe, Scaling

SCALE, HISTORY = ".scale", ".amax_history"
# How many slots of a site are saved: its operands', that of attention too, or all.
ENTRY_LENGTHS = (len(Operand), ATTENTION_SLOT + 1, len(SLOT_NAMES))


class ScalingState:
    """The state of one graph's sites, delayed or static: flat tensors with ``SLOTS_PER_SITE`` slots
    a site (see ``SLOT_NAMES``), which are used unless the site's own recipe finds current scales.

    ``scale``, ``amax_fwd``, ``amax_bwd``: ``f32[slots]``. ``history``: ``f32[history_len, slots]``,
    a ring that ``position`` points into. ``events``: ``i32[3, slots]``, how often an amax was not
    finite, how often one was too large for the scale that was used, and how often one jumped (see
    ``fp8::update_scales``). Static scaling uses only ``scale``. ``weights``: for each site its
    weight, or None where it has no parameter. ``recipes``: the recipe of each site. ``rule``: see
    ``rule_of``. ``leaders``: for each site the one whose slots its input and weight use, see Site.
    ``replicas``: the process group that trains copies of the weights on other data, or None.
    ``number``: states are created, and so numbered, in the same order in every replica.
    """

    _numbers = itertools.count()

    @torch.inference_mode(False)  # the first call may be one of inference; training goes on with it
    def __init__(
        self,
        weights: Sequence[Tensor | None],
        recipes: Sequence[Recipe],
        device: torch.device,
        leaders: Sequence[int] | None = None,
    ) -> None:
        self.recipes = tuple(recipes)
        self.leaders = tuple(range(len(weights)) if leaders is None else leaders)
        rule = rule_of(recipes)
        assert rule is not None, "current scales need no state"
        self.rule = rule
        self._weights = [None if w is None else weakref.ref(w) for w in weights]
        slots = SLOTS_PER_SITE * len(weights)
        # Tensors of their own: CUDA graphs take an input for static only if it is aligned.
        self.scale, self.amax_fwd, self.amax_bwd = (
            torch.zeros(slots, dtype=torch.float32, device=device) for _ in range(3)
        )
        self.history = torch.zeros(self.rule.history_len, slots, dtype=torch.float32, device=device)
        self.events = torch.zeros(3, slots, dtype=torch.int32, device=device)
        of_attention = [Format.E4M3.max] * (SLOTS_PER_SITE - len(Operand))
        fp8_max = [
            [*(recipe.format_of(operand).max for operand in Operand), *of_attention]
            for recipe in recipes
        ]
        self.fp8_max = torch.tensor(fp8_max, dtype=torch.float32, device=device).flatten()
        _generations[self.scale] = 0
        self.position = 0
        self.updates = 0
        self.observed = False  # whether a training call has run since the last update
        self.unobserved = False  # whether one with gradients has, in eval mode
        self.stepped_by: frozenset[int] = frozenset()  # ids of the parameters that train with it
        self.replicas: Any = None
        self.number = next(self._numbers)
        self._versions = [_version_of(weight) for weight in weights]  # when the scales were theirs
        self.owners: list[weakref.ref[nn.Module]] | None = None  # whose weights; None: not looked
        self._scratch: tuple[Tensor, ...] | None = None

    @property
    def device(self) -> torch.device:
        return self.scale.device

    def weights(self) -> list[Tensor | None]:
        """The weight of each site; None where there is none or it no longer exists."""
        return [None if ref is None else ref() for ref in self._weights]

    def trains_with(self, parameters: Container[int]) -> bool:
        """Whether any weight is one of these parameters, by their ids, or computed from them."""
        return any(id(weight) in parameters for weight in self.weights() if weight is not None) or (
            any(parameter in parameters for parameter in self.stepped_by)
        )

    def belongs_to(self, weights: Sequence[Tensor | None], recipes: Sequence[Recipe]) -> bool:
        """Whether this is the state of exactly these weights, under these recipes."""
        return (
            self.recipes == tuple(recipes)
            and len(weights) == len(self._weights)
            and all(
                w is (None if ref is None else ref())
                for w, ref in zip(weights, self._weights, strict=True)
            )
        )

    def keep_changed_weights(self, stepped: Container[int] | None = None) -> None:
        """Take the scales for those of the weights as they are now: of all, or of those that an
        optimizer ``stepped``, by their ids.
        """
        self._versions = [
            _version_of(weight) if stepped is None or id(weight) in stepped else known
            for weight, known in zip(self.weights(), self._versions, strict=True)
        ]

    def observing(self) -> tuple[Tensor, Tensor, Tensor]:
        """The graph inputs of a training call: scale, amax_fwd, amax_bwd."""
        self.observed = True
        return self.scale, self.amax_fwd, self.amax_bwd

    @property
    def weights_changed(self) -> bool:
        """Whether something other than an optimizer has written to a weight."""
        return self._versions != [_version_of(weight) for weight in self.weights()]

    @torch.inference_mode(False)
    @torch.no_grad()
    def fill(self, scale: Tensor) -> None:
        """Take over those scales of ``scale``, ``f32[slots]``, that are known (not 0) and that
        this does not know, or all of them where the weights have changed.
        """
        scale = scale.to(self.device)
        wanted = scale > 0 if self.weights_changed else (scale > 0) & (self.scale == 0)
        with torch.autograd._unsafe_preserve_version_counter(self.scale):
            self.scale.copy_(torch.where(wanted, scale, self.scale))
        self._moved()
        self.keep_changed_weights()

    def reading(self) -> tuple[Tensor, Tensor, Tensor]:
        """The graph inputs of a call that must not leave a trace (eval): amax goes nowhere.

        Nothing here would notice that a weight outgrew its scale. So where one was written to since
        the last step, by ``load_state_dict`` or an average of weights, those scales are unknown.
        """
        with torch.inference_mode(False), torch.no_grad():
            if self._scratch is None:
                self._scratch = tuple(torch.zeros_like(self.scale) for _ in range(3))
                _generations[self._scratch[0]] = 0  # it says nothing of any weight
            scale, *amax = self._scratch
            if not self.weights_changed:
                scale = self.scale
            else:
                scale.copy_(self.scale)
                scale[Operand.WEIGHT.value :: SLOTS_PER_SITE] = 0.0
        return scale, amax[0], amax[1]

    @torch.no_grad()
    def update(self) -> None:
        """Roll the history and recompute the scales."""
        # The scale may be saved for a backward that is still to come; that one is welcome to use
        # the new scale for its gradients, so the version counter must not object.
        with torch.autograd._unsafe_preserve_version_counter((self.scale, self.amax_bwd)):
            torch.ops.fp8.update_scales(
                self.scale,
                self.amax_fwd,
                self.amax_bwd,
                self.history,
                self.events,
                self.fp8_max,
                self.position,
                self.rule.jump_limit,
                self.rule.saturation_limit,
            )
        self._moved()
        self.keep_changed_weights()
        self.position = (self.position + 1) % self.rule.history_len
        self.updates += 1
        self.observed = self.unobserved = False

    def ordered_history(self) -> Tensor:
        """The history from oldest to newest."""
        return self.history.roll(-self.position, 0)

    def site_entry(self, index: int) -> dict[str, Tensor]:
        """What is saved for a site: ``scale`` ``f32[3]`` and ``amax_history`` ``f32[H, 3]``, of its
        operands; ``f32[4]`` and ``f32[H, 4]`` where attention takes its output in FP8, ``f32[9]``
        and ``f32[H, 9]`` where an attention of which that is the query has a backward in FP8.
        """
        slots = slots_of(index)
        scale, history = self.scale[slots], self.ordered_history()[:, slots]
        taken = (scale > 0) | history.any(0)
        count = next(n for n in reversed(ENTRY_LENGTHS) if n == len(Operand) or taken[n - 1])
        return {SCALE: scale[:count].clone(), HISTORY: history[:, :count].clone()}

    def set_site_entry(self, index: int, entry: Mapping[str, Tensor]) -> None:
        """Take over what ``site_entry`` saved."""
        first = slots_of(index).start
        slots = slice(first, first + len(entry[SCALE]))
        with torch.autograd._unsafe_preserve_version_counter(self.scale):
            self.scale[slots] = entry[SCALE].to(self.device)
        self._moved()
        self.history[:, slots] = entry[HISTORY].to(self.device).roll(self.position, 0)
        self.amax_fwd[slots] = 0.0
        self.amax_bwd[slots] = 0.0

    def forget_weights(self) -> None:
        """Let casts of weights find their own scales: what is known is of weights as they were."""
        self._forget(slice(Operand.WEIGHT.value, None, SLOTS_PER_SITE))

    def forget(self) -> None:
        """Let all casts find their own scales, until a training call is observed again."""
        self._forget(slice(None))
        self.unobserved = False

    @torch.no_grad()
    def _forget(self, slots: slice) -> None:
        with torch.autograd._unsafe_preserve_version_counter(self.scale):
            self.scale[slots] = 0.0
        self._moved()

    def _moved(self) -> None:
        _generations[self.scale] = _generations.get(self.scale, 0) + 1

    def replace_weight(self, old: Tensor, new: Tensor) -> None:
        """Take one tensor for another, whose values mean the same."""
        for index, weight in enumerate(self.weights()):
            if weight is old:
                self._weights[index] = weakref.ref(new)
                self._versions[index] = _version_of(new)

    def scale_of_weight(self, weight: Tensor) -> Tensor | None:
        """The scale, ``f32[1]``, that the next call casts a weight with; None: it finds its own."""
        for index, known in enumerate(self.weights()):
            if known is weight and self._versions[index] == _version_of(weight):
                slot = slots_of(self.leaders[index]).start + Operand.WEIGHT.value
                if self.recipes[index].scaling is not Scaling.CURRENT and self.scale[slot] > 0:
                    return self.scale[slot : slot + 1].clone()
        return None

    def uses(self) -> list[int]:
        """For each site, how many earlier sites of this state use the same weight."""
        seen: dict[int, int] = {}
        uses = []
        for weight in self.weights():
            uses.append(seen.get(id(weight), 0))
            seen[id(weight)] = uses[-1] + 1
        return uses


def rule_of(recipes: Iterable[Recipe]) -> Recipe | None:
    """The recipe by which the scales of a state move: the first that is not current, for all such
    recipes of a model agree about it. None if all scales are current.
    """
    return next((recipe for recipe in recipes if recipe.scaling is not Scaling.CURRENT), None)


def _version_of(weight: Tensor | None) -> int | None:
    """A number that every write to a tensor changes, except those through ``.data``."""
    return None if weight is None or weight.is_inference() else weight._version


def slots_of(index: int) -> slice:
    """The slots of a site, in the order of ``SLOT_NAMES``."""
    first = SLOTS_PER_SITE * index
    return slice(first, first + SLOTS_PER_SITE)


_generations: WeakIdKeyDictionary = WeakIdKeyDictionary()  # scale -> how often it has moved


def generation_of(scale: Tensor) -> int | None:
    """How often the scales of a state have moved, which leaves no trace in the tensor's version;
    None if this is no such tensor.
    """
    return _generations.get(scale)
