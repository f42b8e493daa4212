"""What is kept for backward, and what the scaling state holds: read from final graphs, as rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import sympy
from torch import Tensor, fx

from ..internals import outside_tracing, storage_of
from ..ir import SCALED_MMS, Edge, GemmInfo, Site, format_value, gemms, size_expr
from ..report import EdgeRow, SavedRow
from ..scaling import ScalingState, slots_of
from ..states import states_by_weight


def saved_rows(forward: fx.GraphModule, saved: Sequence[fx.Node]) -> list[SavedRow]:
    """What the outputs ``saved`` of a forward hold in memory, by format, the most first.

    Memory that several of them share counts once, that of the forward's inputs (parameters, mostly)
    not at all: it is there anyway.
    """
    inputs = forward.graph.find_nodes(op="placeholder")
    seen = {storage_of(value) for value in map(_tensor, inputs) if value is not None}
    counts: dict[str, list[Any]] = defaultdict(lambda: [0, sympy.S.Zero])
    for node in saved:
        value = _tensor(node)
        if value is None or (storage := storage_of(value)) in seen:
            continue
        seen.add(storage)
        count = counts[format_value(value).split("[")[0]]
        count[0] += 1
        count[1] += sympy.Mul(*map(size_expr, value.shape)) * value.dtype.itemsize
    rows = [
        SavedRow(name, tensors, int(size) if size.is_number else str(size))
        for name, (tensors, size) in counts.items()
    ]
    return sorted(rows, key=lambda row: -row.bytes if isinstance(row.bytes, int) else 0)


def _tensor(node: Any) -> Tensor | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


# --- edges --------------------------------------------------------------------------------------


def edge_rows(
    graphs: Sequence[fx.GraphModule], sites: Sequence[Site], example_inputs: Sequence[Any]
) -> list[EdgeRow]:
    """The FP8 operands of a graph's GEMMs, once per scale, with what the state of the weights
    among ``example_inputs`` holds.
    """
    rows: dict[tuple[int, Any, str], EdgeRow] = {}
    for info, edge in _edges(graphs):
        leader = sites[info.site.leader_of(edge.operand)]
        key = (leader.index, edge.operand, edge.cast)
        if key not in rows:
            found = _state_of(leader, sites, example_inputs)
            rows[key] = _edge_row(info, edge, found)
    return [rows[key] for key in sorted(rows, key=lambda key: (key[0], key[1].value, key[2]))]


def _edges(graphs: Sequence[fx.GraphModule]) -> Iterator[tuple[GemmInfo, Edge]]:
    for gm in graphs:
        for node, info in gemms(gm):
            if node.target in SCALED_MMS:
                yield from ((info, info.left), (info, info.right))


def _edge_row(info: GemmInfo, edge: Edge, found: tuple[ScalingState, int] | None) -> EdgeRow:
    if found is None:
        return EdgeRow(info.name, str(edge.operand), edge.cast)
    state, index = found
    slot = slots_of(index).start + edge.operand.value
    with outside_tracing():
        scale, amax = float(state.scale[slot]), float(state.ordered_history()[-1, slot])
        events = [int(count) for count in state.events[:, slot]]
    return EdgeRow(info.name, str(edge.operand), edge.cast, scale or None, amax or None, *events)


def _state_of(
    site: Site, sites: Sequence[Site], example_inputs: Sequence[Any]
) -> tuple[ScalingState, int] | None:
    """The state that has learned most about a site's weight, and the site's index in it."""
    if site.weight is None:
        return None
    weight = example_inputs[site.weight]
    use = sum(other.weight == site.weight for other in sites[: site.index])
    found = [
        (state, index)
        for state in states_by_weight.get(weight, ())
        for index, (own, own_use) in enumerate(zip(state.weights(), state.uses(), strict=True))
        if own is weight and own_use == use
    ]
    return max(found, key=lambda pair: pair[0].updates, default=None)
