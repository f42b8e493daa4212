"""Find the scale of a value once, for its casts in forward and in backward."""

from __future__ import annotations

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from ..ir import QUANTIZE, args_of, aten, is_backward, quantize_output
from .insert_casts import quantize_getitem
from .share_casts import cast_key


def keep_scales(gm: fx.GraphModule) -> int:
    """Have backward cast a value with the current scale that forward has found for it.

    Before:
        w_q   : (...) = fp8.quantize(w, None, 1, e4m3, True, False)
        w_q_1 : (...) = fp8.quantize(w, None, 1, e4m3, False, True)
    After:
        w_q          : (...) = fp8.quantize(w, None, 1, e4m3, True, False)
        w_scale_used : f32[1] = w_q[4]  # saved
        w_q_1        : (...) = fp8.quantize(w, w_scale_used, 0, e4m3, False, True)

    A current scale costs a look at all of the value before it can be cast. One number kept for
    backward spares the second look at weights, and at what plan_saved computes again.

    Requires: plan_saved, which says what is cast again; a joint graph.
    Ensures: of two casts of one value to one format, only the first has to find a scale.
    Leaves alone: what only backward casts; scales per row or block, of which the transposed copy
        that backward needs has its own.
    Numerics: exact.
    """
    found: dict[object, fx.Node] = {}
    rewrites = 0
    for cast in list(gm.graph.nodes):
        if cast.target is not QUANTIZE or args_of(cast)[1] is not None:
            continue
        first = found.setdefault(_cast_of(cast), cast)
        if is_backward(cast) and not is_backward(first) and _is_needed(first):
            _take_scale(gm.graph, cast, first)
            rewrites += 1
    return rewrites


def _cast_of(cast: fx.Node) -> object:
    """Equal for casts of one value, wherever; backward puts the weights of merged GEMMs together
    once more.
    """
    value = args_of(cast)[0]
    rows = value.target is aten.cat.default and value.args[1:] in ((), (0,))
    return cast_key(cast, tuple(args_of(value)[0]) if rows else None)[:2]


def _is_needed(cast: fx.Node) -> bool:
    """Whether a copy of it is used: else all are made by backward's cast, which finds the scale."""
    copies = [quantize_output(cast, name) for name in ("fp8", "fp8_t")]
    return any(copy is not None and copy.users for copy in copies)


def _take_scale(graph: fx.Graph, cast: fx.Node, first: fx.Node) -> None:
    with graph.inserting_after(first):
        scale = quantize_getitem(graph, first, "scale_used")
    scale.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    cast.args = (args_of(cast)[0], scale, 0, *cast.args[3:])
