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
from .block_cast import BlockCast
from .pieces import named, padded_text, plus
from .region import Cast, Region, Result
from .searched_cast import INVERSES, SearchedCast
from .values import Function, Values, expr_text


class Writer:
    """Writes the kernels of one region. ``search_apart``: a missing amax is found by a kernel of
    its own, not by the kernel that casts.
    """

    def __init__(self, region: Region, values: Values, *, search_apart: bool) -> None:
        self.region = region
        self.values = values
        self.search_apart = search_apart
        self.sizes = sorted(str(symbol) for symbol in values.symbols)
        # Where a transposed copy is stored, a tile is computed as four interleaved sets of rows.
        self.sets = "abcd" if region.transposes else ("",)

    # --- the kernels ---------------------------------------------------------------------------

    def functions(self) -> list[str]:
        """What the kernels call."""
        found = [function.text() for function in (*self.values.sums, *self.values.last)]
        inside = self.region.casts and not self.search_apart
        return [*found, self._search()] if inside else found

    def main(self, name: str) -> str:
        """The kernel that computes and stores one tile per program."""
        tile = "tile = tl.program_id(0)"
        if self.region.sums_apart:
            # Backwards: what the kernel before this one has read last is still in the cache.
            tile = "tile = tl.num_programs(0) - 1 - tl.program_id(0)"
        return _function(name, self.arguments(), [tile, *self._tile()])

    def part(self, name: str) -> str:
        """The same as a function of a kernel whose programs other regions share."""
        return _function(name, ["tile", *self.arguments()], self._tile())

    def sums(self, name: str) -> str:
        """The kernel that sums over whole rows, for one that computes tiles of columns."""
        lines = [*self._extent(), "first_m = tl.program_id(0) * BLOCK_M", "first_n = 0"]
        lines += [*self._rows(("",)), *self._cols()]
        lines += [self._call(function, "", function.returns) for function in self.values.sums]
        for i, total in enumerate(self.values.totals.values()):
            lines.append(f"tl.store(totals_ptr + {i} * M + rows, {total.name}, mask=in_m)")
        return _function(name, [*self._inputs(), "totals_ptr"], lines)

    def amax(self, name: str) -> str:
        """The kernel that finds the amax of the casts, unless all scales are known, and of rows."""
        casts = range(len(self.region.casts))
        height = self.region.search_height or "BLOCK_M"
        lines = [*self._extent(height), *self._tile_counts(height)]
        if self._known():
            lines.append(f"tiles = tl.where({self._known()}, 0, tiles)")
        lines += [f"bits_{i} = {_ZEROS}" for i in casts]
        lines.append("for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):")
        lines += [f"    {line}" for line in self._search_tile()]
        for i in casts:
            lines += self._leave_amax(i, f"bits_{i}")
        return _function(name, [*self._read(), *self._scales(), *self._inverses()], lines)

    def _search_tile(self) -> list[str]:
        """Look at a tile, or at those that make a block of rows."""
        found = self._searched()
        wait = [cast for _, cast in found if cast.waits]
        look = []
        for i in range(len(self.region.casts)):
            look += [*self._bits(i, ("",)), f"bits_{i} = tl.maximum(bits_{i}, bits)"]
        for variable, cast in found:
            look.append(f"bits = inside(magnitude_bits({variable}), in_m & in_n, EVEN)")
            look += cast.search("bits")
        height = self.region.search_height
        if not height:
            return [*self._values_of_tile(), *look]
        lines = [*self._place(height), *self._cols()]
        lines += [f"{cast.largest} = {_ZEROS}" for cast in wait]
        lines.append(f"for strip in tl.range(0, {height}, BLOCK_M, num_stages={self._stages()}):")
        inner = [*self._rows(("",), "strip"), *self._totals(("",)), *self._results(("",))]
        lines += [f"    {line}" for line in (*inner, *look)]
        return lines + [line for cast in wait for line in cast.leave()]

    def _stages(self) -> int:
        """How many strips the loads of a search are ahead: two more, a fifth faster, unless they
        take so much shared memory that few programs run at a time.
        """
        return 3 if self.values.loads_little else 1

    def column_sums(self, name: str) -> str:
        """The kernel that adds up the rows of partial sums, of all sums over columns at once."""
        lines = [*self._extent(), "cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)"]
        lines.append("in_n = cols < N")
        for i in range(len(self.region.sums)):
            lines.append(f"total_{i} = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)")
        lines += ["for first in range(0, tiles_m, BLOCK_M):"]
        lines += ["    row = first + tl.arange(0, BLOCK_M)[:, None]"]
        lines += ["    mask = (row < tiles_m) & in_n[None, :]"]
        for i in range(len(self.region.sums)):
            load = f"tl.load(partial_{i}_ptr + (row * N + cols[None, :]), mask=mask, other=0.0)"
            lines.append(f"    total_{i} += {load}")
        for i in range(len(self.region.sums)):
            lines.append(f"tl.store(sum_{i}_ptr + cols, tl.sum(total_{i}, axis=0), mask=in_n)")
        arguments = [*self._sum_arguments(), *self.sizes, "tiles_m"]
        return _function(name, arguments, lines)

    def _totals(self, sets: Sequence[str]) -> list[str]:
        """The sums over rows that the values depend on: from memory, or of this tile itself."""
        if not self.region.sums_apart:
            return [self._call(function, "", function.returns) for function in self.values.sums]
        lines = []
        for i, total in enumerate(self.values.totals.values()):
            for letter in sets:
                rows, in_m = named("rows", letter), named("in_m", letter)
                load = f"tl.load(totals_ptr + {i} * M + {rows}, mask={in_m}, other=0.0)"
                lines.append(f"{named(total.name, letter)} = {load}")
        return lines

    def _tile(self) -> list[str]:
        """Compute the results of one tile and store them."""
        padding = self.region.padding
        if padding == 1:
            lines = [*self._extent(), "tiles_n = tl.cdiv(N, BLOCK_N)"]
        else:
            width = padded_text("N", padding)
            lines = [*self._extent(padding, padding), f"tiles_n = tl.cdiv({width}, BLOCK_N)"]
        lines += [*self._place(), *self._rows(self.sets), *self._cols()]
        if self.region.casts and not self.search_apart:
            lines += self._search_if_needed()
        for i, cast in enumerate(self.region.casts):
            lines += self._scale(i, cast)
        lines += self._totals(self.sets)
        for outputs in self._in_turn():
            lines += self._values_in_sets(outputs)
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
        lines = self._results(self.sets, [variable for _, variable in outputs])
        for variable in [variable for r, variable in outputs if r.kind == "block"]:
            for a in self.sets:
                where = f"{named('in_m', a)} & in_n"
                value = f"inside({named(variable, a)}, {where}, EVEN)"
                lines.append(f"{named(f'x_{variable}', a)} = {value}")
        return lines

    def _results(self, sets: Sequence[str], wanted: Sequence[str] | None = None) -> list[str]:
        """Call the last function, or the one of the part that the tile lies in. ``wanted``: the
        results that are looked at, if not all.
        """
        if not self.region.branches:
            names = [
                variable if wanted is None or variable in wanted else "unused"
                for _, variable in self._outputs()
            ]
            return [self._call(self.values.last[0], letter, names) for letter in sets]
        lines = []
        ends = [start for start, _ in self.region.branches[1:]]
        for i, (function, (start, _)) in enumerate(
            zip(self.values.last, self.region.branches, strict=True)
        ):
            word = "if" if i == 0 else "elif"
            lines.append(f"{word} first_n < {ends[i]}:" if i < len(ends) else "else:")
            for letter in sets:
                call = self._call(function, letter, ["out_0"])
                lines.append("    " + call.replace("cols", f"cols - {start}" if start else "cols"))
        return lines

    def _extent(self, height: int | str = "BLOCK_M", width: int | str = "BLOCK_N") -> list[str]:
        """The space, and whether what a program computes, so high and wide, never leaves it."""
        m, n = self.region.space.m, self.region.space.n
        lines = []
        for name, size in (("M", m), ("N", n)):
            kind = ": tl.constexpr" if size.is_number else ""
            lines.append(f"{name}{kind} = {expr_text(size)}")
        static = m.is_number and n.is_number
        even = f"(M % {height} == 0) and (N % {width} == 0)" if static else "False"
        return [*lines, f"EVEN: tl.constexpr = {even}"]

    def _place(self, height: int | str = "BLOCK_M") -> list[str]:
        """Where the tile lies."""
        lines = ["tile_m = tile // tiles_n", "tile_n = tile % tiles_n"]
        return [*lines, f"first_m = tile_m * {height}", "first_n = tile_n * BLOCK_N"]

    def _rows(self, sets: Sequence[str], below: str = "") -> list[str]:
        """The tile's rows; ``below``: how far below its place."""
        first = "first_m.to(tl.int64)" if self.region.is_large else "first_m"
        first += f" + {below}" if below else ""
        lines = []
        for j, letter in enumerate(sets):
            row = "tl.arange(0, BLOCK_M)[:, None]"
            if len(sets) > 1:
                row = f"tl.arange(0, BLOCK_M // {len(sets)})[:, None] * {len(sets)} + {j}"
            lines.append(f"{named('row_in_tile', letter)} = {row}")
            lines.append(f"{named('rows', letter)} = {first} + {named('row_in_tile', letter)}")
            lines.append(f"{named('in_m', letter)} = {named('rows', letter)} < M")
        return lines

    def _cols(self) -> list[str]:
        return ["cols = first_n + tl.arange(0, BLOCK_N)[None, :]", "in_n = cols < N"]

    def _scale(self, i: int, cast: Cast) -> list[str]:
        known = f"tl.load(scale_{i}_ptr)" if cast.is_delayed else "0.0"
        found = f"tl.load({_found(i)}).to(tl.float32, bitcast=True)"
        lines = [f"scale_{i} = resolve_scale({known}, {found}, {cast.format.max})"]
        if "scale_inv" in cast.outputs:
            lines.append("if (tile_m == 0) & (tile_n == 0):")
            lines.append(f"    tl.store(scale_inv_{i}_ptr, tl.div_rn(1.0, scale_{i}))")
        return lines

    def _call(self, function: Function, letter: str, returned: Sequence[str]) -> str:
        same = {"cols", "in_n", *function.arguments}
        arguments = [p if p in same else named(p, letter) for p in function.parameters]
        names = [named(name, letter) for name in returned]
        return f"{', '.join(names)} = {function.name}({', '.join(arguments)})"

    def _outputs(self) -> list[tuple[Result, str]]:
        return [(result, f"out_{i}") for i, result in enumerate(self.region.results)]

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
        """One row of partial sums per row of tiles."""
        terms = [f"inside({named(variable, a)}, {named('in_m', a)}, EVEN)" for a in self.sets]
        pointer = f"partial_{result.index}_ptr + (tile_m * N + cols)"
        return [
            f"col_sum = tl.sum({' + '.join(terms)}, axis=0)",
            f"tl.store({pointer}, col_sum[None, :], mask=in_n)",
        ]

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
                value = f"{named('y', a)}.to(fp8_{i}_ptr.dtype.element_ty)"
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

    def _searched_cast(self, result: Result, variable: str) -> SearchedCast:
        """A cast for which a kernel before this one has looked for the largest elements."""
        found = {
            copy: f"found_ptr + {expr_text(first)}" if first != 0 else "found_ptr"
            for (index, copy), first in self.region.found.items()
            if index == result.index
        }
        cast = self.region.blocks[result.index]
        return SearchedCast(result, cast, f"x_{variable}", self.sets, found)

    def _searched(self) -> list[tuple[str, SearchedCast]]:
        """All such casts, with the variables that hold their values."""
        return [
            (variable, self._searched_cast(result, variable))
            for result, variable in self._outputs()
            if result.kind == "block" and self.region.blocks[result.index] in self.region.searched
        ]

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
            value = f"{named('y', a)}.to(q_{i}_ptr.dtype.element_ty)"
            lines.append(f"tl.store(q_{i}_ptr + ({rows} * N + cols), {value}, mask={in_m} & in_n)")
            at = f"group_scale_inv_{i}_ptr + ({rows} * (N // {GROUP}) + group)"
            mask = f"{in_m} & (group < N // {GROUP})"
            lines.append(f"tl.store({at}, {named('inv', a)}, mask={mask})")
        return lines

    def _track(self, i: int, cast: Cast) -> list[str]:
        if "amax" not in cast.outputs:
            return []
        track = f'tl.atomic_max(amax_{i}_ptr, tile_amax(bits), sem="relaxed")'
        return [*self._bits(i, self.sets), track]

    def _bits(self, i: int, sets: Sequence[str]) -> list[str]:
        """The magnitudes of all that a cast takes from this tile, each element's largest."""
        bits = [
            f"inside(magnitude_bits({named(variable, a)}), {named('in_m', a)} & in_n, EVEN)"
            for result, variable in self._outputs()
            if (result.kind, result.index) == ("cast", i)
            for a in sets
        ]
        return [f"bits = {bits[0]}", *(f"bits = tl.maximum(bits, {b})" for b in bits[1:])]

    # --- arguments -----------------------------------------------------------------------------

    def _inputs(self) -> list[str]:
        return [f"{node.name}_ptr" for node in self.region.inputs] + self.sizes

    def _read(self) -> list[str]:
        """What the values of a tile are computed from, and the words that programs share."""
        totals = ["totals_ptr"] if self.region.sums_apart else []
        words = ["words_ptr"] if self.region.casts else []
        found = ["found_ptr"] if self.region.searched else []
        return [*self._inputs(), *totals, *words, *found]

    def _scales(self) -> list[str]:
        casts = enumerate(self.region.casts)
        return [f"scale_{i}_ptr" for i, cast in casts if cast.is_delayed]

    def arguments(self) -> list[str]:
        """What a kernel takes, besides the extent of its tiles."""
        names = self._read() + self._scales()
        for i, cast in enumerate(self.region.casts):
            names += [f"{output}_{i}_ptr" for output in cast.outputs]
        searched = self._inverses()
        for i, block in enumerate(self.region.blocks):
            pointers = [f"block_{output}_{i}_ptr" for output in block.outputs]
            names += [pointer for pointer in pointers if pointer not in searched]
        for i in range(len(self.region.groups)):
            names += [f"q_{i}_ptr", f"group_scale_inv_{i}_ptr"]
        names += [f"value_{i}_ptr" for i in range(len(self.region.values))]
        return names + [f"partial_{i}_ptr" for i in range(len(self.region.sums))]

    def _inverses(self) -> list[str]:
        """The inverse scales that the kernel that finds them stores."""
        return [
            f"block_{output}_{i}_ptr"
            for i, cast in enumerate(self.region.blocks)
            for output in INVERSES.values()
            if cast in self.region.searched and cast.block[1] and output in cast.outputs
        ]

    def _sum_arguments(self) -> list[str]:
        sums = range(len(self.region.sums))
        return [f"{name}_{i}_ptr" for i in sums for name in ("partial", "sum")]

    # --- the search for amax -------------------------------------------------------------------

    def _known(self) -> str:
        """Whether every cast has a scale from earlier steps; "" where that is never so."""
        if self.region.searched or not all(cast.is_delayed for cast in self.region.casts):
            return ""
        return " & ".join(f"(tl.load(scale_{i}_ptr) > 0)" for i in range(len(self.region.casts)))

    def _search_if_needed(self) -> list[str]:
        call = f"{self._search_name}({', '.join([*self._read(), 'BLOCK_M', 'BLOCK_N'])})"
        return [f"known = {self._known()}", "if not known:", f"    {call}"]

    @property
    def _search_name(self) -> str:
        return f"_search{self.values.suffix}"

    def _search(self) -> str:
        """The function in which all programs find the amax of every cast before any goes on.

        ``words_ptr``, zero at first: how many tiles are taken, how many are done, and the bits of
        each cast's amax. A program takes tiles as long as there are any, so that those that
        run never wait for one that does not run yet.
        """
        lines = [*self._extent(), *self._tile_counts(), "tile = tl.atomic_add(words_ptr, 1)"]
        lines.append("while tile < tiles:")
        lines += [f"    {line}" for line in self._values_of_tile()]
        for i in range(len(self.region.casts)):
            lines += [f"    {x}" for x in (*self._bits(i, ("",)), *self._leave_amax(i, "bits"))]
        lines += [
            f"    tl.atomic_add({_DONE}, 1)",
            "    tile = tl.atomic_add(words_ptr, 1)",
            f"while tl.atomic_add({_DONE}, 0) < tiles:",
            "    pass",
        ]
        return _function(self._search_name, self._read(), lines)

    def _tile_counts(self, height: int | str = "BLOCK_M") -> list[str]:
        return ["tiles_n = tl.cdiv(N, BLOCK_N)", f"tiles = tl.cdiv(M, {height}) * tiles_n"]

    def _values_of_tile(self) -> list[str]:
        lines = [*self._place(), *self._rows(("",)), *self._cols()]
        return [*lines, *self._totals(("",)), *self._results(("",))]

    def _leave_amax(self, i: int, bits: str) -> list[str]:
        amax = f"tile_amax({bits}).to(tl.int32, bitcast=True)"
        return [f'tl.atomic_max({_found(i)}, {amax}, sem="relaxed")']


_DONE = "words_ptr + 1"
_ZEROS = "tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)"


def word_count(region: Region) -> int:
    """The zeroed int32 through which the programs of a region find the amax of its casts."""
    return 2 + len(region.casts) if region.casts else 0


def _found(i: int) -> str:
    """Where the search for amax leaves what it has found for a cast."""
    return f"words_ptr + {2 + i}"


def _function(name: str, arguments: Sequence[str], lines: Sequence[str]) -> str:
    head = [f"    {argument}," for argument in arguments]
    head += [f"    {constant}: tl.constexpr," for constant in ("BLOCK_M", "BLOCK_N")]
    body = [f"    {line}" for line in lines]
    return "\n".join(["@triton.jit", f"def {name}(", *head, "):", *body])
