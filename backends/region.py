"""A region as its kernel sees it: inputs, casts, and what else it writes."""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import fx

from ..formats import Format
from ..internals import FloorDiv
from ..ir import CASTS, FIND_SCALE, QUANTIZE, QUANTIZE_BLOCKS, QUANTIZE_GROUPS, args_of
from ..ops import GROUP, padded
from ..regions import (
    COL,
    ROW,
    ROW_REDUCTIONS,
    Position,
    Space,
    cast_parts,
    cast_shape,
    place_in,
    reduced_dims,
    shape_of,
    split,
    sum_behind,
)

GROUP_OUTPUTS = ("q", "scale_inv")
COPIES = ("fp8", "fp8_t")  # the outputs of a cast that are matrices; the others are one number
LEAST_IN_TILE = 2048  # elements of a tile of whole rows
LEAST_WIDE = 32  # columns of any other tile
# The words of a cast's numbers, of which others read two, at multiples of 16 bytes: of the inverse
# scale cuBLASLt wants that, and Inductor would copy what a forward keeps for its backward.
_NUMBERS = {"scale_inv": 0, "scale": 1, "scale_used": 4}
_NUMBERS_WIDTH, _FOUND_WIDTH = 8, 4
_LINE = 32  # words that a cache keeps together: a program that reads one waits for atomics on all
_LONGEST_ROW = 16384  # elements that one program holds to find their scale


@dataclass(frozen=True, eq=False)
class Cast:
    """A cast, and those of its outputs that are wanted, by name."""

    node: fx.Node
    outputs: dict[str, fx.Node]

    @property
    def format(self) -> Format:
        return Format.of(args_of(self.node)[3])

    @property
    def is_delayed(self) -> bool:
        """Whether it has a scale from earlier steps, where that is known."""
        return args_of(self.node)[1] is not None

    @property
    def is_given(self) -> bool:
        """Whether its scale was found for the same value before, and is never missing."""
        return self.is_delayed and args_of(self.node)[1].meta["val"].numel() == 1

    @property
    def slot(self) -> int:
        return int(args_of(self.node)[2])

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns that share a scale, of a cast with a scale per block."""
        high, wide = args_of(self.node)[1]
        return high, wide

    @property
    def power_of_two(self) -> bool:
        """Whether the scales of blocks are rounded to powers of two."""
        return bool(args_of(self.node)[2])


@dataclass(frozen=True)
class Result:
    """A value that the kernel computes per tile, and what becomes of it.

    ``kind``: "cast", "block" and "group" (casts with a scale per block, or per group of a row),
    "value", "scale" (of a cast in another region) or "sum" (over columns); ``index``: which of the
    region's results of that kind; ``start``: for a cast, the column that it is stored from.
    """

    kind: str
    index: int
    node: fx.Node
    position: Position
    start: sympy.Expr = sympy.S.Zero


@dataclass(frozen=True)
class Branch:
    """A part of a concatenation that has tiles of its own: the row (``axis`` 0) or column (1) of
    the space that it starts at.
    """

    node: fx.Node
    axis: int
    start: int


@dataclass(frozen=True, eq=False)
class Region:
    """The submodule that grow_regions has made of a region.

    ``inputs``: what the kernel loads. ``casts``: tensorwise; ``blocks``: those with a scale per
    block, which is found in the tile; ``groups``: those with a scale per group of 128 elements,
    with the outputs "q" and "scale_inv". ``values``: what it writes in high precision, matrices of
    its space or one number per row. ``scales``: those that it finds for casts in other regions; it
    has none with a scale to find then. ``sums``: sums over columns, or what converts one.
    """

    gm: fx.GraphModule
    space: Space
    inputs: list[fx.Node]
    casts: list[Cast]
    blocks: list[Cast]
    groups: list[Cast]
    values: list[fx.Node]
    scales: list[fx.Node]
    sums: list[fx.Node]

    @staticmethod
    def of(gm: fx.GraphModule) -> Region:
        """Read a submodule."""
        space = gm.meta["fp8_space"]
        casts, blocks, groups = (
            [Cast(node, {}) for node in gm.graph.nodes if node.target is target]
            for target in (QUANTIZE, QUANTIZE_BLOCKS, QUANTIZE_GROUPS)
        )
        by_node = {cast.node: cast for cast in (*casts, *blocks, *groups)}
        values, found, sums = [], [], []
        for node in args_of(gm.graph.output_node())[0]:
            if node.target is operator.getitem and args_of(node)[0] in by_node:
                cast, index = args_of(node)
                names = CASTS.get(cast.target, GROUP_OUTPUTS)
                by_node[cast].outputs[names[index]] = node
            elif node.target is FIND_SCALE:
                found.append(node)
            elif _is_column_sum(node, space):
                sums.append(node)
            else:
                values.append(node)
        given = {args_of(cast.node)[1] for cast in casts}
        inputs = [n for n in gm.graph.find_nodes(op="placeholder") if n not in given]
        return Region(gm, space, inputs, casts, blocks, groups, values, found, sums)

    @cached_property
    def results(self) -> list[Result]:
        """Everything that is computed per tile."""
        found = [
            Result(kind, i, part.value, part.position, part.start)
            for kind, casts in (("cast", self.casts), ("block", self.blocks))
            for i, cast in enumerate(casts)
            for part in cast_parts(cast.node, self.space)
        ]
        for i, group in enumerate(self.groups):
            (part,) = cast_parts(group.node, self.space)
            found.append(Result("group", i, part.value, part.position))
        for i, node in enumerate(self.values):
            place = place_in(self.space, shape_of(node))
            assert place is not None
            found.append(Result("value", i, node, place))
        for i, scale in enumerate(self.scales):
            for part in cast_parts(scale, self.space):
                found.append(Result("scale", i, part.value, part.position, part.start))
        for i, node in enumerate(map(sum_behind, self.sums)):
            value, dims = args_of(node)[:2]
            shape, count = shape_of(value), len(dims)
            place = (*split(ROW, shape[:count]), *split(COL, shape[count:]))
            found.append(Result("sum", i, value, place))
        return found

    @cached_property
    def branches(self) -> list[Branch]:
        """Parts of a concatenation that the kernel tells apart by the place of a tile.

        Empty unless the region only casts a concatenation whose parts start at multiples of 128,
        and not row by row.
        """
        if not (self.casts or self.blocks) or self.finds_row_scales:
            return []
        value = args_of([*self.casts, *self.blocks][0].node)[0]
        if len(self.results) != 1 or value.target is not torch.ops.aten.cat.default:
            return []
        parts, axis = args_of(value)[0], args_of(value)[1] % 2 if len(value.args) > 1 else 0
        sizes = [part.meta["val"].shape[axis] for part in parts]
        if not all(isinstance(size, int) for size in sizes):
            return []
        starts = list(itertools.accumulate(sizes[:-1], initial=0))
        if any(start % GROUP for start in starts):
            return []
        return [Branch(part, axis, start) for part, start in zip(parts, starts, strict=True)]

    @property
    def transposes(self) -> bool:
        return any("fp8_t" in cast.outputs for cast in (*self.casts, *self.blocks))

    @property
    def takes_high_tiles(self) -> bool:
        """Whether tiles of whole rows have too few of them: for a transposed copy, or for blocks of
        several rows.
        """
        return self.transposes or any(cast.block[0] > 1 for cast in self.blocks)

    @property
    def scales_rows(self) -> bool:
        """Whether a cast has a scale per row."""
        return any(cast.block[1] == 0 for cast in self.blocks)

    @property
    def finds_row_scales(self) -> bool:
        """Whether the program that casts a row finds its scale, as it holds the whole of it."""
        return self.scales_rows and not (self.takes_high_tiles or self._is_long)

    @cached_property
    def searched(self) -> list[Cast]:
        """The casts whose scales a kernel of its own finds the largest elements for.

        Those of rows, where not only rows are cast, which takes tiles that hold no whole rows, or
        where one is too long for a program. Those of blocks that no fast tile holds, unless so
        little is computed that a tile of whole blocks is still faster than to read all twice.
        """
        rows, blocks = self.scales_rows and not self.finds_row_scales, self._is_heavy
        return [
            cast
            for cast in self.blocks
            if (rows and cast.block[1] == 0) or (blocks and cast.block[1] == GROUP)
        ]

    @property
    def _is_long(self) -> bool:
        return not (self.space.n.is_number and self.space.n <= _LONGEST_ROW)

    @property
    def _is_heavy(self) -> bool:
        """Whether a tile of 128 rows would hold too much: several results, or what several inputs
        are combined to, in each part that has tiles of its own. On an H100 it takes 1.5 times
        as long as a search and small tiles for SwiGLU's backward, 1.2 times for a norm's, as long
        for rotary embeddings'; 0.7 times for a cast of two weights.
        """
        tall = any(cast.block[1] == GROUP and "fp8_t" in cast.outputs for cast in self.blocks)
        parts = [branch.node for branch in self.branches] or [r.node for r in self.results]
        loads = [sum(not self.is_vector(node) for node in _inputs_of(part)) for part in parts]
        return tall and (len(self.results) > 1 or max(loads) > 2)

    def is_vector(self, node: fx.Node) -> bool:
        """Whether a value has at most one element for each row, or for each column."""
        size = sympy.prod(shape_of(node))
        return any(sympy.expand(size - other) == 0 for other in (1, self.space.m, self.space.n))

    @property
    def padding(self) -> int:
        """What tiles cover more than the space: they fill multiples of so many rows and columns."""
        return max((cast.block[1] for cast in self.searched), default=0) or 1

    @property
    def search_height(self) -> int:
        """The rows that a program of such a kernel looks at, tile by tile; 0: those of one tile."""
        return GROUP if self.searched and self.transposes else 0

    @cached_property
    def found(self) -> dict[tuple[int, str], sympy.Expr]:
        """Where what such a kernel finds lies in one buffer: the first number, by the index of the
        block cast and the copy; both copies of blocks of several rows have the same.
        """
        return {key: first for key, first, _ in self._found}

    @property
    def found_size(self) -> sympy.Expr:
        """The length of that buffer; 0 if nothing is looked for."""
        return sympy.Add(*(size for _, _, size in self._found))

    @cached_property
    def _found(self) -> list[tuple[tuple[int, str], sympy.Expr, sympy.Expr]]:
        found, first = [], sympy.S.Zero
        for i, cast in enumerate(self.blocks):
            if cast not in self.searched:
                continue
            (m, n), (high, wide) = cast_shape(cast.node), cast.block
            sizes = {"fp8": m * _blocks(n, wide), "fp8_t": _blocks(m, wide) * n}
            if high > 1:
                sizes = {"fp8": _blocks(m, high) * _blocks(n, wide)}
            for copy, size in sizes.items():
                if copy in cast.outputs or high > 1:
                    found.append(((i, copy), first, size))
                    first += size
        return found

    @cached_property
    def reduces(self) -> bool:
        """Whether anything depends on a reduction over rows."""
        over_columns = set(map(sum_behind, self.sums))
        return any(
            node.target in ROW_REDUCTIONS and node not in over_columns
            for node in self.gm.graph.nodes
        )

    @property
    def sums_apart(self) -> bool:
        """Whether a kernel before computes the reductions over rows."""
        return self.reduces and self.takes_high_tiles

    @property
    def whole_rows(self) -> bool:
        """Whether a program computes whole rows, for sums over them or for their scales."""
        return self.finds_row_scales or (self.reduces and not self.sums_apart)

    @property
    def loops(self) -> bool:
        """Whether a program goes from row to row. Where columns are summed up as well, it would
        else leave a row of partial sums for every row or two.
        """
        return self.whole_rows and bool(self.sums or self.scales)

    @property
    def completes_sums(self) -> bool:
        """Whether the kernel that sums over columns tile by tile also adds up what its tiles leave.

        Where a program goes from row to row, few programs would do so, and the others have ended.
        """
        return bool(self.sums) and not self.loops and bool(self.space.n.is_number)

    @property
    def completes_apart(self) -> bool:
        """Whether a kernel of its own adds them up."""
        return bool(self.sums) and not self.completes_sums

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The words in which single float32 numbers lie, by their names: those that are read or
        written once by each program, of each cast and of the scales found for casts in other
        regions, then each cast's amax. Before them are the words through which programs find an
        amax together.
        """
        found = self.casts if self.searches else self.scales
        first = padded(2 + len(found), _LINE) if found else 0
        numbers = {
            f"{name}_{i}": first + i * _NUMBERS_WIDTH + word
            for i in range(len(self.casts))
            for name, word in _NUMBERS.items()
        }
        first += len(self.casts) * _NUMBERS_WIDTH
        numbers |= {f"found_scale_{i}": first + i * _FOUND_WIDTH for i in range(len(self.scales))}
        first = padded(first + len(self.scales) * _FOUND_WIDTH, _LINE)
        return numbers | {f"amax_{i}": first + i for i in range(len(self.casts))}

    @property
    def first_counter(self) -> int:
        """The word in which the first column of tiles counts its tiles, to complete sums."""
        return padded(1 + max(self.numbers.values(), default=-1), _LINE)

    @property
    def word_count(self) -> int:
        """The 32 bits each, zero but for the scales from earlier steps, that programs share and
        leave numbers in: how many tiles are taken, how many are done, the bits of the amax of each
        cast or scale; ``numbers``; then a counter for each column of tiles. Lines of a cache have
        words of one kind, and of one region: to read a scale beside an amax that all programs
        raise made casts take 1.5 times as long (H200).
        """
        if not self.completes_sums:
            return self.first_counter
        width = padded(int(self.space.n), max(self.padding, LEAST_WIDE))
        return padded(self.first_counter + width // LEAST_WIDE, _LINE)

    @property
    def sums_alone(self) -> bool:
        """Whether that kernel is one of its own, not one that looks for an amax at every call."""
        return self.sums_apart and not self.sums_in_search

    @property
    def sums_in_search(self) -> bool:
        """Whether it is the one that looks for an amax: at every call, that reads all there is."""
        return self.sums_apart and self.always_searches and not self.searched

    @property
    def search_in_sums(self) -> bool:
        """Whether that kernel also looks for an amax, at the calls that miss a scale."""
        return self.sums_alone and self.searches and not self.searched

    @property
    def searches(self) -> bool:
        """Whether it has to look for the amax of a cast whose scale is missing."""
        return not all(cast.is_given for cast in self.casts)

    @property
    def always_searches(self) -> bool:
        """Whether every call looks for an amax, since no step before has found one."""
        return not all(cast.is_delayed for cast in self.casts)

    @property
    def is_large(self) -> bool:
        """Whether an offset may not fit into 32 bits."""
        tensors = [n.meta["val"] for n in self.gm.graph.nodes if _is_tensor(n)]
        spans = [_span(tensor) for tensor in tensors]
        return any(not isinstance(span, int) or span >= 2**31 for span in spans)

    def is_matrix(self, node: fx.Node) -> bool:
        """Whether a value has an element for every element of the space."""
        return bool(sympy.expand(sympy.prod(shape_of(node)) - self.space.size) == 0)


def _blocks(length: sympy.Expr, size: int) -> sympy.Expr:
    """How many blocks a row or column has; ``size`` 0: one."""
    return FloorDiv(length + size - 1, size) if size else sympy.S.One


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _span(tensor: torch.Tensor) -> Any:
    """How many elements of memory lie between a tensor's first element and its last."""
    extents = zip(tensor.shape, tensor.stride(), strict=True)
    return max(tensor.numel(), 1 + sum((size - 1) * stride for size, stride in extents))


def _inputs_of(node: fx.Node) -> set[fx.Node]:
    """The region's inputs that a value is computed from."""
    found, seen = [node], set()
    while found:
        node = found.pop()
        if node not in seen:
            seen.add(node)
            found += node.all_input_nodes
    return {node for node in seen if node.op == "placeholder"}


def _is_column_sum(node: fx.Node, space: Space) -> bool:
    node = sum_behind(node)
    if node.target is not torch.ops.aten.sum.dim_IntList:
        return False
    return 0 in reduced_dims(node) and sympy.expand(sympy.prod(shape_of(node)) - space.n) == 0
