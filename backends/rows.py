"""Which fused kernels a final graph launches, as rows. Nothing is compiled; no GPU is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import sympy
import torch
from torch import fx

from ..cost import Device, kernel_us
from ..ir import CASTS, QUANTIZE_GROUPS, RESHAPES, SCALED_MMS, aten, format_value, gemm_info
from ..recipe import Granularity
from ..regions import SAME_PLACE
from ..report import KernelRow
from .bundle import NAME, emit_bundle
from .emit import Source, bytes_read, bytes_written, search_apart
from .fused import emit_once
from .region import Cast, Region
from .triton import regions_of, weight_bundles

_MOVES = {*RESHAPES, *SAME_PLACE, aten.expand.default, aten.permute.default, aten.slice.Tensor}


def kernel_rows(gm: fx.GraphModule, direction: str, device: Device | None) -> list[KernelRow]:
    """A row for each kernel of a graph after ``grow_regions``, in the order of first launches.

    Launches of one source are one row. ``device``: what times are predicted for, if for any.
    """
    rows: dict[str, KernelRow] = {}
    for launched in _launches(regions_of(gm)):
        regions = list(launched.values())
        text = emit_bundle(regions).text if len(regions) > 1 else emit_once(regions[0]).text
        row = rows.get(text) or _row(regions, text, direction, device)
        feeds = [name for call, region in launched.items() for name in _feeds(call, region)]
        feeds = list(dict.fromkeys([*row.feeds, *feeds]))
        rows[text] = replace(row, launches=row.launches + 1, feeds=tuple(feeds))
    return list(rows.values())


def _launches(regions: Mapping[fx.Node, Region]) -> Iterator[dict[fx.Node, Region]]:
    """The regions that share a launch, by their calls, in order."""
    bundles = weight_bundles(regions)
    for call, region in regions.items():
        bundle = next((bundle for bundle in bundles if call in bundle), {call: region})
        if call is next(iter(bundle)):
            yield bundle


def _row(regions: Sequence[Region], text: str, direction: str, device: Device | None) -> KernelRow:
    """The row of a launch, which counts none yet."""
    source = emit_once(regions[0])
    alone = len(regions) == 1
    read, written = (
        _megabytes(sympy.Add(*map(count, regions))) for count in (bytes_read, bytes_written)
    )
    row = KernelRow(
        name=source.name if alone else NAME,
        direction=direction,
        functions=_functions(regions[0], source) if alone else (NAME,),
        launches=0,
        regions=len(regions),
        size=f"{regions[0].space.m} x {regions[0].space.n}" if alone else "",
        fused=tuple(name for region in regions for name in _operators(region)),
        writes=tuple(dict.fromkeys(name for region in regions for name in _written(region))),
        feeds=(),
        mb_read=read,
        mb_written=written,
        source=text,
    )
    if device is None or row.megabytes is None:
        return row
    return replace(row, predicted_us=kernel_us(device, 1e6 * row.megabytes))


def _functions(region: Region, source: Source) -> tuple[str, ...]:
    """The names of a region's launches, in order."""
    launched = {
        source.sums_name: region.sums_alone,
        source.amax_name: search_apart(region),
        source.name: True,
        source.column_sums_name: region.completes_apart,
    }
    return tuple(name for name, there in launched.items() if there)


def _operators(region: Region) -> list[str]:
    """What a region computes besides casts; views and conversions cost nothing there."""
    return [
        node.target._opname
        for node in region.gm.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
        and node.target not in (*CASTS, QUANTIZE_GROUPS)
        and node.target not in _MOVES
    ]


def _written(region: Region) -> list[str]:
    """What a region writes: copies by format, transposed ones with ``^T``, and other values."""
    found = [
        f"{cast.format}{_granularity(cast)}{'^T' if copy == 'fp8_t' else ''}"
        for cast in (*region.casts, *region.blocks)
        for copy in ("fp8", "fp8_t")
        if copy in cast.outputs
    ]
    found += ["amax"] * any("amax" in cast.outputs for cast in region.casts)
    found += ["e4m3 in groups"] * bool(region.groups)
    found += [format_value(node.meta["val"]).split("[")[0] for node in region.values]
    found += ["scale"] * bool(region.scales)
    return found + ["column sums"] * bool(region.sums)


def _granularity(cast: Cast) -> str:
    if not isinstance(cast.node.args[1], list | tuple):
        return ""
    return f":{next(each for each in Granularity if each.block == cast.block)}"


def _feeds(call: fx.Node, region: Region) -> list[str]:
    """The GEMMs that take what a region writes, in its own graph; where it only stores what others
    cast, those that take that.
    """
    users = [user for item in call.users for user in item.users]
    if not (region.casts or region.blocks):
        casting = [user for user in users if user.op == "call_module"]
        users += [user for cast in casting for item in cast.users for user in item.users]
    infos = [gemm_info(user) for user in users if user.target in SCALED_MMS]
    return [f"{info.name} {info.gemm}" for info in infos if info is not None]


def _megabytes(count: sympy.Expr) -> float | str:
    return float(count) / 1e6 if count.is_number else f"({count}) / 1e6"
