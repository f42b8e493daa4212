"""Several regions in one launch.

The casts of weights wait for nothing, and every layer has four or so in forward and in backward.
Where they are small, what a launch costs the host is more than what the kernel costs the GPU: so a
few of them become one kernel, whose programs they share.
"""

from __future__ import annotations

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
_NUM_WARPS = 4
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
    """One kernel for all; regions that look alike share their functions."""
    parts: dict[str, PartSource] = {}
    heads, arguments, branches, writes = [], ["words_ptr"], [], {"words_ptr"}
    first = words = 0
    for index, region in enumerate(regions):
        key = region_key(region)
        if key not in parts:
            parts[key] = emit_part(region, f"_{len(parts)}")
            heads.append(describe(region, parts[key].name))
        part, tile = parts[key], tile_of(region)
        own = {name: f"{prefix(index)}{name}" for name in part.arguments if name != "words_ptr"}
        arguments += own.values()
        writes |= {own[name] for name in written(region, own)}
        passed = (own.get(name, f"words_ptr + {words}") for name in part.arguments)
        given = ", ".join([f"program - {first}" if first else "program", *passed])
        m, n = int(region.space.m), int(region.space.n)
        programs = triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n)
        branches += [
            f"    {'elif' if index else 'if'} program < {first + programs}:",
            f"        {part.name}({given}, {tile.block_m}, {tile.block_n})",
        ]
        first += programs
        words += region.word_count
    kernel = ["@triton.jit", f"def {NAME}(", *(f"    {a}," for a in arguments), "):"]
    kernel += ["    program = tl.program_id(0)", *branches]
    functions = [part.text for part in parts.values()]
    head = f'"""{NAME}: {len(regions)} regions.\n\n' + "\n\n".join(heads) + '\n"""'
    text = "\n\n\n".join([head, IMPORTS, *functions, "\n".join(kernel)]) + "\n"
    return Bundle(text, first, frozenset(writes))


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
