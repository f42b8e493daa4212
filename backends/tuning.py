"""Choose what multiplies a GEMM shape fastest: cuBLASLt or one of our tile configurations.

Each shape is timed once per device and remembered in a file beside Inductor's own caches.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from ..formats import Format
from ..internals import cache_folder, outside_tracing
from .kernels.scaled_mm import TileConfig, candidates, scaled_mm

log = logging.getLogger("fp8compile")

CUBLASLT = "cublaslt"
_TIMED_CONFIGS = 3  # of our own, best guesses first
_WARMUP, _REPEATS = 3, 15


@dataclass(frozen=True)
class GemmShape:
    """What a choice depends on. ``m``, ``n``, ``k``: hints where they are symbolic."""

    m: int
    n: int
    k: int
    left: torch.dtype
    right: torch.dtype
    out: torch.dtype
    bias: torch.dtype | None
    fast_accum: bool

    def __str__(self) -> str:
        def short(dtype: torch.dtype | None) -> str:
            return str(dtype).removeprefix("torch.")

        formats = f"{Format.of(self.left)}x{Format.of(self.right)}"
        accum = "fast" if self.fast_accum else "precise"
        types = f"{formats} {short(self.out)} bias={short(self.bias)}"
        return f"{self.m}x{self.n}x{self.k} {types} {accum}"


def cublaslt_supports(shape: GemmShape) -> bool:
    """cuBLASLt adds a bias only in the output's dtype, and none to a float32 output."""
    return shape.bias is None or (shape.bias == shape.out and shape.out != torch.float32)


@functools.cache
def choose_gemm(shape: GemmShape, device_index: int) -> TileConfig | None:
    """The fastest tile configuration for a shape, or None for cuBLASLt."""
    remembered = _remembered(device_index)
    if str(shape) not in remembered:
        with outside_tracing(), torch.no_grad():
            times = time_choices(shape, torch.device("cuda", device_index))
        best = min(times, key=lambda choice: times[choice])
        log.debug("%s: %s", shape, {str(c or CUBLASLT): f"{t:.1f} us" for c, t in times.items()})
        remembered = _remember(device_index, str(shape), asdict(best) if best else None)
    entry = remembered[str(shape)]
    return None if entry is None else TileConfig(**entry)


def time_choices(shape: GemmShape, device: torch.device) -> dict[TileConfig | None, float]:
    """Microseconds of every choice on fresh random data; None stands for cuBLASLt."""
    a = torch.randn(shape.m, shape.k, device=device).to(shape.left)
    b = torch.randn(shape.n, shape.k, device=device).to(shape.right)
    one = torch.ones(1, device=device)
    bias = None if shape.bias is None else torch.randn(shape.n, device=device).to(shape.bias)
    times: dict[TileConfig | None, float] = {}
    if cublaslt_supports(shape):
        times[None] = _microseconds(
            lambda: torch._scaled_mm(
                a,
                b.t(),
                scale_a=one,
                scale_b=one,
                bias=bias,
                out_dtype=shape.out,
                use_fast_accum=shape.fast_accum,
            )
        )
    configs = candidates(shape.m, shape.n, shape.k, fast_accum=shape.fast_accum)
    for config in configs[:_TIMED_CONFIGS]:
        run = functools.partial(
            scaled_mm,
            a,
            b,
            one,
            one,
            bias,
            out_dtype=shape.out,
            config=config,
            fast_accum=shape.fast_accum,
        )
        try:
            times[config] = _microseconds(run)
        except triton.runtime.errors.OutOfResources as error:
            log.debug("%s: %s does not fit: %s", shape, config, error)
    return times


def _microseconds(run: Callable[[], Tensor]) -> float:
    for _ in range(_WARMUP):
        run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(_REPEATS)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) * 1e3


# --- the file -----------------------------------------------------------------------------------


def _cache_file(device_index: int) -> Path:
    name = torch.cuda.get_device_name(device_index).replace(" ", "_")
    versions = f"torch{torch.__version__}_triton{triton.__version__}"
    return cache_folder() / f"gemm_{name}_{versions}.json"


def _remembered(device_index: int) -> dict[str, Any]:
    try:
        entries = json.loads(_cache_file(device_index).read_text())
        return entries if isinstance(entries, dict) else {}
    except (OSError, ValueError):
        return {}


def _remember(device_index: int, key: str, entry: dict[str, Any] | None) -> dict[str, Any]:
    """Add an entry; the file is replaced in one step, so that no reader sees half of it."""
    entries = {**_remembered(device_index), key: entry}
    file = _cache_file(device_index)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as new:
            json.dump(entries, new, indent=1)
        os.replace(new.name, file)
    except OSError as error:
        log.debug("timings are not kept: %s", error)
    return entries
