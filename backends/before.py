"""The text of what runs before a region's results are stored.

Sums over rows, for a kernel that computes tiles of columns; and the search for scales, which looks
for the largest elements before anything is cast.
"""

from __future__ import annotations

from .tile_text import TileText, definition

DONE = "words_ptr + 1"
_ZEROS = "tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)"


def found_amax(i: int) -> str:
    """Where programs leave what they have found for a cast, or for a scale."""
    return f"words_ptr + {2 + i}"


def leave_amax(word: str, bits: str) -> str:
    """Leave the largest of a tile's magnitudes, unless a larger one is there."""
    amax = f"tile_amax({bits}).to(tl.int32, bitcast=True)"
    return f'tl.atomic_max({word}, {amax}, sem="relaxed")'


class Before(TileText):
    """Writes what a region needs first: kernels of its own, or a function of the one that casts."""

    # --- kernels -------------------------------------------------------------------------------

    def sums(self, name: str) -> str:
        """The kernel that sums over whole rows, for one that computes tiles of columns; and that,
        unless all scales are known, finds the amax of the casts.
        """
        lines = [*self._extent(), "first_m = tl.program_id(0) * BLOCK_M", "first_n = 0"]
        lines += [*self._rows(), *self._cols(), *self._summed(), *self._leave_totals()]
        if not self.region.search_in_sums:
            return definition(name, [*self._inputs(), "totals_ptr"], lines)
        lines += [f"known = {self._known()}", "if not known:"]
        look = self._results()
        for i in self._missing():
            look += [*self._bits(i), leave_amax(found_amax(i), "bits")]
        lines += [f"    {x}" for x in look]
        return definition(name, [*self._read(), *self._scales()], lines)

    def amax(self, name: str) -> str:
        """The kernel that finds the amax of the casts, unless all scales are known, and of rows.
        One that always does makes the sums over rows, too.
        """
        casts = self._missing()
        height = self.region.search_height or "BLOCK_M"
        lines = [*self._extent(height), *self._tile_counts(height)]
        if self._known():
            lines.append(f"tiles = tl.where({self._known()}, 0, tiles)")
        lines += [f"bits_{i} = {_ZEROS}" for i in casts]
        lines.append("for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):")
        lines += [f"    {line}" for line in self._search_tile()]
        lines += [leave_amax(found_amax(i), f"bits_{i}") for i in casts]
        return definition(name, [*self._read(), *self._scales(), *self._inverses()], lines)

    def _search_tile(self) -> list[str]:
        """Look at a tile, or at those that make a block of rows."""
        found = self._searched()
        wait = [cast for _, cast in found if cast.waits]
        look = []
        for i in self._missing():
            look += [*self._bits(i), f"bits_{i} = tl.maximum(bits_{i}, bits)"]
        for variable, cast in found:
            look.append(f"bits = inside(magnitude_bits({variable}), in_m & in_n, EVEN)")
            look += cast.search("bits")
        height = self.region.search_height
        if not height:
            return [*self._values_of_tile(), *look]
        lines = [*self._place(height), *self._cols()]
        lines += [f"{cast.largest} = {_ZEROS}" for cast in wait]
        if not self.region.branches:
            lines += self._strips(height, [*self._totals(), *self._results()], look)
        else:  # loads are ahead in a loop without branches only
            for head, calls in self._parts():
                lines += [head, *(f"    {x}" for x in self._strips(height, calls, look))]
        lines += [line for cast in wait for line in cast.leave()]
        settle = [line for _, cast in found for line in cast.settle()]
        return [*lines, *self._block(), "tl.debug_barrier()", *settle] if settle else lines

    def _strips(self, height: int, values: list[str], look: list[str]) -> list[str]:
        """Compute ``values`` strip by strip, and ``look`` at them."""
        head = f"for strip in tl.range(0, {height}, BLOCK_M, num_stages={self._stages()}):"
        return [head, *(f"    {x}" for x in (*self._rows("strip"), *values, *look))]

    def _block(self) -> list[str]:
        """The rows and columns of the block that a program has looked at."""
        return [
            f"rows = first_m + tl.arange(0, {self.region.search_height})",
            "cols = first_n + tl.arange(0, BLOCK_N)",
        ]

    def _stages(self) -> int:
        """How many strips the loads of a search are ahead: two more, a fifth faster, unless they
        take so much shared memory that few programs run at a time.
        """
        return 3 if self.values.loads_little else 1

    # --- a function ----------------------------------------------------------------------------

    def search_if_needed(self) -> list[str]:
        # In tiles as high as a set, which take no more registers than the results do.
        height = "BLOCK_M // 4" if self.region.transposes else "BLOCK_M"
        call = f"{self._search_name}({', '.join([*self._read(), height, 'BLOCK_N'])})"
        return [f"known = {self._known()}", "if not known:", f"    {call}"]

    def search_function(self) -> str:
        """The function in which all programs find the amax of every cast before any goes on.

        A program takes tiles as long as there are any, so that those that run never wait for one
        that does not run yet.
        """
        lines = [*self._extent(), *self._tile_counts(), "tile = tl.atomic_add(words_ptr, 1)"]
        lines.append("while tile < tiles:")
        lines += [f"    {line}" for line in self._values_of_tile()]
        for i in self._missing():
            leave = leave_amax(found_amax(i), "bits")
            lines += [f"    {x}" for x in (*self._bits(i), leave)]
        lines += [
            f"    tl.atomic_add({DONE}, 1)",
            "    tile = tl.atomic_add(words_ptr, 1)",
            f"while tl.atomic_add({DONE}, 0) < tiles:",
            "    pass",
        ]
        return definition(self._search_name, self._read(), lines)

    @property
    def _search_name(self) -> str:
        return f"_search{self.values.suffix}"

    # --- both ----------------------------------------------------------------------------------

    def _known(self) -> str:
        """Whether every cast has a scale from earlier steps; "" where that is never so."""
        if self.region.searched or not all(cast.is_delayed for cast in self.region.casts):
            return ""
        return " & ".join(f"({self._number(f'scale_{i}')} > 0)" for i in self._missing())

    def _missing(self) -> list[int]:
        """The casts whose scales may be missing."""
        return [i for i, cast in enumerate(self.region.casts) if not cast.is_given]

    def _tile_counts(self, height: int | str = "BLOCK_M") -> list[str]:
        return ["tiles_n = tl.cdiv(N, BLOCK_N)", f"tiles = tl.cdiv(M, {height}) * tiles_n"]

    def _values_of_tile(self) -> list[str]:
        lines = [*self._place(), *self._rows(), *self._cols()]
        if not self.region.sums_in_search:
            return [*lines, *self._totals(), *self._results()]
        # What is stored comes last: what the sums have loaded need not be loaded again before it.
        return [*lines, *self._summed(), *self._results(), *self._leave_totals()]

    def _leave_totals(self) -> list[str]:
        """Leave the sums over rows for the kernel that casts."""
        return [
            f"tl.store(totals_ptr + {i} * M + rows, {total.name}, mask=in_m)"
            for i, total in enumerate(self.values.totals.values())
        ]
