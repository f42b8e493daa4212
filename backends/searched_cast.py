"""The text that stores a cast whose scales come from what a kernel before has found.

The scales of a transposed copy belong to columns, or to parts of them: to more rows than a tile
that is fast to compute and store has. A program of the kernel before looks at 128 x 128 elements.
Of blocks it leaves the scales, and stores their inverses; of rows and columns, which many programs
see parts of, it leaves the largest magnitudes, as bits.
"""

from __future__ import annotations

from dataclasses import dataclass

from .fine_cast import FineCast
from .pieces import named, plus

INVERSES = {"fp8": "scale_inv", "fp8_t": "scale_inv_t"}


@dataclass(frozen=True)
class SearchedCast(FineCast):
    """A cast with a scale per row, column or block, of smaller tiles.

    ``found``: where each copy's scales or largest magnitudes lie, as text.
    """

    found: dict[str, str]

    # --- the kernel that searches ----------------------------------------------------------------

    @property
    def waits(self) -> bool:
        """Whether something is known only when all rows of a block have been looked at."""
        return self.high > 1 or "fp8_t" in self.cast.outputs

    @property
    def largest(self) -> str:
        """The variable that holds the largest so far at each place of a tile."""
        return f"largest_{self.x}"

    def search(self, bits: str) -> list[str]:
        """Take a tile of ``magnitude_bits`` into account."""
        lines = []
        if "fp8" in self.cast.outputs and self.high == 1:
            lines += self._leave("fp8", f"tl.max({bits}, axis=1, keep_dims=True)", "in_m")
        if self.waits:
            lines.append(f"{self.largest} = tl.maximum({self.largest}, {bits})")
        return lines

    def leave(self) -> list[str]:
        """Leave what all rows of a block have given."""
        if self.high > 1:
            return self._leave_scale(f"tl.max({self.largest})")
        return self._leave("fp8_t", f"tl.max({self.largest}, axis=0, keep_dims=True)", "in_n")

    def _leave(self, copy: str, bits: str, mask: str) -> list[str]:
        at = f"{self.found[copy]} + {self._at(copy, 'rows')}"
        if self._wide:
            return [f"tl.store({at}, {bits}, mask={mask})"]
        return [f'tl.atomic_max({at}, {bits}, mask={mask}, sem="relaxed")']

    def _leave_scale(self, bits: str) -> list[str]:
        """Leave the scale of a block of several rows."""
        at = f"{self.found['fp8']} + {self._at('fp8', 'rows')}"
        lines = [
            f"scale = {self._group_scale(bits)}",
            f"tl.store({at}, scale.to(tl.int32, bitcast=True))",
        ]
        for copy in INVERSES:
            if copy in self.cast.outputs:
                at = f"{self.pointer(INVERSES[copy])} + {self._at_inverse(copy)}"
                lines.append(f"tl.store({at}, inverse(scale))")
        return lines

    def settle(self) -> list[str]:
        """Make scales of what was left for the rows and columns of a block: here each thread has
        other ones, while those that find the largest of one all have that.
        """
        if self.high > 1 or not self._wide:
            return []
        lines = []
        for copy, mask in (("fp8", "rows < M"), ("fp8_t", "cols < N")):
            if copy in self.cast.outputs:
                at = self._at(copy, "rows")
                pointers = f"{self.found[copy]} + {at}, {self.pointer(INVERSES[copy])} + {at}"
                lines.append(f"settle_scales({pointers}, {mask}, {self._rule})")
        return lines

    # --- the kernel that casts -------------------------------------------------------------------

    def load(self) -> list[str]:
        """Load the scales, or what they are made from: before the values, since no load passes a
        store, and each would be waited for alone.
        """
        lines = []
        if "fp8" in self.cast.outputs:
            for a in self.sets:
                scale = self._scale("fp8", named("rows", a), named("in_m", a))
                lines.append(f"{self._of_rows(a)} = {scale}")
        if "fp8_t" in self.cast.outputs:
            lines.append(f"{self._of_columns} = {self._scale('fp8_t', '', 'in_n')}")
        return lines

    def store(self) -> list[str]:
        """Scale, cast and store both copies, as far as they are wanted; of rows, the scales."""
        lines = self._store_rows() if "fp8" in self.cast.outputs else []
        return lines + (self._store_columns() if "fp8_t" in self.cast.outputs else [])

    def _store_rows(self) -> list[str]:
        lines = []
        for a in self.sets:
            rows, in_m, scale = named("rows", a), named("in_m", a), self._of_rows(a)
            lines += [self.scaled(a, scale), self.store_rows(a)]
            if not self._wide and self.result.start == 0:
                lines += self._store_inverse("fp8", rows, scale, in_m, "tile_n == 0")
        return lines

    def _store_columns(self) -> list[str]:
        scale = self._of_columns
        lines = [*(self.scaled(a, scale) for a in self.sets), *self.store_transposed()]
        if not self._wide:
            lines += self._store_inverse("fp8_t", "", scale, "in_n", "tile_m == 0")
        return lines

    def _of_rows(self, a: str) -> str:
        return named(f"row_scale_of_{self.x}", a)

    @property
    def _of_columns(self) -> str:
        return f"column_scale_of_{self.x}"

    def _scale(self, copy: str, rows: str, mask: str) -> str:
        """The scale, or what it is made from, loaded."""
        found = self.found["fp8" if self.high > 1 else copy]
        masked = "" if self.high > 1 else f", mask={mask}, other=0"
        bits = f"tl.load({found} + {self._at(copy, rows)}{masked})"
        if self._wide:
            return f"{bits}.to(tl.float32, bitcast=True)"
        return self._group_scale(bits)

    def _store_inverse(self, copy: str, rows: str, scale: str, mask: str, first: str) -> list[str]:
        """Store the inverse of a row's or column's scale, from the ``first`` of its tiles."""
        at = f"{self.pointer(INVERSES[copy])} + {self._at(copy, rows)}"
        return [f"if {first}:", f"    tl.store({at}, inverse({scale}), mask={mask})"]

    # --- both ------------------------------------------------------------------------------------

    def _group_scale(self, bits: str) -> str:
        """The scale for the largest magnitude, given by its bits."""
        return f"group_scale({bits}, {self._rule})"

    @property
    def _rule(self) -> str:
        """What a scale depends on besides: the format's largest number, and the rounding."""
        return f"{self.cast.format.max}, {self.cast.power_of_two}"

    # --- where things lie ------------------------------------------------------------------------

    @property
    def _wide(self) -> int:
        """A block's columns; 0 where it is a whole row."""
        return self.cast.block[1]

    @property
    def _columns(self) -> str:
        """The columns of the whole cast, of which the result may be a part."""
        return f"(cols{plus(self.result.start)})"

    @property
    def _across(self) -> str:
        """The number of the tile's block in a row of blocks."""
        return f"(first_n // {self._wide}{plus(self.result.start, self._wide)})"

    @property
    def _down(self) -> str:
        """The number of the tile's block in a column of blocks."""
        return f"(first_m // {self._wide})"

    def _at(self, copy: str, rows: str) -> str:
        """Where the scale of a block lies among those of a copy."""
        if self.high > 1:
            return f"({self._down} * tl.cdiv({self.width}, {self._wide}) + {self._across})"
        if copy == "fp8":
            return f"({self._across} * M + {rows})" if self._wide else rows
        return f"({self._down} * {self.width} + {self._columns})" if self._wide else self._columns

    def _at_inverse(self, copy: str) -> str:
        """The same of its inverse: the blocks of a transposed copy lie transposed."""
        if self.high > 1 and copy == "fp8_t":
            return f"({self._across} * tl.cdiv(M, {self.high}) + {self._down})"
        return self._at(copy, "rows")
