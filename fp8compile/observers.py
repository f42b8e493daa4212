"""Observers: the amax that a static scale shall have, from all that an operand held.

``max`` is the largest magnitude. ``percentile`` is the one that all but a small share of elements
do not exceed. ``mse`` is the one that loses least: the amax for which the cast's mean squared error
over the histogram is smallest, with saturation, rounding and underflow as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .formats import Format
from .histogram import Histogram
from .ops import current_scale

MAX, PERCENTILE, MSE = OBSERVERS = ("max", "percentile", "mse")
# Where ``mse`` looks: from one octave above the largest magnitude, for the grid may lie better
# there, to where all but the largest values that float32 can tell apart from it are clipped.
_OCTAVES = range(1, -24, -1)
_STEPS = Histogram.PER_OCTAVE  # candidates to an octave


@dataclass
class Observed:
    """An operand, over all batches; ``histogram`` is None if only its amax is wanted."""

    histogram: Histogram | None = None
    _amax: list[Tensor] = field(default_factory=list)  # on the device: nothing waits for them

    def add(self, x: Tensor) -> None:
        """Look at a value, float ``[...]``."""
        if not x.numel():
            return
        amax = x.detach().float().abs().amax()  # NaN, if one is
        self._amax = [torch.maximum(self._amax[0], amax) if self._amax else amax]
        if self.histogram is not None:
            self.histogram.add(x)

    @property
    def amax(self) -> float:
        """The largest magnitude, 0 if nothing was seen, NaN or infinite if anything was that."""
        return float(self._amax[0]) if self._amax else 0.0


def chosen_amax(seen: Observed, observer: str, percentile: float, fmt: Format) -> float:
    """The amax that an observer chooses for an operand that is cast to ``fmt``."""
    if observer == MAX or seen.histogram is None or not seen.amax:
        return seen.amax
    if observer == PERCENTILE:
        return min(seen.amax, quantile(seen.histogram, percentile / 100))
    return least_squares(seen.histogram, seen.amax, fmt)


def quantile(histogram: Histogram, share: float) -> float:
    """The magnitude that a share of all elements does not exceed, to the width of a bin (1.1 %)."""
    values, counts = histogram.bins()
    zeros = histogram.elements - counts.sum()
    if share * histogram.elements <= zeros:  # nothing but zeros: the smallest that is none
        return float(values[0])
    place = torch.searchsorted(zeros + counts.cumsum(0), share * histogram.elements)
    return float(values[min(int(place), len(values) - 1)])


def least_squares(histogram: Histogram, amax: float, fmt: Format) -> float:
    """The amax whose scale loses least: the smallest mean squared error of the cast to ``fmt``."""
    values, counts = histogram.bins()
    best, least = amax, float(_errors(values, counts, values.new_tensor([amax]), fmt)[0])
    for octave in _OCTAVES:
        steps = torch.arange(_STEPS, dtype=torch.float64) / _STEPS
        candidates = amax * 2.0 ** (octave - steps)
        candidates = candidates[candidates < torch.finfo(torch.float32).max]
        errors = _errors(values, counts, candidates, fmt)
        if len(errors) and float(errors.min()) < least:
            best, least = float(candidates[errors.argmin()]), float(errors.min())
    return best


def _errors(values: Tensor, counts: Tensor, amaxes: Tensor, fmt: Format) -> Tensor:
    """The squared error of all values for each amax, ``f64[amaxes]``."""
    scale = current_scale(amaxes.float(), fmt.max)[:, None]
    scaled = (values.float() * scale).clamp(-fmt.max, fmt.max)
    cast = scaled.to(fmt.dtype).double() / scale.double()
    return ((cast - values).square() * counts).sum(1)
