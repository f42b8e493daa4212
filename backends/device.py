"""The constants of a device that FP8's gain is predicted from: shipped, or measured once."""

from __future__ import annotations

import functools
import logging
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..cost import H100, H200, Device
from ..internals import cache_folder, outside_tracing
from .json_file import add_entry, read_entries

log = logging.getLogger(__name__)

# By the name that the driver gives: an H100 PCIe or NVL is another device, and is measured.
_SHIPPED = {"NVIDIA H200": H200, "NVIDIA H100 80GB HBM3": H100}
ASSUMED = replace(H200, name="an NVIDIA H200, for want of an FP8 GPU here")

_SIZE = 8192  # of the square GEMMs
_COPY_BYTES = 256 * 2**20
_LAUNCHES = 200
_ROUNDS = 5
_HEAD_START = 4  # GEMMs: some milliseconds


def constants_of(device: torch.device) -> Device:
    """The constants of a GPU: those shipped, or measured in under a second and kept in a file."""
    with torch.cuda.device(device):
        index = torch.cuda.current_device()
    return _SHIPPED.get(torch.cuda.get_device_name(index)) or _measured(index)


@functools.cache
def _measured(index: int) -> Device:
    name = torch.cuda.get_device_name(index)
    file = _cache_file()
    remembered = _device_of(read_entries(file).get(name))
    if remembered is not None:
        return remembered
    try:
        with outside_tracing(), torch.no_grad(), torch.cuda.device(index):
            measured = _measure(name)
    except torch.OutOfMemoryError:
        log.info("no memory left to measure %s; predicting for %s", name, H200.name)
        return H200
    add_entry(file, name, asdict(measured))
    return measured


def _device_of(entry: Any) -> Device | None:
    """The constants in a file's entry, if it has all of them and they can be right."""
    try:
        device = Device(**entry)
        constants = [value for name, value in asdict(device).items() if name != "name"]
        usable = all(math.isfinite(value) and value > 0 for value in constants)
    except (TypeError, OverflowError):  # other constants, or no numbers
        return None
    return device if usable else None


def _cache_file() -> Path:
    return cache_folder() / f"device_torch{torch.__version__}.json"


def _measure(name: str) -> Device:
    """Time a copy, two GEMMs and a train of launches on the current device."""
    bf16 = torch.randn(_SIZE, _SIZE, device="cuda").bfloat16()
    fp8 = bf16.to(torch.float8_e4m3fn)
    one = torch.ones(1, dtype=torch.float32, device="cuda")
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    bf16_seconds = _seconds(lambda: bf16 @ bf16.t())
    fp8_seconds = _seconds(
        lambda: torch._scaled_mm(
            fp8, fp8.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    )
    # The host fills the queue behind a GEMM, so that its own time for a launch does not count.
    launch_seconds = _seconds(lambda: one.add_(1), _LAUNCHES, behind=lambda: bf16 @ bf16.t())
    return Device(
        name=name,
        copy_bandwidth=2 * _COPY_BYTES / _seconds(lambda: target.copy_(source)),
        launch_seconds=launch_seconds,
        bf16_flops=2 * _SIZE**3 / bf16_seconds,
        fp8_flops=2 * _SIZE**3 / fp8_seconds,
        sms=torch.cuda.get_device_properties("cuda").multi_processor_count,
    )


def _seconds(
    run: Callable[[], object], calls: int = 10, behind: Callable[[], object] = lambda: None
) -> float:
    """Median over a few rounds of the time that a call takes on the device."""
    times = []
    for _ in range(_ROUNDS):
        run()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(_HEAD_START):
            behind()
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / calls)
    return statistics.median(times)
