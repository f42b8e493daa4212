"""Small pieces of a kernel's text."""

from __future__ import annotations

import sympy

from ..ops import ALIGNMENT
from .values import expr_text


def named(name: str, letter: str) -> str:
    """A variable's name for one set of rows; "" stands for all rows."""
    return f"{name}_{letter}" if letter else name


def plus(start: sympy.Expr, unit: int = 1) -> str:
    """What is added to a column, or to a number of units of columns, of a part of a cast."""
    return "" if start == 0 else f" + {expr_text(start / unit)}"


def padded_text(size: str, multiple: int = ALIGNMENT) -> str:
    """The length of a row of an FP8 copy: what lies behind the values is zero."""
    return f"(({size} + {multiple - 1}) // {multiple} * {multiple})"
