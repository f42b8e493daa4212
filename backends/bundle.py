"""Several regions in one launch.

The casts of weights wait for nothing, and every layer has four or so in forward and in backward.
Where they are small, what a launch costs the host is more than what the kernel costs the GPU: so a
few of them become one kernel, whose programs they share.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import triton

from .emit import IMPORTS, PartSource, bytes_written, describe, emit_part
from .fused import Tile, load, region_key, tiles, written
from .kernels.launch import Launch
from .region import Region

MOST_REGIONS = 16
MOST_BYTES = 32 * 2**20  # written by a bundle: they are alive from its first cast to its last GEMM
_NUM_WARPS = 8
NAME = "fp8_bundle"


def bundles(regions: Iterable[Region]) -> list[list[Region]]:
    """Group regions that may share a launch, in order; each is one for itself if it is large."""
    found: list[list[Region]] = []
    size = MOST_BYTES
    for region in regions:
        written = int(bytes_written(region))
        if size + written > MOST_BYTES or len(found[-1]) == MOST_REGIONS:
            found.append([])
            size = 0
        found[-1].append(region)
        size += written
    return found


def can_share(region: Region) -> bool:
    """Whether a region is one kernel of a fixed size, with a tile for the warps of a bundle, and
    has to search for an amax at its first steps only.
    """
    sizes = (region.space.m, region.space.n)
    return (
        all(size.is_number for size in sizes)
        and all(cast.is_delayed for cast in region.casts)
        and not (region.blocks or region.scales or region.sums or region.reduces or region.is_large)
        and any(tile.num_warps == _NUM_WARPS for tile in tiles(region))
    )


def tile_of(region: Region) -> Tile:
    """The tile of a region in a bundle."""
    return next(tile for tile in tiles(region) if tile.num_warps == _NUM_WARPS)


@dataclass(frozen=True)
class Bundle:
    """The emitted file of a bundle, how many programs it takes, and the arguments it writes."""

    text: str
    programs: int
    writes: frozenset[str]


def emit_bundle(regions: Sequence[Region]) -> Bundle:
    """One kernel for all. Those that look alike are one piece of code: each takes a second or so to
    compile.
    """
    starts = [0, *itertools.accumulate(region.word_count for region in regions)]
    alike: dict[str, list[int]] = {}
    for index, region in enumerate(regions):
        alike.setdefault(region_key(region), []).append(index)
    heads, functions, branches = [], [], []
    arguments, writes = ["words_ptr"], {"words_ptr"}
    programs = 0
    for number, indices in enumerate(alike.values()):
        region = regions[indices[0]]
        part = emit_part(region, f"_{number}")
        heads.append(describe(region, part.name))
        own = [name for name in part.arguments if name != "words_ptr"]
        passed = [f"{prefix(index)}{name}" for index in indices for name in own]
        writes |= {f"{prefix(i)}{name}" for i in indices for name in written(region, own)}
        family = _family(part, own, {index: starts[index] for index in indices}, region)
        functions += [part.text, family]
        program = f"program - {programs}" if programs else "program"
        programs += _programs(region) * len(indices)
        branches += [
            f"    {'elif' if number else 'if'} program < {programs}:",
            f"        _regions_{number}({', '.join([program, 'words_ptr', *passed])})",
        ]
        arguments += passed
    kernel = ["@triton.jit", f"def {NAME}(", *(f"    {a}," for a in arguments), "):"]
    kernel += ["    program = tl.program_id(0)", *branches]
    head = f'"""{NAME}: {len(regions)} regions.\n\n' + "\n\n".join(heads) + '\n"""'
    text = "\n\n\n".join([head, IMPORTS, *functions, "\n".join(kernel)]) + "\n"
    return Bundle(text, programs, frozenset(writes))


def _family(part: PartSource, own: Sequence[str], starts: Mapping[int, int], region: Region) -> str:
    """A function that has a program work for one of the regions that look alike: ``own``, their
    arguments but for words; ``starts``: the first word of each, by its index.
    """
    first, *others = starts
    takes = [f"{prefix(index)}{name}" for index in starts for name in own]
    lines = [f"region = program // {_programs(region)}"]
    for name in own:
        lines.append(f"{name} = {prefix(first)}{name}")
        chosen = (f"{prefix(index)}{name}, {name})" for index in others)
        lines += [f"{name} = tl.where(region == {i}, {x}" for i, x in enumerate(chosen, 1)]
    lines.append(f"word = {starts[first]}")
    chosen = (f"{starts[index]}, word)" for index in others)
    lines += [f"word = tl.where(region == {i}, {x}" for i, x in enumerate(chosen, 1)]
    tile = tile_of(region)
    passed = ["words_ptr + word" if name == "words_ptr" else name for name in part.arguments]
    given = [f"program % {_programs(region)}", *passed, str(tile.block_m), str(tile.block_n)]
    lines.append(f"{part.name}({', '.join(given)})")
    head = [f"    {argument}," for argument in ("program", "words_ptr", *takes)]
    body = [f"    {line}" for line in lines]
    name = part.name.replace("_region", "_regions")
    return "\n".join(["@triton.jit", f"def {name}(", *head, "):", *body])


def _programs(region: Region) -> int:
    """How many programs work for a region: one for each of its tiles."""
    tile = tile_of(region)
    m, n = int(region.space.m), int(region.space.n)
    return triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n)


def prefix(index: int) -> str:
    """What the names of a region's arguments begin with."""
    return f"r{index}_"


def bundle_launch(bundle: Bundle, tensors: Mapping[str, Any]) -> Launch:
    """The launch of a bundle. ``tensors``: every pointer argument by name, without ``_ptr``."""
    kernel = getattr(load(bundle.text), NAME)
    chosen = {name: tensors[name.removesuffix("_ptr")] for name in kernel.arg_names}
    return Launch(
        kernel,
        chosen,
        sizes={},
        constants={},
        grid=(bundle.programs, 1, 1),
        writes=bundle.writes,
        num_warps=_NUM_WARPS,
    )
