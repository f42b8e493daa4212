"""Means and variances of a graph's tensors, as sympy expressions in its weights' statistics.

``gaussian`` has the algebra, ``walk`` goes over a graph, ``pointwise``, ``products`` and
``tensors`` have a rule for each operator.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from .gaussian import evaluator, largest_of
from .pointwise import POINTWISE
from .products import PRODUCTS
from .tensors import TENSORS
from .walk import Analysis, Statistics, elements, is_floating, sizes

__all__ = [
    "RULES",
    "Analysis",
    "Statistics",
    "analyse",
    "elements",
    "evaluator",
    "is_floating",
    "largest_of",
    "sizes",
]

RULES = {**POINTWISE, **PRODUCTS, **TENSORS}


def analyse(gm: fx.GraphModule, statistics: Mapping[fx.Node, Statistics] | None = None) -> Analysis:
    """The moments of all tensors of an ATen graph, see ``Analysis``."""
    return Analysis(gm, statistics or {}, RULES)
