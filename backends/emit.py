"""Write the Triton source of a region's kernels.

The source is what a person would write for the region: functions that compute the values of a tile
(see ``values``), and a kernel that computes and stores one tile per program. Where the scale of a
cast is not known yet, all programs first find the amax together, in that kernel or in one before
it. Where values depend on sums over rows, a program computes whole rows; but a transposed copy
wants tiles that are higher than wide, and the sums then come from a kernel of their own. Sums over
columns are left in part, one row of them per row of tiles, which the last program of a column of
tiles adds up; or per program where it computes whole rows, and goes from one to the next: a last
kernel adds up these.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

import sympy
from torch import fx

from ..ir import args_of, format_graph
from ..ops import GROUP
from ..regions import COL, ROW, Position, Space, in_first_row, shape_of
from .region import Region
from .values import Values
from .writer import Writer

_SMALL = 2**25  # elements


@dataclass(frozen=True)
class Source:
    """An emitted file: the names of its kernels, its text, and what a launch has to know.

    ``totals``: reductions over rows; ``loads_little``, ``loads``: see ``Values``.
    """

    name: str
    text: str
    symbols: list[sympy.Symbol]
    totals: int
    loads_little: bool
    loads: int

    @property
    def sums_name(self) -> str:
        return f"{self.name}_sums"

    @property
    def amax_name(self) -> str:
        return f"{self.name}_amax"

    @property
    def column_sums_name(self) -> str:
        return f"{self.name}_column_sums"


def emit(region: Region) -> Source:
    """The source of a region's kernels."""
    values = Values(region)
    name = kernel_name(region)
    writer = Writer(region, values, search_apart=search_apart(region))
    parts = [f'"""{describe(region, name)}\n"""', IMPORTS, *writer.functions(), writer.main(name)]
    if region.sums_alone:
        parts.append(writer.before.sums(f"{name}_sums"))
    if search_apart(region):
        parts.append(writer.before.amax(f"{name}_amax"))
    if region.completes_apart:
        parts.append(writer.column_sums(f"{name}_column_sums"))
    return Source(
        name=name,
        text="\n\n\n".join(parts) + "\n",
        symbols=sorted(values.symbols, key=str),
        totals=len(values.totals),
        loads_little=values.loads_little,
        loads=values.loads,
    )


def search_apart(region: Region) -> bool:
    """Whether a kernel of its own looks for a missing amax, of the whole or of rows or blocks.

    Transposed copies are made in small tiles, with few registers to spare: a search in SwiGLU's
    backward makes it 12 % slower (H200). Casts of one value it costs nothing. It spares a launch,
    which is more than a small matrix takes. Where no scale is ever known, every step searches,
    which a kernel without a wait does faster.
    """
    tight = region.transposes and not _is_small(region)
    elsewhere = region.search_in_sums or not (tight or region.always_searches)
    return (region.searches and not elsewhere) or bool(region.searched)


def _is_small(region: Region) -> bool:
    """Whether a cast takes the GPU some 25 microseconds at most: about a launch of the host's."""
    size = region.space.size
    return bool(size.is_number) and size <= _SMALL


@dataclass(frozen=True)
class PartSource:
    """A region as a function of a launch that others share: ``name(tile, *arguments)``."""

    name: str
    arguments: list[str]
    text: str


def emit_part(region: Region, suffix: str) -> PartSource:
    """The functions of a region that needs one launch; ``suffix`` tells it from others."""
    writer = Writer(region, Values(region, suffix), search_apart=False)
    name = f"_region{suffix}"
    text = "\n\n\n".join([*writer.functions(), writer.part(name)])
    return PartSource(name, writer.arguments(), text)


def kernel_name(region: Region) -> str:
    """``fp8_`` and the operators that tell one region from another."""
    telling = ("silu", "gelu", "erf", "tanh", "sigmoid", "exp", "relu", "rsqrt", "mean", "cat")
    names = {str(getattr(n.target, "_opname", "")) for n in region.gm.graph.nodes}
    found = [name for name in telling if name in names]
    kinds = found or ["cast" if region.casts or region.blocks else "value"]
    if region.sums:
        kinds.append("colsum")
    return "_".join(["fp8", *kinds])


def bytes_read(region: Region) -> sympy.Expr:
    """Bytes of the inputs, each element that is needed counted once."""
    found: dict[fx.Node, set[Position]] = {}
    values = Values(region)
    for function in (*values.sums, *values.last):
        for node, place, _ in function.known:
            if node in region.inputs:
                found.setdefault(node, set()).add(place)
    return sympy.Add(
        *(
            _elements(region, node, places) * node.meta["val"].dtype.itemsize
            for node, places in found.items()
        )
    )


def _elements(region: Region, node: fx.Node, places: Collection[Position]) -> sympy.Expr:
    """How many elements of an input are read at some places."""
    extents = [region.space.extent(place) for place in places]
    whole = sympy.prod(shape_of(node))
    return sympy.Min(whole, sympy.Add(*extents) * _share_of_different(region.space, places))


def _share_of_different(space: Space, places: Collection[Position]) -> sympy.Expr:
    """Of what is read at several places, the share that is not the same elements again, as the
    halves that rotary embeddings exchange; all of it where sizes are symbolic.
    """
    symbols = set().union(*(expr.free_symbols for place in places for expr in place))
    if len(places) == 1 or symbols - {ROW, COL} or not space.n.is_number:
        return sympy.S.One
    read = [in_first_row(place, int(space.n)) for place in places]
    return sympy.Rational(len(set().union(*read)), sum(map(len, read)))


def bytes_written(region: Region) -> sympy.Expr:
    """Bytes of the outputs; scales and the like, which are few, do not count."""
    copies = [
        sympy.prod(shape_of(args_of(cast.node)[0]))
        for cast in (*region.casts, *region.blocks)
        for output in ("fp8", "fp8_t")
        if output in cast.outputs
    ]
    values = [sympy.prod(shape_of(n)) * n.meta["val"].dtype.itemsize for n in region.values]
    groups = [region.space.size * (1 + sympy.Rational(4, GROUP)) for _ in region.groups]
    return sympy.Add(*copies, *values, *groups)


_DEVICE_FUNCTIONS = (
    "add_rows",
    "block_scales",
    "divide",
    "erf_plus_1",
    "exp",
    "group_scale",
    "inside",
    "inverse",
    "log1p",
    "magnitude_bits",
    "quantize_groups",
    "resolve_scale",
    "saturate",
    "scaled",
    "settle_scales",
    "sigmoid",
    "store_transposed",
    "tile_amax",
    "tile_position",
    "to_fp8",
    "widen",
)
IMPORTS = (
    "import triton\nimport triton.language as tl\n\n"
    "from fp8compile.backends.kernels.device import (\n"
    + "".join(f"    {function},\n" for function in _DEVICE_FUNCTIONS)
    + ")"
)


def describe(region: Region, name: str) -> str:
    """What a region moves and computes, for the head of its file."""
    read, written = bytes_read(region), bytes_written(region)
    text = re.sub(r"(fp8\.quantize\(\w+, \w+), \d+", r"\1, slot", format_graph(region.gm))
    body = "\n".join(f"    {line}" for line in text.splitlines())
    before = ["what the sums over rows are made of"] * region.sums_alone
    before += ["what the scales are found in"] * bool(region.searched or region.always_searches)
    once = f"each byte once, and before that {' and '.join(before)}" if before else "each byte once"
    return f"{name}: reads {_size(read)}, writes {_size(written)}, {once}.\n\n{body}"


def _size(count: sympy.Expr) -> str:
    return f"{float(count) / 1e6:.1f} MB" if count.is_number else f"{count} bytes"
