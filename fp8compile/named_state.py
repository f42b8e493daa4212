"""The scaling state of a model by fully qualified name: saved, loaded, and what went wrong.

An entry belongs to a site, and is named after its weight: ``layers.0.wq.weight``, and
``layers.0.wq.weight#1`` for the second use of that weight in a graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from .arguments import checked_model
from .errors import ScalingStateError
from .ir import SLOT_NAMES
from .recipe import Scaling
from .scaling import ENTRY_LENGTHS, HISTORY, SCALE, ScalingState, slots_of
from .states import latest_entry, parked_entries, states_by_weight, states_of

_LENGTHS = [(length,) for length in ENTRY_LENGTHS]  # of what ScalingState.site_entry returns


class Events(NamedTuple):
    """In how many steps an operand's amax was not finite, its delayed scale was too large, or its
    amax jumped; see ``events``.
    """

    not_finite: int
    saturated: int
    jumped: int


# --- what went wrong ----------------------------------------------------------------------------


def events(model: nn.Module) -> dict[str, Events]:
    """What went wrong so far with the delayed scales of a model, by name; empty if nothing did.

    The key is the name of a site's weight, as in ``state_dict``, and an operand:
    ``layers.0.wq.weight.grad_output``; ``.attention`` is what attention takes of the site's output
    in FP8, and ``.attention_grad_output``, ``_products``, ``_query``, ``_key`` and ``_value`` are
    the gradients of an attention whose query that output is. Sites with the same input share their
    scales, and stand under the name of the first; of gradients, those that come from the same
    outputs of the graph.
    ``not_finite`` counts the steps whose amax was inf or NaN: the scale did not move. ``saturated``
    counts those whose values had outgrown the scale so far that clipping changed them by more than
    rounding does; the next step's scale is right again. ``jumped`` counts how often the amax of the
    last steps came to lie further apart than the recipe's ``jump_limit``: from the next step on
    until they agree again, the operand is cast with current scaling. A spike is one jump, and so
    are two within ``history_len`` steps.

    Raises OptionError for what is no model.
    """
    counts: dict[str, Tensor] = {}
    for key, state, site in named_states(checked_model(model, "events")):
        counts[key] = counts.get(key, 0) + state.events[:, slots_of(site)].cpu()
    return {
        f"{key}.{operand}": Events(*found)
        for key, kinds in counts.items()
        for operand, found in zip(SLOT_NAMES, kinds.t().tolist(), strict=False)
        if any(found)
    }


# --- saving and loading -------------------------------------------------------------------------


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The scaling state of a model, by fully qualified name.

    For a site with weight ``layers.0.wq.weight`` there are ``layers.0.wq.weight.scale``,
    ``f32[3]`` (input, weight, grad_output), and ``layers.0.wq.weight.amax_history``, ``f32[H, 3]``
    from oldest to newest; ``f32[4]`` and ``f32[H, 4]`` where attention takes its output in FP8, and
    ``f32[9]`` and ``f32[H, 9]`` where that is the query of one whose backward is in FP8, too. A
    weight's second use in a graph is ``layers.0.wq.weight#1``. Entries loaded but not used yet are
    included. Raises OptionError for what is no model.
    """
    return _entries(checked_model(model, "state_dict"))


def _entries(model: nn.Module) -> dict[str, Tensor]:
    entries: dict[str, Tensor] = {}
    for fqn, parameter in model.named_parameters():
        known: dict[int, Mapping[str, Tensor]] = dict(parked_entries.get(parameter, {}))
        for state in states_by_weight.get(parameter, ()):
            for weight, use, recipe in zip(
                state.weights(), state.uses(), state.recipes, strict=True
            ):
                if weight is parameter and recipe.scaling is not Scaling.CURRENT:
                    known[use] = latest_entry(parameter, use, recipe) or {}
        for use, saved in sorted(known.items()):
            for suffix, tensor in saved.items():
                entries[_key(fqn, use) + suffix] = tensor
    return entries


def load_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Restore what ``state_dict`` returned, before or after the first compiled call.

    Raises ScalingStateError, and changes nothing, if entries are missing, foreign or of the wrong
    shape; it lists them. Raises TypeError for what is no mapping, OptionError for what is no model.
    """
    model = checked_model(model, "load_state_dict")
    parameters = dict(model.named_parameters())
    for fqn, uses in check_state_dict(model, state_dict).items():
        _apply(parameters[fqn], uses)
    for state in states_of(model):
        state.observed = False
        state.keep_changed_weights()


def check_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor]
) -> dict[str, dict[int, dict[str, Tensor]]]:
    """What ``load_state_dict`` would restore, by parameter and use; it raises as that does."""
    if not isinstance(state_dict, Mapping):
        given = type(state_dict).__name__
        raise TypeError(f"a {given} is no scaling state; give what fp8compile.state_dict returned")
    loaded, problems = _parse(state_dict, dict(model.named_parameters()))
    expected = {key.rpartition(".")[0] for key in _entries(model)}
    present = {_key(fqn, use) for fqn, uses in loaded.items() for use in uses}
    if expected:
        problems += [f"missing: {key}" for key in sorted(expected - present)]
        problems += [f"foreign: {key} (no such site)" for key in sorted(present - expected)]
    if problems:
        raise ScalingStateError(
            "the scaling state does not fit this model:\n  " + "\n  ".join(problems)
        )
    return loaded


def _apply(parameter: Tensor, uses: Mapping[int, Mapping[str, Tensor]]) -> None:
    states = states_by_weight.get(parameter, ())
    if not states:
        parked_entries[parameter] = {
            use: {k: v.detach().clone() for k, v in e.items()} for use, e in uses.items()
        }
    for state in states:
        for index, (weight, use) in enumerate(zip(state.weights(), state.uses(), strict=True)):
            if weight is parameter and use in uses:
                state.set_site_entry(index, uses[use])


def _parse(
    state_dict: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> tuple[dict[str, dict[int, dict[str, Tensor]]], list[str]]:
    """Sort a state dict by parameter and use; the second result lists what does not fit."""
    loaded: dict[str, dict[int, dict[str, Tensor]]] = {}
    problems = []
    for key, tensor in state_dict.items():
        site, dot, name = key.rpartition(".")
        fqn, _, number = site.partition("#")
        suffix, number = dot + name, number or "0"
        if suffix not in (SCALE, HISTORY) or fqn not in parameters or not number.isdigit():
            problems.append(f"foreign: {key}")
        elif not isinstance(tensor, Tensor):
            problems.append(f"not a tensor but {type(tensor).__name__}: {key}")
        elif tensor.shape[-1:] not in _LENGTHS or tensor.dim() != 1 + (suffix == HISTORY):
            problems.append(f"shape {tuple(tensor.shape)}: {key}")
        elif not (tensor.isfinite() & (tensor >= 0)).all():
            problems.append(f"negative or not finite: {key}")
        else:
            loaded.setdefault(fqn, {}).setdefault(int(number), {})[suffix] = tensor
    for fqn, uses in loaded.items():
        for use, entry in uses.items():
            absent = {SCALE, HISTORY} - entry.keys()
            problems += [f"missing: {_key(fqn, use)}{suffix}" for suffix in sorted(absent)]
            problems += _history_problems(_key(fqn, use), parameters[fqn], entry)
            if len({tensor.shape[-1] for tensor in entry.values()}) > 1:
                problems.append(f"shape: {_key(fqn, use)} has a scale or history more")
    return loaded, problems


def _history_problems(key: str, parameter: Tensor, entry: Mapping[str, Tensor]) -> Iterable[str]:
    for state in states_by_weight.get(parameter, ()):
        kept = state.rule.history_len
        steps = entry[HISTORY].shape[0] if HISTORY in entry else kept
        if steps != kept:
            yield f"shape: {key}{HISTORY} has {steps} steps, the recipe keeps {kept}"


def _key(fqn: str, use: int) -> str:
    return f"{fqn}#{use}" if use else fqn


def named_states(model: nn.Module) -> Iterator[tuple[str, ScalingState, int]]:
    """Every (key, state, site index) of a model, for inspection."""
    for fqn, parameter in model.named_parameters():
        for state in states_by_weight.get(parameter, ()):
            for index, (weight, use) in enumerate(zip(state.weights(), state.uses(), strict=True)):
                if weight is parameter:
                    yield _key(fqn, use), state, index


def site_of(key: str) -> str:
    """The name of a site whose state has this key: ``wq.weight#1`` is ``wq#1``."""
    fqn, mark, use = key.partition("#")
    return f"{fqn.removesuffix('.weight')}{mark}{use}"
