"""Time steps of a model on a GPU, and say which kernels and GEMMs the time went into."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ..backends import why_not_triton
from ..backends.cublaslt import sizes_of
from ..errors import OptionError, own_errors
from ..options import parse_options
from ..progress import progress
from ..report import KernelRow, Measured, Row
from ..states import states_left_as_they_were
from ..untouched import fresh, left_as_it_was

HIGH, FP8 = "its own precision", "FP8"
_WARMUP, _ROUNDS, _STEPS, _PROFILED = 3, 5, 10, 3
_OWN_GEMM = "_scaled_mm"  # what the names of our GEMM kernels begin with
_SCALED_MM = "aten::_scaled_mm"

GemmSize = tuple[int, int, int]


@dataclass(frozen=True)
class StepTimes:
    """``measured``, and microseconds per FP8 step: of kernels by name, and of cuBLASLt
    calls by M, N and K.
    """

    measured: Measured
    kernels: Mapping[str, float]
    gemms: Mapping[tuple[Any, ...], float]


def time_step(
    target: Callable[..., Any],
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: Mapping[str, Any] | None,
) -> Measured:
    """Compile a model in its own precision and in FP8, and run both in turns.

    A step is a forward and, where an output has a gradient, a backward. The model, its scaling
    state and the random number generators are left as they were.
    Raises OptionError where there is no GPU that has FP8.
    """
    return _timed(target, inputs, kwargs, options)[0]


def measure_step(
    target: Callable[..., Any],
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: Mapping[str, Any] | None,
) -> StepTimes:
    """Like ``time_step``, and profile the steps in FP8."""
    return StepTimes(*_timed(target, inputs, kwargs, options, profiled=True))


def _timed(
    target: Callable[..., Any],
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: Mapping[str, Any] | None,
    profiled: bool = False,
) -> tuple[Measured, dict[str, float], dict[GemmSize, float]]:
    parse_options(options)  # what is wrong with them is said first
    device = _device(target, (inputs, kwargs))
    with own_errors(), left_as_it_was(target), states_left_as_they_were():
        steps = _steps(target, inputs, kwargs, options)
        ms = _medians(steps, device)
        found = _profiled(steps[FP8], device) if profiled else ({}, {})
    return Measured(torch.cuda.get_device_name(device), ms[HIGH], ms[FP8]), *found


def _device(target: Any, inputs: Any) -> torch.device:
    parameters = target.parameters() if isinstance(target, nn.Module) else ()
    tensors = [*parameters, *(x for x in _leaves(inputs) if isinstance(x, Tensor))]
    device = next((x.device for x in tensors), torch.device("cpu"))
    missing = why_not_triton(device)
    if missing is not None:
        raise OptionError(
            f"FP8 is emulated here, and its time says nothing: to measure takes {missing}. Move "
            "the model and its inputs to such a GPU, or do not measure"
        )
    return device


def _leaves(tree: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(tree)


# --- running ------------------------------------------------------------------------------------


def _steps(
    target: Callable[..., Any],
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: Mapping[str, Any] | None,
) -> dict[str, Callable[[], None]]:
    """A step in either precision, compiled at its first call."""
    inductor = dict(parse_options(options).inductor)
    compiled = {
        HIGH: torch.compile(fresh(target), options=inductor or None),
        FP8: torch.compile(fresh(target), backend="fp8", options=dict(options or {})),
    }
    owned = list(target.parameters()) if isinstance(target, nn.Module) else []
    tensors = [x for x in (*owned, *_leaves((inputs, kwargs))) if isinstance(x, Tensor)]

    def step_of(call: Callable[..., Any]) -> Callable[[], None]:
        ones: list[Tensor] = []  # the gradients that enter, made once

        def step() -> None:
            for tensor in tensors:
                tensor.grad = None
            outputs = [x for x in _leaves(call(*inputs, **kwargs)) if isinstance(x, Tensor)]
            outputs = [output for output in outputs if output.requires_grad]
            if outputs and not ones:
                ones.extend(map(torch.ones_like, outputs))
            if outputs:
                torch.autograd.backward(outputs, ones)

        return step

    return {name: step_of(call) for name, call in compiled.items()}


def _medians(steps: Mapping[str, Callable[[], None]], device: torch.device) -> dict[str, float]:
    """Median milliseconds of each, in turns: clocks drift for all alike."""
    for step in steps.values():
        for _ in range(_WARMUP):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in progress(range(_ROUNDS), "timing steps"):
        for name, step in steps.items():
            step()  # the one before has cooled or warmed the chip, and filled its cache
            times[name] += _gaps_ms(step, device)
    return {name: statistics.median(values) for name, values in times.items()}


def _gaps_ms(step: Callable[[], None], device: torch.device) -> list[float]:
    """Milliseconds from each call to the next on the device; the host may run ahead."""
    stream = torch.cuda.current_stream(device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(_STEPS + 1)]
    events[0].record(stream)
    for event in events[1:]:
        step()
        event.record(stream)
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in pairwise(events)]


def _profiled(
    step: Callable[[], None], device: torch.device
) -> tuple[dict[str, float], dict[GemmSize, float]]:
    """Microseconds per step of kernels by name, and of cuBLASLt's FP8 GEMMs by size."""
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(_PROFILED):
            step()
        torch.cuda.synchronize(device)
    kernels: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            kernels[event.key] += event.self_device_time_total / _PROFILED
    gemms: dict[GemmSize, float] = defaultdict(float)
    for event in profiler.key_averages(group_by_input_shape=True):
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        size = sizes_of(event.key)
        if event.key == _SCALED_MM:
            (m, k), (_, n) = event.input_shapes[:2]
            size = m, n, k
        if size is not None:
            gemms[size] += event.device_time_total / _PROFILED
    return dict(kernels), dict(gemms)


# --- attributing --------------------------------------------------------------------------------


def with_kernel_times(kernels: Sequence[KernelRow], times: StepTimes) -> tuple[KernelRow, ...]:
    """The rows with the microseconds of a launch.

    A profile knows names only. Kernels of one name share its time by the megabytes that they move,
    which is what they wait for.
    """
    total = {name: 0.0 for kernel in kernels for name in kernel.functions}
    for name, us in times.kernels.items():
        own = re.sub(r"_\d+$", "", name)  # Inductor numbers them
        if own in total:
            total[own] += us
    weights = _sums((name, _weight(kernel)) for kernel in kernels for name in kernel.functions)

    def us_of(kernel: KernelRow) -> float | None:
        named = [name for name in kernel.functions if total[name] and weights[name]]
        shares = (total[name] * _weight(kernel) / weights[name] for name in named)
        return sum(shares) / kernel.launches if named else None

    return tuple(replace(kernel, measured_us=us_of(kernel)) for kernel in kernels)


def _weight(kernel: KernelRow) -> float:
    return kernel.per_step * (kernel.megabytes or 0.0)


def with_gemm_times(rows: Sequence[Row], times: StepTimes) -> tuple[Row, ...]:
    """The rows of FP8 GEMMs with their microseconds.

    Those of cuBLASLt are told apart by their sizes; all that one of our kernels multiplies share
    its time by their FLOPs.
    """
    own = sum(us for name, us in times.kernels.items() if name.startswith(_OWN_GEMM))
    fp8 = [row for row in rows if row.is_fp8]
    flops = sum(row.gflops for row in fp8 if _is_own(row) and isinstance(row.gflops, float))
    alike = _sums(((row.m, row.n, row.k), 1.0) for row in fp8 if not _is_own(row))

    def us_of(row: Row) -> float | None:
        if not row.is_fp8 or not isinstance(row.gflops, float):
            return None
        if _is_own(row):
            return own * row.gflops / flops if own and flops else None
        size = row.m, row.n, row.k
        return times.gemms[size] / alike[size] if size in times.gemms else None

    return tuple(replace(row, measured_us=us_of(row)) for row in rows)


def _is_own(row: Row) -> bool:
    return row.kernel.startswith("triton")


def _sums(pairs: Iterable[tuple[Any, float]]) -> dict[Any, float]:
    found: dict[Any, float] = defaultdict(float)
    for key, value in pairs:
        found[key] += value
    return found
