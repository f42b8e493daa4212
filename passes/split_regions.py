"""Let a kernel of its own compute what a region stores, where its casts can read that instead."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import fx

from ..internals import module_of
from ..ir import FIND_SCALE, QUANTIZE, QUANTIZE_BLOCKS, args_of, emit, is_cast
from ..ops import GROUP
from ..regions import ROW_REDUCTIONS, Space, hint

_LEAST_BYTES = 2**24  # that must be spared: a launch more takes about as long
# What tiles lose that use sums over rows made before, as a part of what the sums read: a norm's
# backward with all its casts takes 294 us, three parts that move as much 262 (H200).
_LOST_TO_SUMS = 0.25


def split_regions(gm: fx.GraphModule, least_bytes: int = _LEAST_BYTES) -> int:
    """Split regions in what computes the values that they store, and what casts these.

    Before:
        region_0 : (e4m3[16, 32], f32[1], bf16[16, 32]) = region_0(x, y)
        mul_out  : bf16[16, 32] = region_0[2]
    After:
        region_0_part_0 : (bf16[16, 32], f32[1]) = region_0_part_0(x, y)
        mul_out         : bf16[16, 32] = region_0_part_0[0]
        quantize_scale  : f32[1] = region_0_part_0[1]
        region_0_part_1 : (e4m3[16, 32], f32[1]) = region_0_part_1(mul_out, quantize_scale)

    Kernels that look for a scale, or sum over the rows of high tiles, read what a region computes
    with before the kernel that casts does. Casts of a value that is stored anyway can read that,
    which is less: the sum of a norm's gradient and of the residual's is made of three matrices. The
    first part finds current scales. Casts that have no matrix in common any more come apart.
    Tiles that need no such sums are faster, too.

    Requires: a graph after grow_regions.
    Ensures: the first part casts nothing, the others do nothing else.
    Leaves alone: regions whose kernels would not read ``least_bytes`` less, sums counted for more.
    Numerics: exact; its kernels then cast what is stored, rounded as in eager PyTorch.
    """
    calls = list(gm.graph.find_nodes(op="call_module"))
    count = sum(_split(gm, call, least_bytes) for call in calls)
    if count:
        gm.recompile()
    return count


@dataclass(frozen=True)
class _Part:
    """Some of a region's outputs, and what they are computed from, in order. ``stops``: what is
    read from memory besides the placeholders.
    """

    outputs: list[fx.Node]
    inside: list[fx.Node]
    inputs: list[fx.Node]

    @staticmethod
    def of(outputs: list[fx.Node], stops: Iterable[fx.Node] = ()) -> _Part:
        found: set[fx.Node] = set()
        stack, known = list(outputs), set(stops)
        while stack:
            node = stack.pop()
            if node not in found:
                found.add(node)
                stack += () if node in known else node.all_input_nodes
        ordered = [node for node in outputs[0].graph.nodes if node in found]
        inputs = [node for node in ordered if node in known or node.op == "placeholder"]
        return _Part(outputs, [node for node in ordered if node not in inputs], inputs)

    @property
    def matrices(self) -> set[fx.Node]:
        """The large ones of its inputs."""
        largest = max(map(_numel, self.inputs), default=0)
        return {node for node in self.inputs if 4 * _numel(node) >= largest}

    def bytes_read(self, *, scales_given: bool = False) -> int:
        """By all of its kernels: by the one that stores, and by those before it; and what could be
        read in the time lost to sums. ``scales_given``: tensorwise ones have been found elsewhere.
        """
        count = _bytes(self.inputs)
        casts = [node for node in self.inside if is_cast(node)]
        if not scales_given and any(_is_current(cast) for cast in casts):
            return 2 * count  # a search, which sums over rows as well
        searched = any(self._is_searched(cast) for cast in casts)
        summed = self._bytes_summed(casts)
        return count * (1 + searched) + summed + int(_LOST_TO_SUMS * summed)

    def _is_searched(self, cast: fx.Node) -> bool:
        """Whether a kernel looks for the scales of rows or blocks: see Region.searched."""
        if cast.target is QUANTIZE or not _is_transposed(cast):
            return False
        wide = args_of(cast)[1][1]
        results = {node if _is_stored(node) else args_of(node)[0] for node in self.outputs}
        return wide == 0 or (wide == GROUP and (len(results) > 1 or len(self.matrices) > 2))

    def _bytes_summed(self, casts: list[fx.Node]) -> int:
        """What is read to sum over rows before tiles of several are cast: see Region.sums_apart."""
        if not any(_is_tall(cast) for cast in casts):
            return 0
        above = _Part.of(casts, stops=self.inputs).inside
        summed = [node for node in above if node.target in ROW_REDUCTIONS]
        return _bytes(_Part.of(summed, stops=self.inputs).inputs) if summed else 0

    def module(self, space: Space) -> fx.GraphModule:
        """A region of its own."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in self.inputs:
            name = node.name if node.op == "placeholder" else "stored"
            name = "scale" if node.target is FIND_SCALE else name
            copies[node] = holder = graph.placeholder(name)
            holder.target = holder.name  # several may be called that
            holder.meta["val"] = node.meta["val"]
        for node in self.inside:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[node] for node in self.outputs))
        module = module_of(graph, "Region")
        module.meta["fp8_space"] = space
        return module


def _split(gm: fx.GraphModule, call: fx.Node, least_bytes: int) -> bool:
    """Split a region, if that spares so many bytes."""
    region = _submodule(gm, call)
    returned = list(args_of(region.graph.output_node())[0])
    values = [node for node in returned if _is_stored(node)]
    if not values or len(values) == len(returned):
        return False
    current = [node for node in region.graph.nodes if _is_current(node)]
    storing = _Part.of([*values, *(args_of(cast)[0] for cast in current)])
    casting = _casting_parts(returned, values)
    spared = _Part.of(returned).bytes_read() - storing.bytes_read()
    spared -= sum(part.bytes_read(scales_given=True) for part in casting)
    if spared < least_bytes:
        return False
    values += [_give_scale(cast) for cast in current]
    _build(gm, call, [_Part.of(values), *_casting_parts(returned, values)])
    return True


def _casting_parts(returned: Sequence[fx.Node], values: Sequence[fx.Node]) -> list[_Part]:
    """A part for each cast, or for those that read a matrix in common."""
    parts: list[_Part] = []
    for cast in dict.fromkeys(args_of(node)[0] for node in returned if not _is_stored(node)):
        outputs = [node for node in returned if cast in node.all_input_nodes]
        part = _Part.of(outputs, stops=values)
        near = [other for other in parts if not part.matrices.isdisjoint(other.matrices)]
        parts = [other for other in parts if other not in near]
        together = [node for other in near for node in other.outputs]
        parts.append(_Part.of([*together, *outputs], stops=values))
    return parts


def _give_scale(cast: fx.Node) -> fx.Node:
    """Find the scale of a cast apart from it."""
    value, _, _, *rest = args_of(cast)
    with cast.graph.inserting_before(cast):
        name = f"{cast.name}_scale"  # the same in every layer, as all names in regions
        scale = emit(cast.graph, FIND_SCALE, (value, rest[0]), name, like=cast)
    scale.meta["fp8_origin"] = f"{cast.meta['fp8_origin']}_scale"
    cast.args = (value, scale, 0, *rest)
    return scale


def _build(gm: fx.GraphModule, call: fx.Node, parts: Sequence[_Part]) -> None:
    """Replace the call of a region by those of its parts."""
    region = _submodule(gm, call)
    returned = args_of(region.graph.output_node())[0]
    outer = dict(zip(region.graph.find_nodes(op="placeholder"), args_of(call), strict=True))
    items = {returned[args_of(item)[1]]: item for item in call.users}
    for i, part in enumerate(parts):
        name = f"{call.target}_part_{i}"
        gm.add_submodule(name, part.module(region.meta["fp8_space"]))
        with gm.graph.inserting_before(call):
            made = gm.graph.call_module(name, tuple(outer[node] for node in part.inputs))
            made.meta["val"] = tuple(node.meta["val"] for node in part.outputs)
            for index, node in enumerate(part.outputs):
                args, name = (made, index), node.meta["fp8_origin"]
                outer[node] = gm.graph.call_function(operator.getitem, args, name=name)
                outer[node].meta = {"val": node.meta["val"]}
    for node, item in items.items():
        outer[node].meta = item.meta
        outer[node].name, item.name = item.name, outer[node].name
        item.replace_all_uses_with(outer[node])
        gm.graph.erase_node(item)
    gm.graph.erase_node(call)
    gm.delete_submodule(str(call.target))


def _submodule(gm: fx.GraphModule, call: fx.Node) -> fx.GraphModule:
    module = gm.get_submodule(str(call.target))
    assert isinstance(module, fx.GraphModule)
    return module


def _is_stored(output: fx.Node) -> bool:
    """Whether a region's output is a value that it computes, not one of a cast."""
    return output.target is not operator.getitem or not is_cast(args_of(output)[0])


def _is_current(cast: fx.Node) -> bool:
    """Whether it has one scale, which nothing has found yet."""
    return cast.target is QUANTIZE and args_of(cast)[1] is None


def _is_tall(cast: fx.Node) -> bool:
    """Whether it takes tiles of several rows, too high to hold whole ones."""
    high = args_of(cast)[1][0] if cast.target is QUANTIZE_BLOCKS else 1
    return high > 1 or _is_transposed(cast)


def _is_transposed(cast: fx.Node) -> bool:
    """Whether a transposed copy is written."""
    return any(args_of(user)[1] == 1 for user in cast.users)


def _numel(node: fx.Node) -> int:
    return hint(node.meta["val"].numel())


def _bytes(nodes: Iterable[fx.Node]) -> int:
    return sum(_numel(node) * node.meta["val"].dtype.itemsize for node in nodes)
