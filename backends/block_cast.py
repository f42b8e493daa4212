"""The text that stores a cast with a scale per block.

A tile holds whole blocks, so their scales are found in registers. Where a block is part of one row,
each set of rows has its own; blocks of several rows, and the blocks of the transposed copy, need
the largest of all sets.
"""

from __future__ import annotations

from .fine_cast import FineCast
from .pieces import named, plus


class BlockCast(FineCast):
    """A cast with a scale per block, whose tiles hold whole blocks."""

    def store(self) -> list[str]:
        """Scale, cast and store both copies, as far as they are wanted, with their scales."""
        row_major, transposed = ("fp8" in self.cast.outputs, "fp8_t" in self.cast.outputs)
        lines = []
        if row_major and self.high == 1:
            for a in self.sets:
                lines += [*self._scale_row(a), self.store_rows(a), self._store_row_scales(a)]
        if transposed or self.high > 1:
            lines += self._scale_all()
        if row_major and self.high > 1:
            for a in self.sets:
                lines.append(self.store_rows(a))
            lines += self._store_scales()
        return lines + (self._store_transposed() if transposed else [])

    @property
    def _wide(self) -> int | str:
        """A block's columns; a tile's, where they are all that there are."""
        return self.cast.block[1] or "BLOCK_N"

    # --- scales ----------------------------------------------------------------------------------

    def _scale_row(self, a: str) -> list[str]:
        """A set of rows, ready to cast to blocks that are part of a row."""
        bits = f"magnitude_bits({named(self.x, a)})"
        return [self._find_scales(bits, "1", self._wide), self.scaled(a, "spread")]

    def _scale_all(self) -> list[str]:
        """All sets of rows, ready to cast to blocks that are several rows of the tile."""
        high, wide = (self.high, self._wide) if self.high > 1 else (self._wide, 1)
        several = [f"magnitude_bits({named(self.x, a)})" for a in self.sets]
        lines = [f"bits = {several[0]}"]
        lines += [f"bits = tl.maximum(bits, {bits})" for bits in several[1:]]
        lines.append(self._find_scales("bits", f"{high} // {len(self.sets)}", wide))
        return lines + [self.scaled(a, "spread") for a in self.sets]

    def _find_scales(self, bits: str, high: str, wide: int | str) -> str:
        settings = f"{high}, {wide}, {self.cast.format.max}, {self.cast.power_of_two}"
        return f"block_scale, spread = block_scales({bits}, {settings})"

    def _columns(self, wide: int | str) -> tuple[str, str]:
        """The numbers of the tile's blocks in a row of blocks, and which of them there are."""
        across = f"(first_n // {wide} + tl.arange(0, BLOCK_N // {wide})[None, :])"
        start = "" if isinstance(wide, str) else plus(self.result.start, wide)
        return f"({across}{start})" if start else across, f"({across} < tl.cdiv(N, {wide}))"

    # --- stores ----------------------------------------------------------------------------------

    def _store_row_scales(self, a: str) -> str:
        across, mask = self._columns(self._wide)
        at = f"{self.pointer('scale_inv')} + ({across} * M + {named('rows', a)})"
        mask = f"{named('in_m', a)} & {mask}"
        return f"tl.store({at}, inverse(block_scale), mask={mask})"

    def _store_scales(self) -> list[str]:
        across, mask = self._columns(self._wide)
        count = f"tl.cdiv({self.width}, {self._wide})"
        at = f"{self.pointer('scale_inv')} + (down * {count} + {across})"
        mask = f"(down < tl.cdiv(M, {self.high})) & {mask}"
        return [
            f"down = first_m // {self.high} + tl.arange(0, BLOCK_M // {self.high})[:, None]",
            f"tl.store({at}, inverse(block_scale), mask={mask})",
        ]

    def _store_transposed(self) -> list[str]:
        wide = self._wide
        at, mask = f"(down * {self.width} + cols{plus(self.result.start)})", "in_n"
        if self.high > 1:
            across, mask = self._columns(self.high)
            at = f"({across} * tl.cdiv(M, {wide}) + down)"
        at, mask = f"{self.pointer('scale_inv_t')} + {at}", f"(down < tl.cdiv(M, {wide})) & {mask}"
        return [
            *self.store_transposed(),
            f"down = first_m // {wide} + tl.arange(0, BLOCK_M // {wide})[:, None]",
            f"tl.store({at}, inverse(block_scale), mask={mask})",
        ]
