"""Which scaling states there are, and when they move.

A ScalingState belongs to the list of weights that a compiled graph multiplies with. It is found
through them at run time, because one compiled graph may serve many modules. It moves at the end of
every step of an optimizer of ``torch.optim``, or where ``update_scales`` says that a step has
ended. The replicas of a DistributedDataParallel take the largest amax of all, in one collective per
step, and so have the same scales.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from .arguments import checked_model
from .errors import ScalingStateError
from .recipe import Operand, Recipe, Scaling
from .scaling import HISTORY, SCALE, ScalingState

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
