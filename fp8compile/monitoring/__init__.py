"""Watch the numbers of a training: amax, scales, events, and what casts lose."""

from .monitor import Monitor

__all__ = ["Monitor"]
