"""Benchmark a training step of several models: bf16 against FP8, in one run.

    python examples/bench/models.py                              # all of them, on a GPU
    python examples/bench/models.py --models gpt2 bert-large --csv models.csv
    python examples/bench/models.py --models gpt2 --cuda-graphs  # both without the host's launches
    python examples/bench/models.py --device cpu --tiny          # do they run at all?

A step is forward, backward and, for FP8, the update of the scales; no optimizer, which would cost
both the same. The two contenders have the same parameters and inputs, and are measured in turns.
The models have random weights and no dropout. FP8 leaves in bf16 what it would make slower. "Host"
is the time to launch a step, bf16's and FP8's: where that is not below the step's, the host is what
was measured. Below each model's line is what its kernels took.

    llama-WIDTH  layers only, no embedding and no head (llama_layers.py)
    gpt2         GPT-2 small with its language-model head, from transformers
    bert-large   masked language model
    vit-large    ViT-L/16, images of 224 x 224
"""

from __future__ import annotations

import argparse
import copy
import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from llama_layers import LlamaLayers, LlamaShape, rope_tables
from rich.console import Console
from rich.table import Table
from timing import (
    KernelTime,
    append_csv,
    by_category,
    device_name,
    equal_conditions,
    host_ms,
    kernel_times,
    load_compiler,
    median_ms_in_turns,
    print_categories,
    seconds,
    sqnr_db,
    versions,
)
from torch import Tensor, nn

import fp8compile
from fp8compile.progress import progress

WARMUP_STEPS = 5
ROUNDS = 5
MIN_SQNR_DB = 10.0  # below this the output is noise; FP8 reaches 15 to 28 dB in deep models
PHASES = 4  # of measuring one model: plan, bf16, fp8, turns


# ---- the models ----------------------------------------------------------------------------------
@dataclass
class Workload:
    """A model and what its forward takes; ``loss`` and ``output`` pick from what it returns."""

    title: str
    model: nn.Module
    inputs: dict[str, Any]
    loss: Callable[[Any], Tensor] = lambda result: result.loss
    output: Callable[[Any], Tensor] = lambda result: result.logits
    grad_output: Tensor | None = None  # None for a loss, which is a scalar


def llama(
    width: int, ff: int, layers: int, batch: int, tokens: int, *, device: torch.device, tiny: bool
) -> Workload:
    head_dim = 64 if width < 2048 else 128
    heads = width // head_dim
    shape = LlamaShape(width, heads, heads // 4, head_dim, ff)
    if tiny:
        shape, layers, batch, tokens = LlamaShape.of_width(64), 1, 1, 64
    with device:
        model = LlamaLayers(shape, layers).bfloat16()
        size = (batch, tokens, shape.hidden)
        x, grad_output = (torch.randn(size, dtype=torch.bfloat16) for _ in range(2))
    cos, sin = rope_tables(tokens, shape.head_dim, x)
    return Workload(
        f"Llama d {shape.hidden}, ff {shape.ff}, {layers} layers, {batch} x {tokens} tokens",
        model,
        {"x": x.requires_grad_(), "cos": cos, "sin": sin},
        loss=lambda result: result,
        output=lambda result: result,
        grad_output=grad_output,
    )


def gpt2(*, device: torch.device, tiny: bool) -> Workload:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 1, "n_embd": 64, "n_head": 2, "vocab_size": 96} if tiny else {}
    config = GPT2Config(**sizes, use_cache=False, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    batch, tokens = (1, 32) if tiny else (8, 1024)
    with device:
        model = GPT2LMHeadModel(config).bfloat16()
        ids = torch.randint(config.vocab_size, (batch, tokens))
    title = f"GPT-2 d {config.n_embd}, {config.n_layer} layers, {batch} x {tokens} tokens"
    return Workload(title, model, {"input_ids": ids, "labels": ids})


def bert_large(*, device: torch.device, tiny: bool) -> Workload:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        hidden_size=64 if tiny else 1024,
        num_hidden_layers=1 if tiny else 24,
        num_attention_heads=2 if tiny else 16,
        intermediate_size=128 if tiny else 4096,
        vocab_size=96 if tiny else 30522,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    batch, tokens = (1, 32) if tiny else (16, 512)
    with device:
        model = BertForMaskedLM(config).bfloat16()
        ids = torch.randint(config.vocab_size, (batch, tokens))
    title = f"BERT d {config.hidden_size}, {config.num_hidden_layers} layers, "
    return Workload(title + f"{batch} x {tokens} tokens", model, {"input_ids": ids, "labels": ids})


def vit_large(*, device: torch.device, tiny: bool) -> Workload:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=64 if tiny else 1024,
        num_hidden_layers=1 if tiny else 24,
        num_attention_heads=2 if tiny else 16,
        intermediate_size=128 if tiny else 4096,
        image_size=48 if tiny else 224,
        num_labels=16 if tiny else 1000,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    images = 16 if tiny else 32
    size = (images, 3, config.image_size, config.image_size)
    with device:
        model = ViTForImageClassification(config).bfloat16()
        pixels = torch.randn(size, dtype=torch.bfloat16)
        labels = torch.randint(config.num_labels, (images,))
    title = f"ViT d {config.hidden_size}, {config.num_hidden_layers} layers, {images} images"
    return Workload(title, model, {"pixel_values": pixels, "labels": labels})


MODELS: dict[str, Callable[..., Workload]] = {
    "llama-768": partial(llama, 768, 2048, layers=3, batch=16, tokens=1024),
    "llama-1024": partial(llama, 1024, 4096, layers=3, batch=8, tokens=2048),
    "llama-2048": partial(llama, 2048, 8192, layers=3, batch=4, tokens=4096),
    "llama-4096": partial(llama, 4096, 14336, layers=2, batch=1, tokens=2048),
    "llama-8192": partial(llama, 8192, 28672, layers=1, batch=1, tokens=8192),
    "gpt2": gpt2,
    "bert-large": bert_large,
    "vit-large": vit_large,
}


# ---- measuring -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Job:
    """How to measure."""

    device: torch.device
    tiny: bool
    steps: int
    cuda_graphs: bool = False

    def build(self, name: str) -> Workload:
        torch.manual_seed(0)
        return MODELS[name](device=self.device, tiny=self.tiny)


@dataclass
class Result:
    """What was found for one model; from ``ms`` on, by contender."""

    title: str
    fp8_gemms: int = 0
    gemms: int = 0
    sqnr_db: float = 0.0
    ms: dict[str, float] = field(default_factory=dict)
    host_ms: dict[str, float] = field(default_factory=dict)
    compile_s: dict[str, float] = field(default_factory=dict)
    kernels: dict[str, dict[str, KernelTime]] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        return self.ms["bf16"] / self.ms["fp8"]


class Contender:
    """A copy of a workload's model, compiled with one backend."""

    def __init__(self, workload: Workload, backend: str, cuda_graphs: bool) -> None:
        self.workload = workload
        self.model = copy.deepcopy(workload.model)
        self.updates_scales = backend == "fp8"
        inductor = {"triton.cudagraphs": cuda_graphs}
        options = {"inductor": inductor} if self.updates_scales else inductor
        self.compiled = torch.compile(self.model, backend=backend, options=options)

    def step(self) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        self.model.zero_grad(set_to_none=True)
        for value in self.workload.inputs.values():
            value.grad = None
        loss = self.workload.loss(self.compiled(**self.workload.inputs))
        loss.backward(self.workload.grad_output)
        if self.updates_scales:
            fp8compile.update_scales()  # an optimizer would do this in its step()

    def output(self) -> Tensor:
        """From the code of the training step: without grad mode, another would be compiled."""
        torch.compiler.cudagraph_mark_step_begin()
        return self.workload.output(self.compiled(**self.workload.inputs)).detach().clone()


BACKENDS = {"bf16": "inductor", "fp8": "fp8"}


def measure(name: str, job: Job) -> Iterator[Result]:
    """Compile both contenders, compare what they compute, then time them in turns.

    Gives the result after each of the PHASES; it is complete after the last.
    """
    workload = job.build(name)
    result = Result(workload.title)
    count_gemms(workload, result)
    yield result
    with ExitStack() as stack:
        contenders = {}
        for who, backend in BACKENDS.items():
            stack.enter_context(equal_conditions(job.device))
            contenders[who] = Contender(workload, backend, job.cuda_graphs)
            result.compile_s[who] = seconds(contenders[who].step, job.device)
            for _ in range(WARMUP_STEPS if job.device.type == "cuda" else 1):
                contenders[who].step()
            yield result
        result.sqnr_db = sqnr_db(*(each.output() for each in contenders.values()))
        if not result.sqnr_db >= MIN_SQNR_DB:
            raise ValueError(f"FP8's output has an SQNR of {result.sqnr_db:.1f} dB against bf16")
        steps = {who: each.step for who, each in contenders.items()}
        result.ms = median_ms_in_turns(steps, job.steps, ROUNDS, job.device)
        result.host_ms = {who: host_ms(step, job.device) for who, step in steps.items()}
        if job.device.type == "cuda":
            result.kernels = {who: kernel_times(step) for who, step in steps.items()}
    yield result


def count_gemms(workload: Workload, result: Result) -> None:
    """How many GEMMs run in FP8; merged ones count for each of their sites."""
    rows = [
        row for row in fp8compile.explain(workload.model, **workload.inputs).rows if row.k != ""
    ]
    result.gemms = sum(len(row.sites) for row in rows)
    result.fp8_gemms = sum(len(row.sites) for row in rows if row.is_fp8)


def measure_all(
    names: list[str], job: Job, console: Console, found: Callable[[Result], None]
) -> list[Result]:
    """Measure one model after the other; one that fails is reported and left out.

    ``found`` is given each result at once: whoever interrupts the script keeps what it has.
    """
    load_compiler(job.device)
    results = []
    for name in names:
        try:
            *_, result = progress(measure(name, job), name, total=PHASES)
            results.append(result)
            found(result)
        except Exception:
            console.print(f"{name} failed:\n{traceback.format_exc()}", markup=False)
        clear(job.device)
    return results


def clear(device: torch.device) -> None:
    """Leave nothing of a model behind on the device."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---- output --------------------------------------------------------------------------------------
def table_of(results: list[Result]) -> Table:
    table = Table()
    table.add_column("model")
    for name in ("bf16 ms", "fp8 ms", "ratio", "host ms", "FP8 GEMMs", "SQNR dB", "compile s"):
        table.add_column(name, justify="right")
    for r in results:
        table.add_row(
            r.title,
            *(f"{r.ms[who]:.2f}" for who in BACKENDS),
            f"{r.ratio:.2f}x",
            ", ".join(f"{r.host_ms[who]:.2f}" for who in BACKENDS),
            f"{r.fp8_gemms} of {r.gemms}",
            f"{r.sqnr_db:.1f}",
            ", ".join(f"{r.compile_s[who]:.1f}" for who in BACKENDS),
            style="yellow" if r.ratio < 1 else None,
        )
    return table


def save_csv(path: Path, job: Job, results: list[Result]) -> None:
    for r in results:
        rows = [(who, "step", ms, "ms") for who, ms in r.ms.items()]
        rows += [(who, "host", ms, "ms") for who, ms in r.host_ms.items()]
        rows += [(who, "compile", time, "s") for who, time in r.compile_s.items()]
        rows += [
            (who, f"{category} kernels", time.ms, "ms")
            for who, kernels in r.kernels.items()
            for category, time in by_category(kernels).items()
        ]
        rows += [
            ("fp8", "FP8 GEMMs", r.fp8_gemms, f"of {r.gemms}"),
            ("fp8", "SQNR of the output", r.sqnr_db, "dB"),
        ]
        append_csv(path, job.device, r.title + ", CUDA graphs" * job.cuda_graphs, rows)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", type=int, default=10, help="per round; their median is taken")
    parser.add_argument("--csv", type=Path, help="append the numbers to this file")
    parser.add_argument("--cuda-graphs", action="store_true", help="replay what was launched once")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a layer or so of each, 64 wide")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    job = Job(torch.device(args.device), args.tiny, args.steps, args.cuda_graphs)
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(f"{device_name(job.device)}, {versions()}", highlight=False)

    def found(result: Result) -> None:
        times = ", ".join(f"{who} {ms:.2f} ms" for who, ms in result.ms.items())
        console.print(f"{result.title}: {times}, {result.ratio:.3f}x", highlight=False)
        print_categories(result.kernels, result.ms)
        if args.csv:
            save_csv(args.csv, job, [result])

    results = measure_all(args.models, job, console, found)
    console.print(table_of(results))
    if job.device.type == "cpu":
        console.print("These times mean nothing: on a CPU, FP8 is emulated.")
    if len(results) < len(args.models):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
