"""Magnitudes, sorted into bins of equal width in octaves: no range has to be known beforehand."""

from __future__ import annotations

import torch
from torch import Tensor

OCTAVES = range(-160, 129)  # below float32's smallest denormal, 2^-149, to above its largest


def places_of(magnitudes: Tensor, per_octave: int) -> Tensor:
    """The bin of every magnitude that is finite and not zero, ``i64[n]``, of float ``[...]``.

    Bin ``i`` holds those from ``2 ** (OCTAVES[0] + i / per_octave)`` up to where the next begins.
    """
    places = (magnitudes.log2() - OCTAVES[0]) * per_octave
    return places[places.isfinite()].long()


class Histogram:
    """How often magnitudes occur, over all that was added, in ``PER_OCTAVE`` bins to an octave.

    A bin is 1.1 % wide: E4M3 has six to twelve of them between a number and the next.
    """

    PER_OCTAVE = 64

    def __init__(self, device: torch.device) -> None:
        bins = self.PER_OCTAVE * len(OCTAVES)
        self._counts = torch.zeros(bins, dtype=torch.int64, device=device)
        self._sums = torch.zeros(bins, dtype=torch.float64, device=device)
        self.elements = 0  # zeros, too

    def add(self, x: Tensor) -> None:
        """Count a value, float ``[...]``; what is not finite is left out of the bins."""
        magnitudes = x.detach().float().abs().flatten()
        places = places_of(magnitudes, self.PER_OCTAVE)
        there = magnitudes[(magnitudes > 0) & magnitudes.isfinite()].double()
        self._counts += places.bincount(minlength=len(self._counts))
        self._sums += places.bincount(there, minlength=len(self._sums))
        self.elements += x.numel()

    def bins(self) -> tuple[Tensor, Tensor]:
        """The mean magnitude of every bin that is not empty, in ascending order, and how many it
        holds: ``f64[n]`` each, on the CPU.
        """
        counts, sums = self._counts.cpu().double(), self._sums.cpu()
        used = counts > 0
        return sums[used] / counts[used], counts[used]
