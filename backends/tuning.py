"""Choose what multiplies a GEMM shape fastest: which algorithm of cuBLASLt, or one of our tiles.

Each shape is timed once per device and remembered in a file beside Inductor's own caches.
"""

from __future__ import annotations

import functools
import logging
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import triton
from torch import Tensor

from ..formats import Format
from ..internals import cache_folder, outside_tracing, pause
from ..progress import progress
from . import cublaslt
from .cublaslt import MOST_ALGORITHMS, SCALED_MM_CUBLASLT, CublasltError
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
_HOPELESS = 1.2  # times the fastest: what took that long in the first round is not timed again
_SAMPLE = 2**20  # random numbers, which operands repeat


@dataclass(frozen=True)
class CublasltAlgorithm:
    """One that cuBLASLt lists for a shape; the first, 0, is what ``aten._scaled_mm`` takes."""

    index: int

    def __str__(self) -> str:
        return f"{CUBLASLT} #{self.index}" if self.index else CUBLASLT


# None: aten._scaled_mm; for a sum, what is chosen for the product, and a kernel that adds.
Choice = TileConfig | FewRowsConfig | CublasltAlgorithm | None


@dataclass(frozen=True)
class GemmShape:
    """What a choice depends on. ``m``, ``n``, ``k``: hints where they are symbolic, and then not
    ``fixed``; ``aligned``: whether n is known to be a multiple of 16; ``grows``: whether few rows
    may become many; ``adds``: whether it adds a matrix to its output.
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
    fixed: bool = True
    adds: bool = False

    @property
    def has_few_rows(self) -> bool:
        return self.m <= FEW_ROWS and not self.grows

    def __str__(self) -> str:
        def short(dtype: torch.dtype | None) -> str:
            return str(dtype).removeprefix("torch.")

        formats = f"{Format.of(self.left)}x{Format.of(self.right)}"
        accum = "fast" if self.fast_accum else "precise"
        types = f"{formats} {short(self.out)} bias={short(self.bias)}"
        marks = {
            " unaligned": not self.aligned,
            " grows": self.grows,
            " symbolic": not self.fixed,
            " plus matrix": self.adds,
        }
        marked = "".join(mark for mark, applies in marks.items() if applies)
        return f"{self.m}x{self.n}x{self.k} {types} {accum}{marked}"

    @property
    def gemm(self) -> cublaslt.Gemm:
        """What cuBLASLt is told of it."""
        sizes, dtypes = (self.m, self.n, self.k), (self.left, self.right, self.out)
        return cublaslt.Gemm(*sizes, *dtypes, self.bias is not None, self.fast_accum)


def cublaslt_supports(shape: GemmShape) -> bool:
    """cuBLASLt wants N to be a multiple of 16, and adds a bias only in the output's dtype, and
    none to a float32 output.
    """
    adds = shape.bias is None or (shape.bias == shape.out and shape.out != torch.float32)
    return shape.aligned and adds


@functools.cache
def choose_gemm(shape: GemmShape, device_index: int) -> Choice:
    """What is fastest for a shape; the best guess, if the GPU has no memory left to find out."""
    offered = offered_choices(shape, device_index)
    if offered == [None]:
        return None
    file = _cache_file(device_index)
    remembered = read_entries(file).get(str(shape), "never timed")
    for choice in offered:  # from a file, no other is taken
        if _entry(choice) == remembered:
            return choice
    try:
        with outside_tracing(), torch.no_grad():
            times = time_choices(shape, torch.device("cuda", device_index))
    except torch.OutOfMemoryError:
        guess = choices(shape)[0]
        log.warning("no memory left to time %s; taking %s", shape, _name(guess, shape))
        return guess
    best = min(times, key=lambda choice: _cost(choice, times[choice]))
    log.debug("%s: %s", shape, {_name(c, shape): f"{t:.1f} us" for c, t in times.items()})
    add_entry(file, str(shape), _entry(best))
    return best


def _name(choice: Choice, shape: GemmShape) -> str:
    """A choice as logs call it."""
    return str(choice or ("apart" if shape.adds else CUBLASLT))


def _cost(choice: Choice, us: float) -> float:
    """What a choice is judged by: cuBLASLt's first is preferred within the noise."""
    return us if choice in (None, CublasltAlgorithm(0)) else us * (1 + _NOISE)


def choices(shape: GemmShape) -> list[Choice]:
    """What can multiply a shape and may be the fastest, PyTorch's operator first if it can.

    Algorithms of cuBLASLt are for known sizes: the same index is another one for others.
    """
    if shape.adds:
        return [None, *_sums(shape)]
    m, n, k, aligned = shape.m, shape.n, shape.k, shape.aligned
    found: list[Choice] = [None] if cublaslt_supports(shape) else []
    if found and shape.fixed:
        count = 1 if shape.has_few_rows else MOST_ALGORITHMS
        found += [CublasltAlgorithm(index) for index in range(count)]
    if shape.has_few_rows:
        return [*found, few_rows_config_for(m, n, fast_accum=shape.fast_accum)]
    configs = candidates(m, n, k, fast_accum=shape.fast_accum, aligned=aligned)
    return [*found, *configs[: _TIMED_CONFIGS if found else _TIMED_CONFIGS_ALONE]]


def _sums(shape: GemmShape) -> list[Choice]:
    """What can add a matrix to a shape's output: cuBLASLt, where the sizes are known."""
    if shape.has_few_rows or not shape.fixed or not cublaslt_supports(shape):
        return []
    return [CublasltAlgorithm(index) for index in range(MOST_ALGORITHMS)]


def offered_choices(shape: GemmShape, device_index: int) -> list[Choice]:
    """The choices there are on a device: cuBLASLt may list fewer algorithms. PyTorch's operator is
    not timed beside them: it is the first, and takes the host longer.
    """
    offered = choices(shape)
    if any(isinstance(choice, CublasltAlgorithm) for choice in offered):
        listed = cublaslt.listed(shape.gemm, device_index)
        offered = [c for c in offered if not isinstance(c, CublasltAlgorithm) or c.index < listed]
        offered = offered[1:] if listed and not shape.adds else offered
    return offered


def _entry(choice: Choice) -> dict[str, int | bool] | None:
    """A choice as it is written to the file."""
    return None if choice is None else asdict(choice)


def time_choices(shape: GemmShape, device: torch.device) -> dict[Choice, float]:
    """Microseconds of every choice on fresh random data.

    To add a matrix in a kernel of its own takes that kernel as long as to copy one, more or less:
    it reads the matrix besides the product, and writes the sum.
    """
    a = _operand(shape.m, shape.k, shape.left, device)
    one = torch.ones(1, dtype=torch.float32, device=device)
    bias = None if shape.bias is None else torch.randn(shape.n, device=device).to(shape.bias)
    rights = [
        _operand(shape.n, shape.k, shape.right, device) for _ in range(_copies(shape, device))
    ]
    addends = _addends(shape, device)
    sets = [(b, addend) for b in rights for addend in addends]
    product = replace(shape, adds=False)
    of_product = choose_gemm(product, device.index or 0) if shape.adds else None

    def run(choice: Choice) -> None:
        for b, addend in sets:
            if addend is not None and choice is None:
                multiply(of_product, product, a, b, one, one, bias)
                addend.clone()
            else:
                multiply(choice, shape, a, b, one, one, bias, addend)

    runs = {
        choice: functools.partial(run, choice)
        for choice in offered_choices(shape, device.index or 0)
    }
    times = _fastest(runs, f"autotuning {shape}", as_graph=shape.has_few_rows)
    return {choice: time / len(sets) for choice, time in times.items()}


def multiply(
    choice: Choice,
    shape: GemmShape,
    a: Tensor,
    b: Tensor,
    a_scale_inv: Tensor,
    b_scale_inv: Tensor,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    """``fp8::scaled_mm`` of operands of a shape, by what was chosen; what cannot add has no
    ``addend``.
    """
    operands, out, fast = (a, b, a_scale_inv, b_scale_inv, bias), shape.out, shape.fast_accum
    if choice is None:
        scales = a_scale_inv, b_scale_inv
        return torch._scaled_mm(a, b.t(), *scales, bias, out_dtype=out, use_fast_accum=fast)
    if isinstance(choice, CublasltAlgorithm):
        return SCALED_MM_CUBLASLT(*operands, addend, out, fast, choice.index)
    if isinstance(choice, FewRowsConfig):
        return scaled_mm_few_rows(*operands, out_dtype=out, config=choice, fast_accum=fast)
    aligned = shape.aligned
    return scaled_mm(*operands, out_dtype=out, config=choice, fast_accum=fast, aligned=aligned)


def _operand(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal random numbers in FP8, in the memory that they take: a backward is compiled while
    activations fill the GPU, and a head's gradient in float32 would take gigabytes.
    """
    size = rows * columns
    sample = torch.randn(min(size, _SAMPLE), device=device).to(dtype).view(torch.uint8)
    repeated = sample.repeat(triton.cdiv(size, len(sample)))[:size]
    return repeated.view(dtype).view(rows, columns)


def _addends(shape: GemmShape, device: torch.device) -> list[Tensor | None]:
    """What to add in turns, so that it is not in L2 any more when it comes again."""
    if not shape.adds:
        return [None]
    one = torch.randn(shape.m, shape.n, device=device, dtype=shape.out)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return [one, *(one.clone() for _ in range(_beyond(cache, one.nbytes) - 1))]


def _copies(shape: GemmShape, device: torch.device) -> int:
    """How many matrices to multiply few rows with in turns, so that none is in L2 any more when it
    comes again: like weights, when a model decodes. A head of one output would take a million.
    """
    if not shape.has_few_rows:
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return _beyond(cache, shape.n * shape.k)


def _beyond(cache: int, size: int) -> int:
    """How many matrices of so many bytes fill more than a cache."""
    return min(_MOST_COPIES, triton.cdiv(2 * cache, size))


def _fastest(
    runs: Mapping[Choice, Callable[[], None]], what: str, *, as_graph: bool
) -> dict[Choice, float]:
    """Microseconds per run of every choice, measured in turns so that clocks drift for all.

    ``as_graph``: replayed, for what many launches make. Others queue up behind a pause: the host
    may take longer to launch a GEMM than it runs.
    """
    measures: dict[Choice, Callable[[], float]] = {}
    for choice, run in progress(runs.items(), what):  # their compiling takes the time
        try:
            run()
        except CublasltError as error:  # what is listed need not run
            log.debug("%s: %s", choice, error)
            continue
        timed = _captured(run) if as_graph else run
        launches = max(1, int(_BATCH_US / _microseconds(timed, _WARMUP)))
        measures[choice] = functools.partial(_microseconds_queued, timed, launches)
    times = {choice: [measure()] for choice, measure in measures.items()}
    limit = _HOPELESS * min(first for (first,) in times.values())
    hopeful = [choice for choice, (first,) in times.items() if first <= limit]
    for _ in range(_ROUNDS - 1):
        for choice in hopeful:
            times[choice].append(measures[choice]())
    return {choice: statistics.median(values) for choice, values in times.items()}


def _captured(run: Callable[[], None]) -> Callable[[], None]:
    """The launches of a run as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph.replay


def _microseconds_queued(run: Callable[[], None], launches: int) -> float:
    """The GPU waits for longer than the host takes, which is no more than the batch."""
    pause(1.5 * _BATCH_US)
    return _microseconds(run, launches)


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
    versions = f"torch{torch.__version__}_triton{triton.__version__}_cublaslt{cublaslt.version()}"
    return cache_folder() / f"gemm_{name}_{versions}.json"
