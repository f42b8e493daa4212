"""The text of a region's kernels, around the functions that compute its values.

A kernel finds its tile, takes or finds the scales of its casts, calls the functions and stores what
they return. A region is one kernel that stores all results, and up to three others: before it, the
sums over rows and the search for a missing amax; after it, the completion of sums over columns.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..formats import Format
from ..ir import args_of
from ..ops import GROUP
from ..regions import is_aligned, shape_of
from .before import DONE, Before, found_amax, leave_amax
from .block_cast import BlockCast
from .pieces import named, padded_text, plus
from .region import COPIES, LEAST_IN_TILE, Cast, Region, Result
from .tile_text import TileText, definition
from .values import Values, expr_text

_ROWS_OF_TILES = 8
_ADDED_ROWS = 64  # of partial sums, at a time
_MOST_SHARED = 160 * 2**10  # bytes, of the 227 KiB that there are


class Writer(TileText):
    """Writes the kernels of one region. ``search_apart``: a missing amax is found by a kernel of
    its own, not by the kernel that casts, or that sums.
    """

    def __init__(self, region: Region, values: Values, *, search_apart: bool) -> None:
        super().__init__(region, values, sets="abcd" if region.transposes else ("",))
        self.before = Before(region, values)
        self.search_inside = region.searches and not (search_apart or region.search_in_sums)

    # --- the kernels ---------------------------------------------------------------------------

    def functions(self) -> list[str]:
        """What the kernels call."""
        found = [function.text() for function in (*self.values.sums, *self.values.last)]
        return [*found, self.before.search_function()] if self.search_inside else found

    def main(self, name: str) -> str:
        """The kernel that computes and stores one tile per program."""
        tile = "tile = tl.program_id(0)"
        if self.region.sums_apart:
            # Backwards: what the kernel before this one has read last is still in the cache.
            tile = "tile = tl.num_programs(0) - 1 - tl.program_id(0)"
        return definition(name, self.arguments(), [tile, *self._tile()])

    def part(self, name: str) -> str:
        """The same as a function of a kernel whose programs other regions share."""
        return definition(name, ["tile", *self.arguments()], self._tile())

    def column_sums(self, name: str) -> str:
        """The kernel that adds up the rows of partial sums, of all sums over columns at once."""
        lines = [*self._extent(), "first_n = tl.program_id(0) * BLOCK_N", *self._cols()]
        lines += self._add_partial_sums("tiles_m", "BLOCK_M")
        arguments = [*self._sum_arguments(), *self.sizes, "tiles_m"]
        return definition(name, arguments, lines)

    def _add_partial_sums(self, rows: str, block_m: str) -> list[str]:
        """Add up the partial sums of the columns, so many rows of them at a time. Those of several
        sums take turns in one buffer, which is one pointer to pass.
        """
        lines, count = [], len(self.region.sums)
        pitch = "N" if count == 1 else f"{count} * N"
        for i in range(count):
            first = f"partial_ptr + {i} * N" if i else "partial_ptr"
            total = f"add_rows({first} + cols, {rows}, {pitch}, in_n, {block_m})"
            lines.append(f"tl.store(sum_{i}_ptr + cols, {total}, mask=in_n)")
        return lines

    def _complete_sums(self) -> list[str]:
        """The last program of a column of tiles adds up what all of it have left."""
        if not self.region.completes_sums:
            return []
        counter = f"words_ptr + {self.region.first_counter} + tile_n"
        tiles_m = self._tiles_along("M")
        inner = [
            "tl.debug_barrier()",
            f"tl.store({counter}, 0)",  # so that the same buffer serves another launch
            *self._add_partial_sums(tiles_m, str(_ADDED_ROWS)),
        ]
        return [
            "tl.debug_barrier()",  # all threads have stored what they leave
            f"if tl.atomic_add({counter}, 1) == {tiles_m} - 1:",
            *(f"    {line}" for line in inner),
        ]

    def _tile(self) -> list[str]:
        """Compute the results of one tile and store them; of several, where a program loops."""
        padding = self.region.padding
        lines = self._extent(padding, padding) if padding > 1 else self._extent()
        lines.append(f"tiles_n = {self._tiles_along('N')}")
        for i in range(len(self.region.scales)):
            lines.append(f"bits_{i} = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)")
        casts = list(enumerate(self.region.casts))
        scales = self.before.search_if_needed() if self.search_inside else []
        scales += [self._scale(i, cast) for i, cast in casts]
        told = [line for i, cast in casts for line in self._tell_scale(i, cast)]
        if not self.region.loops:
            lines += [*self._ordered_place(), *self._rows(), *self._cols()]
            lines += [*self._stored_tile(scales), *told, *self._leave_scales()]
            return lines + self._complete_sums()
        lines += [*scales, *told, "tile_n = 0", "first_n = 0", *self._cols()]
        sums = range(len(self.region.sums))
        lines += [f"col_sum_{i} = tl.zeros((BLOCK_N,), dtype=tl.float32)" for i in sums]
        steps = "tile, tl.cdiv(M, BLOCK_M), tl.num_programs(0)"
        lines.append(f"for tile in tl.range({steps}, num_stages={self._stages()}):")
        inner = ["first_m = tile * BLOCK_M", *self._rows(), *self._stored_tile()]
        lines += [f"    {line}" for line in inner]
        for i in sums:
            lines += self._leave_sum(i, f"col_sum_{i}", "tl.program_id(0)")
        return lines + self._leave_scales()

    def _tiles_along(self, side: str) -> str:
        """How many tiles cover a side of the space, and the padding behind it."""
        padding = self.region.padding
        return f"tl.cdiv({padded_text(side, padding) if padding > 1 else side}, BLOCK_{side})"

    def _ordered_place(self) -> list[str]:
        """Where the tile lies. Of tiles that use sums made before, several rows of them are taken
        together, which share the lines of transposed copies: a tenth faster for a norm's backward
        (H200); others are as fast in rows, or faster.
        """
        place = self._place()
        if not self.region.sums_apart:
            return place
        position = f"tile_position(tile, {self._tiles_along('M')}, tiles_n, {_ROWS_OF_TILES})"
        return [f"tile_m, tile_n = {position}", *place[2:]]

    def _stages(self) -> int:
        """How many rows the loads of a loop are ahead, if they fit into shared memory: two, a
        twentieth faster than none.
        """
        row = self.values.bytes_loaded * max(int(self.region.space.n), LEAST_IN_TILE)
        return min(3, 1 + _MOST_SHARED // max(1, row))

    def _stored_tile(self, scales: Sequence[str] = ()) -> list[str]:
        """Compute the results of a tile whose place is known, and store them. ``scales``: what
        finds those of casts, after the values, whose loads would else wait for them.
        """
        lines = self._totals()
        for _, searched in self._searched():
            lines += searched.load()
        for turn, outputs in enumerate(self._in_turn()):
            lines += self._values_in_sets(outputs)
            if turn == 0:
                lines += scales
            for result, variable in outputs:
                lines += getattr(self, f"_store_{result.kind}")(result, variable)
        for i, cast in enumerate(self.region.casts):
            lines += self._track(i, cast)
        return lines

    def _in_turn(self) -> list[list[tuple[Result, str]]]:
        """The results, by what is in registers at a time. A tile of whole blocks fills them with
        one result: what several are computed from is loaded again for each, from the cache.
        """
        found = self._outputs()
        if self.region.searched:
            return [found]
        alone = [[output] for output in found if output[0].kind == "block"]
        if len(alone) < 2 or not self.region.transposes:
            return [found]
        others = [output for output in found if output[0].kind != "block"]
        return [*alone, others] if others else alone

    def _values_in_sets(self, outputs: Sequence[tuple[Result, str]]) -> list[str]:
        """Compute results; those with a scale per block, which counts what lies outside of the
        matrix as zero, all before the first is stored: the loads of a tile are under way together.
        """
        lines = self._results([variable for _, variable in outputs])
        for variable in [variable for r, variable in outputs if r.kind == "block"]:
            for a in self.sets:
                where = f"{named('in_m', a)} & in_n"
                value = f"inside({named(variable, a)}, {where}, EVEN)"
                lines.append(f"{named(f'x_{variable}', a)} = {value}")
        return lines

    def _scale(self, i: int, cast: Cast) -> str:
        if cast.is_given:
            return f"scale_{i} = tl.load(scale_{i}_ptr)"
        known = self._number(f"scale_{i}") if cast.is_delayed else "0.0"
        amax = f"tl.load({found_amax(i)}).to(tl.float32, bitcast=True)"
        return f"scale_{i} = resolve_scale({known}, {amax}, {cast.format.max})"

    def _tell_scale(self, i: int, cast: Cast) -> list[str]:
        """Leave what others want to know of the scale, from the first tile."""
        told = {"scale_inv": f"divide(1.0, scale_{i})", "scale_used": f"scale_{i}"}
        wanted = [name for name in told if name in cast.outputs]
        stores = [f"    {self._leave_number(f'{name}_{i}', told[name])}" for name in wanted]
        return ["if tile == 0:", *stores] if stores else []

    # --- stores --------------------------------------------------------------------------------

    def _store_value(self, result: Result, variable: str) -> list[str]:
        pointer, lines = f"value_{result.index}_ptr", []
        for letter in self.sets:
            rows, in_m = named("rows", letter), named("in_m", letter)
            value = named(variable, letter)
            if self.region.is_matrix(result.node):
                lines.append(
                    f"tl.store({pointer} + ({rows} * N + cols), {value}, mask={in_m} & in_n)"
                )
            else:
                lines.append("if tile_n == 0:")
                lines.append(f"    tl.store({pointer} + {rows}, {value}, mask={in_m})")
        return lines

    def _store_sum(self, result: Result, variable: str) -> list[str]:
        """A row of partial sums for each row of tiles, or for each program that loops."""
        terms = [f"inside({named(variable, a)}, {named('in_m', a)}, EVEN)" for a in self.sets]
        total = f"tl.sum({' + '.join(terms)}, axis=0)"
        if self.region.loops:
            return [f"col_sum_{result.index} += {total}"]
        return self._leave_sum(result.index, total, "tile_m")

    def _leave_sum(self, index: int, total: str, row: str) -> list[str]:
        """Leave what belongs to a row of partial sums."""
        count = len(self.region.sums)
        at = row if count == 1 else f"({row} * {count} + {index})"
        pointer = f"partial_ptr + ({at} * N + cols)"
        return [f"tl.store({pointer}, {total}[None, :], mask=in_n)"]

    def _store_scale(self, result: Result, variable: str) -> list[str]:
        """Look for the amax of a value."""
        bits = f"inside(magnitude_bits({variable}), in_m & in_n, EVEN)"
        return [f"bits_{result.index} = tl.maximum(bits_{result.index}, {bits})"]

    def _leave_scales(self) -> list[str]:
        """Leave the largest of what a program has seen; the last program makes scales of it."""
        lines, last = [], []
        for i, scale in enumerate(self.region.scales):
            lines.append(leave_amax(found_amax(i), f"bits_{i}"))
            amax = f"tl.atomic_max({found_amax(i)}, 0).to(tl.float32, bitcast=True)"
            found = f"resolve_scale(0.0, {amax}, {Format.of(args_of(scale)[1]).max})"
            last.append(f"    {self._leave_number(f'found_scale_{i}', found)}")
        done = f"if tl.atomic_add({DONE}, 1) == tl.num_programs(0) - 1:"
        return [*lines, done, *last] if last else lines

    def _store_cast(self, result: Result, variable: str) -> list[str]:
        i, cast = result.index, self.region.casts[result.index]
        width = shape_of(args_of(cast.node)[0])[1]
        pads_rows = "fp8" in cast.outputs and not is_aligned(width)
        pads_columns = "fp8_t" in cast.outputs and not is_aligned(self.region.space.m)
        pitch = padded_text(expr_text(width)) if pads_rows else expr_text(width)
        shift = plus(result.start)
        lines = []
        for a in self.sets:
            y = f"saturate({named(variable, a)}, scale_{i}, {cast.format.max})"
            outside = [named("in_m", a)] * pads_columns + ["in_n"] * pads_rows
            y = f"inside({y}, {' & '.join(outside)}, EVEN)" if outside else y
            lines.append(f"{named('y', a)} = {y}")
        if "fp8" in cast.outputs:
            in_row = f"(cols < {pitch})" if pads_rows else "in_n"
            for a in self.sets:
                rows, in_m = named("rows", a), named("in_m", a)
                value = f"to_fp8({named('y', a)}, fp8_{i}_ptr.dtype.element_ty)"
                at = f"fp8_{i}_ptr + ({rows} * {pitch} + cols{shift})"
                lines.append(f"tl.store({at}, {value}, mask={in_m} & {in_row})")
        if "fp8_t" in cast.outputs:
            height = padded_text("M") if pads_columns else "M"
            lines.append("store_transposed(")
            lines.append(f"    fp8_t_{i}_ptr, y_a, y_b, y_c, y_d, first_m, first_n{shift},")
            lines.append(f"    {height} - first_m, N - first_n, {height},")
            lines.append(")")
        return lines

    def _store_block(self, result: Result, variable: str) -> list[str]:
        cast = self.region.blocks[result.index]
        if cast in self.region.searched:
            return self._searched_cast(result, variable).store()
        return BlockCast(result, cast, f"x_{variable}", self.sets).store()

    def _store_group(self, result: Result, variable: str) -> list[str]:
        """A cast with a scale per group of a row; the tile holds whole groups."""
        i, fp8_max = result.index, Format.E4M3.max
        columns = f"(first_n // {GROUP} + tl.arange(0, BLOCK_N // {GROUP})[None, :])"
        lines = [f"group = {columns}"]
        for a in self.sets:
            y, inv = named("y", a), named("inv", a)
            lines.append(f"{y}, {inv} = quantize_groups({named(variable, a)}, {fp8_max})")
        for a in self.sets:
            rows, in_m = named("rows", a), named("in_m", a)
            value = f"to_fp8({named('y', a)}, q_{i}_ptr.dtype.element_ty)"
            lines.append(f"tl.store(q_{i}_ptr + ({rows} * N + cols), {value}, mask={in_m} & in_n)")
            at = f"group_scale_inv_{i}_ptr + ({rows} * (N // {GROUP}) + group)"
            mask = f"{in_m} & (group < N // {GROUP})"
            lines.append(f"tl.store({at}, {named('inv', a)}, mask={mask})")
        return lines

    def _track(self, i: int, cast: Cast) -> list[str]:
        if "amax" not in cast.outputs:
            return []
        return [*self._bits(i), leave_amax(self._word(f"amax_{i}"), "bits")]

    # --- arguments -----------------------------------------------------------------------------

    def arguments(self) -> list[str]:
        """What a kernel takes, besides the extent of its tiles."""
        names = self._read() + self._scales()
        for i, cast in enumerate(self.region.casts):
            names += [f"{output}_{i}_ptr" for output in cast.outputs if output in COPIES]
        searched = self._inverses()
        for i, block in enumerate(self.region.blocks):
            pointers = [f"block_{output}_{i}_ptr" for output in block.outputs]
            names += [pointer for pointer in pointers if pointer not in searched]
        for i in range(len(self.region.groups)):
            names += [f"q_{i}_ptr", f"group_scale_inv_{i}_ptr"]
        names += [f"value_{i}_ptr" for i in range(len(self.region.values))]
        if not self.region.completes_sums:
            return names + ["partial_ptr"] * bool(self.region.sums)
        return names + ["words_ptr"] * ("words_ptr" not in names) + self._sum_arguments()

    def _sum_arguments(self) -> list[str]:
        return ["partial_ptr", *(f"sum_{i}_ptr" for i in range(len(self.region.sums)))]
