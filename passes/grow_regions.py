"""Fuse every cast with what produces its value, as far as one pass over memory allows."""

from __future__ import annotations

import heapq
import operator
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from ..internals import module_of
from ..ir import QUANTIZE, RESHAPES, VIEWS, args_of, aten, emit
from ..regions import (
    COL,
    ROW,
    ROW_REDUCTIONS,
    Position,
    Space,
    cast_parts,
    cast_shape,
    casts_of,
    concatenated_columns,
    hint,
    is_computable,
    place_in,
    reads,
    reduced_dims,
    shape_of,
    split,
    sum_behind,
)

_MAX_READS = 8  # matrices that one kernel reads; more would not fit into its registers


def grow_regions(gm: fx.GraphModule) -> int:
    """Move every cast, with the operators above it, into a submodule that becomes one kernel.

    Before:
        neg      : bf16[16, 32] = aten.neg(x)
        neg_q    : (e4m3[16, 32], ...) = fp8.quantize(neg, scale, 0, e4m3, True, False)
        neg_fp8  : e4m3[16, 32] = neg_q[0]
    After:
        region_0 : (e4m3[16, 32], f32[1]) = region_0(x, scale)
        neg_fp8  : e4m3[16, 32] = region_0[0]

    A region grows from a cast upwards through pointwise operators, views and reductions over rows.
    Casts that read the same matrices share a region, unless one depends on the other. Sums over
    the columns of what a region computes (gradients of norms' weights and of biases) join it, with
    their conversion to another dtype. A value that others need, too, is written by the region; but
    where they can compute it from one matrix that is in memory anyway, they do.

    Requires: a forward, backward or inference graph after drop_unused_outputs.
    Ensures: no cast is left outside of a region; no cycle.
    Leaves alone: everything that no cast needs.
    Numerics: exact.
    """
    return _Grower(gm).run()


Read = tuple[fx.Node, Position]


@dataclass(eq=False)
class _Draft:
    """A region that is growing. ``computed``: its nodes besides casts and sums. ``replaces``: the
    one that it grows in place of, or for, whose nodes may be its own.
    """

    space: Space
    casts: list[fx.Node]
    replaces: _Draft | None = None
    computed: dict[fx.Node, set[Position]] = field(default_factory=dict)
    reads: set[Read] = field(default_factory=set)
    sums: list[fx.Node] = field(default_factory=list)
    written: list[fx.Node] = field(default_factory=list)

    @property
    def leaves(self) -> set[fx.Node]:
        """The values that it takes from memory."""
        return {node for node, _ in self.reads}

    @property
    def inputs(self) -> set[fx.Node]:
        """All that has to be there before it runs: its leaves, and the scales that it is given."""
        scales = {args_of(cast)[1] for cast in self.casts if cast.target is QUANTIZE}
        return self.leaves | (scales - {None})

    @property
    def matrices(self) -> set[fx.Node]:
        """Those of its leaves that are as large as its space."""
        return {n for n, place in self.reads if self.space.extent(place) == self.space.size}


class _Grower:
    """The state of growing the regions of one graph."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.order = {node: i for i, node in enumerate(gm.graph.nodes)}
        self.stops: set[fx.Node] = set()
        self.drafts: list[_Draft] = []
        self.owner: dict[fx.Node, _Draft] = {}
        self.bit = {cast: 1 << i for i, cast in enumerate(casts_of(gm))}
        self.bits_above = self._bits_above()
        # Which drafts, by their place in the list, may read or compute a value.
        self.near: dict[fx.Node, set[int]] = defaultdict(set)

    def run(self) -> int:
        """Draft the regions until none has to write what it depends on; then build them."""
        while True:
            self.drafts, self.owner = [], {}
            self.near.clear()
            for cast in self.bit:
                self._draft(cast)
            self._join_sums()
            cyclic = self._plan_written()
            if not cyclic:
                break
            self.stops |= cyclic
        _build(self.gm, self.drafts, self.order)
        return len(self.drafts)

    def _draft(self, cast: fx.Node) -> None:
        draft = self._smallest(cast)
        for place in sorted(self._near(draft.matrices), reverse=True):
            merged = self._merged(self.drafts[place], draft)
            if merged is not None:
                self.drafts[place] = draft = merged
                break
        else:
            place = len(self.drafts)
            self.drafts.append(draft)
        self.owner |= dict.fromkeys(draft.computed, draft)
        for node in (*draft.computed, *draft.leaves):
            self.near[node].add(place)

    def _near(self, nodes: Iterable[fx.Node]) -> set[int]:
        """The places of the drafts that may read or compute any of these values."""
        return set().union(*(self.near.get(node, ()) for node in nodes))

    def _smallest(self, cast: fx.Node) -> _Draft:
        """The region of one cast; over the columns of a part, if its parts share what they read."""
        m, n = cast_shape(cast)
        whole = self._grown(Space(m, n), [cast])
        pieces = concatenated_columns(cast)
        if len(pieces) > 1:
            parts = self._grown(Space(m, sympy.sympify(shape_of(pieces[0])[1])), [cast])
            if len(parts.matrices) < len(whole.matrices) * len(pieces) and _shared(self, pieces):
                return parts
        return whole

    def _grown(self, space: Space, casts: list[fx.Node], replaces: _Draft | None = None) -> _Draft:
        draft = _Draft(space, casts, replaces)
        for cast in casts:
            if cast_shape(cast)[1] != space.n:
                draft.computed[args_of(cast)[0]] = set()  # the concatenation of its parts
            for part in cast_parts(cast, space):
                self._absorb(draft, part.value, part.position)
        if len(draft.matrices) > _MAX_READS:
            draft.computed, draft.reads = {}, set()
            for cast in casts:
                draft.reads |= {(p.value, p.position) for p in cast_parts(cast, space)}
        return draft

    def _absorb(self, draft: _Draft, node: fx.Node, position: Position) -> None:
        """Add a value to a draft: computed, if it can be, else read."""
        seen: set[Read] = set()
        stack = [(node, position)]
        while stack:
            node, position = stack.pop()
            if (node, position) in seen:
                continue
            seen.add((node, position))
            above = self._above(draft, node, position)
            if above is None:
                draft.reads.add((node, position))
            else:
                draft.computed.setdefault(node, set()).add(position)
                if node.target is operator.getitem:  # with the tuple that it is taken from
                    draft.computed.setdefault(args_of(node)[0], set())
                stack += above

    def _above(self, draft: _Draft, node: fx.Node, position: Position) -> list[Read] | None:
        if node in self.stops or not is_computable(node):
            return None
        own = self.owner.get(node) in (None, draft, draft.replaces)
        if not own and not self._is_derived(node):
            return None  # another region writes it
        found = reads(node, position, draft.space)
        if found is None or any(not _in_memory_or_computable(r.node) for r in found):
            return None
        return [(r.node, r.position) for r in found]

    def _is_derived(self, node: fx.Node) -> bool:
        """Whether whoever needs a value computes it, at no cost, from one that is in memory."""
        source = self._source(node)
        return source is not node and _itemsize(source) <= _itemsize(node)

    def _source(self, node: fx.Node) -> fx.Node:
        """The value at the upper end of the chain of operators that read one matrix each."""
        while is_computable(node) and node not in self.stops:
            if node.target in ROW_REDUCTIONS or node.target is aten.cat.default:
                break
            whole = args_of(node)[0] if node.target is operator.getitem else node
            matrices = [arg for arg in whole.all_input_nodes if 2 * _numel(arg) >= _numel(node)]
            if len(matrices) != 1:
                break
            (node,) = matrices
        return node

    # --- merging ---------------------------------------------------------------------------------

    def _merged(self, first: _Draft, second: _Draft) -> _Draft | None:
        """One region for both, if they share matrices and do not depend on each other's casts."""
        if first.space != second.space or self._needs(second.inputs, first.casts):
            return None
        if not second.matrices & (first.matrices | first.computed.keys()):
            return None
        merged = self._grown(first.space, first.casts + second.casts, replaces=first)
        if not merged.computed and (first.computed or second.computed):
            return None
        if self._needs(merged.inputs, merged.casts):
            return None
        self.owner |= dict.fromkeys(merged.computed, merged)
        return merged

    def _bits_above(self) -> dict[fx.Node, int]:
        """For every node the casts that it is computed from, or is, a bit each."""
        found: dict[fx.Node, int] = {}
        for node in self.gm.graph.nodes:
            found[node] = self.bit.get(node, 0)
            for above in node.all_input_nodes:
                found[node] |= found[above]
        return found

    def _needs(self, values: Iterable[fx.Node], casts: Sequence[fx.Node]) -> bool:
        """Whether any of ``values`` is computed from what any of ``casts`` casts to."""
        bits = sum(self.bit[cast] for cast in casts)
        return any(self.bits_above[value] & bits for value in values)

    def _depends(self, values: Iterable[fx.Node], on: fx.Node) -> bool:
        """Whether any of ``values`` is ``on``, or computed from it."""
        first = self.order[on]
        stack, seen = list(values), set(values)
        while stack:
            node = stack.pop()
            if node is on:
                return True
            for above in node.all_input_nodes:
                if above not in seen and self.order[above] >= first:
                    seen.add(above)
                    stack.append(above)
        return False

    # --- sums over columns -----------------------------------------------------------------------

    def _join_sums(self) -> None:
        for node in self.gm.graph.nodes:
            value = _column_summed(node)
            if value is None:
                continue
            for place in sorted(self._near_sum(node, value)):
                if self._join_sum(self.drafts[place], node, value):
                    break

    def _near_sum(self, node: fx.Node, value: fx.Node) -> set[int]:
        """The places of the drafts that read or compute every matrix that a sum is made of."""
        found: set[int] = set()
        for space in {draft.space for draft in self.drafts}:
            position = _summed_position(node, value, space)
            if position is not None:
                trial = _Draft(space, [])
                self._absorb(trial, value, position)
                near = [self.near.get(leaf, set()) for leaf in trial.matrices]
                found |= set.intersection(*near) if near else self._near(trial.leaves)
        return found

    def _join_sum(self, draft: _Draft, node: fx.Node, value: fx.Node) -> bool:
        place = _summed_position(node, value, draft.space)
        if place is None:
            return False
        trial = _Draft(draft.space, [], replaces=draft)
        self._absorb(trial, value, place)
        if not trial.matrices <= draft.matrices or not trial.matrices:
            return False
        if self._depends(draft.inputs, node) or self._needs(trial.leaves, draft.casts):
            return False
        user = next(iter(node.users), node)
        draft.sums.append(user if sum_behind(user) is node else node)
        for computed, places in trial.computed.items():
            draft.computed.setdefault(computed, set()).update(places)
        draft.reads |= trial.reads
        return True

    # --- what is written -------------------------------------------------------------------------

    def _plan_written(self) -> set[fx.Node]:
        """Decide what each region writes for others; returns values that would close a cycle."""
        sums = [node for draft in self.drafts for node in draft.sums]
        inside = {*sums, *map(sum_behind, sums), *(c for d in self.drafts for c in d.casts)}
        stored = {value for draft in self.drafts for value in draft.inputs}
        needed = set(stored)
        writers = {node: draft for draft in reversed(self.drafts) for node in draft.computed}
        for node in reversed(self.gm.graph.nodes):
            if node in inside or not (node in needed or node.op == "output" or node.is_impure()):
                continue
            draft = writers.get(node)
            wanted = draft is not None and _is_writable(node, draft) and not _is_there(node)
            if draft is not None and wanted and (node in stored or not self._is_derived(node)):
                draft.written.append(node)
                continue
            needed.update(node.all_input_nodes)
            if not is_computable(node) or (node in stored and node.target in VIEWS):
                stored.update(node.all_input_nodes)
        return {
            node
            for draft in self.drafts
            for node in draft.written
            if self._depends(draft.inputs, node)
        }


def _shared(grower: _Grower, pieces: list[fx.Node]) -> bool:
    """Whether the pieces of a concatenation are computed from common matrices."""
    m, n = shape_of(pieces[0])
    leaves = []
    for piece in pieces:
        draft = _Draft(Space(m, n), [])
        grower._absorb(draft, piece, (ROW, COL))
        leaves.append(draft.matrices)
    return bool(set.intersection(*leaves))


def _in_memory_or_computable(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor) or is_computable(node)


def _column_summed(node: fx.Node) -> fx.Node | None:
    """The value whose columns a node sums, if it is such a sum."""
    if node.target is not aten.sum.dim_IntList or not node.all_input_nodes:
        return None
    value = node.all_input_nodes[0]
    rank, dims = value.meta["val"].dim(), reduced_dims(node)
    return value if rank > 1 and dims == list(range(len(dims))) and len(dims) < rank else None


def _summed_position(node: fx.Node, value: fx.Node, space: Space) -> Position | None:
    """The position of ``value`` where leading dimensions, all of a space's rows, are summed."""
    shape, count = shape_of(value), len(reduced_dims(node))
    rows, cols = sympy.prod(shape[:count]), sympy.prod(shape[count:])
    if sympy.expand(rows - space.m) != 0 or sympy.expand(cols - space.n) != 0:
        return None
    return (*split(ROW, shape[:count]), *split(COL, shape[count:]))


def _is_there(value: fx.Node) -> bool:
    """Whether a value has another shape only than one that no kernel computes."""
    source = value
    while source.target in RESHAPES:
        source = args_of(source)[0]
    if source is value or is_computable(source):
        return False
    return bool(source.meta["val"].is_contiguous())


def _is_writable(node: fx.Node, draft: _Draft) -> bool:
    """Whether a region computes a value in the order in which memory holds it."""
    value = node.meta.get("val")
    order = _memory_order(value) if isinstance(value, torch.Tensor) else None
    if order is None:
        return False
    place = place_in(draft.space, [shape_of(node)[dim] for dim in order])
    return place is not None and tuple(place[i] for i in _inverse(order)) in draft.computed[node]


def _memory_order(value: torch.Tensor) -> list[int] | None:
    """The dimensions in the order of their strides, in which a value without gaps is contiguous."""
    if value.is_contiguous():
        return list(range(value.dim()))
    strides = value.stride()
    if not all(isinstance(size, int) for size in (*value.shape, *strides)):
        return None
    order = sorted(range(value.dim()), key=strides.__getitem__, reverse=True)
    return order if value.permute(order).is_contiguous() else None


def _inverse(order: Sequence[int]) -> list[int]:
    """The permutation that undoes another."""
    return [order.index(dim) for dim in range(len(order))]


def _numel(node: fx.Node) -> int:
    value = node.meta.get("val")
    return hint(value.numel()) if isinstance(value, torch.Tensor) else 0


def _itemsize(node: fx.Node) -> int:
    return node.meta["val"].dtype.itemsize


# --- building -----------------------------------------------------------------------------------


def _build(gm: fx.GraphModule, drafts: list[_Draft], order: dict[fx.Node, int]) -> None:
    """Replace what the drafts hold by calls of submodules, and sort the graph again."""
    rank = {node: (i, 0) for node, i in order.items()}
    built = []
    for index, draft in enumerate(drafts):  # all before the first value is replaced
        outputs = [*_outputs_of_casts(draft), *reversed(draft.written), *draft.sums]
        built.append((draft, _call(gm, draft, outputs, order, index), outputs))
    for draft, call, outputs in built:
        taken = _take_outputs(gm.graph, call, outputs)
        last = max(order[node] for node in draft.casts)
        rank |= {node: (last, 1 + i) for i, node in enumerate([call, *taken])}
    _sort(gm.graph, rank)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _call(
    gm: fx.GraphModule,
    draft: _Draft,
    outputs: list[fx.Node],
    order: dict[fx.Node, int],
    index: int,
) -> fx.Node:
    """A submodule for a draft, and its call at the end of the graph."""
    sums = {*draft.sums, *map(sum_behind, draft.sums)}
    inside = sorted({*draft.computed, *draft.casts, *sums}, key=order.__getitem__)
    inputs = sorted(draft.inputs, key=order.__getitem__)
    module = module_of(_copy(inside, inputs, outputs), "Region")
    module.meta["fp8_space"] = draft.space
    name = f"region_{index}"
    gm.add_submodule(name, module)
    with gm.graph.inserting_before(gm.graph.output_node()):
        call = gm.graph.call_module(name, tuple(inputs))
    returned = args_of(module.graph.output_node())[0]
    call.meta["val"] = tuple(node.meta["val"] for node in returned)
    return call


def _take_outputs(graph: fx.Graph, call: fx.Node, outputs: list[fx.Node]) -> list[fx.Node]:
    """Let the users of what a region returns take it from the call; returns the new nodes."""
    taken = []
    with graph.inserting_before(graph.output_node()):
        for i, node in enumerate(outputs):
            item = graph.call_function(operator.getitem, (call, i), name=f"{node.name}_out")
            item.meta = dict(node.meta) | {"val": call.meta["val"][i]}
            back = _permuted(graph, item, _inverse(_memory_order(node.meta["val"]) or []))
            node.replace_all_uses_with(back)
            taken += [item] if back is item else [item, back]
            if node.target is operator.getitem:
                item.name, node.name = node.name, item.name
    return taken


def _permuted(graph: fx.Graph, node: fx.Node, order: list[int]) -> fx.Node:
    """A view with the dimensions in another order; the node itself if that is theirs."""
    if order == sorted(order):
        return node
    return emit(graph, aten.permute.default, (node, order), f"{node.name}_permuted", like=node)


def _outputs_of_casts(draft: _Draft) -> list[fx.Node]:
    return [item for cast in draft.casts for item in sorted(cast.users, key=_index)]


def _index(item: fx.Node) -> int:
    return int(args_of(item)[1])


def _copy(inside: list[fx.Node], inputs: list[fx.Node], outputs: list[fx.Node]) -> fx.Graph:
    """A graph of its own for a region's nodes, with names that are the same in every layer."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    used: Counter[str] = Counter()
    for node in inputs:
        name = _input_name(node)
        used[name] += 1
        copies[node] = graph.placeholder(f"{name}_{used[name]}")
        copies[node].meta["val"] = node.meta["val"]

    def copied(arg: fx.Node) -> fx.Node | int:
        """A size, of which there is one in a view, follows from the others."""
        return -1 if isinstance(arg.meta["val"], torch.SymInt) else copies[arg]

    for node in inside:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), copied)
        copies[node] = graph.create_node("call_function", node.target, args, kwargs)
        copies[node].meta.update(_kept_meta(node))
    for node in outputs:
        if node not in copies:  # a getitem of a cast
            cast, i = args_of(node)
            copies[node] = graph.call_function(operator.getitem, (copies[cast], i))
            copies[node].meta.update(_kept_meta(node))
    returned = []
    for node in outputs:
        returned.append(_permuted(graph, copies[node], _memory_order(node.meta["val"]) or []))
        returned[-1].meta["fp8_origin"] = node.name
    graph.output(tuple(returned))
    return graph


def _kept_meta(node: fx.Node) -> dict[str, Any]:
    """What is still known of a node in a region: its value, its name, and where it comes from."""
    stacks = ("stack_trace", "nn_module_stack", "fwd_nn_module_stack")
    kept = {key: node.meta[key] for key in ("val", *stacks) if key in node.meta}
    return {**kept, "fp8_origin": node.name}


# What kernels call their other arguments.
_RESERVED = {"amax", "found", "fp8", "scale", "scale_inv", "sum", "value"}


def _input_name(node: fx.Node) -> str:
    name = node.target._opname if isinstance(node.target, torch._ops.OpOverload) else ""
    return "input" if not name or name in _RESERVED else name


def _sort(graph: fx.Graph, rank: dict[fx.Node, tuple[int, int]]) -> None:
    """Topologically, otherwise in the order of ``rank``."""
    waiting = {node: len(node.all_input_nodes) for node in graph.nodes}
    ready = [(rank[node], i, node) for i, node in enumerate(waiting) if not waiting[node]]
    heapq.heapify(ready)
    count = len(waiting)
    sorted_nodes: list[fx.Node] = []
    while ready:
        _, _, node = heapq.heappop(ready)
        sorted_nodes.append(node)
        for user in node.users:
            waiting[user] -= 1
            if not waiting[user]:
                count += 1
                heapq.heappush(ready, (rank[user], count, user))
    assert len(sorted_nodes) == len(waiting), "regions depend on each other"
    last = graph._root
    for node in sorted_nodes:
        if node is not last:
            last.append(node)
            last = node
