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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
import triton
from gemms import ROUNDS, SETS, Choice, GemmCase, call, compilers_choice, random_operands
from gemms import median_ms as median_ms_of_turns
from llama_layers import LlamaShape
from models import clear
from rich import box
from rich.console import Console
from rich.table import Table
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
from torch._inductor import metrics
from torch._inductor.runtime.compile_tasks import _set_triton_ptxas_path
from training_step import Contender, Job, fp8, input_and_grad_output

from fp8compile import compile as compiler
from fp8compile.backends import TRITON
from fp8compile.backends.emit import bytes_read, bytes_written, search_apart
from fp8compile.backends.fused import emit_once, prepare, region_key, run_region
from fp8compile.backends.kernels.launch import Launch, run
from fp8compile.backends.region import Region
from fp8compile.internals import is_tangent
from fp8compile.ir import (
    DEQUANTIZE_GROUPS,
    QUANTIZE,
    QUANTIZE_GROUPS,
    SCALED_MM,
    args_of,
    gemm_info,
)
from fp8compile.ops import GROUP
from fp8compile.passes import grow_regions, split_regions
from fp8compile.progress import progress

WAYS = ("forward", "backward")
TIMED = ("fp8", "inductor")  # our kernels, Inductor's code
HALVES = (torch.bfloat16, torch.float16)
SCALE = 60.0  # of every cast: the largest random values come near the end of E4M3's range
MAX_DIFFERING = 1e-4  # of the codes: float32 sums in another order round some the other way
MIN_FOR_INDUCTOR = 10e6  # bytes; compiling takes longer than smaller regions are worth
NOT_RUN = "not run"
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


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return fx.GraphModule(gm, graph)


# ---- launches per layer --------------------------------------------------------------------------
FUSED, OTHER = "fused regions", "other"
SUMS, SEARCH, COLUMNS = "their sums over rows", "search for amax", "sums over columns"
KINDS = (FUSED, SUMS, SEARCH, COLUMNS, "GEMM", "attention", OTHER)
MOVES = "only transposing"
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


# ---- one region: its data and its results --------------------------------------------------------
def random_inputs(region: Region, device: torch.device) -> dict[str, Tensor]:
    """By name, in the order of the region's arguments; the scales are known."""
    scales = {args_of(cast.node)[1] for cast in region.casts}
    inputs = {}
    for node in region.gm.graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        tensor = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        inputs[node.name] = tensor.fill_(SCALE) if node in scales else fill_randomly(tensor)
    return inputs


def fill_randomly(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.random_(0, 2)
    values = torch.randn(tensor.shape, device=tensor.device)
    # What is kept in float32 is, in a model, one over a root mean square, or the like.
    return tensor.copy_(values.abs() + 0.5 if tensor.dtype == torch.float32 else values)


class InFloat32(fx.Interpreter):
    """Runs a region's graph without the roundings in between, which no fused kernel makes."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        wide = {name: widened(arg) for name, arg in kwargs.items()}
        return super().call_function(target, tuple(map(widened, args)), wide)


def widened(arg: Any) -> Any:
    """float32 for what would be rounded: 16 bits wide, be it a type or a tensor."""
    if isinstance(arg, Tensor):
        return arg.float() if arg.dtype in HALVES else arg
    return torch.float32 if arg in HALVES else arg


def in_float32(gm: fx.GraphModule, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a region returns, by the names of the nodes that it returns."""
    names = [node.name for node in args_of(gm.graph.output_node())[0]]
    results = InFloat32(gm).run(*map(widened, inputs.values()))
    return dict(zip(names, results, strict=True))


def differing(got: Tensor, want: Tensor) -> float:
    """The share of FP8 codes that differ; ValueError or AssertionError beyond rounding errors."""
    if want.dtype.itemsize > 1:
        near_zero = 1e-5 * want.abs().max().item()  # there, what cancels out decides
        torch.testing.assert_close(got.float(), want.float(), rtol=2**-8, atol=near_zero)
        return 0.0
    share = (got.view(torch.uint8) != want.view(torch.uint8)).count_nonzero().item() / want.numel()
    if got.dtype != want.dtype or share > max(MAX_DIFFERING, 2 / want.numel()):
        raise ValueError(f"{share:.2%} of the FP8 codes differ from those computed in float32")
    return share


def check(region: Region, inputs: dict[str, Tensor]) -> float | None:
    """The largest share of codes in which any result differs; None where kernels cannot run."""
    want = in_float32(region.gm, inputs)
    in_aten = in_float32(with_casts_in_aten(region.gm), inputs)
    for name, value in want.items():
        differing(in_aten[name], value)
    if not (next(iter(inputs.values())).is_cuda or triton.knobs.runtime.interpret):
        return None
    got = run_region(region.gm, inputs)
    return max(differing(got[name], value) for name, value in want.items())


# ---- the same region for Inductor ----------------------------------------------------------------
def with_casts_in_aten(gm: fx.GraphModule) -> fx.GraphModule:
    """A region's graph as a model would have it that casts to FP8 without this repository."""
    gm = copied(gm)
    for node in gm.graph.nodes:
        node.target = IN_ATEN.get(node.target, node.target)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def cast_in_aten(
    x: Tensor,
    scale: Tensor,
    slot: int,
    format: torch.dtype,
    row_major: bool = True,
    transposed: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """fp8::quantize with a known scale; what nobody takes is not computed."""
    limit = torch.finfo(format).max
    f, used = x.float(), scale[slot]
    q = (f * used).clamp(-limit, limit).to(format)
    q_t = q.t().contiguous() if transposed else None
    return q, q_t, used.reciprocal().reshape(1), f.abs().amax().reshape(1)


def group_cast_in_aten(x: Tensor) -> tuple[Tensor, Tensor]:
    f = x.float().unflatten(-1, (-1, GROUP))
    amax = f.abs().amax(-1, keepdim=True)
    scale = torch.full_like(amax, torch.finfo(torch.float8_e4m3fn).max) / amax
    return (f * scale).to(torch.float8_e4m3fn).flatten(-2), scale.reciprocal().squeeze(-1)


def group_cast_back_in_aten(q: Tensor, scale_inv: Tensor, dtype: torch.dtype) -> Tensor:
    return (q.float().unflatten(-1, (-1, GROUP)) * scale_inv.unsqueeze(-1)).flatten(-2).to(dtype)


IN_ATEN: dict[Any, Callable[..., Any]] = {
    QUANTIZE: cast_in_aten,
    QUANTIZE_GROUPS: group_cast_in_aten,
    DEQUANTIZE_GROUPS: group_cast_back_in_aten,
}


def compile_with_inductor(
    gm: fx.GraphModule, inputs: dict[str, Tensor]
) -> tuple[Callable[..., Any], int]:
    """The compiled region, and of how many kernels it consists."""
    metrics.reset()
    compiled = torch.compile(with_casts_in_aten(gm), dynamic=False)
    compiled(*inputs.values())
    return compiled, int(metrics.generated_kernel_count)


# ---- measuring regions ---------------------------------------------------------------------------
@dataclass
class Row:
    """What is known of a region; ``us`` by those of TIMED."""

    name: str
    calls: dict[str, float]  # per layer
    bytes: float
    kernels: int
    size: str = ""
    differing: float | None = None
    failed: bool = False
    inductor_kernels: int | None = None
    us: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name} {self.size}".strip()

    @property
    def times(self) -> float:
        """How often a layer calls it."""
        return sum(self.calls.values())

    @property
    def ratio(self) -> float | None:
        """How many times Inductor's time is that of ours."""
        return self.us["inductor"] / self.us["fp8"] if "inductor" in self.us else None


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
@dataclass(frozen=True)
class GemmSpeed:
    """TFLOP/s of what the compiler launches, and of cuBLASLt."""

    case: GemmCase
    choice: Choice
    chosen: float
    cublaslt: float

    @property
    def ratio(self) -> float:
        return self.chosen / self.cublaslt


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
@dataclass
class Results:
    """``roof``: bytes per second of a copy; None where nothing is timed."""

    roof: float | None
    launches: dict[str, Counter[str]]
    rows: list[Row]
    gemms: list[GemmSpeed]


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


# ---- tables --------------------------------------------------------------------------------------
def print_all(results: Results, job: Job, console: Console) -> None:
    say = partial(console.print, highlight=False, soft_wrap=True)
    if results.roof:
        say(f"copy of 1 GiB: {results.roof / 1e12:.2f} TB/s, read and written")
    else:
        say("Nothing is timed: that takes a GPU.")
    say("\nRegions (calls: per layer, forward/backward; ratio: Inductor's time over ours)")
    console.print(regions_table(results))
    if any(verdict(row) == NOT_RUN for row in results.rows):
        say(f"{NOT_RUN}: only the graph was; the kernels take a GPU or Triton's interpreter\n")
    say("Launches per layer")
    console.print(launches_table(results, job.layers))
    if results.gemms:
        say("TFLOP/s per GEMM, " + about_ratios(results.gemms))
        console.print(gemms_table(results.gemms))


def table_with(*columns: str) -> Table:
    """A table whose first column holds names, and the others numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        justify: Literal["left", "right"] = "right" if table.columns else "left"
        table.add_column(name, justify=justify, no_wrap=True)
    return table


def regions_table(results: Results) -> Table:
    table = table_with(
        *("region", "calls", "rows x cols", "MB", "us", "of roof", "kernels"),
        *("Inductor us", "kernels", "ratio", "differing"),
    )
    for row in results.rows:
        calls = "/".join(f"{row.calls[way]:g}" for way in WAYS)
        table.add_row(row.name, calls, row.size, *numbers(row, results.roof), verdict(row))
    table.add_section()
    total = sum_per_layer(results.rows)
    table.add_row("a layer", "", "", *numbers(total, results.roof), "")
    return table


def numbers(row: Row, roof: float | None) -> list[str]:
    us = row.us.get("fp8")
    share = f"{row.bytes / us / roof * 1e6:.0%}" if us and roof else "-"
    return [
        f"{row.bytes / 1e6:.{0 if row.bytes >= 1e7 else 3}f}",
        shown(us, ".1f"),
        share,
        f"{row.kernels}",
        shown(row.us.get("inductor"), ".1f"),
        shown(row.inductor_kernels, "d"),
        shown(row.ratio, ".2f"),
    ]


def shown(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def verdict(row: Row) -> str:
    if row.failed:
        return "failed"
    return NOT_RUN if row.differing is None else f"{row.differing:.1g}"


def sum_per_layer(rows: list[Row]) -> Row:
    """All regions of a layer as one; what is not known of each of them is left out."""

    def total(values: Iterable[float]) -> float:
        return sum(row.times * value for row, value in zip(rows, values, strict=True))

    complete = [who for who in TIMED if rows and all(who in row.us for row in rows)]
    in_inductor = total(row.inductor_kernels or 0 for row in rows)
    return Row(
        name="a layer",
        calls={way: sum(row.calls[way] for row in rows) for way in WAYS},
        bytes=total(row.bytes for row in rows),
        kernels=round(total(row.kernels for row in rows)),
        inductor_kernels=round(in_inductor) if "inductor" in complete else None,
        us={who: total(row.us[who] for row in rows) for who in complete},
    )


def launches_table(results: Results, layers: int) -> Table:
    table = table_with("", *WAYS, "total")
    for kind in [*KINDS, MOVES]:
        counts = [results.launches[way][kind] / layers for way in WAYS]
        if is_counted(results, kind):
            table.add_row(kind, *(f"{count:g}" for count in [*counts, sum(counts)]))
        if kind == KINDS[-1]:
            totals = [sum(results.launches[way][k] for k in KINDS) / layers for way in WAYS]
            table.add_row("all", *(f"{count:g}" for count in [*totals, sum(totals)]))
    return table


def is_counted(results: Results, kind: str) -> bool:
    return results.roof is not None or any(results.launches[way][kind] for way in WAYS)


def about_ratios(gemms: list[GemmSpeed]) -> str:
    least = min(gemm.ratio for gemm in gemms)
    return f"chosen over cuBLASLt: geometric mean {mean_ratio(gemms):.3f}, minimum {least:.3f}"


def mean_ratio(gemms: list[GemmSpeed]) -> float:
    return statistics.geometric_mean(gemm.ratio for gemm in gemms)


def gemms_table(gemms: list[GemmSpeed]) -> Table:
    columns = ("GEMM", "role", "m", "n", "k", "chosen", "cuBLASLt", "ratio", "what was chosen")
    table = table_with(*columns)
    for gemm in gemms:
        case = gemm.case
        speeds = (f"{gemm.chosen:.0f}", f"{gemm.cublaslt:.0f}", f"{gemm.ratio:.2f}")
        sizes = map(str, (case.m, case.n, case.k))
        table.add_row(case.names, case.role, *sizes, *speeds, str(gemm.choice or "cuBLASLt"))
    return table


# ---- records -------------------------------------------------------------------------------------
def csv_rows(results: Results, layers: int) -> Iterator[tuple[str, str, float, str]]:
    if results.roof:
        yield "copy", "1 GiB", results.roof / 1e12, "TB/s"
    for index, row in enumerate(results.rows):
        yield from csv_rows_of(row, f"region {index} {row}")
    yield from csv_rows_of(sum_per_layer(results.rows), "regions of a layer")
    for way in WAYS:
        for kind in [*KINDS, MOVES]:
            if is_counted(results, kind):
                count = results.launches[way][kind] / layers
                yield "fp8", f"launches, {way}, {kind}", count, "per layer"
    for gemm in results.gemms:
        yield "chosen", str(gemm.case), gemm.chosen, "TFLOP/s"
        yield "cublaslt", str(gemm.case), gemm.cublaslt, "TFLOP/s"
    if results.gemms:
        yield "chosen", "geometric mean over cuBLASLt", mean_ratio(results.gemms), "x"


def csv_rows_of(row: Row, name: str) -> Iterator[tuple[str, str, float, str]]:
    yield "fp8", f"{name} calls", row.times, "per layer"
    yield "fp8", f"{name} bytes", row.bytes / 1e6, "MB"
    yield from ((who, name, us, "us") for who, us in row.us.items())


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
