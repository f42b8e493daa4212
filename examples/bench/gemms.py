"""Time the GEMMs of Llama layers alone: this repository's FP8 kernels against cuBLASLt.

    python examples/bench/gemms.py      # the GEMMs of a Llama-3-8B layer: 2 x 8192 tokens, and few
    python examples/bench/gemms.py --sustained   # every choice, each for a second

`training_step.py` prints the first table for the layers that it measures. Every GEMM computes
`a[m, k] @ b[n, k].T` in FP8 with one scale per operand, fast accumulation and a bf16 output. Those
of few rows, as in decoding, are timed as the compiler does it, with weights that are not in L2.

The compiler chooses by milliseconds. In a training step the GPU is at its power limit, where what
needs less energy is faster: `--sustained` shows what would be chosen there.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton
from llama_layers import LlamaShape
from timing import median_gap_ms
from torch import Tensor

from fp8compile.backends.kernels.scaled_mm import TileConfig, candidates
from fp8compile.backends.tuning import (
    CUBLASLT,
    Choice,
    GemmShape,
    choose_gemm,
    multiply,
    offered_choices,
    time_choices,
)
from fp8compile.progress import progress

SETS = 3  # of operands, which take turns: no call finds its own in the L2 cache
ROUNDS = 3
SUSTAINED_MS = 500.0  # per choice, twice: until the clock has settled, and timed
FEW_ROWS = (1, 16, 32, 64, 128)
# Rows and columns: of Llama-3-8B's layers, merged, and of its head; of smaller models; one of many
# rows and one of long ones.
WEIGHTS = (
    *((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)),
    *((2304, 768), (768, 3072), (1024, 4096), (3072, 3072), (57344, 8192), (8192, 28672)),
)


@dataclass(frozen=True)
class GemmCase:
    """One GEMM of a layer; `names` lists the projections that share its shape."""

    names: str
    role: str
    m: int
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.names} {self.role} {self.m}x{self.n}x{self.k}"

    @property
    def formats(self) -> tuple[torch.dtype, torch.dtype]:
        """Of a and b: gradients are E5M2, inputs and weights E4M3."""
        a = torch.float8_e4m3fn if self.role == "fprop" else torch.float8_e5m2
        return a, torch.float8_e4m3fn

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k


def gemm_cases(shape: LlamaShape, tokens: int) -> list[GemmCase]:
    """The distinct GEMMs of a layer's forward and backward, for `tokens` rows of input."""
    linears = {  # names: (in, out)
        "q, o": (shape.hidden, shape.hidden),
        "k, v": (shape.hidden, shape.kv_heads * shape.head_dim),
        "gate, up": (shape.hidden, shape.ff),
        "down": (shape.ff, shape.hidden),
    }
    cases = []
    for names, (n_in, n_out) in linears.items():
        cases += [
            GemmCase(names, "fprop", tokens, n_out, n_in),  # x @ w.T
            GemmCase(names, "dgrad", tokens, n_in, n_out),  # g @ w
            GemmCase(names, "wgrad", n_out, n_in, tokens),  # g.T @ x
        ]
    return cases


@dataclass(frozen=True)
class GemmResult:
    """TFLOP/s of every choice that was timed to the end, and which of them the compiler takes."""

    case: GemmCase
    speed: dict[Choice, float]
    chosen: Choice

    @property
    def best_kernel(self) -> Choice:
        kernels = [choice for choice in self.speed if isinstance(choice, TileConfig)]
        return max(kernels, key=lambda kernel: self.speed[kernel])

    @property
    def tflops(self) -> dict[str, float]:
        return {
            "cublaslt": self.speed[None],
            "kernel": self.speed[self.best_kernel],
            "chosen": self.speed[self.chosen],
        }


def measure_gemms(cases: list[GemmCase]) -> list[GemmResult]:
    return [measure_gemm(case) for case in progress(cases, "timing GEMMs")]


def measure_gemm(case: GemmCase) -> GemmResult:
    """Find our fastest kernel, then time it, cuBLASLt and the compiler's choice in turns."""
    operands = [random_operands(case) for _ in range(SETS)]

    def milliseconds(choice: Choice, repeats: int) -> float:
        return median_ms([call(case, choice, *pair) for pair in operands], repeats)

    quick = {config: milliseconds(config, 9) for config in fitting(case, operands[0])}
    finalists: set[Choice] = {None, compilers_choice(case), min(quick, key=lambda c: quick[c])}
    times: dict[Choice, list[float]] = {choice: [] for choice in finalists}
    for _ in range(ROUNDS):  # in turns: clocks drop as the chip warms up
        for choice in finalists:
            times[choice].append(milliseconds(choice, 21))
    speed = {choice: case.flops / statistics.median(ms) / 1e9 for choice, ms in times.items()}
    return GemmResult(case, speed, compilers_choice(case))


def random_operands(case: GemmCase) -> tuple[Tensor, Tensor]:
    """Random, because the power that a GEMM draws, and with it the clock, depends on the data."""
    a_format, b_format = case.formats
    a = torch.randn(case.m, case.k, device="cuda").to(a_format)
    b = torch.randn(case.n, case.k, device="cuda").to(b_format)
    return a, b


def call(case: GemmCase, choice: Choice, a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    """The multiplication as a function without arguments."""
    shape, one = gemm_shape(case), torch.ones(1, device=a.device)
    return lambda: multiply(choice, shape, a, b, one, one)


def fitting(case: GemmCase, operands: tuple[Tensor, Tensor]) -> list[TileConfig]:
    """The kernel's configurations that this GPU has the shared memory for."""
    configs = []
    for config in candidates(case.m, case.n, case.k):
        try:
            call(case, config, *operands)()
        except triton.runtime.errors.OutOfResources:
            continue
        configs.append(config)
    return configs


def compilers_choice(case: GemmCase) -> Choice:
    """What `torch.compile(backend="fp8")` launches for this GEMM."""
    return choose_gemm(gemm_shape(case), torch.cuda.current_device())


def gemm_shape(case: GemmCase) -> GemmShape:
    a_format, b_format = case.formats
    return GemmShape(
        case.m, case.n, case.k, a_format, b_format, torch.bfloat16, bias=None, fast_accum=True
    )


def median_ms(calls: Sequence[Callable[[], object]], repeats: int) -> float:
    """Median time of a call, between CUDA events; the calls take turns.

    All launches queue up behind a pause, so that the time it takes the host to launch a short
    kernel does not count.
    """
    for each in calls:
        each()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda._sleep(20_000_000)  # clock cycles: about 10 ms
    events[0].record()
    for index, event in enumerate(events[1:]):
        calls[index % len(calls)]()
        event.record()
    return median_gap_ms(events)


def print_gemms(results: list[GemmResult]) -> None:
    print("\nTFLOP/s per GEMM (cuBLASLt: its first algorithm; chosen: what the compiler launches)")
    print(
        f"{'':<10}{'role':<7}{'m':>7}{'n':>7}{'k':>7}{'cuBLASLt':>10}{'our kernel':>12}"
        f"{'chosen':>8}{'ratio':>7}  what was chosen"
    )
    for r in results:
        case, speed = r.case, r.tflops
        print(
            f"{case.names:<10}{case.role:<7}{case.m:>7}{case.n:>7}{case.k:>7}"
            f"{speed['cublaslt']:>10.0f}{speed['kernel']:>12.0f}{speed['chosen']:>8.0f}"
            f"{speed['chosen'] / speed['cublaslt']:>6.2f}x  {r.chosen or CUBLASLT}"
        )
    ratios = [r.tflops["chosen"] / r.tflops["cublaslt"] for r in results]
    print(f"geometric mean {statistics.geometric_mean(ratios):.3f}x, minimum {min(ratios):.2f}x")


def print_few_rows() -> None:
    """Time cuBLASLt and the kernel for few rows, and print each as it comes."""
    print("\nMicroseconds per GEMM of few rows")
    print(f"{'m':>4}{'n':>8}{'k':>7}{'cuBLASLt':>10}{'our kernel':>12}{'ratio':>7}{'TB/s':>7}")
    ratios = []
    for m, (n, k) in itertools.product(FEW_ROWS, WEIGHTS):
        shape = gemm_shape(GemmCase("", "fprop", m, n, k))
        times = time_choices(shape, torch.device("cuda"))
        (config,) = set(times) - {None}
        cublaslt, kernel = times[None], times[config]
        ratios.append(cublaslt / kernel)
        print(
            f"{m:>4}{n:>8}{k:>7}{cublaslt:>10.1f}{kernel:>12.1f}{ratios[-1]:>6.2f}x"
            f"{n * k / kernel / 1e6:>7.2f}  {config}",
            flush=True,
        )
    print(f"geometric mean {statistics.geometric_mean(ratios):.3f}x, minimum {min(ratios):.2f}x")


def sustained_ms(calls: Sequence[Callable[[], object]]) -> float:
    """Of a call, when calls have followed each other for long enough to settle the clock."""
    repeats = max(1, round(SUSTAINED_MS / median_ms(calls, 9)))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    for event in events[:2]:
        event.record()
        for index in range(repeats):
            calls[index % len(calls)]()
    events[2].record()
    torch.cuda.synchronize()
    return events[1].elapsed_time(events[2]) / repeats


def print_sustained(cases: list[GemmCase]) -> None:
    """Time every choice of each GEMM at the power limit, and print each GEMM as it comes."""
    print("\nTFLOP/s per GEMM, sustained")
    print(f"{'':<10}{'role':<7}{'chosen':>8}{'best':>8}{'ratio':>7}  chosen, best, and all")
    ratios = []
    for case in cases:
        operands = [random_operands(case) for _ in range(SETS)]
        shape = gemm_shape(case)
        chosen = compilers_choice(case)
        speed = {
            choice: case.flops / 1e9 / sustained_ms([call(case, choice, *x) for x in operands])
            for choice in offered_choices(shape, torch.cuda.current_device())
        }
        best = max(speed, key=lambda choice: speed[choice])
        ratios.append(speed[best] / speed[chosen])
        print(
            f"{case.names:<10}{case.role:<7}{speed[chosen]:>8.0f}{speed[best]:>8.0f}"
            f"{ratios[-1]:>6.2f}x  {chosen or CUBLASLT}, {best or CUBLASLT}; "
            + ", ".join(f"{choice or CUBLASLT} {tflops:.0f}" for choice, tflops in speed.items()),
            flush=True,
        )
    print(f"geometric mean {statistics.geometric_mean(ratios):.3f}x, maximum {max(ratios):.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sustained", action="store_true", help="at the power limit")
    args = parser.parse_args()
    cases = gemm_cases(LlamaShape.of_width(4096), tokens=2 * 8192)
    if args.sustained:
        print_sustained(cases)
    else:
        print_gemms(measure_gemms(cases))
        print_few_rows()


if __name__ == "__main__":
    main()
