"""Benchmark one training step of Llama layers: bf16 against FP8, in one run.

    python examples/bench/training_step.py                       # 4 Llama-3-8B layers, on a GPU
    python examples/bench/training_step.py --contenders bf16 fp8 --csv steps.csv
    python examples/bench/training_step.py --contenders fp8 fp8-static --rounds 10
    python examples/bench/training_step.py --device cpu --layers 1 --width 64 --batch 1 \\
        --tokens 64 --steps 1                                    # does it run at all?

A step is forward, backward and, for FP8, the update of the scales; no optimizer, which would cost
everybody the same. Contenders run one after the other, each alone on the device, on the same
parameters and inputs, and with the same choice of attention kernels. With `--rounds`, all are on
the device at once and only timed, in turns: that tells apart what differs by less than a clock
drifts in a minute. The contenders:

    bf16     torch.compile
    fp8      torch.compile(backend="fp8"), this repository
    fp8-stored  the same, with save_activations="fp8"
    fp8-attention  the same, with attention="fp8" (needs nvidia-cudnn-frontend)
    fp8-attention-both  the same, with attention="fp8_both"
    fp8-current, fp8-static, fp8-rowwise, fp8-blockwise  the same, with that recipe
    torchao  float8 tensorwise (dynamic scaling) and torch.compile, if installed
    torchao-rowwise  the same, with a scale per row
    te       TransformerEngine's TransformerLayer with DelayedScaling HYBRID, if installed

Compare the times of one run only: clocks and power limits differ from card to card and day to day.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from gemms import GemmResult, gemm_cases, measure_gemms, print_gemms
from llama_layers import LlamaLayers, LlamaShape, rope_tables
from timing import (
    GIB,
    KernelTime,
    allocated,
    append_csv,
    by_category,
    device_name,
    equal_conditions,
    heat_up,
    kernel_times,
    load_compiler,
    median_ms,
    median_ms_in_turns,
    peak_of,
    print_categories,
    seconds,
    sqnr_db,
    versions,
)
from torch import Tensor, nn

import fp8compile
from fp8compile.progress import progress

WARMUP_STEPS = 5


@dataclass(frozen=True)
class Job:
    """What is measured, on what."""

    shape: LlamaShape
    layers: int
    batch: int
    tokens: int
    steps: int
    device: torch.device

    def __str__(self) -> str:
        return f"{self.layers} layers, {self.shape}, {self.batch} x {self.tokens} tokens"


@dataclass
class Result:
    """What one contender reached. Sizes in bytes."""

    name: str
    step_ms: float = 0.0
    kept: int = 0
    peak: int = 0
    compile_s: float = 0.0
    kernels: dict[str, KernelTime] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)  # output and gradients, on the CPU


# ---- the contenders ------------------------------------------------------------------------------
@dataclass
class Contender:
    """A model, how it is called, and what follows each backward."""

    model: nn.Module
    forward: Callable[[Tensor], Tensor]
    after_backward: Callable[[], None] = lambda: None
    comparable: bool = True  # has the parameters of LlamaLayers, under the same names


def llama(job: Job) -> LlamaLayers:
    torch.manual_seed(0)
    with torch.device(job.device):
        return LlamaLayers(job.shape, job.layers).bfloat16()


def compiled(
    job: Job,
    model: nn.Module,
    backend: str = "inductor",
    options: dict[str, object] | None = None,
) -> Contender:
    function = torch.compile(model, backend=backend, options=options)
    cos, sin = rope_tables(job.tokens, job.shape.head_dim, next(model.parameters()))
    return Contender(model, lambda x: function(x, cos, sin))


def bf16(job: Job) -> Contender:
    return compiled(job, llama(job))


def fp8(job: Job, **options: object) -> Contender:
    contender = compiled(job, llama(job), backend="fp8", options=options)
    # An optimizer would do this in its step().
    contender.after_backward = lambda: fp8compile.update_scales(contender.model)
    return contender


def torchao(job: Job, recipe: str = "tensorwise") -> Contender:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name(recipe)
    return compiled(job, convert_to_float8_training(llama(job), config=config))


def te(job: Job) -> Contender:
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import DelayedScaling, Format

    shape, recipe = job.shape, DelayedScaling(fp8_format=Format.HYBRID)
    layers = nn.ModuleList(
        te.TransformerLayer(
            shape.hidden,
            shape.ff,
            shape.heads,
            num_gqa_groups=shape.kv_heads,
            normalization="RMSNorm",
            activation="swiglu",
            bias=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            self_attn_mask_type="causal",
            attn_input_format="bshd",
            params_dtype=torch.bfloat16,
            device=job.device,
        )
        for _ in range(job.layers)
    )
    rope = te.RotaryPositionEmbedding(shape.head_dim)(job.tokens).to(job.device)

    def forward(x: Tensor) -> Tensor:
        with te.autocast(enabled=True, recipe=recipe):
            for layer in layers:
                x = layer(x, rotary_pos_emb=rope)
        return x

    return Contender(layers, forward, comparable=False)


RECIPES = ("current", "static", "rowwise", "blockwise")
CONTENDERS: dict[str, Callable[[Job], Contender]] = {
    "bf16": bf16,
    "fp8": fp8,
    "fp8-stored": partial(fp8, save_activations="fp8"),
    "fp8-attention": partial(fp8, attention="fp8"),
    "fp8-attention-both": partial(fp8, attention="fp8_both"),
    "fp8-auto": partial(fp8, scaling="auto"),
    **{f"fp8-{name}": partial(fp8, recipe=name) for name in RECIPES},
    "torchao": torchao,
    "torchao-rowwise": partial(torchao, recipe="rowwise"),
    "te": te,
}


# ---- measuring one contender ---------------------------------------------------------------------
def input_and_grad_output(job: Job) -> tuple[Tensor, Tensor]:
    """The layers' input, which needs a gradient as in a whole model, and that of their output."""
    generator = torch.Generator(job.device).manual_seed(1)
    size = (job.batch, job.tokens, job.shape.hidden)
    x, grad_output = (
        torch.randn(size, generator=generator, device=job.device, dtype=torch.bfloat16)
        for _ in range(2)
    )
    return x.requires_grad_(), grad_output


class Step:
    """One training step of a contender, on inputs of its own. Call it to run it."""

    def __init__(self, name: str, job: Job) -> None:
        self.contender = CONTENDERS[name](job)
        self.x, self.grad_output = input_and_grad_output(job)
        self.compile_s = seconds(self, job.device)  # the first step; almost all of it compiles
        for _ in range(WARMUP_STEPS if job.device.type == "cuda" else 1):
            self()

    def __call__(self) -> None:
        self.clear()
        self.forward().backward(self.grad_output)  # no loss: it would only add work of its own
        self.contender.after_backward()

    def forward(self) -> Tensor:
        return self.contender.forward(self.x)

    def clear(self) -> None:
        self.x.grad = None
        self.contender.model.zero_grad(set_to_none=True)


def measure(name: str, job: Job) -> Result:
    """Build a contender, run it, and leave nothing of it behind on the device."""
    step = Step(name, job)
    result = Result(name, compile_s=step.compile_s)
    result.step_ms = median_ms(step, job.steps, job.device)
    result.peak = peak_of(step, job.device)
    step.clear()
    result.kept, output = kept_for_backward(step.forward, job.device)
    output.backward(step.grad_output)
    if step.contender.comparable:
        result.tensors = on_cpu(output, step.x, step.contender.model)
    del output
    if job.device.type == "cuda":
        result.kernels = kernel_times(step)
    return result


def kept_for_backward(forward: Callable[[], Tensor], device: torch.device) -> tuple[int, Tensor]:
    """Bytes that a forward leaves alive for its backward, and its output.

    Live bytes after the forward less live bytes before it. Parameters and input are alive at both
    times and the temporaries of the forward at neither, so this is what the backward will read,
    plus the output itself, which the caller holds (0.125 GiB of 2 x 8192 x 4096 in bf16). Gradients
    must be None, or the backward of the step before would hide some of it.
    """
    before = allocated(device)
    output = forward()
    return allocated(device) - before, output


def on_cpu(output: Tensor, x: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """The output and every gradient, kept where they do not count as the device's memory."""
    tensors = {"output": output, "input": x.grad}
    tensors |= {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: tensor.detach().cpu() for name, tensor in tensors.items() if tensor is not None}


def measure_all(names: list[str], job: Job) -> list[Result]:
    """Measure each contender alone; one that fails is reported and left out."""
    load_compiler(job.device)
    heat_up(job.device)
    results = []
    for name in progress(names, "contenders"):
        print(f"... {name}", flush=True)
        with equal_conditions(job.device):
            try:
                results.append(measure(name, job))
            except ImportError as error:
                print(f"    left out: {error}")
            except Exception:
                print(f"    failed:\n{traceback.format_exc()}")
        torch.compiler.reset()
        gc.collect()
        if job.device.type == "cuda":
            torch.cuda.empty_cache()
    return results


def time_in_turns(names: list[str], job: Job, rounds: int) -> dict[str, float]:
    """Median ms of a step of each contender, all alive at once."""
    load_compiler(job.device)
    heat_up(job.device)
    with ExitStack() as stack:
        steps = {}
        for name in progress(names, "contenders"):
            stack.enter_context(equal_conditions(job.device))
            steps[name] = Step(name, job)
        return median_ms_in_turns(steps, job.steps, rounds, job.device)


# ---- tables --------------------------------------------------------------------------------------
def print_steps(results: list[Result], job: Job) -> None:
    bf16_ms = next((r.step_ms for r in results if r.name == "bf16"), float("nan"))
    print(
        f"\n{'contender':<19} {'step ms':>9} {'vs bf16':>8} {'kept GiB':>9} {'peak GiB':>9} "
        f"{'compile s':>10}"
    )
    for r in results:
        print(
            f"{r.name:<19} {r.step_ms:>9.2f} {bf16_ms / r.step_ms:>7.2f}x {r.kept / GIB:>9.2f} "
            f"{r.peak / GIB:>9.2f} {r.compile_s:>10.1f}"
        )
    if job.device.type == "cpu":
        print("These times mean nothing: on a CPU, FP8 is emulated. Memory is not counted.")


def print_turns(times: dict[str, float]) -> None:
    first = next(iter(times))
    print(f"\n{'contender':<19} {'step ms':>9} {'vs ' + first:>14}")
    for name, ms in times.items():
        print(f"{name:<19} {ms:>9.2f} {times[first] / ms:>13.3f}x")


def print_sqnr(results: list[Result]) -> None:
    """How far each contender's output and gradients are from those of bf16."""
    reference = next((r.tensors for r in results if r.name == "bf16"), None)
    others = [r for r in results if r.tensors and r.name != "bf16"]
    if not reference or not others:
        return
    print("\nSQNR against bf16, dB")
    print(f"{'contender':<19} {'output':>8} {'worst gradient':>15} {'median gradient':>16}")
    for r in others:
        db = {name: sqnr_db(tensor, r.tensors[name]) for name, tensor in reference.items()}
        output = db.pop("output")
        worst = min(db, key=lambda name: db[name])
        print(
            f"{r.name:<19} {output:>8.1f} {db[worst]:>15.1f} "
            f"{statistics.median(db.values()):>16.1f}   (worst: {worst})"
        )


# ---- records -------------------------------------------------------------------------------------
def save_steps(path: Path, job: Job, results: list[Result]) -> None:
    rows: list[tuple[str, str, float, str]] = []
    for r in results:
        rows += [
            (r.name, "step", r.step_ms, "ms"),
            (r.name, "kept for backward", r.kept / GIB, "GiB"),
            (r.name, "peak", r.peak / GIB, "GiB"),
            (r.name, "compile", r.compile_s, "s"),
        ]
        sums = by_category(r.kernels) if r.kernels else {}
        rows += [(r.name, category, time.ms, "ms") for category, time in sums.items()]
    append_csv(path, job.device, str(job), rows)


def save_gemms(path: Path, job: Job, gemms: list[GemmResult]) -> None:
    rows = [
        (name, str(g.case), value, "TFLOP/s") for g in gemms for name, value in g.tflops.items()
    ]
    append_csv(path, job.device, str(job), rows)


# ---- the command line ----------------------------------------------------------------------------
def parse_arguments(argv: list[str] | None) -> tuple[Job, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=4096, help="hidden size; the rest follows")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8192, help="per sequence")
    parser.add_argument("--steps", type=int, default=20, help="whose median time is taken")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument(
        "--rounds", type=int, help="only time them: in turns, so many times --steps each"
    )
    parser.add_argument("--csv", type=Path, help="append the numbers to this file")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    args = parser.parse_args(argv)
    shape, device = LlamaShape.of_width(args.width), torch.device(args.device)
    return Job(shape, args.layers, args.batch, args.tokens, args.steps, device), args


def main(argv: list[str] | None = None) -> None:
    job, args = parse_arguments(argv)
    print(f"{device_name(job.device)}, {versions()}\n{job}")
    if args.rounds:
        times = time_in_turns(args.contenders, job, args.rounds)
        print_turns(times)
        if args.csv:
            rows = [(name, f"step in {args.rounds} rounds", ms, "ms") for name, ms in times.items()]
            append_csv(args.csv, job.device, str(job), rows)
        return
    results = measure_all(args.contenders, job)
    print_steps(results, job)
    print_sqnr(results)
    print_categories({r.name: r.kernels for r in results}, {r.name: r.step_ms for r in results})
    if args.csv:
        save_steps(args.csv, job, results)
    if job.device.type == "cuda":
        gemms = measure_gemms(gemm_cases(job.shape, job.batch * job.tokens))
        print_gemms(gemms)
        if args.csv:
            save_gemms(args.csv, job, gemms)


if __name__ == "__main__":
    main()
