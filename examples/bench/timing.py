"""Measure: time per step, memory, time per kernel category, SQNR.

On a CPU the same functions run, so that the benchmark can be tried anywhere; but their times then
say nothing, since FP8 is emulated there, and memory is not counted.
"""

from __future__ import annotations

import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

GIB = 2**30


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of one call, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def median_ms(step: Callable[[], object], steps: int, device: torch.device) -> float:
    """Median time of `step`: between CUDA events, so the host may run ahead as in training."""
    if device.type != "cuda":
        return 1e3 * statistics.median(seconds(step, device) for _ in range(steps))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    return median_gap_ms(events)


def median_gap_ms(events: list[torch.cuda.Event]) -> float:
    """Median time from one event to the next, once all have happened."""
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairwise(events))


# ---- memory --------------------------------------------------------------------------------------
def allocated(device: torch.device) -> int:
    """Bytes of live tensors."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_of(step: Callable[[], object], device: torch.device) -> int:
    """The most bytes alive at once during `step`, parameters included."""
    if device.type != "cuda":
        step()
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device)


# ---- time per kernel category --------------------------------------------------------------------
# The first pattern found in a kernel's name decides. Inductor names a kernel after all the ops it
# came from (triton_poi_fused__scaled_dot_product_cudnn_attention_...), so its kernels must be told
# apart before "attention" is looked for; and the template arguments of a flash kernel mention
# cutlass, so attention comes before GEMM.
CATEGORIES = (
    ("casts and transposes", r"^_(quantize|amax)_kernel|^_.*transpose.*kernel"),
    ("GEMM", r"^_scaled_mm_kernel|^triton_tem_fused.*mm"),
    ("other", r"^triton_|^_update_scales"),  # norms, activations, residuals and RoPE, by Inductor
    ("attention", r"flash|fmha|cudnn|sdpa|attention|attn"),
    ("GEMM", r"gemm|nvjet|xmma|cublas|splitk"),
    ("casts and transposes", r"cast|transpose|amax|fp8|float8"),
    ("other", r"at::native|^Mem(cpy|set)|elementwise|reduce|norm|swiglu|gated|rope"),
)
UNKNOWN = "unclassified"


def category_of(kernel: str) -> str:
    for category, pattern in CATEGORIES:
        if re.search(pattern, kernel, re.IGNORECASE):
            return category
    return UNKNOWN


@dataclass
class KernelTime:
    """Per step."""

    ms: float = 0.0
    launches: float = 0.0

    def add(self, ms: float, launches: float) -> None:
        self.ms += ms
        self.launches += launches


def kernel_times(step: Callable[[], object], steps: int = 3) -> dict[str, KernelTime]:
    """Time on the GPU of every kernel of a step, by name."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    times: dict[str, KernelTime] = defaultdict(KernelTime)
    for event in profiler.key_averages():
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if on_gpu and not event.is_user_annotation:
            ms = event.self_device_time_total / 1e3
            times[event.key].add(ms / steps, event.count / steps)
    return times


def by_category(kernels: dict[str, KernelTime]) -> dict[str, KernelTime]:
    """Sums, in the order in which they are printed."""
    names = ("GEMM", "attention", "casts and transposes", "other", UNKNOWN)
    sums = {name: KernelTime() for name in names}
    for name, kernel in kernels.items():
        sums[category_of(name)].add(kernel.ms, kernel.launches)
    return sums


# ---- numerics ------------------------------------------------------------------------------------
def sqnr_db(reference: Tensor, actual: Tensor) -> float:
    """Signal to quantization noise ratio, in decibels."""
    reference, actual = reference.float(), actual.float()
    return 20 * torch.log10(reference.norm() / (reference - actual).norm()).item()
