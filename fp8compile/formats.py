"""The two FP8 formats, as values.

E4M3 and E5M2 follow the OCP 8-bit floating point specification (arXiv 2209.05433, table 1).
"""

from __future__ import annotations

from enum import Enum

import torch


class Format(Enum):
    """An FP8 number format. The value is its torch dtype; ``str()`` is its name."""

    E4M3 = torch.float8_e4m3fn
    E5M2 = torch.float8_e5m2

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype that stores this format."""
        return self.value

    @property
    def max(self) -> float:
        """The largest finite value: 448 for E4M3, 57344 for E5M2."""
        return float(torch.finfo(self.value).max)

    @classmethod
    def of(cls, dtype: torch.dtype) -> Format:
        """The format stored as ``dtype``; ValueError if it is no FP8 dtype."""
        return cls(dtype)

    def __str__(self) -> str:
        return self.name.lower()


FP8_DTYPES = tuple(f.dtype for f in Format)
