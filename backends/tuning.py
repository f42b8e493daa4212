"""Choose what multiplies a GEMM shape fastest: cuBLASLt or one of our tile configurations.

Each shape is timed once per device and remembered in a file beside Inductor's own caches.
"""

from __future__ import annotations

import functools
import logging
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor

from ..formats import Format
from ..internals import cache_folder, outside_tracing
from ..progress import progress
from .json_file import add_entry, read_entries
from .kernels.scaled_mm import TileConfig, candidates, scaled_mm
from .kernels.scaled_mm_few_rows import (
    FEW_ROWS,
    FewRowsConfig,
    few_rows_config_for,
    scaled_mm_few_rows,
)

log = logging.getLogger(__name__)

CUBLASLT = "cublaslt"
# Of our own, best guesses first; each costs seconds to compile. Where cuBLASLt can do the job, too,
# the best guess alone is worth them.
_TIMED_CONFIGS, _TIMED_CONFIGS_ALONE = 1, 3
_WARMUP, _ROUNDS, _BATCH_US = 5, 7, 2000
_MOST_COPIES = 256  # of matrices below 0.4 MB, whose launches take longer than reading them
_NOISE = 0.01
_SAMPLE = 2**20  # random numbers, which operands repeat

Choice = TileConfig | FewRowsConfig | None  # None stands for cuBLASLt


@dataclass(frozen=True)
class GemmShape:
    """What a choice depends on. ``m``, ``n``, ``k``: hints where they are symbolic; ``aligned``:
    whether n is known to be a multiple of 16; ``grows``: whether few rows may become many.
    """

    m: int
    n: int
    k: int
    left: torch.dtype
    right: torch.dtype
    out: torch.dtype
    bias: torch.dtype | None
    fast_accum: bool
    aligned: bool = True
    grows: bool = False

    @property
    def has_few_rows(self) -> bool:
        return self.m <= FEW_ROWS and not self.grows

    def __str__(self) -> str:
        def short(dtype: torch.dtype | None) -> str:
            return str(dtype).removeprefix("torch.")

        formats = f"{Format.of(self.left)}x{Format.of(self.right)}"
        accum = "fast" if self.fast_accum else "precise"
        types = f"{formats} {short(self.out)} bias={short(self.bias)}"
        rows = ("" if self.aligned else " unaligned") + (" grows" if self.grows else "")
        return f"{self.m}x{self.n}x{self.k} {types} {accum}{rows}"


def cublaslt_supports(shape: GemmShape) -> bool:
    """cuBLASLt wants N to be a multiple of 16, and adds a bias only in the output's dtype, and
    none to a float32 output.
    """
    adds = shape.bias is None or (shape.bias == shape.out and shape.out != torch.float32)
    return shape.aligned and adds


@functools.cache
def choose_gemm(shape: GemmShape, device_index: int) -> Choice:
    """What is fastest for a shape; the best guess, if the GPU has no memory left to find out."""
    file = _cache_file(device_index)
    remembered = read_entries(file).get(str(shape), "never timed")
    for choice in choices(shape):  # what would not be timed today is not taken from a file
        if _entry(choice) == remembered:
            return choice
    try:
        with outside_tracing(), torch.no_grad():
            times = time_choices(shape, torch.device("cuda", device_index))
    except torch.OutOfMemoryError:
        guess = choices(shape)[0]
        log.warning("no memory left to time %s; taking %s", shape, guess or CUBLASLT)
        return guess
    # Within the noise cuBLASLt is preferred: its launch is cheaper.
    best = min(times, key=lambda c: times[c] * (1.0 if c is None else 1 + _NOISE))
    log.debug("%s: %s", shape, {str(c or CUBLASLT): f"{t:.1f} us" for c, t in times.items()})
    add_entry(file, str(shape), _entry(best))
    return best


def choices(shape: GemmShape) -> list[Choice]:
    """What is worth timing for a shape; None stands for cuBLASLt."""
    m, n, k, aligned = shape.m, shape.n, shape.k, shape.aligned
    cublaslt = [None] if cublaslt_supports(shape) else []
    if shape.has_few_rows:
        return [*cublaslt, few_rows_config_for(m, n, fast_accum=shape.fast_accum)]
    configs = candidates(m, n, k, fast_accum=shape.fast_accum, aligned=aligned)
    return [*cublaslt, *configs[: _TIMED_CONFIGS if cublaslt else _TIMED_CONFIGS_ALONE]]


def _entry(choice: Choice) -> dict[str, int | bool] | None:
    """A choice as it is written to the file."""
    return None if choice is None else asdict(choice)


def time_choices(shape: GemmShape, device: torch.device) -> dict[Choice, float]:
    """Microseconds of every choice on fresh random data."""
    a = _operand(shape.m, shape.k, shape.left, device)
    one = torch.ones(1, dtype=torch.float32, device=device)
    bias = None if shape.bias is None else torch.randn(shape.n, device=device).to(shape.bias)
    rights = [
        _operand(shape.n, shape.k, shape.right, device) for _ in range(_copies(shape, device))
    ]

    def multiply(choice: Choice, b: Tensor) -> None:
        operands, out, fast = (a, b, one, one, bias), shape.out, shape.fast_accum
        if choice is None:
            torch._scaled_mm(a, b.t(), one, one, bias, out_dtype=out, use_fast_accum=fast)
        elif isinstance(choice, FewRowsConfig):
            scaled_mm_few_rows(*operands, out_dtype=out, config=choice, fast_accum=fast)
        else:
            aligned = shape.aligned
            scaled_mm(*operands, out_dtype=out, config=choice, fast_accum=fast, aligned=aligned)

    def run(choice: Choice) -> None:
        for b in rights:
            multiply(choice, b)

    runs = {choice: functools.partial(run, choice) for choice in choices(shape)}
    times = _fastest(runs, f"autotuning {shape}", as_graph=shape.has_few_rows)
    return {choice: time / len(rights) for choice, time in times.items()}


def _operand(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal random numbers in FP8, in the memory that they take: a backward is compiled while
    activations fill the GPU, and a head's gradient in float32 would take gigabytes.
    """
    size = rows * columns
    sample = torch.randn(min(size, _SAMPLE), device=device).to(dtype).view(torch.uint8)
    repeated = sample.repeat(triton.cdiv(size, len(sample)))[:size]
    return repeated.view(dtype).view(rows, columns)


def _copies(shape: GemmShape, device: torch.device) -> int:
    """How many matrices to multiply few rows with in turns, so that none is in L2 any more when it
    comes again: like weights, when a model decodes. A head of one output would take a million.
    """
    if not shape.has_few_rows:
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(_MOST_COPIES, triton.cdiv(2 * cache, shape.n * shape.k))


def _fastest(
    runs: Mapping[Choice, Callable[[], None]], what: str, *, as_graph: bool
) -> dict[Choice, float]:
    """Microseconds per run of every choice, measured in turns so that clocks drift for all.

    ``as_graph``: replayed, for what takes longer to launch than to run.
    """
    timed, batches = {}, {}
    for choice, run in progress(runs.items(), what):  # their compiling takes the time
        run()
        timed[choice] = _captured(run) if as_graph else run
        estimate = _microseconds(timed[choice], _WARMUP)
        batches[choice] = max(1, int(_BATCH_US / estimate))
    times: dict[Choice, list[float]] = {choice: [] for choice in runs}
    for _ in range(_ROUNDS):
        for choice, run in timed.items():
            times[choice].append(_microseconds(run, batches[choice]))
    return {choice: statistics.median(values) for choice, values in times.items()}


def _captured(run: Callable[[], None]) -> Callable[[], None]:
    """The launches of a run as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph.replay


def _microseconds(run: Callable[[], None], launches: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(launches):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / launches


# --- the file -----------------------------------------------------------------------------------


def _cache_file(device_index: int) -> Path:
    name = torch.cuda.get_device_name(device_index).replace(" ", "_")
    versions = f"torch{torch.__version__}_triton{triton.__version__}"
    return cache_folder() / f"gemm_{name}_{versions}.json"
