"""Measure: time per step, memory, time per kernel category, SQNR; and keep what was measured.

On a CPU the same functions run, so that the benchmark can be tried anywhere; but their times then
say nothing, since FP8 is emulated there, and memory is not counted.
"""

from __future__ import annotations

import csv
import datetime
import math
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import triton
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import fp8compile

GIB = 2**30
ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


# ---- where it is measured ------------------------------------------------------------------------
def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def versions() -> str:
    found = {"torch": torch, "triton": triton, "fp8compile": fp8compile}
    return ", ".join(f"{name} {module.__version__}" for name, module in found.items())


def load_compiler(device: torch.device) -> None:
    """Compile something small: the first time in a process takes seconds that nobody caused."""
    linear = torch.compile(nn.Linear(16, 16, device=device))
    linear(torch.ones(16, 16, device=device)).sum().backward()


def heat_up(device: torch.device, seconds: float = 10.0) -> None:
    """Keep a GPU busy until it is as hot as a run makes it: at its power limit a cold one is faster
    (an H100 by 1.5 %), and the first that is measured would have that alone.
    """
    if device.type != "cuda":
        return
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device=device)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(100):
            a @ a
        synchronize(device)


@contextmanager
def equal_attention(device: torch.device) -> Iterator[None]:
    """Prefer cuDNN's attention, the fastest on Hopper."""
    if device.type == "cuda":
        with sdpa_kernel(ATTENTION, set_priority=True):
            yield
    else:
        yield


@contextmanager
def equal_conditions(device: torch.device) -> Iterator[None]:
    """`equal_attention`, and on a GPU nothing that is compiled already."""
    with equal_attention(device), fresh_cache() if device.type == "cuda" else nullcontext():
        yield


# ---- time ----------------------------------------------------------------------------------------


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


def median_ms_in_turns(
    contenders: Mapping[str, Callable[[], object]],
    steps: int,
    rounds: int,
    device: torch.device,
) -> dict[str, float]:
    """Median over rounds in which each contender has its turn: clocks drift for all alike."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, step in contenders.items():
            step()  # the one before has cooled or warmed the chip, and filled its cache
            times[name].append(median_ms(step, steps, device))
    return {name: statistics.median(values) for name, values in times.items()}


def host_ms(step: Callable[[], object], device: torch.device, steps: int = 10) -> float:
    """Median time that the host takes for ``step`` while the device has nothing else to do."""
    times = []
    for _ in range(steps):
        synchronize(device)
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def train_of(calls: Sequence[Callable[[], object]], count: int) -> torch.cuda.CUDAGraph:
    """A CUDA graph of ``count`` calls, in turns: the host's time per launch does not count."""
    for call in calls:
        call()  # whatever is compiled at the first call must not be captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(count):
            calls[index % len(calls)]()
    return graph


def copies_beyond_cache(size: float, most: int) -> int:
    """How many data sets of ``size`` bytes must take turns so that none is found in the cache."""
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return min(most, max(2, math.ceil(2 * cache / size)))


def copy_roof(device: torch.device) -> float:
    """Bytes per second, read and written, of copying 1 GiB from device to device."""
    source, target = (torch.zeros(GIB, dtype=torch.uint8, device=device) for _ in range(2))
    return 2e3 * GIB / median_ms(lambda: target.copy_(source), 20, device)


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
    ("fused casts", r"^fp8_"),  # with the norms, activations and sums of their regions
    ("GEMM", r"^_scaled_mm_kernel|^triton_tem_fused.*mm"),
    ("other", r"^triton_|^_update_scales"),  # norms, activations, residuals and RoPE, by Inductor
    ("attention", r"flash|fmha|cudnn|sdpa|attention|attn"),
    ("GEMM", r"gemm|nvjet|xmma|cublas|splitk"),
    ("casts and transposes", r"(?<!Without)cast|transpose|amax|fp8|float8"),
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
    names = ("GEMM", "attention", "fused casts", "casts and transposes", "other", UNKNOWN)
    sums = {name: KernelTime() for name in names}
    for name, kernel in kernels.items():
        sums[category_of(name)].add(kernel.ms, kernel.launches)
    return sums


def print_categories(
    kernels: Mapping[str, dict[str, KernelTime]], step_ms: Mapping[str, float]
) -> None:
    """Where a step's time goes, by contender; those without kernels are left out.

    Left over are gaps between kernels, and what the clock is lower by in the timed steps, which
    follow each other for longer than those that kernels are timed in.
    """
    tables = {name: by_category(times) for name, times in kernels.items() if times}
    if not tables:
        return
    print("\nms per step by category (launches per step)")
    print(f"{'':<22}" + "".join(f"{name:>20}" for name in tables))
    for category in next(iter(tables.values())):
        found = [table[category] for table in tables.values()]
        cells = [f"{time.ms:.2f} ({time.launches:.0f})" for time in found]
        print(f"{category:<22}" + "".join(f"{cell:>20}" for cell in cells))
    left = [step_ms[name] - sum(k.ms for k in kernels[name].values()) for name in tables]
    print(f"{'left over':<22}" + "".join(f"{ms:>20.2f}" for ms in left))
    for name in tables:
        for category in ("casts and transposes", "other", UNKNOWN):
            print_largest(name, kernels[name], category)


def print_largest(name: str, kernels: dict[str, KernelTime], category: str, count: int = 6) -> None:
    found = [
        (time.ms, time.launches, kernel)
        for kernel, time in kernels.items()
        if category_of(kernel) == category
    ]
    if found:
        print(f"\n{name}, {category}: the largest of {len(found)} kernels")
    for ms, launches, kernel in sorted(found, reverse=True)[:count]:
        print(f"  {ms:>8.3f} ms  {launches:>5.0f} launches  {kernel[:80]}")


# ---- numerics ------------------------------------------------------------------------------------
def sqnr_db(reference: Tensor, actual: Tensor) -> float:
    """Signal to quantization noise ratio, in decibels."""
    reference, actual = reference.float(), actual.float()
    return 20 * torch.log10(reference.norm() / (reference - actual).norm()).item()


# ---- records -------------------------------------------------------------------------------------
WHERE = ["date", "device", "torch", "triton", "fp8compile", "job"]
WHAT = ["who", "what", "value", "unit"]


def append_csv(
    path: Path, device: torch.device, job: str, rows: Iterable[tuple[str, str, float, str]]
) -> None:
    """Append one row per number, so that rows of all kinds and of later versions fit one file."""
    where = (
        datetime.date.today().isoformat(),
        device_name(device),
        torch.__version__,
        triton.__version__,
        fp8compile.__version__,
        job,
    )
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(WHERE + WHAT)
        writer.writerows(
            (*where, who, what, f"{value:.4g}", unit) for who, what, value, unit in rows
        )
