"""The scaling state: scales, amax histories, and when they move.

Inside a compiled graph the state is only read (``scale``) and max-accumulated (``amax_fwd``,
``amax_bwd``). Everything else happens here, once per optimizer step. A scale of 0 means that no
amax is known, none seen yet or one that has outgrown the history or jumped; the cast then uses
current scaling, so that the first step is right, and so are those after a jump.

A ScalingState belongs to the list of weights that a compiled graph multiplies with. It is found
through them at run time, because one compiled graph may serve many modules. The replicas of a
DistributedDataParallel take the largest amax of all, in one collective per optimizer step, and so
have the same scales.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from .arguments import checked_model
from .errors import ScalingStateError
from .ir import SLOTS_PER_SITE
from .recipe import Operand, Recipe, Scaling

SCALE, HISTORY = ".scale", ".amax_history"


class ScalingState:
    """The state of one graph's sites, delayed or static: flat tensors with ``SLOTS_PER_SITE`` slots
    a site, of which one is used per operand, unless the site's own recipe finds current scales.

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
        unused = [1.0] * (SLOTS_PER_SITE - len(Operand))
        fp8_max = [
            [recipe.format_of(operand).max for operand in Operand] + unused for recipe in recipes
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
        for index, weight in enumerate(self.weights()):
            if stepped is None or id(weight) in stepped:
                self._versions[index] = _version_of(weight)

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
        """What is saved for a site: ``scale`` ``f32[3]`` and ``amax_history`` ``f32[H, 3]``."""
        slots = slots_of(index)
        return {
            SCALE: self.scale[slots].clone(),
            HISTORY: self.ordered_history()[:, slots].clone(),
        }

    def set_site_entry(self, index: int, entry: Mapping[str, Tensor]) -> None:
        """Take over what ``site_entry`` saved."""
        slots = slots_of(index)
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
    """The slots of a site that are used."""
    first = SLOTS_PER_SITE * index
    return slice(first, first + len(Operand))


_generations: WeakIdKeyDictionary = WeakIdKeyDictionary()  # scale -> how often it has moved


def generation_of(scale: Tensor) -> int | None:
    """How often the scales of a state have moved, which leaves no trace in the tensor's version;
    None if this is no such tensor.
    """
    return _generations.get(scale)


# --- finding states -----------------------------------------------------------------------------

_lock = threading.RLock()
# weight -> the states it takes part in; each state lives as long as one of its weights
states_by_weight: WeakIdKeyDictionary = WeakIdKeyDictionary()
# weight -> {use: entry}, or GivenScales: loaded before the weight's first compiled call
parked_entries: WeakIdKeyDictionary = WeakIdKeyDictionary()
_all_states: weakref.WeakSet[ScalingState] = weakref.WeakSet()
_hook: Any = None
# Called at the end of every step with the optimizer that ended it, or None for ``update_scales``;
# the ids of the parameters that were stepped, or None for all; and the states that moved.
Listener = Callable[[Any, Container[int] | None, Sequence[ScalingState]], None]
_listeners: list[Listener] = []


class GivenScales(dict[int, dict[str, Tensor]]):
    """Parked entries of which the first is for all uses of a weight that have none. They are from a
    checkpoint of another server, which has none for weights that it does not quantize.
    """

    def get(self, use: int, default: Any = None) -> Any:
        """The entry of a use, or the first."""
        return super().get(use, super().get(0, default))


def find_state(
    weights: Sequence[Tensor | None],
    recipes: Sequence[Recipe],
    device: torch.device,
    leaders: Sequence[int] | None = None,
) -> ScalingState:
    """The state of these weights under these recipes, one per site; a new one if there is none.

    A new state takes over what another graph has learned about the same sites, or what
    ``load_state_dict`` parked for them. Raises ScalingStateError if only part of it was loaded.
    """
    with _lock:
        anchor = next((w for w in weights if w is not None), None)
        if anchor is not None:
            for state in states_by_weight.get(anchor, ()):
                if state.belongs_to(weights, recipes) and state.device == device:
                    return state
        state = ScalingState(weights, recipes, device, leaders)
        _inherit(state)
        for weight in weights:
            if weight is not None and state not in states_by_weight.setdefault(weight, []):
                states_by_weight[weight].append(state)
        _all_states.add(state)
        _install_hook()
        return state


def _inherit(state: ScalingState) -> None:
    parked, missing, is_whole = [], [], True
    for index, (weight, use) in enumerate(zip(state.weights(), state.uses(), strict=True)):
        if weight is None or state.recipes[index].scaling is Scaling.CURRENT:
            continue
        entries = parked_entries.get(weight, {})
        is_whole = is_whole and not isinstance(entries, GivenScales)
        entry = entries.get(use)
        if entry is not None:
            parked.append((index, entry))
        else:
            missing.append(index)
            other = latest_entry(weight, use, state.recipes[index])
            if other is not None:
                state.set_site_entry(index, other)
    if parked and missing and is_whole:
        raise ScalingStateError(
            f"the loaded scaling state has entries for {len(parked)} of this graph's "
            f"{len(parked) + len(missing)} sites; missing are the sites number {missing}. Save it "
            "from a model that was compiled with the same options and holds all of the graph's "
            "modules: nn.ModuleList([teacher, student]) for two that are compiled together"
        )
    for index, entry in parked:
        if entry[HISTORY].shape[0] != state.rule.history_len:
            raise ScalingStateError(
                f"the loaded amax history has {entry[HISTORY].shape[0]} steps; the recipe "
                f"{state.recipes[index].name!r} keeps {state.rule.history_len}"
            )
        state.set_site_entry(index, entry)


def latest_entry(weight: Tensor, use: int, recipe: Recipe) -> dict[str, Tensor] | None:
    """What the most often updated other state knows about a use of a weight."""
    found = [
        (other, index)
        for other in states_by_weight.get(weight, ())
        for index, (w, u) in enumerate(zip(other.weights(), other.uses(), strict=True))
        if w is weight and u == use and other.recipes[index] == recipe
    ]
    if not found:
        return None
    other, index = max(found, key=lambda pair: pair[0].updates)
    return other.site_entry(index)


def known_weight_scale(weight: Tensor) -> Tensor | None:
    """The scale, ``f32[1]``, that compiled calls cast a weight with; None if they find their own.

    It is that of the state that was updated most often, or what was loaded for the first call.
    """
    states = sorted(states_by_weight.get(weight, ()), key=lambda state: -state.updates)
    for state in states:
        scale = state.scale_of_weight(weight)
        if scale is not None:
            return scale
    entry = parked_entries.get(weight, {}).get(0)
    scale = None if entry is None or states else entry[SCALE][Operand.WEIGHT.value].reshape(1)
    return None if scale is None or not scale > 0 else scale.to(weight.device)


def replace_weight(old: Tensor, new: Tensor) -> None:
    """Let the scaling state of one tensor be that of another, whose values mean the same."""
    with _lock:
        for table in (states_by_weight, parked_entries):
            if old in table:
                table[new] = table.pop(old)
        for state in states_by_weight.get(new, ()):
            state.replace_weight(old, new)


def states_of(model: nn.Module) -> list[ScalingState]:
    """The states that any parameter of the model takes part in."""
    states: dict[int, ScalingState] = {}
    for parameter in model.parameters():
        for state in states_by_weight.get(parameter, ()):
            states[id(state)] = state
    return list(states.values())


# --- when they move -----------------------------------------------------------------------------


def _install_hook() -> None:
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_after_optimizer_step)


def listen(listener: Listener) -> None:
    """Call ``listener`` at the end of every step, until ``unlisten``."""
    with _lock:
        _listeners.append(listener)
        _install_hook()


def unlisten(listener: Listener) -> None:
    """Undo ``listen``; does nothing if that is done already."""
    with _lock:
        _listeners[:] = [other for other in _listeners if other != listener]


def _known_states() -> list[ScalingState]:
    with _lock:  # another thread may be compiling a model of its own
        return list(_all_states)


def _after_optimizer_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    states = _known_states()
    for state in states:
        state.keep_changed_weights(stepped)
    # A graph without trainable parameters of its own moves with whatever is trained.
    moves = (s for s in states if not s.stepped_by or not stepped.isdisjoint(s.stepped_by))
    _end_step(optimizer, stepped, moves)


def _end_step(
    optimizer: Any, stepped: Container[int] | None, states: Iterable[ScalingState]
) -> None:
    moved = _update(states)
    for listener in list(_listeners):  # one may end itself
        listener(optimizer, stepped, moved)


def _update(states: Iterable[ScalingState]) -> list[ScalingState]:
    """End the step of those states that a training call has run with since their last update, and
    return them. One that was trained with in eval mode, which is not observed, knows nothing now.
    """
    states = list(states)
    for state in states:
        if state.unobserved and not state.observed:
            state.forget()
    by_number = {state.number: state for state in states if state.observed}
    observed = [by_number[number] for number in sorted(by_number)]
    for group in dict.fromkeys(state.replicas for state in observed):
        if group is not None:
            _take_largest_amax([s for s in observed if s.replicas is group], group)
    for state in observed:
        state.update()
    return observed


@torch.no_grad()
def _take_largest_amax(states: Sequence[ScalingState], group: Any) -> None:
    """Let all replicas have the largest amax of any, with one collective and no host sync."""
    parts = [amax for state in states for amax in (state.amax_fwd, state.amax_bwd)]
    flat = torch.cat(parts)
    dist.all_reduce(flat, dist.ReduceOp.MAX, group=group)
    # A backward that is still to come may have saved them; a larger amax does it no harm.
    with torch.autograd._unsafe_preserve_version_counter(tuple(parts)):
        for part, largest in zip(parts, flat.split([p.numel() for p in parts]), strict=True):
            part.copy_(largest)


@contextlib.contextmanager
def states_left_as_they_were() -> Iterator[None]:
    """Forget what training calls in between were seen to do, and the states that they needed."""
    kept = {
        state: (
            state.amax_fwd.clone(),
            state.amax_bwd.clone(),
            (state.observed, state.unobserved, state.stepped_by),
        )
        for state in _known_states()
    }
    try:
        yield
    finally:
        for state in _known_states():
            if state not in kept:
                _forget(state)
                continue
            amax_fwd, amax_bwd, (state.observed, state.unobserved, state.stepped_by) = kept[state]
            with torch.no_grad():
                state.amax_fwd.copy_(amax_fwd)
                state.amax_bwd.copy_(amax_bwd)


def _forget(state: ScalingState) -> None:
    with _lock:
        _all_states.discard(state)
        for weight in state.weights():
            if weight is not None and state in states_by_weight.get(weight, ()):
                states_by_weight[weight].remove(state)


def update_scales(model: nn.Module | None = None) -> None:
    """End a step in a loop that calls no ``torch.optim`` optimizer.

    Rolls the amax histories and recomputes the scales of ``model``, or of every compiled graph.
    Optimizers of ``torch.optim`` do this by themselves; calling it as well does no harm, for a
    state that has seen no training call since its last update stays as it is. Static scales never
    move; but writes to the weights up to here count as a step, after which they stay.

    Raises OptionError for what is no model.
    """
    if model is None:
        own, states = None, _known_states()
    else:
        parameters = checked_model(model, "update_scales").parameters()
        own = {id(parameter) for parameter in parameters}
        states = [state for state in _known_states() if state.trains_with(own)]
    for state in states:
        if state.rule.scaling is Scaling.STATIC:
            state.keep_changed_weights()
    _end_step(None, own, states)
