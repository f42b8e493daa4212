"""What a scaling state holds at the end of a step, on its way from the device to a Monitor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import Format
from ..named_state import Events, named_states, site_of
from ..recipe import Operand, Scaling
from ..records import Record
from ..scaling import ScalingState, slots_of
from ..states import states_of


@dataclass(frozen=True)
class Slot:
    """Where an edge lies in the flat tensors of a state."""

    site: str
    operand: str
    format: Format
    index: int


@dataclass(frozen=True)
class Sample:
    """What a state held at the end of a step: ``values``, ``i32[5, slots]``, are the bits of scale
    and amax, and the events; on the host once ``arrived``, a CUDA event, has happened.
    """

    step: int
    slots: Sequence[Slot]
    has_amax: bool
    values: Tensor
    arrived: Any = None

    @property
    def is_on_its_way(self) -> bool:
        return self.arrived is not None

    def on_host(self) -> Sample:
        """The same once it has arrived, in memory that is not pinned."""
        if self.arrived is None:
            return self
        self.arrived.synchronize()
        return replace(self, values=self.values.clone(), arrived=None)

    def records(self) -> Iterator[Record]:
        """A record for every edge that has been cast so far."""
        scales, largest = self.values[:2].view(torch.float32).tolist()
        counts = self.values[2:].t().tolist()
        for slot in self.slots:
            scale, amax, events = scales[slot.index], largest[slot.index], counts[slot.index]
            if scale or amax or any(events):
                yield Record(
                    self.step,
                    slot.site,
                    slot.operand,
                    slot.format,
                    amax=(amax or None) if self.has_amax else None,
                    scale=scale or None,
                    events=Events(*events) if self.has_amax else None,
                )


@dataclass(frozen=True)
class Looked:
    """The records of ``Monitor.measure``, as a sample."""

    found: tuple[Record, ...]
    is_on_its_way = False

    def on_host(self) -> Looked:
        return self

    def records(self) -> Iterator[Record]:
        return iter(self.found)


@torch.no_grad()
def sample_of(state: ScalingState, step: int, slots: Sequence[Slot]) -> Sample:
    """Start one copy to the host, behind what the device still has to do."""
    amax = state.history[state.position - 1]  # what this step has written
    values = torch.cat([torch.stack([state.scale, amax]).view(torch.int32), state.events])
    arrived = None
    if values.is_cuda:
        values = values.to("cpu", non_blocking=True)  # into pinned memory
        arrived = torch.cuda.current_stream(state.device).record_event()
    return Sample(step, slots, not is_static(state), values, arrived)


def slots_in(state: ScalingState, model: nn.Module) -> list[Slot]:
    """The edges of a state whose scales it keeps, and that the model has a name for."""
    return [
        Slot(site_of(key), str(operand), recipe.format_of(operand), slots_of(site).start + i)
        for key, owner, site in named_states(model)
        if owner is state and (recipe := state.recipes[site]).scaling is not Scaling.CURRENT
        for i, operand in enumerate(Operand)
    ]


def is_static(state: ScalingState) -> bool:
    """Whether its scales stay as they are."""
    return state.rule.scaling is Scaling.STATIC


def what_is_missing(model: nn.Module) -> str | None:
    """Why nothing, or not everything, can be recorded of a model that is trained."""
    states = states_of(model)
    if not states:
        return (
            "the model has no scaling state, so its amax and scales cannot be recorded: it has not "
            'run with backend="fp8", or its recipe (such as current, rowwise, blockwise or mx) '
            "finds scales in the tensors and keeps none"
        )
    if any(map(is_static, states)):
        return "static scaling keeps scales, but no amax and no events"
    current = {
        site_of(key)
        for key, state, site in named_states(model)
        if state.recipes[site].scaling is Scaling.CURRENT
    }
    if current:
        return f"the recipes of {', '.join(sorted(current))} keep no scales: they are not recorded"
    return None
