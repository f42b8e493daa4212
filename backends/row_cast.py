"""The text that stores a cast with a scale per row whose largest elements were found before.

The scales of a transposed copy are those of columns: each depends on a whole column of the value,
and so on many tiles. A kernel before this one has left the largest magnitude of every row and
column in memory, as bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..regions import shape_of
from .pieces import named, padded_text, plus
from .region import Cast, Result
from .values import expr_text


@dataclass(frozen=True)
class RowCast:
    """A result of a region's kernel that is cast with a scale per row, or column.

    ``x``: the variable that holds its values, for each of the ``sets`` of rows, zero outside of the
    matrix. ``found``: where the largest magnitudes of each copy's rows lie, as text.
    """

    result: Result
    cast: Cast
    x: str
    sets: Sequence[str]
    found: dict[str, str]

    def search(self, bits: str) -> list[str]:
        """Take a tile of ``magnitude_bits`` into account."""
        lines = []
        for copy, at, axis, mask in (("fp8", "rows", 1, "in_m"), ("fp8_t", self._at, 0, "in_n")):
            if copy in self.cast.outputs:
                largest = f"tl.max({bits}, axis={axis}, keep_dims=True)"
                where = f"{self.found[copy]} + {at}"
                lines.append(f'tl.atomic_max({where}, {largest}, mask={mask}, sem="relaxed")')
        return lines

    def store(self) -> list[str]:
        """Scale, cast and store both copies, as far as they are wanted, with their scales."""
        lines = self._store_rows() if "fp8" in self.cast.outputs else []
        return lines + (self._store_columns() if "fp8_t" in self.cast.outputs else [])

    @property
    def _at(self) -> str:
        """The columns of the whole cast, of which the result may be a part."""
        return f"(cols{plus(self.result.start)})"

    @property
    def _width(self) -> str:
        return expr_text(shape_of(self.cast.node.all_input_nodes[0])[1])

    def _pointer(self, output: str) -> str:
        return f"block_{output}_{self.result.index}_ptr"

    def _scale(self, copy: str, at: str, mask: str) -> str:
        bits = f"tl.load({self.found[copy]} + {at}, mask={mask}, other=0)"
        return f"row_scale({bits}, {self.cast.format.max}, {self.cast.power_of_two})"

    def _scaled(self, a: str, scale: str) -> str:
        return f"{named('y', a)} = saturate({named(self.x, a)}, {scale}, {self.cast.format.max})"

    def _store_rows(self) -> list[str]:
        pointer, pitch = self._pointer("fp8"), padded_text(self._width)
        lines = []
        for a in self.sets:
            rows, in_m = named("rows", a), named("in_m", a)
            scale = named("scale_of_rows", a)
            lines += [f"{scale} = {self._scale('fp8', rows, in_m)}", self._scaled(a, scale)]
            value = f"{named('y', a)}.to({pointer}.dtype.element_ty)"
            mask = f"{in_m} & (cols < {padded_text('N')})"
            at = f"{pointer} + ({rows} * {pitch} + {self._at})"
            lines.append(f"tl.store({at}, {value}, mask={mask})")
            if self.result.start == 0:
                at = f"{self._pointer('scale_inv')} + {rows}"
                lines.append("if tile_n == 0:")
                lines.append(f"    tl.store({at}, tl.div_rn(1.0, {scale}), mask={in_m})")
        return lines

    def _store_columns(self) -> list[str]:
        height = padded_text("M")
        return [
            f"scale_of_columns = {self._scale('fp8_t', self._at, 'in_n')}",
            *(self._scaled(a, "scale_of_columns") for a in self.sets),
            "store_transposed(",
            f"    {self._pointer('fp8_t')}, y_a, y_b, y_c, y_d, first_m, "
            f"first_n{plus(self.result.start)},",
            f"    {height} - first_m, N - first_n, {height},",
            ")",
            "if tile_m == 0:",
            f"    at = {self._pointer('scale_inv_t')} + {self._at}",
            "    tl.store(at, tl.div_rn(1.0, scale_of_columns), mask=in_n)",
        ]
