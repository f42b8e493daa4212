"""Scales that a model keeps for its inputs: what calibration or training has left.

Other servers read ``input_scale``, which divides. In float32 its reciprocal is not always the scale
that it was made of, and a checkpoint has no place for those of layers that it does not quantize. So
a file of our own holds the scaling state as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..frozen import is_frozen, linears
from ..recipe import RECIPES, Granularity, Operand, Scaling
from ..scaling import HISTORY, SCALE, slots_of
from ..states import GivenScales, parked_entries, states_by_weight


def input_scales(model: nn.Module) -> dict[str, Tensor]:
    """``f32[1]``, by which the input of a tensorwise frozen module is divided, by its name.

    Where a module is used several times, the largest, which clips nothing. Modules that have none,
    or do not know that of every use, are not in it.
    """
    found = {}
    for name, module in linears(model):
        weight = module._parameters.get("weight")
        is_tensorwise = is_frozen(module) and module.granularity is Granularity.TENSOR
        scales = _scales_of_input(weight) if is_tensorwise and weight is not None else []
        if scales and all(scale > 0 for scale in scales):
            found[name] = torch.stack(scales).amin().float().reciprocal().reshape(1).cpu()
    return found


def _scales_of_input(weight: Tensor) -> list[Tensor]:
    """That of each use of a weight, by the state that was updated most often."""
    states = sorted(states_by_weight.get(weight, ()), key=lambda state: -state.updates)
    if not states:
        loaded = parked_entries.get(weight, {}).values()
        return [entry[SCALE][Operand.INPUT.value] for entry in loaded]
    state = states[0]
    return [
        state.scale[slots_of(state.leaders[index]).start + Operand.INPUT.value]
        for index, known in enumerate(state.weights())
        if known is weight and state.recipes[index].scaling is not Scaling.CURRENT
    ]


def state_from_scales(model: nn.Module, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The scaling state of a model for which a checkpoint has nothing but ``input_scale``.

    Every other ``nn.Linear`` gets one that knows no scale, since a state has to be whole.
    """
    if not scales:
        return {}
    state: dict[str, Tensor] = {}
    keys = {id(parameter): key for key, parameter in model.named_parameters()}  # tied: the first
    for name, module in linears(model):
        key = keys.get(id(module._parameters.get("weight")))
        if key is None:  # a weight that something computes at every call
            continue
        scale = torch.zeros(3, dtype=torch.float32)
        history = torch.zeros(RECIPES["delayed"].history_len, 3, dtype=torch.float32)
        if name in scales:
            scale[Operand.INPUT.value] = scales[name].reciprocal()
        state |= {key + SCALE: scale, key + HISTORY: history}
    return state


def for_all_uses(model: nn.Module) -> None:
    """Let what ``state_from_scales`` made, and ``load_state_dict`` has loaded, be for every use of
    a weight, and be enough for graphs that multiply with other weights as well.
    """
    for parameter in model.parameters():
        if parameter in parked_entries:
            parked_entries[parameter] = GivenScales(parked_entries[parameter])


def to_json(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """A scaling state as numbers, which float32 survives."""
    return {key: tensor.tolist() for key, tensor in state.items()}


def from_json(held: Mapping[str, Any], file: str) -> dict[str, Tensor]:
    """What ``to_json`` was given; CheckpointError if it is nothing of that kind."""
    try:
        return {key: torch.tensor(numbers, dtype=torch.float32) for key, numbers in held.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{file} does not hold a scaling state ({error}); save the checkpoint again"
        ) from error
