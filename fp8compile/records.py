"""What a Monitor records: a public value, and the columns of its file."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .formats import Format
from .named_state import Events


@dataclass(frozen=True, slots=True)
class Record:
    """One edge in one step: the operand ``operand`` of the GEMMs of a site.

    ``step``: optimizer steps ended so far. ``site``: its name; sites that take the same input share
    their scales, and stand under the name of the first. ``operand``: input, weight or grad_output.
    ``format``: what it is cast to. ``amax``: the largest magnitude in that step; None if it was not
    finite, nothing was cast, or the scaling is static. ``scale``: what the next step multiplies
    with before the cast; None if that cast finds its own. A static one of a gradient is that for
    the size expected of those that enter the graph, and follows them. ``events``: how often
    something went wrong so far, as in ``fp8compile.events``; None if nobody counts.

    The others are known only of what ``Monitor.measure`` has looked at; its ``amax`` is that of the
    value it saw, and its ``scale`` the one that it cast with, None where there are many.
    ``saturated_share``: of the elements, that are clipped. ``underflowed_share``: of those that are
    not zero, that become zero. ``sqnr_db``: power of the value over that of the cast's error, in
    dB; infinite if the cast is exact, None if the value is all zeros or not finite.
    """

    step: int
    site: str
    operand: str
    format: Format
    amax: float | None = None
    scale: float | None = None
    events: Events | None = None
    saturated_share: float | None = None
    underflowed_share: float | None = None
    sqnr_db: float | None = None

    @property
    def headroom(self) -> float | None:
        """How many octaves the amax lies below the largest value that the scale lets through:
        ``log2(FP8_MAX / (amax * scale))``. None if either is not known.
        """
        if not self.amax or self.scale is None:
            return None
        return math.log2(self.format.max) - math.log2(self.amax) - math.log2(self.scale)

    @property
    def is_measured(self) -> bool:
        """Whether it is of ``Monitor.measure``."""
        return self.saturated_share is not None

    def numbers(self) -> dict[str, float]:
        """What is known, by name; events as counts."""
        counts = {} if self.events is None else self.events._asdict()
        found = {name: getattr(self, name) for name in _VALUES} | counts
        return {name: value for name, value in found.items() if value is not None}


_VALUES = ("amax", "scale", "saturated_share", "underflowed_share", "sqnr_db")
COLUMNS = ("step", "site", "operand", "format", "amax", "scale", *Events._fields, *_VALUES[2:])
