"""Find the scales of static scaling: expressions in the statistics of the graph's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sympy
import torch
from torch import fx

from ..formats import Format
from ..internals import is_tangent
from ..ir import QUANTIZE, args_of, aten, emit
from ..moments import Analysis, Statistics, analyse, elements, is_floating, largest_of, sizes
from ..ops import LARGEST_SCALE
from ..static import StaticScales

# How many times the largest value that is expected fits into a format. Precision does not suffer
# until small values underflow: with margins of 4 to 512 for E4M3, and of 4 to 2^20 for E5M2, a
# Llama, a GPT and an MLP have the same SQNR at initialisation, up to 0.5 dB. These lie in between,
# for what training and a loss outside of the graph may do to the values. Of E4M3's, 256 also is
# fast: most values then lie between 1/16 and 1, whose exponents are 0b0011 to 0b0110. At its power
# limit an H100 multiplies them 3 to 5 % faster than those between 1/2 and 4 (0b0110 to 0b1000),
# where more bits change from one value to the next; a margin of 32 would put them there.
MARGIN = {Format.E4M3: 256, Format.E5M2: 1024}
STATIC_SCALES = "fp8_static_scales"  # key in a graph's meta


def derive_scales(gm: fx.GraphModule, *, inputs: Mapping[fx.Node, int]) -> int:
    """Find the largest magnitude that every cast has to expect, without running the graph.

    Before:
        x_q : (...) = fp8.quantize(x, scale, 0, e4m3)
        w_q : (...) = fp8.quantize(w, scale, 1, e4m3...
        tangents_1_q : (...) = fp8.quantize(tangents_1, scale, 2, e5m2...
    After:
        x_q : (...) = fp8.quantize(x, scale, 0, e4m3)  # amax = 3.53
        w_q : (...) = fp8.quantize(w, scale, 1, e4m3...  # amax = amax_w
        tangents_1_abs : bf16[16, 64] = aten.abs(tangents_1)
        tangents_1_amax : bf16[] = aten.amax(tangents_1_abs)
        tangents_1_ratio : f32[] = aten.div.Tensor(tangents_1_amax_f32, 0.0625)
        scale_ratio : f32[12] = aten.div.Tensor(scale, tangents_1_ratio)
        scale_bwd : f32[12] = aten.minimum(scale_ratio, scale_most)
        tangents_1_q : (...) = fp8.quantize(tangents_1, scale_bwd, 2, e5m2...  # amax = 0.0625

    Gradients are proportional to those that enter the graph, of which nothing is known: the loss
    may be a mean or a sum, scaled for float16, or a part of many. So the amax of those is found,
    and the scales of all that is computed from them divided by how much larger it is than expected.

    ``inputs``: the graph's inputs whose mean, variance and amax are taken when it is called, with
    their positions among the arguments of the call.

    Requires: share_casts, so that every value has one cast.
    Ensures: ``gm.meta["fp8_static_scales"]`` is a StaticScales with an expression for each slot:
        ``FP8_MAX / (MARGIN amax)``, of the largest amax where several casts use it.
    Leaves alone: casts that find their own scale.
    Numerics: quantizes (with the scales that it finds).
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
    scales = {slot: _scale(fmt, largest_of(amaxes)) for (slot, fmt), amaxes in found.items()}
    _follow_tangents(gm, casts, moments)
    by_position = {inputs[node]: known for node, known in statistics.items()}
    gm.meta[STATIC_SCALES] = StaticScales(scales, moments.definitions, by_position)
    return len(new)


def _scale(fmt: Format, amax: sympy.Expr) -> sympy.Expr:
    """0, as of what has no amax yet, where all is zero by what it is computed from, such as the
    gradient of ``x`` in ``x - x``.
    """
    return sympy.Integer(0) if amax.is_zero else sympy.Rational(fmt.max) / (MARGIN[fmt] * amax)


def _follow_tangents(gm: fx.GraphModule, casts: Sequence[fx.Node], moments: Analysis) -> None:
    """Divide the scales of gradients by the size of those that enter the graph, each by that of
    those it is computed from: the losses of two heads may be of any sizes.
    """
    behind = _tangents_behind(gm)
    of_slot: dict[int, frozenset[fx.Node]] = {}  # casts with one slot have one scale
    for cast in casts:
        slot = args_of(cast)[2]
        of_slot[slot] = of_slot.get(slot, frozenset()) | behind[cast]
    gradients: dict[frozenset[fx.Node], list[fx.Node]] = {}
    for cast in casts:
        if group := of_slot[args_of(cast)[2]]:
            gradients.setdefault(group, []).append(cast)
    if not gradients:
        return
    tangents = [node for node in behind if any(node in group for group in gradients)]
    like = next(iter(gradients.values()))[0]
    scale = args_of(like)[1]
    with gm.graph.inserting_before(like):
        ratios = {tangent: _ratio(gm.graph, tangent, moments) for tangent in tangents}
        # Finite where all gradients are zero; where one is not finite, it is not positive, and each
        # cast finds its own.
        most = emit(gm.graph, aten.full.default, ([], LARGEST_SCALE), "scale_most", like)
        for group, followers in gradients.items():
            largest = _largest(gm.graph, [ratios[t] for t in tangents if t in group])
            ratio = emit(gm.graph, aten.div.Tensor, (scale, largest), "scale_ratio", like=like)
            followed = emit(gm.graph, aten.minimum.default, (ratio, most), "scale_bwd", ratio)
            for cast in followers:
                cast.update_arg(1, followed)


def _tangents_behind(gm: fx.GraphModule) -> dict[fx.Node, frozenset[fx.Node]]:
    """The gradients that enter the graph, of what has elements, which a value is computed from."""
    found: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in gm.graph.nodes:
        enters = is_tangent(node) and is_floating(node) and 0 not in sizes(node)
        behind = [found[each] for each in node.all_input_nodes]
        found[node] = frozenset([node] if enters else []).union(*behind)
    return found


def _largest(graph: fx.Graph, ratios: Sequence[fx.Node]) -> fx.Node:
    largest, *others = ratios
    for ratio in others:
        args = (largest, ratio)
        largest = emit(graph, aten.maximum.default, args, f"{ratio}_max", like=ratio)
    return largest


def _ratio(graph: fx.Graph, tangent: fx.Node, moments: Analysis) -> fx.Node:
    """How many times as large as expected a gradient is that enters the graph, ``f32[]``."""
    expected = float(moments.largest(moments.of(tangent), elements(tangent)))
    magnitude = emit(graph, aten.abs.default, (tangent,), f"{tangent}_abs", tangent)
    amax = emit(graph, aten.amax.default, (magnitude,), f"{tangent}_amax", tangent)
    args = (amax, torch.float32)
    wide = emit(graph, torch.ops.prims.convert_element_type.default, args, f"{amax}_f32", tangent)
    return emit(graph, aten.div.Tensor, (wide, expected), f"{tangent}_ratio", tangent)
