"""What the GEMMs of each site, and the casts they need in FP8, cost on a device.

Sites that take the same input, under one recipe, are decided together: they share its cast, and may
be merged.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import sympy
import torch
from torch import fx

from ..cost import COSTS, TOKENS, Cast, Device, GemmCost, GemmWork, Prediction, Size, predict
from ..ir import (
    RESHAPES,
    SCALED_MMS,
    Edge,
    GemmInfo,
    args_of,
    aten,
    base_of,
    gemms,
    is_backward,
    operands,
    size_hint,
    value_key,
)
from ..recipe import Gemm, Granularity, Operand, Recipe, Scaling

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# These move a value, or copy it at most: what computes it stands before them.
_MOVES = (
    *RESHAPES,
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.clone.default,
    aten.squeeze.dim,
    aten.unsqueeze.default,
)

_ROW_MAJOR = True  # among the copies of a value
Group = tuple[fx.Node, ...]  # the GEMMs of the sites that take one input


# Of the rate of tensorwise FP8 GEMMs, reached on an H100 in the sizes of a Llama-3-8B layer.
_RATES = {
    Granularity.TENSOR: 1.0,
    Granularity.ROW: 0.95,
    Granularity.BLOCK_1X128: 0.78,
    Granularity.BLOCK_128X128: 0.78,
    Granularity.BLOCK_1X32: 0.16,
}


def predict_groups(
    gm: fx.GraphModule,
    device: Device,
    *,
    recipe: Recipe | None = None,
    weights_cast_once: bool = False,
) -> dict[Group, Prediction]:
    """Predict the GEMMs that may be FP8, by groups of sites that share an input and a recipe.

    ``recipe`` is that of sites that have none of their own; without any, scaling is delayed.
    ``weights_cast_once``: casts of weights are not part of a call.
    What is found for each GEMM, also for those that stay in high precision, goes into
    ``gm.meta["fp8_costs"]``, under its site's index and its role.
    """
    costs: dict[tuple[int, Gemm], GemmCost] = gm.meta.setdefault(COSTS, {})
    candidates: dict[fx.Node, _Sized] = {}
    for node, info in gemms(gm):
        sized = _sized(node, info, recipe)
        if sized is not None and info.is_fp8:
            candidates[node] = sized
        elif sized is not None:
            (high_us,) = predict((sized.work,), sized.tokens, device).high_us
            costs.setdefault(sized.key, GemmCost(device.name, high_us))
    _add_casts(candidates, weights_cast_once)
    predictions: dict[Group, Prediction] = {}
    for group in _groups(candidates):
        works = tuple(candidates[node].work for node in group)
        first = candidates[group[0]]
        found = predictions[group] = predict(works, first.tokens, _as_used(device, first.recipe))
        for node, high_us, fp8_us in zip(group, found.high_us, found.fp8_us, strict=True):
            cost = GemmCost(device.name, high_us, fp8_us, found.pays_from)
            costs[candidates[node].key] = cost
    return predictions


def current_costs(
    gm: fx.GraphModule,
    device: Device,
    *,
    recipe: Recipe | None = None,
    weights_cast_once: bool = False,
) -> dict[fx.Node, tuple[float, float]]:
    """What current scaling would cost beside delayed, for both operands of every FP8 GEMM that
    anything is predicted of: as a share of the time of all GEMMs that take the same value in the
    same role, forward and backward.
    """
    candidates = {
        node: sized
        for node, info in gemms(gm)
        if info.is_fp8 and (sized := _sized(node, info, recipe)) is not None
    }
    alone = {  # before any has a cast
        node: sum(predict((each.work,), each.tokens, device).fp8_us)
        for node, each in candidates.items()
    }
    added: dict[object, float] = defaultdict(float)
    time: dict[object, float] = defaultdict(float)
    for quantized in _quantized(candidates):
        tokens = candidates[quantized.takers[0]].tokens
        if not (weights_cast_once and quantized.role is Operand.WEIGHT):
            first = not quantized.again  # which keeps the scale
            current, delayed = (_cast(replace(quantized, rereads=r)) for r in (first, False))
            added[quantized.key] += current.microseconds(tokens, device)
            added[quantized.key] -= delayed.microseconds(tokens, device)
        time[quantized.key] += sum(alone[node] for node in quantized.takers)
    shares = {key: added[key] / time[key] for key in time}
    return {
        node: (shares[left], shares[right])
        for node, each in candidates.items()
        for left, right in [_operand_keys(node, each)]
    }


def _as_used(device: Device, recipe: Recipe | None) -> Device:
    """The device with the rate that its FP8 GEMMs have under a recipe."""
    if recipe is None:
        return device
    rate = min(_RATES[recipe.granularity_of(operand)] for operand in Operand)
    return replace(device, fp8_flops=rate * device.fp8_flops)


@dataclass
class _Sized:
    """A GEMM with the numbers that stand for its sizes, and which of them counts tokens."""

    info: GemmInfo
    sizes: dict[str, int]
    recipe: Recipe | None
    casts: list[Cast] = field(default_factory=list)

    @property
    def key(self) -> tuple[int, Gemm]:
        return self.info.site.index, self.info.gemm

    @property
    def token_axis(self) -> str:
        """Tokens are the rows of input and grad_output, which wgrad contracts over."""
        if self.info.gemm is Gemm.WGRAD:
            return "k"
        return "n" if self.info.left.operand is Operand.WEIGHT else "m"

    @property
    def tokens(self) -> int:
        return self.sizes[self.token_axis]

    @property
    def flops(self) -> int:
        return 2 * self.sizes["m"] * self.sizes["n"] * self.sizes["k"]

    def size(self, axis: str) -> Size:
        return TOKENS if axis == self.token_axis else sympy.Integer(self.sizes[axis])

    @property
    def work(self) -> GemmWork:
        m, n, k = (self.size(axis) for axis in "mnk")
        return GemmWork(m, n, k, self.info.dtype.itemsize, tuple(self.casts))


def _sized(node: fx.Node, info: GemmInfo, recipe: Recipe | None) -> _Sized | None:
    """None where a prediction says nothing: no hint for a symbolic size, empty, an odd dtype."""
    if node.target in SCALED_MMS or info.dtype not in _DTYPES:
        return None
    left, right = (value.meta["val"] for value in operands(node))
    hints = [size_hint(size) for size in (left.shape[0], right.shape[1], left.shape[1])]
    known = [size for size in hints if size]
    if len(known) < 3:
        return None
    return _Sized(info, dict(zip("mnk", known, strict=True)), info.site.recipe or recipe)


def _groups(candidates: Mapping[fx.Node, _Sized]) -> Iterator[Group]:
    inputs: dict[int, object] = {}  # of each site, by its index
    for node, each in candidates.items():
        if each.info.gemm is Gemm.FPROP:
            side = 0 if each.info.left.operand is Operand.INPUT else 1
            value = value_key(base_of(operands(node)[side])[0])
            inputs[each.info.site.index] = value, each.recipe
    groups: dict[object, list[fx.Node]] = defaultdict(list)
    for node, each in candidates.items():
        index = each.info.site.index
        groups[inputs.get(index, index)].append(node)
    return map(tuple, groups.values())


# --- casts --------------------------------------------------------------------------------------


@dataclass
class _Quantized:
    """A value that is cast once, for all GEMMs that take it; ``copies``: whether row-major."""

    value: fx.Node
    key: object  # of its value, role and recipe
    role: Operand
    rows: Size
    columns: Size
    again: bool  # a weight, in backward
    rereads: bool  # to find the scale first
    whole_rows: bool  # each has a scale
    copies: set[bool] = field(default_factory=set)
    takers: list[fx.Node] = field(default_factory=list)


def _add_casts(candidates: Mapping[fx.Node, _Sized], weights_cast_once: bool = False) -> None:
    """Give every GEMM its part, by FLOPs, of the casts that insert_casts and share_casts leave."""
    for quantized in _quantized(candidates):
        if weights_cast_once and quantized.role is Operand.WEIGHT:
            continue
        cast = _cast(quantized)
        total = sum(candidates[node].flops for node in quantized.takers)
        for node in quantized.takers:
            share = sympy.Rational(candidates[node].flops, total)
            candidates[node].casts.append(replace(cast, share=share))


def _quantized(candidates: Mapping[fx.Node, _Sized]) -> list[_Quantized]:
    found: dict[object, _Quantized] = {}
    for node, each in candidates.items():
        left, right = each.info.left, each.info.right
        for value, edge, axes in zip(operands(node), (left, right), ("mk", "kn"), strict=True):
            base, transposed = base_of(value)
            again = edge.operand is Operand.WEIGHT and is_backward(node)
            key = _cast_of(value, edge, each)
            rows, columns = (each.size(axis) for axis in axes)
            rereads = _rereads(each.recipe, edge.operand, again)
            by_row = _granularity(each.recipe, edge.operand) is Granularity.ROW
            fresh = _Quantized(base, key, edge.operand, rows, columns, again, rereads, by_row)
            quantized = found.setdefault((key, again), fresh)
            quantized.copies.add(transposed == (edge is right))
            quantized.takers.append(node)
    return list(found.values())


def _operand_keys(node: fx.Node, each: _Sized) -> tuple[object, object]:
    """The keys of the values that a GEMM takes."""
    left, right = operands(node)
    return _cast_of(left, each.info.left, each), _cast_of(right, each.info.right, each)


def _cast_of(value: fx.Node, edge: Edge, each: _Sized) -> object:
    """Equal for the operands that one cast serves, in one direction."""
    return value_key(base_of(value)[0]), edge.operand, each.recipe


def _rereads(recipe: Recipe | None, operand: Operand, again: bool) -> bool:
    """Whether a cast reads its value once more than it must, to find a scale: that of a block is
    found in the tile that casts it, and that of a tensor kept for when it is cast again.
    """
    if recipe is None or recipe.scaling is not Scaling.CURRENT:
        return False
    granularity = recipe.granularity_of(operand)
    return not granularity.block[1] and not (again and granularity is Granularity.TENSOR)


def _granularity(recipe: Recipe | None, operand: Operand) -> Granularity:
    return Granularity.TENSOR if recipe is None else recipe.granularity_of(operand)


def _cast(quantized: _Quantized) -> Cast:
    """The kernel of one cast, or what it adds to the kernel that computes its value.

    Fused, it writes its copies instead of the value, if nothing else needs that.
    """
    itemsize, copies = quantized.value.meta["val"].dtype.itemsize, len(quantized.copies)
    separate = Cast(quantized.rows, quantized.columns, itemsize, copies)
    fused = not quantized.again and _is_pointwise(_origin(quantized.value))
    in_registers = quantized.whole_rows and quantized.copies == {_ROW_MAJOR}
    if quantized.rereads and not in_registers:  # what finds the amax cannot cast yet
        return separate if fused else replace(separate, read=2 * itemsize, launches=2)
    if not fused:
        return separate
    spared = itemsize if _only_for(_origin(quantized.value), quantized.takers) else 0
    return replace(separate, read=0, spared=spared, launches=0)


def _origin(node: fx.Node) -> fx.Node:
    while node.target in _MOVES:
        node = args_of(node)[0]
    return node


def _is_pointwise(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and (
        torch.Tag.pointwise in node.target.tags
    )


def _only_for(value: fx.Node, takers: list[fx.Node]) -> bool:
    """Whether these GEMMs are all that uses a value."""
    return all(
        user in takers or (user.target in _MOVES and _only_for(user, takers))
        for user in value.users
    )
