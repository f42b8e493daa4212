"""Time the kernels of Llama layers in FP8 one by one, against a copy and against Inductor's code.

    python examples/bench/kernels.py                         # 2 Llama-3-8B layers, on a GPU
    python examples/bench/kernels.py --csv kernels.csv
    python examples/bench/kernels.py --device cpu --tiny     # does it run at all?

The model of training_step.py is compiled, forward and backward. Each distinct region of its
graphs, that is, what becomes one fused kernel, is then measured alone on random data: first its
results against its graph in float32, then its time. The fewest bytes are every input once and every
output once; the roof is a copy of 1 GiB in the same run. Inductor gets the same region, with its
casts written in ATen. Then come the launches per layer, as the profiler counts them, and each GEMM
of the graphs: what the compiler launches against cuBLASLt.
"""

from __future__ import annotations

import argparse
import re
import statistics
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gemms import ROUNDS, SETS, Choice, GemmCase, call, compilers_choice, random_operands
from gemms import median_ms as median_ms_of_turns
from kernel_tables import (
    COLUMNS,
    FUSED,
    KINDS,
    MOVES,
    OTHER,
    SEARCH,
    SUMS,
    WAYS,
    GemmSpeed,
    Results,
    Row,
    csv_rows,
    print_all,
)
from llama_layers import LlamaShape
from models import clear
from one_region import check, compile_with_inductor, copied, random_inputs
from rich.console import Console
from timing import (
    KernelTime,
    append_csv,
    category_of,
    copies_beyond_cache,
    copy_roof,
    device_name,
    equal_conditions,
    kernel_times,
    load_compiler,
    median_ms_in_turns,
    train_of,
    versions,
)
from torch import Tensor, fx
from torch._inductor.runtime.compile_tasks import _set_triton_ptxas_path
from training_step import Contender, Job, fp8, input_and_grad_output

from fp8compile import compile as compiler
from fp8compile.backends import TRITON
from fp8compile.backends.emit import bytes_read, bytes_written, search_apart
from fp8compile.backends.fused import emit_once, prepare, region_key
from fp8compile.backends.kernels.launch import Launch, run
from fp8compile.backends.region import Region
from fp8compile.internals import is_tangent
from fp8compile.ir import (
    SCALED_MM,
    args_of,
    gemm_info,
)
from fp8compile.passes import grow_regions, split_regions
from fp8compile.progress import progress

MIN_FOR_INDUCTOR = 10e6  # bytes; compiling takes longer than smaller regions are worth
TRAIN_BYTES = 4e9  # about a millisecond
STEPS, TURNS = 5, 3  # replays of a train in each turn


# ---- the parts of the compiled model -------------------------------------------------------------
@dataclass
class Found:
    """A distinct region, and how often forward and backward call it."""

    gm: fx.GraphModule
    calls: Counter[str] = field(default_factory=Counter)


@dataclass
class Parts:
    """The distinct regions and GEMMs of the final graphs, and how many launches they are."""

    regions: dict[str, Found] = field(default_factory=dict)
    gemms: dict[GemmCase, None] = field(default_factory=dict)  # in order
    launches: dict[str, Counter[str]] = field(default_factory=lambda: {w: Counter() for w in WAYS})

    def add(self, gm: fx.GraphModule) -> None:
        """Add those of a graph that has its regions."""
        way = WAYS[any(is_tangent(node) for node in gm.graph.nodes)]
        for node in gm.graph.nodes:
            if node.op == "call_module":
                self._add_region(gm.get_submodule(str(node.target)), way)
            elif node.target is SCALED_MM:
                self.gemms[gemm_case(node)] = None
                self.launches[way]["GEMM"] += 1

    def _add_region(self, gm: Any, way: str) -> None:
        region = Region.of(gm)
        self.regions.setdefault(region_key(region), Found(gm)).calls[way] += 1
        apart = {
            SUMS: region.sums_alone,
            SEARCH: search_apart(region),
            COLUMNS: region.completes_apart,
        }
        self.launches[way] += Counter({FUSED: 1, **{k: int(v) for k, v in apart.items()}})


def gemm_case(node: fx.Node) -> GemmCase:
    """The GEMM of a graph's node, by the names of its projections within their layer."""
    info = gemm_info(node)
    assert info is not None
    (m, k), (n, _) = (arg.meta["val"].shape for arg in args_of(node)[:2])
    return GemmCase(re.sub(r"^layers\.\d+\.", "", info.name), str(info.gemm), m, n, k)


@contextmanager
def parts_recorded() -> Iterator[Parts]:
    """Keep the regions and GEMMs of everything that is compiled within."""
    parts, lower = Parts(), compiler.lower

    def recorded(gm: fx.GraphModule, kernels: str) -> dict[str, str]:
        parts.add(gm if kernels == TRITON else grown(gm))
        return lower(gm, kernels)

    # Cached code would be used again without a look at its graphs.
    no_code = torch._inductor.config.patch(fx_graph_cache=False)
    no_graphs = torch._functorch.config.patch(enable_autograd_cache=False)
    with no_code, no_graphs, mock.patch.object(compiler, "lower", recorded):
        yield parts


def grown(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a final graph with the regions that it would have on a GPU."""
    gm = copied(gm)
    grow_regions(gm)
    split_regions(gm)
    return gm


# ---- launches per layer --------------------------------------------------------------------------
_VIEWS = "clone|permute|transpose|t|unsafe_view|view|reshape|contiguous|expand|unsqueeze|squeeze"


def kind_of(kernel: str) -> str:
    """What a kernel of the compiled step is, by its name."""
    ours = re.match(r"fp8_\w*?(_amax|_column_sums|_sums|)(_\d+)?$", kernel)
    if ours:
        return {"_amax": SEARCH, "_column_sums": COLUMNS, "_sums": SUMS, "": FUSED}[ours[1]]
    category = category_of(kernel)
    return category if category in KINDS else OTHER


def only_transposes(kernel: str) -> bool:
    """Whether a kernel writes what it reads in another order, by its name."""
    if kernel.startswith("triton_"):
        return bool(re.match(rf"triton_[a-z]+_fused_(_?({_VIEWS})_)+\d+$", kernel))
    return kind_of(kernel) == OTHER and "transpose" in kernel.lower()


def counted(kernels: dict[str, KernelTime]) -> Counter[str]:
    count: Counter[str] = Counter()
    for name, time in kernels.items():
        count[kind_of(name)] += round(time.launches)
        count[MOVES] += round(time.launches) * only_transposes(name)
    return count


def launches_of(contender: Contender, x: Tensor, grad_output: Tensor) -> dict[str, Counter[str]]:
    """The launches on a GPU of a forward, and of the backward that follows it."""

    def step() -> None:
        x.grad = None
        contender.model.zero_grad(set_to_none=True)
        contender.forward(x).backward(grad_output)

    step()
    forward = counted(kernel_times(lambda: contender.forward(x)))
    backward = counted(kernel_times(step))
    backward.subtract(forward)
    return {"forward": forward, "backward": backward}


def take_apart(job: Job) -> Parts:
    """Compile the model, run a step, and leave only its parts behind."""
    x, grad_output = input_and_grad_output(job)
    with parts_recorded() as parts:
        contender = fp8(job)
        contender.forward(x).backward(grad_output)
    if job.device.type == "cuda":
        parts.launches = launches_of(contender, x, grad_output)
    return parts


# ---- measuring regions ---------------------------------------------------------------------------
def row_of(found: Found, layers: int) -> Row:
    region = Region.of(found.gm)
    return Row(
        name=emit_once(region).name.removeprefix("fp8_"),
        calls={way: found.calls[way] / layers for way in WAYS},
        bytes=float(bytes_read(region) + bytes_written(region)),
        kernels=1 + region.sums_alone + search_apart(region) + region.completes_apart,
        size=f"{region.space.m}x{region.space.n}",
    )


@torch.no_grad()
def measure_region(row: Row, gm: fx.GraphModule, device: torch.device) -> None:
    """Check a region's results, then time it."""
    region = Region.of(gm)
    row.differing = check(region, random_inputs(region, device))
    if device.type == "cuda":
        time_region(row, region, device)


def time_region(row: Row, region: Region, device: torch.device) -> None:
    """Time the kernels and Inductor's code in turns."""
    count = min(200, max(20, int(TRAIN_BYTES / row.bytes)))
    sets = [random_inputs(region, device) for _ in range(copies_beyond_cache(row.bytes, count))]
    launches = [prepare(region.gm, inputs)[0] for inputs in sets]
    assert all(len(each) == row.kernels for each in launches)
    calls: dict[str, list[Callable[[], object]]] = {
        "fp8": [partial(run_all, each) for each in launches],
    }
    if row.bytes >= MIN_FOR_INDUCTOR:
        compiled, row.inductor_kernels = compile_with_inductor(region.gm, sets[0])
        calls["inductor"] = [partial(compiled, *inputs.values()) for inputs in sets]
    trains = {who: train_of(each, count) for who, each in calls.items()}
    replays = {who: train.replay for who, train in trains.items()}
    ms = median_ms_in_turns(replays, STEPS, TURNS, device)
    row.us = {who: 1e3 * each / count for who, each in ms.items()}


def run_all(launches: Sequence[Launch]) -> None:
    for launch in launches:
        run(launch)


# ---- measuring GEMMs -----------------------------------------------------------------------------
def measure_gemm(case: GemmCase) -> GemmSpeed:
    """Time the compiler's choice and cuBLASLt in turns."""
    operands = [random_operands(case) for _ in range(SETS)]
    choice = compilers_choice(case)
    times: dict[Choice, list[float]] = {each: [] for each in {choice, None}}
    for _ in range(ROUNDS):
        for each in times:
            calls = [call(case, each, *pair) for pair in operands]
            times[each].append(median_ms_of_turns(calls, 21))
    tflops = {each: case.flops / statistics.median(ms) / 1e9 for each, ms in times.items()}
    return GemmSpeed(case, choice, tflops[choice], tflops[None])


# ---- measuring all -------------------------------------------------------------------------------
def measure_all(job: Job, console: Console) -> Results:
    """Compile the model, then measure its parts, one after the other."""
    on_gpu = job.device.type == "cuda"
    load_compiler(job.device)
    (parts,) = progress(map(take_apart, [job]), "compiling")
    clear(job.device)
    results = Results(copy_roof(job.device) if on_gpu else None, parts.launches, [], [])
    for found in progress(parts.regions.values(), "measuring regions"):
        results.rows.append(row_of(found, job.layers))
        measure_or_report(results.rows[-1], found.gm, job.device, console)
    for case in progress(parts.gemms, "measuring GEMMs") if on_gpu else ():
        results.gemms.append(measure_gemm(case))
    return results


def measure_or_report(row: Row, gm: fx.GraphModule, device: torch.device, console: Console) -> None:
    """Measure a region and leave nothing of it on the device; a failure does not end the run."""
    try:
        measure_region(row, gm, device)
    except Exception:
        row.failed = True
        console.print(f"{row} failed:\n{traceback.format_exc()}", markup=False)
    if device.type == "cuda":
        clear(device)


# ---- the command line ----------------------------------------------------------------------------
def parse_arguments(argv: list[str] | None) -> tuple[Job, Path | None]:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=4096, help="hidden size; the rest follows")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8192, help="per sequence")
    parser.add_argument("--csv", type=Path, help="append the numbers to this file")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a layer 64 wide, 64 tokens")
    args = parser.parse_args(argv)
    sizes = (args.width, args.layers, args.batch, args.tokens)
    width, layers, batch, tokens = (64, 1, 1, 64) if args.tiny else sizes
    shape, device = LlamaShape.of_width(width), torch.device(args.device)
    return Job(shape, layers, batch, tokens, steps=1, device=device), args.csv


def main(argv: list[str] | None = None) -> None:
    job, csv_path = parse_arguments(argv)
    if job.device.type == "cuda":
        # Inductor, and with it the compiled model, uses the assembler that comes with torch. Triton
        # alone would use its own, of another version: other code than the model runs.
        _set_triton_ptxas_path()
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(f"{device_name(job.device)}, {versions()}\n{job}", highlight=False)
    with equal_conditions(job.device):
        results = measure_all(job, console)
    print_all(results, job, console)
    if csv_path:
        append_csv(csv_path, job.device, str(job), csv_rows(results, job.layers))
    if any(row.failed for row in results.rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
