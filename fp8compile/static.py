"""Static scales: expressions in the weights' statistics, evaluated at a graph's first call.

The statistics of a list of weights are taken once, and again when something other than an optimizer
has written to them, such as ``load_state_dict``.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor

from .moments import Statistics, evaluator
from .ops import LARGEST_SCALE
from .scaling import ScalingState


class StaticScales:
    """The scales of one graph.

    ``scales``: an expression per slot that the graph reads. ``definitions``: of the symbols in
    them, in order. ``inputs``: the positions of the graph's inputs whose statistics they are in.
    """

    def __init__(
        self,
        scales: Mapping[int, sympy.Expr],
        definitions: Mapping[sympy.Symbol, sympy.Expr],
        inputs: Mapping[int, Statistics],
    ) -> None:
        self._slots = list(scales)
        self._symbols, self._evaluate = evaluator(list(scales.values()), definitions)
        self._inputs = {
            position: statistics
            for position, statistics in inputs.items()
            if not statistics.symbols.isdisjoint(self._symbols)
        }
        self._filled: weakref.WeakSet[ScalingState] = weakref.WeakSet()

    def scale_of(self, state: ScalingState, args: Sequence[Any]) -> Tensor:
        """The scales to call the graph with, ``f32[slots]``: the state's own.

        Those that it does not know yet are derived from the call's arguments, and all where its
        weights have been written to. What was loaded, or derived for another graph, stays.
        """
        if state not in self._filled or state.weights_changed:
            state.fill(self.derived(args, len(state.scale)))
            self._filled.add(state)
        return state.scale

    @torch.no_grad()
    def derived(self, args: Sequence[Any], slots: int) -> Tensor:
        """The scales for these arguments of a call, ``f32[slots]`` on the CPU.

        0, which lets a cast find its own, where the graph reads none, or where the expression comes
        to no positive number, as behind weights that are all zero.
        """
        known: dict[sympy.Symbol, float] = {}
        measured = [_measured(args[position]) for position in self._inputs]
        rows = torch.stack(measured).tolist() if measured else []  # one wait for the device
        for statistics, numbers in zip(self._inputs.values(), rows, strict=True):
            known |= zip(statistics.ordered, numbers, strict=True)
        scale = torch.zeros(slots, dtype=torch.float32)
        found = self._evaluate(*(known[symbol] for symbol in self._symbols))
        for slot, number in zip(self._slots, found, strict=True):
            scale[slot] = min(number, LARGEST_SCALE) if 0 < number < float("inf") else 0.0
        return scale


def _measured(tensor: Tensor) -> Tensor:
    """Mean, variance and amax, ``f32[3]``."""
    if not tensor.numel():
        return torch.zeros(3, dtype=torch.float32, device=tensor.device)
    x = tensor.detach().float()
    return torch.stack([x.mean(), x.var(correction=0), x.abs().max()])
