"""What a compiled graph does at a call: find the scaling state of the weights it is called with."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .ir import Site
from .modules import calling_replicas, owners_of
from .recipe import Operand, Recipe, Scaling
from .scaling import ScalingState
from .states import find_state
from .static import StaticScales


class CompiledGraph:
    """A compiled graph together with the way to its scaling state."""

    def __init__(
        self,
        run: Callable[..., Any],
        sites: Sequence[Site],
        recipes: Sequence[Recipe],
        device: torch.device,
        example_inputs: Sequence[Any],
        static: StaticScales | None = None,
    ) -> None:
        self._run = run
        self._recipes = recipes
        self._static = static
        self._device = device
        # Only a parameter can be recognised again; other weights share the graph's own state.
        self._weights = [
            s.weight if s.weight is not None and is_parameter(example_inputs[s.weight]) else None
            for s in sites
        ]
        self._leaders = [site.leader_of(Operand.WEIGHT) for site in sites]
        self._trainable = [
            i for i, x in enumerate(example_inputs) if is_parameter(x) and x.requires_grad
        ]
        self._state: ScalingState | None = None

    def __call__(self, *args: Any) -> Any:
        state = self.state_of(args)
        if state.rule.scaling is Scaling.STATIC:
            scale = state.scale if self._static is None else self._static.scale_of(state, args)
            return self._run(*args, scale)
        if not torch.is_grad_enabled():
            return self._run(*args, *state.reading())
        training = _in_training_mode(state)
        if not state.observed:
            state.stepped_by = frozenset(id(args[i]) for i in self._trainable)
            state.replicas = calling_replicas()
        if training:
            return self._run(*args, *state.observing())
        state.unobserved = bool(self._trainable)
        return self._run(*args, *state.reading())

    def state_of(self, args: Sequence[Any]) -> ScalingState:
        """The state of the weights among the arguments of a call."""
        weights = [None if i is None else args[i] for i in self._weights]
        # Another thread may replace it meanwhile: one graph serves many modules.
        state = self._state
        if state is None or not state.belongs_to(weights, self._recipes):
            state = find_state(weights, self._recipes, self._device, self._leaders)
            self._state = state
        if state.owners is None:
            owners = owners_of([w for w in weights if w is not None])
            state.owners = [weakref.ref(owner) for owner in owners]
        return state


def _in_training_mode(state: ScalingState) -> bool:
    """Whether a module with one of the weights is: a frozen part may be in eval mode for good."""
    owners = [owner for ref in state.owners or () if (owner := ref()) is not None]
    return not owners or any(owner.training for owner in owners)


def is_parameter(value: Any) -> bool:
    return isinstance(value, nn.Parameter)
