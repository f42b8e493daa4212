"""Launch a region's kernels: load what was emitted, choose a tile, name the arguments."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor

from ..internals import cache_folder
from ..ir import args_of, format_graph
from ..ops import GROUP, padded
from ..regions import shape_of
from .emit import Source, emit, search_apart
from .kernels.launch import Launch, run
from .region import LEAST_IN_TILE, Cast, Region

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tile:
    """How much of the space one program computes, and with how many warps."""

    block_m: int
    block_n: int
    num_warps: int

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n}w{self.num_warps}"


_MULTIPROCESSORS = 132  # of an H100 SXM or H200
_LOOPING = 2  # programs for each
_COLUMN_SUMS = Tile(64, 32, 4)  # of the rows of partial sums


def tiles(region: Region) -> list[Tile]:
    """The tiles worth timing, best guess first."""
    found = _tiles(region)
    if len(region.blocks) > len(region.searched):
        found = _of_whole_blocks(region, found)
    # A program casts whole groups.
    return [tile for tile in found if tile.block_n % GROUP == 0] if region.groups else found


def _of_whole_blocks(region: Region, usual: list[Tile]) -> list[Tile]:
    """Tiles that blocks fill: whole rows, as wide as a block at least; as high as the blocks of
    columns, where these are all; or one block where both copies have blocks of 128.
    """
    inside = [cast for cast in region.blocks if cast not in region.searched]
    high, wide = (max(sizes) for sizes in zip(*map(_extent, inside), strict=True))
    if all(cast.block == (1, GROUP) and "fp8" not in cast.outputs for cast in inside):
        return [Tile(GROUP, 64, 2), Tile(GROUP, 64, 4), Tile(GROUP, GROUP, 4)]
    if region.transposes and wide == GROUP:
        # With 4 warps a result of many loads does not fit into registers.
        warps = (4, 8) if emit_once(region).loads_little else (8, 16)
        return [Tile(GROUP, GROUP, count) for count in warps]
    if region.whole_rows:
        return [replace(tile, block_n=max(tile.block_n, wide)) for tile in usual]
    found = [tile for tile in usual if tile.block_m % high == tile.block_n % wide == 0]
    return found or [Tile(max(high, 32), max(wide, 32), count) for count in (4, 8)]


def _extent(cast: Cast) -> tuple[int, int]:
    """The rows and columns of a tile that hold whole blocks of both copies."""
    high, wide = (max(1, size) for size in cast.block)  # a row's scale was found before
    return (max(high, wide), max(high, wide)) if "fp8_t" in cast.outputs else (high, wide)


def _tiles(region: Region) -> list[Tile]:
    if region.transposes:
        return _tiles_transposed(region)
    if region.whole_rows:
        return _whole_rows(region)
    if region.branches and region.branches[0].axis == 1:  # a tile lies in one part
        return [Tile(64, 128, 4), Tile(128, 128, 4), Tile(32, 128, 4), Tile(256, 64, 4)]
    found = [Tile(32, 256, 8), Tile(64, 256, 4), Tile(16, 512, 4)]
    if emit_once(region).loads > 1:  # 32 x 256 take too many registers for another program beside
        found.insert(0, Tile(16, 256, 8))
    # Parts below each other start at multiples of 128 rows.
    return found if region.branches else [*found, Tile(256, 64, 4)]


def _tiles_transposed(region: Region) -> list[Tile]:
    """Tiles for transposed copies: high ones, unless many values at once leave few registers."""
    matrices = [node for node in region.inputs if not region.is_vector(node)]
    below = bool(region.branches) and region.branches[0].axis == 0
    if below or len(matrices) < 2:
        return [Tile(64, 64, 8), Tile(64, 64, 4), Tile(32, 128, 8), Tile(32, 128, 4)]
    if region.sums:
        return [Tile(32, 64, 4), Tile(64, 64, 8), Tile(32, 128, 4), Tile(32, 128, 8)]
    return [Tile(32, 128, 4), Tile(32, 64, 4), Tile(64, 64, 8), Tile(32, 128, 8)]


def _whole_rows(region: Region) -> list[Tile]:
    """Tiles of whole rows: as few elements as give every thread enough to do; fewer for each where
    there are not enough rows for all multiprocessors, and a row is waited for.
    """
    whole = triton.next_power_of_2(padded(int(region.space.n)))  # padding is written, too
    rows = max(1, LEAST_IN_TILE // whole)
    size = rows * whole
    each = (512, 1024, 2048) if region.loops else (1024, 512, 2048)
    warps = [min(16, max(1, size // elements)) for elements in each]
    if region.space.m.is_number and region.space.m < _MULTIPROCESSORS:
        warps.insert(0, min(32, max(1, size // 256)))
    return [Tile(rows, whole, count) for count in dict.fromkeys(warps)]


def _search_tile(region: Region) -> Tile:
    """The tile of the kernel that finds the amax: whole rows where it sums over them itself."""
    if region.reduces and (region.sums_in_search or not region.sums_apart):
        return _whole_rows(region)[0]
    if region.search_height:
        # In strips: many small programs, and smaller ones where there is much to hold.
        return Tile(4, GROUP, 1) if len(region.results) > 1 else Tile(8, GROUP, 2)
    little = region.searched and emit_once(region).loads_little
    return Tile(16, GROUP, 2 if little else 4)


def _search_programs(region: Region, tiles: Any) -> int:
    """How many programs look for an amax in so many tiles: enough for loads to be under way all the
    time, where every call does; few, which end sooner, where only the first call does, or where the
    tiles may be few: a size that is known at run time only.
    """
    known = isinstance(tiles, int)
    most = (32 if region.always_searches and known else 4) * _MULTIPROCESSORS
    return min(tiles, most) if known else most


def launches(
    region: Region,
    source: Source,
    tensors: Mapping[str, Any],
    sizes: Mapping[str, Any],
    *,
    m: Any,
    n: Any,
    tile: Tile,
) -> list[Launch]:
    """The launches of a region, in order: sums over rows and the search for amax, if they are made
    before; what writes the results; and what completes sums over columns, if that does not.

    ``tensors`` holds every pointer argument of the emitted functions by name without ``_ptr``;
    ``sizes`` the values of symbolic sizes; ``m`` and ``n`` are the extent of the space.
    """
    module = load(source.text)
    made = []
    if region.sums_alone:
        rows = _whole_rows(region)[0]
        summing = getattr(module, source.sums_name)
        writes = written(region, summing.arg_names)
        made.append(_launch(summing, tensors, sizes, rows, _cdiv(m, rows.block_m), writes))
    if search_apart(region):
        found_by = _search_tile(region)
        programs = _cdiv(m, region.search_height or found_by.block_m) * _cdiv(n, found_by.block_n)
        if region.searches:  # whose largest all leave in one place
            programs = _search_programs(region, programs)
        search = getattr(module, source.amax_name)
        writes = written(region, search.arg_names)
        writes -= set() if region.sums_in_search else {"totals_ptr"}
        made.append(_launch(search, tensors, sizes, found_by, programs, writes))
    tiles_m = _summing(region, m, tile)
    programs = tiles_m * _tiles_along(region, n, tile.block_n)
    main = getattr(module, source.name)
    writes = written(region, main.arg_names) - {"totals_ptr"}
    if search_apart(region) or region.search_in_sums:  # which has written what this reads
        writes -= {"found_ptr"}
    made.append(_launch(main, tensors, sizes, tile, programs, writes))
    if region.completes_apart:
        completing = getattr(module, source.column_sums_name)
        writes = {f"sum_{i}_ptr" for i in range(len(region.sums))}
        counted, programs = {**sizes, "tiles_m": tiles_m}, _cdiv(n, _COLUMN_SUMS.block_n)
        made.append(_launch(completing, tensors, counted, _COLUMN_SUMS, programs, writes))
    return made


def partial_rows(region: Region, m: Any, tile: Tile) -> Any:
    """How many rows of partial sums a region's kernel leaves: for each sum one for each row of
    tiles, or for each program that loops.
    """
    return _summing(region, m, tile) * len(region.sums)


def _summing(region: Region, m: Any, tile: Tile) -> Any:
    """How many rows of tiles there are, or programs that loop: as many as run at a time."""
    rows = _tiles_along(region, m, tile.block_m)
    most = _LOOPING * _MULTIPROCESSORS
    if not region.loops:
        return rows
    return min(rows, most) if isinstance(rows, int) else most


def _tiles_along(region: Region, size: Any, block: int) -> Any:
    """How many blocks cover a side of the space, and the padding that tiles fill."""
    if region.padding <= block:
        return _cdiv(size, block)
    return _cdiv(size, region.padding) * (region.padding // block)


def written(region: Region, arguments: Iterable[str]) -> set[str]:
    """The pointers among a kernel's arguments that are neither inputs nor scales."""
    read = {f"{node.name}_ptr" for node in region.inputs}
    read |= {f"scale_{i}_ptr" for i in range(len(region.casts))}
    return {name for name in arguments if name.endswith("_ptr")} - read


def _launch(
    kernel: Any,
    tensors: Mapping[str, Any],
    sizes: Mapping[str, Any],
    tile: Tile,
    programs: Any,
    writes: set[str],
) -> Launch:
    return Launch(
        kernel=kernel,
        tensors=_chosen(kernel, tensors),
        sizes=dict(sizes),
        constants={"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n},
        grid=(programs, 1, 1),
        writes=frozenset(writes),
        num_warps=tile.num_warps,
    )


def _chosen(kernel: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    names = [name for name in kernel.arg_names if name.endswith("_ptr")]
    return {name: tensors[name.removesuffix("_ptr")] for name in names}


def _cdiv(a: Any, b: int) -> Any:
    return (a + b - 1) // b


# --- the file -----------------------------------------------------------------------------------


def load(text: str) -> ModuleType:
    """Import emitted source; its file lies beside Inductor's caches, named after the text.

    What runs is the text. Whoever compiles its kernels reads the file, which is therefore written
    again if it says anything else.
    """
    name = f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.py"
    try:
        file = _with_text(cache_folder() / "kernels" / name, text)
    except OSError as error:
        log.debug("kernels are kept for this process only: %s", error)
        file = _with_text(Path(_own_folder().name) / name, text)
    return _imported(file, text)


def _with_text(file: Path, text: str) -> Path:
    if not (file.is_file() and file.read_bytes() == text.encode()):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as new:
            new.write(text)
        os.replace(new.name, file)  # in one step: another process may be reading
    return file


@functools.cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    """For a process that cannot write the cache folder; deleted when it ends."""
    return tempfile.TemporaryDirectory(prefix="fp8compile_")


@functools.cache
def _imported(file: Path, text: str) -> ModuleType:
    module = ModuleType(f"fp8compile_kernel_{file.stem}")
    module.__file__ = str(file)
    code = compile(text, file, "exec", dont_inherit=True)  # never bytecode that could be stale
    exec(code, module.__dict__)
    return module


_emitted: dict[str, Source] = {}


def emit_once(region: Region) -> Source:
    """The source of a region's kernels; layers mostly look alike, and share it."""
    key = region_key(region)
    if key not in _emitted:
        _emitted[key] = emit(region)
    return _emitted[key]


def region_key(region: Region) -> str:
    """A text that is equal for two regions only if one kernel does for both."""
    strides = [n.meta["val"].stride() for n in region.inputs]
    slots = re.sub(r"(fp8\.quantize\(\w+, \w+), \d+", r"\1, slot", format_graph(region.gm))
    return f"{slots}\n{strides}"


# --- eager --------------------------------------------------------------------------------------


def prepare(
    gm: torch.fx.GraphModule,
    inputs: Mapping[str, Tensor],
    *,
    tile: Tile | None = None,
    words: Tensor | None = None,
) -> tuple[list[Launch], dict[str, Tensor]]:
    """The launches of a region on real tensors, and the tensors that they will write.

    ``inputs``: by the names of the submodule's placeholders. The tensors have the names of the
    nodes that the submodule returns. ``words``: zeros, ``f32[region.word_count]``, if they are
    part of others.
    """
    region = Region.of(gm)
    source = emit_once(region)
    m, n = int(region.space.m), int(region.space.n)
    tile = tile or tiles(region)[0]
    device = next(iter(inputs.values())).device
    tensors: dict[str, Any] = {node.name: inputs[node.name] for node in region.inputs}
    results: dict[str, Tensor] = {}
    words = torch.zeros(region.word_count, device=device) if words is None else words
    tensors["words"] = words
    made = torch.zeros if region.scales_rows else torch.empty  # programs of one row add to it
    tensors["found"] = made(int(region.found_size), dtype=torch.int32, device=device)
    for i, cast in enumerate(region.casts):
        tensors |= _cast_tensors(i, cast, inputs, region, words)
        for output, node in cast.outputs.items():
            name = f"{output}_{i}"
            results[node.name] = tensors[name] if name in tensors else _number(region, words, name)
    for i, block in enumerate(region.blocks):
        for output, node in block.outputs.items():
            results[node.name] = tensors[f"block_{output}_{i}"] = _empty_like(node, device)
    for i, group in enumerate(region.groups):
        for output, name in (("q", f"q_{i}"), ("scale_inv", f"group_scale_inv_{i}")):
            tensors[name] = _empty_like(group.outputs[output], device)
            results[group.outputs[output].name] = tensors[name]
    for i, node in enumerate(region.values):
        value = node.meta["val"]
        results[node.name] = torch.empty(tuple(value.shape), dtype=value.dtype, device=device)
        tensors[f"value_{i}"] = results[node.name]
    for i, node in enumerate(region.scales):
        results[node.name] = _number(region, words, f"found_scale_{i}")
    tensors["partial"] = torch.empty(partial_rows(region, m, tile), n, device=device)
    for i, node in enumerate(region.sums):
        results[node.name] = tensors[f"sum_{i}"] = _empty_like(node, device)
    tensors["totals"] = torch.empty(source.totals * m, dtype=torch.float32, device=device)
    return launches(region, source, tensors, {}, m=m, n=n, tile=tile), results


def run_region(
    gm: torch.fx.GraphModule, inputs: Mapping[str, Tensor], *, tile: Tile | None = None
) -> dict[str, Tensor]:
    """Run a region's kernels now; returns what the submodule returns, by the nodes' names."""
    to_run, results = prepare(gm, inputs, tile=tile)
    for launch in to_run:
        run(launch)
    return results


def _empty_like(node: torch.fx.Node, device: Any) -> Tensor:
    value = node.meta["val"]
    return torch.empty(tuple(value.shape), dtype=value.dtype, device=device)


def _number(region: Region, words: Tensor, name: str) -> Tensor:
    at = region.numbers[name]
    return words[at : at + 1]


def _cast_tensors(
    i: int, cast: Cast, inputs: Mapping[str, Tensor], region: Region, words: Tensor
) -> dict[str, Tensor]:
    """The copies of a cast, and its scale if that is given; one from earlier steps is written."""
    m, n = (int(size) for size in shape_of(args_of(cast.node)[0]))
    shapes = {"fp8": (m, padded(n)), "fp8_t": (n, padded(m))}
    tensors = {
        f"{copy}_{i}": torch.empty(shape, dtype=cast.format.dtype, device=words.device)
        for copy, shape in shapes.items()
        if copy in cast.outputs
    }
    if cast.is_delayed:
        scale = inputs[args_of(cast.node)[1].name][cast.slot : cast.slot + 1]
        if cast.is_given:
            tensors[f"scale_{i}"] = scale
        else:
            words[region.numbers[f"scale_{i}"]] = scale[0]
    return tensors
