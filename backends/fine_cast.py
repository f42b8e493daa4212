"""What the two texts of a cast with fine scales, one per row or block, have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..ops import ALIGNMENT
from ..regions import shape_of
from .pieces import named, padded_text, plus
from .region import Cast, Result
from .values import expr_text


@dataclass(frozen=True)
class FineCast:
    """A result of a region's kernel that is cast with a scale per row, column or block.

    ``x``: the variable that holds its values, for each of the ``sets`` of rows, zero outside of the
    matrix.
    """

    result: Result
    cast: Cast
    x: str
    sets: Sequence[str]

    @property
    def high(self) -> int:
        """A block's rows."""
        return self.cast.block[0]

    @property
    def unit(self) -> int:
        """What the length of a copy's rows is a multiple of."""
        return max(self.cast.block[1], ALIGNMENT)

    @property
    def width(self) -> str:
        """The columns of the whole cast, of which the result may be a part."""
        return expr_text(shape_of(self.cast.node.all_input_nodes[0])[1])

    def pointer(self, output: str) -> str:
        return f"block_{output}_{self.result.index}_ptr"

    def scaled(self, a: str, scale: str) -> str:
        """Make a set of rows ready to cast."""
        return f"{named('y', a)} = scaled({named(self.x, a)}, {scale}, {self.cast.format.max})"

    def store_rows(self, a: str) -> str:
        """Cast and store a set of rows."""
        pointer, pitch = self.pointer("fp8"), padded_text(self.width, self.unit)
        at = f"{pointer} + ({named('rows', a)} * {pitch} + cols{plus(self.result.start)})"
        value = f"to_fp8({named('y', a)}, {pointer}.dtype.element_ty)"
        mask = f"{named('in_m', a)} & (cols < {padded_text('N', self.unit)})"
        return f"tl.store({at}, {value}, mask={mask})"

    def store_transposed(self) -> list[str]:
        """Cast and store all sets of rows, transposed."""
        pointer, height = self.pointer("fp8_t"), padded_text("M", self.unit)
        return [
            "store_transposed(",
            f"    {pointer}, y_a, y_b, y_c, y_d, first_m, first_n{plus(self.result.start)},",
            f"    {height} - first_m, N - first_n, {height},",
            ")",
        ]
