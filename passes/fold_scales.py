"""Let constant factors go where they cost nothing: into scales, and into attention's own."""

from __future__ import annotations

import math

from torch import fx

from ..ir import (
    CASTS,
    QUANTIZE,
    QUANTIZE_BLOCKS,
    RESHAPES,
    SCALED_MMS,
    VIEWS,
    args_of,
    aten,
    base_of,
    constant_factor,
    emit,
    evaluate,
    is_cast,
    value_key,
)
from ..regions import hint
from .attention_scale import QUERY, into_attention, is_like
from .share_casts import cast_key

_GEMMS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)
_LARGEST = 2.0**32  # of a factor or its reciprocal: a scale_inv stays far from where floats end


def fold_scales(gm: fx.GraphModule) -> int:
    """Move constant factors into scales, so that no pass over memory only multiplies by one.

    Before:
        mm_fp8 : bf16[16, 64] = fp8.scaled_mm(x_fp8, w_fp8, x_scale_inv, w_scale_inv, ...
        mul    : bf16[16, 64] = aten.mul.Tensor(mm_fp8, 0.125)
    After:
        w_scale_inv_scaled : f32[1] = aten.mul.Tensor(w_scale_inv, 0.125)
        mm_fp8             : bf16[16, 64] = fp8.scaled_mm(x_fp8, w_fp8, x_scale_inv, w_scale_inv_scaled, ...

    - Several constants in a row, with views and transposes between them, become one.
    - ``attention(q * c, k, v)`` becomes attention with c times the scale, forward and backward, and
      so for k: the multiplication of the gradient goes, too.
    - ``scaled_mm(...) * c`` takes c into a scale_inv, as above, if the product has to be in memory:
      the graph returns it, or a GEMM in high precision or attention reads it.
    - A cast of ``x * c`` that finds its own scale becomes a cast of x, whose scale_inv is multiplied
      by c, if x itself is cast as well: share_casts makes one of them. One may be transposed.

    Requires: insert_casts.
    Ensures: a GEMM's scale_inv is multiplied by at most one constant.
    Leaves alone: a product that only pointwise operators, reductions and casts read, which multiply
        while they read (one more launch, for one scale_inv, would not pay); that of a GEMM with a
        bias, of a slice of a merged GEMM, whose other slices have the same scale_inv, or of what
        others read as well; casts with a delayed scale, whose slot has the history of ``x * c``,
        which a graph of other shapes may not share; what is not positive; factors that would make
        powers of two something else.
    Numerics: reorders (one rounding of the product fewer; casts, and everything else if c is a
        power of two, are exact, unless numbers overflow or are denormal).
    """  # noqa: E501
    rewrites = 0
    while found := _fold_once(gm):  # a cast of a multiple of a multiple goes up one at a time
        rewrites += found
    return rewrites


def _fold_once(gm: fx.GraphModule) -> int:
    rewrites = 0
    for fold in (_into_one, into_attention, _into_gemm, _into_cast):
        for node in list(gm.graph.nodes):
            rewrites += fold(node)
        gm.graph.eliminate_dead_code()
    return rewrites


def _source(value: fx.Node) -> fx.Node | None:
    """What a value is a view of; None if anything else reads it."""
    while value.target in VIEWS and len(value.users) == 1:
        value = args_of(value)[0]
    return value if len(value.users) == 1 else None


# --- a chain of factors -------------------------------------------------------------------------


def _into_one(node: fx.Node) -> int:
    found = constant_factor(node)
    inner = _source(found[0]) if found else None
    above = constant_factor(inner) if inner else None
    if not found or not inner or not above or not is_like(inner, above[0]):
        return 0
    value, factor = above[0] if found[0] is inner else found[0], found[1] * above[1]
    if not _is_moderate(factor):
        return 0
    node.target, node.args = aten.mul.Tensor, (value, factor)
    inner.replace_all_uses_with(above[0])
    node.graph.erase_node(inner)
    return 1


# --- a GEMM's scale_inv -------------------------------------------------------------------------


def _into_gemm(node: fx.Node) -> int:
    found = constant_factor(node)
    gemm = _source(found[0]) if found and _is_moderate(found[1]) else None
    if not found or not gemm or gemm.target not in SCALED_MMS or not is_like(node, found[0]):
        return 0
    # One, or with a scale per block as few as possible.
    position = min((1, 0), key=lambda i: hint(args_of(gemm)[2 + i].meta["val"].numel()))
    if args_of(gemm)[4] is not None or not _is_in_memory(node):
        return 0
    if _rounds_scales(_cast_of(args_of(gemm)[position])) and not _is_power_of_two(found[1]):
        return 0
    _multiply_scale(gemm, position, found[1])
    node.replace_all_uses_with(found[0])
    return 1


def _is_in_memory(value: fx.Node) -> bool:
    """Whether anything reads it, or a view of it, that no kernel of Inductor's or ours computes."""
    views = [user for user in value.users if user.target in VIEWS]
    stored = (*_GEMMS, *QUERY)
    return any(user.op == "output" or user.target in stored for user in value.users) or any(
        map(_is_in_memory, views)
    )


def _is_moderate(factor: float) -> bool:
    return 1 / _LARGEST <= factor <= _LARGEST


def _cast_of(operand: fx.Node) -> fx.Node | None:
    """What casts an operand of a GEMM; None for a weight that is FP8 already."""
    return next(filter(is_cast, operand.all_input_nodes), None)


def _rounds_scales(cast: fx.Node | None) -> bool:
    return cast is not None and cast.target is QUANTIZE_BLOCKS and bool(args_of(cast)[2])


def _is_power_of_two(factor: float) -> bool:
    return math.frexp(factor)[0] == 0.5


def _multiply_scale(gemm: fx.Node, position: int, factor: float) -> None:
    """Multiply the scale_inv of a GEMM's left (0) or right (1) operand."""
    scale_inv = args_of(gemm)[2 + position]
    scaled = constant_factor(scale_inv)
    scale_inv, factor = (scaled[0], scaled[1] * factor) if scaled else (scale_inv, factor)
    with gemm.graph.inserting_before(gemm):
        name = f"{scale_inv.name}_scaled"
        product = emit(gemm.graph, aten.mul.Tensor, (scale_inv, factor), name, like=gemm)
    gemm.update_arg(2 + position, product)


# --- a cast -------------------------------------------------------------------------------------


def _into_cast(cast: fx.Node) -> int:
    if not is_cast(cast) or (cast.target is QUANTIZE and args_of(cast)[1] is not None):
        return 0
    key, transposed, factor = _without_factors(args_of(cast)[0])
    if key == value_key(args_of(cast)[0]) or not _is_power_of_two(factor):
        return 0
    wanted, casts = cast_key(cast, key), filter(is_cast, cast.graph.nodes)
    value = next((args_of(other)[0] for other in casts if cast_key(other) == wanted), None)
    if value is None or not _is_moderate(factor) or not _comes_before(value, cast):
        return 0
    readers = dict.fromkeys(reader for item in cast.users for reader in item.users)
    for gemm in (reader for reader in readers if reader.target in SCALED_MMS):
        for position in (0, 1):
            if factor != 1 and _cast_of(args_of(gemm)[position]) is cast:
                _multiply_scale(gemm, position, factor)
    cast.update_arg(0, value)
    cast.meta["val"] = evaluate(cast)
    for item in list(cast.users) if transposed else ():
        _take_other_copy(cast, item)
    return 1


def _without_factors(value: fx.Node) -> tuple[object, bool, float]:
    """The ``value_key`` of x for ``x * c``, through transposes; their parity; and c."""
    shape, transposed, factor = tuple(value.meta["val"].shape), False, 1.0
    while True:
        found, (base, odd) = constant_factor(value), base_of(value)
        if found is not None:
            value, factor = found[0], factor * found[1]
        elif base is not value and tuple(value.meta["val"].shape) == shape:
            value, transposed = base, transposed is not odd
            shape = shape[::-1] if odd else shape
        elif value.target in RESHAPES:
            value = args_of(value)[0]
        else:
            return (value, str(shape)), transposed, factor


def _comes_before(value: fx.Node, node: fx.Node) -> bool:
    """Whether a value is known before a node; a view is moved there if it can be."""
    if value < node:
        return True
    if value.target not in RESHAPES or not all(arg < node for arg in value.all_input_nodes):
        return False
    node.prepend(value)
    return True


def _take_other_copy(cast: fx.Node, item: fx.Node) -> None:
    """Swap the row-major and the transposed copy, and their scales if each has its own."""
    names = CASTS[cast.target]
    name = names[args_of(item)[1]]
    other = name.removesuffix("_t") if name.endswith("_t") else f"{name}_t"
    if other in names:
        item.update_arg(1, names.index(other))
        item.meta["val"] = evaluate(item)
