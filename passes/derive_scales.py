"""Find the scales of static scaling: expressions in the statistics of the graph's weights."""

from __future__ import annotations

from collections.abc import Mapping

import sympy
from torch import fx

from ..formats import Format
from ..ir import QUANTIZE, args_of
from ..moments import Statistics, analyse, elements, largest_of
from ..static import StaticScales

# How many times the largest value that is expected fits into a format. Precision does not suffer
# until small values underflow: with margins of 4 to 512 for E4M3, and of 4 to 2^20 for E5M2, a
# Llama, a GPT and an MLP have the same SQNR at initialisation, up to 0.5 dB. These lie in between,
# for what training and a loss outside of the graph may do to the values.
MARGIN = {Format.E4M3: 32, Format.E5M2: 1024}
STATIC_SCALES = "fp8_static_scales"  # key in a graph's meta


def derive_scales(gm: fx.GraphModule, *, inputs: Mapping[fx.Node, int]) -> int:
    """Find the largest magnitude that every cast has to expect, without running the graph.

    Before:
        x_q : (...) = fp8.quantize(x, scale, 0, e4m3)
        w_q : (...) = fp8.quantize(w, scale, 1, e4m3...
    After:
        x_q : (...) = fp8.quantize(x, scale, 0, e4m3)  # amax = 3.53
        w_q : (...) = fp8.quantize(w, scale, 1, e4m3...  # amax = amax_w

    ``inputs``: the graph's inputs whose mean, variance and amax are taken when it is called, with
    their positions among the arguments of the call.

    Requires: share_casts, so that every value has one cast.
    Ensures: ``gm.meta["fp8_static_scales"]`` is a StaticScales with an expression for each slot:
        ``FP8_MAX / (MARGIN amax)``, of the largest amax where several casts use it.
    Leaves alone: the graph; casts that find their own scale.
    Numerics: exact.
    """
    casts = [n for n in gm.graph.nodes if n.target is QUANTIZE and args_of(n)[1] is not None]
    new = [cast for cast in casts if "amax" not in cast.meta]
    if not new:
        return 0
    statistics = {node: Statistics(node.name) for node in inputs}
    moments = analyse(gm, statistics)
    found: dict[tuple[int, Format], list[sympy.Expr]] = {}
    for cast in casts:
        value, _, slot, dtype = args_of(cast)[:4]
        cast.meta["amax"] = moments.largest(moments.of(value), elements(value))
        found.setdefault((slot, Format.of(dtype)), []).append(cast.meta["amax"])
    scales = {
        slot: sympy.Rational(fmt.max) / (MARGIN[fmt] * largest_of(amaxes))
        for (slot, fmt), amaxes in found.items()
    }
    by_position = {inputs[node]: known for node, known in statistics.items()}
    gm.meta[STATIC_SCALES] = StaticScales(scales, moments.definitions, by_position)
    return len(new)
