"""The text of what a region's kernels have in common: a tile, and the values computed for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from .pieces import named
from .region import Region, Result
from .searched_cast import INVERSES, SearchedCast
from .values import PLACES, Function, Values, expr_text

FIRST = ("first_m", "first_n")  # of a tile's rows and columns


class TileText:
    """Writes the parts of kernels of one region.

    ``sets``: a tile is computed as one set of rows, or, where a transposed copy is stored, as four
    interleaved ones.
    """

    def __init__(self, region: Region, values: Values, sets: Sequence[str] = ("",)) -> None:
        self.region = region
        self.values = values
        self.sets = sets
        self.sizes = sorted(str(symbol) for symbol in values.symbols)

    # --- where a tile lies ---------------------------------------------------------------------

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

    def _rows(self, below: str = "") -> list[str]:
        """The tile's rows; ``below``: how far below its place."""
        first = "first_m.to(tl.int64)" if self.region.is_large else "first_m"
        first += f" + {below}" if below else ""
        lines, count = [], len(self.sets)
        for j, letter in enumerate(self.sets):
            row = "tl.arange(0, BLOCK_M)[:, None]"
            if count > 1:
                row = f"tl.arange(0, BLOCK_M // {count})[:, None] * {count} + {j}"
            lines.append(f"{named('row_in_tile', letter)} = {row}")
            lines.append(f"{named('rows', letter)} = {first} + {named('row_in_tile', letter)}")
            lines.append(f"{named('in_m', letter)} = ({named('rows', letter)} < M) | EVEN")
        return lines

    def _cols(self) -> list[str]:
        return ["cols = first_n + tl.arange(0, BLOCK_N)[None, :]", "in_n = (cols < N) | EVEN"]

    # --- its values ----------------------------------------------------------------------------

    def _totals(self) -> list[str]:
        """The sums over rows that the values depend on: from memory, or of this tile itself."""
        if not self.region.sums_apart:
            return self._summed()
        lines = []
        for i, total in enumerate(self.values.totals.values()):
            for letter in self.sets:
                rows, in_m = named("rows", letter), named("in_m", letter)
                load = f"tl.load(totals_ptr + {i} * M + {rows}, mask={in_m}, other=0.0)"
                lines.append(f"{named(total.name, letter)} = {load}")
        return lines

    def _summed(self) -> list[str]:
        """The sums over the rows of a tile that holds whole ones."""
        return [self._call(function, "", function.returns) for function in self.values.sums]

    def _results(self, wanted: Sequence[str] | None = None) -> list[str]:
        """Call the last function, or the one of the part that the tile lies in. ``wanted``: the
        results that are looked at, if not all.
        """
        if not self.region.branches:
            names = [
                variable if wanted is None or variable in wanted else "unused"
                for _, variable in self._outputs()
            ]
            return [self._call(self.values.last[0], letter, names) for letter in self.sets]
        return [
            line
            for head, calls in self._parts()
            for line in (head, *(f"    {call}" for call in calls))
        ]

    def _parts(self) -> list[tuple[str, list[str]]]:
        """The head of the branch of each part, and what computes its results."""
        branches = self.region.branches
        conditions = [f"{FIRST[branch.axis]} < {branch.start}" for branch in branches[1:]]
        heads = [f"{'elif' if i else 'if'} {at}:" for i, at in enumerate(conditions)]
        found = []
        for head, function, branch in zip(
            [*heads, "else:"], self.values.last, branches, strict=True
        ):
            moved = {PLACES[branch.axis]: f" - {branch.start}" if branch.start else ""}
            calls = [self._call(function, letter, ["out_0"], moved) for letter in self.sets]
            found.append((head, calls))
        return found

    def _outputs(self) -> list[tuple[Result, str]]:
        return [(result, f"out_{i}") for i, result in enumerate(self.region.results)]

    def _bits(self, i: int) -> list[str]:
        """The magnitudes of all that a cast takes from this tile, each element's largest."""
        bits = [
            f"inside(magnitude_bits({named(variable, a)}), {named('in_m', a)} & in_n, EVEN)"
            for result, variable in self._outputs()
            if (result.kind, result.index) == ("cast", i)
            for a in self.sets
        ]
        return [f"bits = {bits[0]}", *(f"bits = tl.maximum(bits, {b})" for b in bits[1:])]

    def _call(
        self,
        function: Function,
        letter: str,
        returned: Sequence[str],
        moved: Mapping[str, str] = MappingProxyType({}),
    ) -> str:
        """``moved``: what follows a parameter."""
        same = {"cols", "in_n", *function.arguments}
        arguments = [
            (p if p in same else named(p, letter)) + moved.get(p, "") for p in function.parameters
        ]
        names = [named(name, letter) for name in returned]
        return f"{', '.join(names)} = {function.name}({', '.join(arguments)})"

    def _searched(self) -> list[tuple[str, SearchedCast]]:
        """All such casts, with the variables that hold their values."""
        return [
            (variable, self._searched_cast(result, variable))
            for result, variable in self._outputs()
            if result.kind == "block" and self.region.blocks[result.index] in self.region.searched
        ]

    def _searched_cast(self, result: Result, variable: str) -> SearchedCast:
        """A cast for which a kernel before this one has looked for the largest elements."""
        found = {
            copy: f"found_ptr + {expr_text(first)}" if first != 0 else "found_ptr"
            for (index, copy), first in self.region.found.items()
            if index == result.index
        }
        cast = self.region.blocks[result.index]
        return SearchedCast(result, cast, f"x_{variable}", self.sets, found)

    # --- single numbers ------------------------------------------------------------------------

    def _number(self, name: str) -> str:
        """A number among the words."""
        return f"tl.load({self._word(name)}).to(tl.float32, bitcast=True)"

    def _leave_number(self, name: str, value: str) -> str:
        return f"tl.store({self._word(name)}, ({value}).to(tl.int32, bitcast=True))"

    def _word(self, name: str) -> str:
        return f"words_ptr + {self.region.numbers[name]}"

    # --- arguments -----------------------------------------------------------------------------

    def _inputs(self) -> list[str]:
        return [f"{node.name}_ptr" for node in self.region.inputs] + self.sizes

    def _read(self) -> list[str]:
        """What the values of a tile are computed from, and the words that programs share."""
        totals = ["totals_ptr"] if self.region.sums_apart else []
        words = ["words_ptr"] if self.region.first_counter else []
        found = ["found_ptr"] if self.region.searched else []
        return [*self._inputs(), *totals, *words, *found]

    def _scales(self) -> list[str]:
        casts = enumerate(self.region.casts)
        return [f"scale_{i}_ptr" for i, cast in casts if cast.is_given]

    def _inverses(self) -> list[str]:
        """The inverse scales that the kernel that finds them stores."""
        return [
            f"block_{output}_{i}_ptr"
            for i, cast in enumerate(self.region.blocks)
            for output in INVERSES.values()
            if cast in self.region.searched and cast.block[1] and output in cast.outputs
        ]


def definition(name: str, arguments: Sequence[str], lines: Sequence[str]) -> str:
    """A kernel, or a function of one, that takes the extent of its tiles besides its arguments."""
    head = [f"    {argument}," for argument in arguments]
    head += [f"    {constant}: tl.constexpr," for constant in ("BLOCK_M", "BLOCK_N")]
    words = ["words_ptr = words_ptr.to(tl.pointer_type(tl.int32))"] * ("words_ptr" in arguments)
    body = [f"    {line}" for line in (*words, *lines)]
    return "\n".join(["@triton.jit", f"def {name}(", *head, "):", *body])
