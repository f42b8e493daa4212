"""Time Llama layers without gradients, prefill and decode: bf16, FP8, torchao, in one run.

    python examples/bench/inference.py                    # 4 Llama-3-8B layers, on an H100 or H200
    python examples/bench/inference.py --tiny --device cpu

Decode takes one token of each of a batch, without a KV cache, and with CUDA graphs: what is left is
the time to read the weights. "host" is the time to launch a call: where that is not well below the
call's, the host is what was measured.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from llama_layers import LlamaLayers, LlamaShape, rope_tables
from timing import (
    allocated,
    append_csv,
    device_name,
    equal_conditions,
    load_compiler,
    median_ms,
    seconds,
    sqnr_db,
    versions,
)
from torch import Tensor, nn

import fp8compile
from fp8compile.progress import progress

WARMUP_SECONDS = 1.0  # clocks have fallen while it was compiled, and a call may take half a ms
PATIENCE_SECONDS = 15.0
Forward = Callable[..., Tensor]


@dataclass(frozen=True)
class Job:
    """One call: ``batch`` sequences of ``tokens``."""

    batch: int
    tokens: int
    cuda_graphs: bool = False

    def __str__(self) -> str:
        kind = "decode" if self.cuda_graphs else "prefill"
        return f"{kind} {self.batch} x {self.tokens}"


PREFILL = Job(1, 8192)
DECODE = tuple(Job(batch, 1, cuda_graphs=True) for batch in (1, 16, 64))


# ---- the contenders ------------------------------------------------------------------------------
def bf16(model: nn.Module, cuda_graphs: bool) -> Forward:
    return torch.compile(model, mode="reduce-overhead" if cuda_graphs else None)


def fp8(model: nn.Module, cuda_graphs: bool, **options: object) -> Forward:
    inductor = torch._inductor.list_mode_options("reduce-overhead") if cuda_graphs else {}
    return torch.compile(model, backend="fp8", options={**options, "inductor": inductor})


def frozen(model: nn.Module, cuda_graphs: bool, **options: object) -> Forward:
    fp8compile.freeze(model, "rowwise")
    return fp8(model, cuda_graphs, recipe="rowwise", **options)


def torchao(model: nn.Module, cuda_graphs: bool) -> Forward:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    return bf16(model, cuda_graphs)


CONTENDERS: dict[str, Callable[[nn.Module, bool], Forward]] = {
    "bf16": bf16,
    "fp8-rowwise": partial(fp8, recipe="rowwise"),
    "fp8-current": partial(fp8, recipe="current"),
    "fp8-frozen": frozen,
    "fp8-frozen-attention": partial(frozen, attention="fp8"),  # needs nvidia-cudnn-frontend
    "torchao-rowwise": torchao,
}


# ---- measuring -----------------------------------------------------------------------------------
@dataclass
class Result:
    """Of a contender and a job. ``ms``: per call; ``host_ms``: to launch it; ``memory``: bytes
    alive between calls; ``parameters``: those of the parameters, and of scales beside them.
    """

    name: str
    job: Job
    ms: float
    host_ms: float
    memory: int
    parameters: int
    compile_s: float
    output: Tensor


def time_calls(
    call: Callable[[], object], job: Job, steps: int, device: torch.device
) -> tuple[float, float]:
    """Median times in ms, of a call and of the host in it.

    Where a decode waits for the host, it is measured again, for `PATIENCE_SECONDS` at most, and the
    fastest round counts: a host that others share takes two or three times as long for seconds. (In
    a prefill the host waits for the GPU, whose queue of kernels is full.)
    """
    launches: list[float] = []

    def timed_call() -> None:
        before = time.perf_counter()
        call()
        launches.append(1e3 * (time.perf_counter() - before))

    def time_round() -> tuple[float, float]:
        launches.clear()
        return median_ms(timed_call, steps, device), statistics.median(launches)

    ms, host_ms = time_round()
    end = time.perf_counter() + PATIENCE_SECONDS
    while job.cuda_graphs and host_ms > 0.7 * ms and time.perf_counter() < end:
        ms, host_ms = min((ms, host_ms), time_round())
    return ms, host_ms


def measure(
    name: str, job: Job, shape: LlamaShape, layers: int, steps: int, device: torch.device
) -> Result:
    torch.manual_seed(0)
    before = allocated(device)
    with torch.device(device):
        model = LlamaLayers(shape, layers).bfloat16().eval().requires_grad_(False)
        x = torch.randn(job.batch, job.tokens, shape.hidden, dtype=torch.bfloat16)
    cos, sin = rope_tables(job.tokens, shape.head_dim, next(model.parameters()))
    forward = CONTENDERS[name](model, job.cuda_graphs)
    with torch.no_grad():
        compile_s = seconds(lambda: forward(x, cos, sin), device)
        start = time.perf_counter()
        output = forward(x, cos, sin).clone()
        while device.type == "cuda" and time.perf_counter() - start < WARMUP_SECONDS:
            seconds(lambda: forward(x, cos, sin), device)
        memory = allocated(device) - before
        ms, host_ms = time_calls(lambda: forward(x, cos, sin), job, steps, device)
    parameters = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    return Result(name, job, ms, host_ms, memory, parameters, compile_s, output.cpu())


def measure_all(
    names: list[str],
    jobs: list[Job],
    shape: LlamaShape,
    layers: int,
    steps: int,
    device: torch.device,
    found: Callable[[Result], None],
) -> list[Result]:
    """Each contender with each job alone; one that fails is reported and left out. ``found`` is
    told of each result as soon as it is there.
    """
    load_compiler(device)
    results: list[Result] = []
    settings = torch._inductor.config.save_config()  # torchao changes them for all that follow
    for job, name in progress(list(itertools.product(jobs, names)), "jobs of contenders"):
        with equal_conditions(device):
            try:
                results.append(measure(name, job, shape, layers, steps, device))
                print_result(results[-1], results)
                found(results[-1])
            except ImportError as error:
                print(f"{job}, {name} is left out: {error}")
            except Exception:
                print(f"{job}, {name} failed:\n{traceback.format_exc()}")
        torch._inductor.config.load_config(settings)
        torch.compiler.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return results


def print_result(r: Result, results: list[Result]) -> None:
    reference = next((o for o in results if o.job == r.job and o.name == "bf16"), None)
    line = f"{r.job!s:<16} {r.name:<20} {r.ms:>8.3f} ms, host {r.host_ms:>6.3f}"
    line += f" {r.memory / 2**20:>7.0f} MiB"
    line += f", parameters {r.parameters / 2**20:.4g} MiB, {r.compile_s:>6.1f} s to compile"
    if reference is not None and reference is not r:
        db = sqnr_db(reference.output, r.output)
        line += f" {reference.ms / r.ms:>6.2f}x {db:>6.1f} dB"
    print(line, flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time Llama layers without gradients.")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=4096, help="hidden size; the rest follows")
    parser.add_argument("--steps", type=int, default=50, help="calls whose median time is taken")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--csv", type=Path, help="append the numbers to this file")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="one layer 64 wide, 64 tokens")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    shape = LlamaShape.of_width(64 if args.tiny else args.width)
    layers, steps = (1, 2) if args.tiny else (args.layers, args.steps)
    jobs = [Job(1, 64), Job(2, 1, device.type == "cuda")] if args.tiny else [PREFILL, *DECODE]
    print(f"{device_name(device)}, {versions()}\n{layers} layers, {shape}")

    def save(r: Result) -> None:
        if args.csv:
            rows = [(r.name, "call", r.ms, "ms"), (r.name, "host", r.host_ms, "ms")]
            rows.append((r.name, "memory", r.memory / 2**20, "MiB"))
            rows.append((r.name, "parameters", r.parameters / 2**20, "MiB"))
            append_csv(args.csv, device, f"{layers} layers, {shape}, {r.job}", rows)

    measure_all(args.contenders, jobs, shape, layers, steps, device, save)
    if device.type == "cpu":
        print("These times mean nothing: on a CPU, FP8 is emulated. Memory is not counted.")


if __name__ == "__main__":
    main()
