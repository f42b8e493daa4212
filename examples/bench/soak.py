"""Train a GPT of 100 M parameters for 1000 steps in bf16 and in FP8, and see that nothing drifts.

    python examples/bench/soak.py                      # on a GPU, minutes
    python examples/bench/soak.py --logits fp8 --csv soak.csv   # the head in FP8, too
    python examples/bench/soak.py --recipe e4m3_only
    python examples/bench/soak.py --attention high_precision fp8_both --seeds 0 1 2 --noise
    python examples/bench/soak.py --tiny --steps 20    # does it run at all?

The model, the text and the loop are those of `examples/train_gpt.py`. The runs of a seed start from
the same weights and see the same batches: one in bf16, one in FP8 for each `--attention` (if one of
them is in FP8, all runs have longer sequences, and heads of 128), and, for `--noise`, another one
in bf16 whose first weights are 0.1 % off. What must hold, or the exit status is 1:

- the final losses (means of the last tenth of the steps) differ from bf16's by at most 0.5 %, as
  the mean of all seeds; that of the other run in bf16, too, or the soak can tell nothing;
- no amax was ever infinite or NaN;
- after the first steps, no new graph is compiled and no more memory is in use.

Whether a difference is of how the loss is computed or of what was learned is seen from the trained
weights, evaluated in bf16 on other windows of the text.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from timing import append_csv, device_name, versions
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fp8compile
from fp8compile.options import ATTENTION, FP8, HIGH_PRECISION, PRECISIONS

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_gpt

WARMUP_STEPS = 10
LARGEST_DIFFERENCE = 0.5  # % of the loss
NOISE = 1e-3  # of the first weights
EVALUATED = 16  # batches
LARGE = replace(train_gpt.ON_GPU, width=832, steps=1000)  # 108 M parameters
TINY = replace(train_gpt.ON_CPU, layers=1, width=64, context=64, batch=4)
CONFIGS = {  # by whether tiny, and whether attention is in FP8, which takes long heads
    (False, False): LARGE,
    (False, True): replace(LARGE, width=896, head_dim=128, context=4096, batch=4),
    (True, False): TINY,
    (True, True): replace(TINY, width=128, head_dim=128, context=128, batch=2),
}
Compiler = Callable[[nn.Module], Callable[..., Tensor]]


@dataclass
class Watched:
    """A compiled model that notes, at each call, what is in use and what was compiled so far."""

    call: Callable[..., Tensor]
    graphs: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)

    def __call__(self, *args: Tensor) -> Tensor:
        self.graphs.append(counters["stats"]["unique_graphs"])
        self.bytes.append(torch.cuda.memory_allocated() if args[0].is_cuda else 0)
        return self.call(*args)

    @property
    def compiled(self) -> int:
        return self.graphs[-1] - self.graphs[0]

    def problems(self) -> list[str]:
        late_graphs = self.graphs[-1] - self.graphs[WARMUP_STEPS]
        growth = self.bytes[-1] - self.bytes[WARMUP_STEPS]
        found = [f"{late_graphs} graphs compiled after {WARMUP_STEPS} steps"] * (late_graphs > 0)
        return found + [f"{growth} bytes more in use than after {WARMUP_STEPS} steps"] * (
            growth > 0
        )


@dataclass(frozen=True)
class Soak:
    """One training run and what was seen of it. Losses in nats; ``evaluated``: of its weights in
    high precision; ``mib``: in use between steps; ``saturated``: by edge, in how many steps.
    """

    name: str
    final_loss: float
    evaluated: float
    step_ms: float
    mib: float
    graphs: int
    saturated: dict[str, int]
    problems: list[str]

    def __str__(self) -> str:
        text = (
            f"{self.name} final loss {self.final_loss:.4f}, its weights in high precision"
            f" {self.evaluated:.4f}, {self.step_ms:.1f} ms per step, {self.mib:.0f} MiB in use"
            f" between steps, graphs compiled: {self.graphs}"
        )
        if self.saturated:
            steps = sum(self.saturated.values())
            text += f", {steps} steps with a saturated operand in {len(self.saturated)} edges"
        return text

    def against(self, other: Soak) -> tuple[float, float]:
        """How much higher the final loss is, and that of the weights, %."""
        return (
            100 * (self.final_loss / other.final_loss - 1),
            100 * (self.evaluated / other.evaluated - 1),
        )


# ---- one run -------------------------------------------------------------------------------------
def soak(
    name: str, compiler: Compiler, text: Tensor, config: train_gpt.Config, device: torch.device
) -> Soak:
    torch._dynamo.reset()
    watched: list[Watched] = []

    def compile_model(model: nn.Module) -> Watched:
        watched.append(Watched(compiler(model)))
        return watched[0]

    run = train_gpt.train(name, text, config, device, compile_model)
    events = fp8compile.events(run.model)
    not_finite = {name: e.not_finite for name, e in events.items() if e.not_finite}
    problems = [f"amax was not finite: {not_finite}"] if not_finite else []
    return Soak(
        name,
        run.final_loss,
        evaluate(run.model, text, config, device),
        run.step_ms,
        watched[0].bytes[-1] / 2**20,
        watched[0].compiled,
        {name: e.saturated for name, e in events.items()},
        [f"{name}: {problem}" for problem in (*problems, *watched[0].problems())],
    )


@torch.no_grad()
def evaluate(
    model: nn.Module, text: Tensor, config: train_gpt.Config, device: torch.device
) -> float:
    """The mean loss of a model that is not compiled, on windows of the text of another seed."""
    generator = torch.Generator().manual_seed(config.seed + 2)
    losses = []
    for _ in range(EVALUATED):
        batch = [t.to(device) for t in train_gpt.random_batch(text, config, generator)]
        with train_gpt.own_precision(device):
            losses.append(model(*batch).item())
    return statistics.mean(losses)


def compile_perturbed(model: nn.Module) -> Callable[..., Tensor]:
    """Of weights that are a little off, as another order of sums would soon make them."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + NOISE * torch.randn_like(parameter))
    return torch.compile(model)


# ---- all runs ------------------------------------------------------------------------------------
def compilers(args: argparse.Namespace, high: str) -> Iterator[tuple[str, Compiler]]:
    """What every seed is trained with, by name; the first is what others are compared with."""
    yield high, torch.compile
    if args.noise:
        yield f"{high}, other weights", compile_perturbed
    for attention in args.attention:
        options = {"logits": args.logits, "recipe": args.recipe, "attention": attention}
        name = "fp8" if args.recipe == "delayed" else f"fp8, {args.recipe}"
        name += ", its logits too" if args.logits == FP8 else ""
        if attention != HIGH_PRECISION:  # an error, then, where it is not
            options |= {"strict": True, "decline_slower": False}
            name += f", attention {attention}"
        yield name, partial(torch.compile, backend="fp8", options=options)


def soak_all(args: argparse.Namespace, config: train_gpt.Config, device: torch.device) -> list[str]:
    """Train with each compiler from each seed, and print what comes out; returns what is wrong."""
    text = train_gpt.standard_library_text()
    high = "bf16" if device.type == "cuda" else "fp32"
    differences: dict[str, list[tuple[float, float]]] = {}
    problems = []
    for seed in args.seeds:
        of_seed = replace(config, seed=seed)
        first: Soak | None = None
        for name, compiler in compilers(args, high):
            one = soak(name, compiler, text, of_seed, device)
            print(f"seed {seed}: {one}", flush=True)
            problems += one.problems
            first = first or one
            if one is not first:
                differences.setdefault(name, []).append(one.against(first))
            if args.csv is not None:
                write(args.csv, one, first, of_seed, device)
    return problems + report(differences, high)


def report(differences: dict[str, list[tuple[float, float]]], high: str) -> list[str]:
    """Print how far each is from ``high``, over all seeds; returns what is wrong with it."""
    found = []
    for name, pairs in differences.items():
        losses, weights = ([pair[i] for pair in pairs] for i in (0, 1))
        print(f"{name} against {high}: {mean_of(losses)}; its weights: {mean_of(weights)}")
        if not abs(statistics.mean(losses)) <= LARGEST_DIFFERENCE:
            found.append(f"{name}: the losses differ by more than {LARGEST_DIFFERENCE} %")
    return found


def mean_of(values: list[float]) -> str:
    """The mean, and its standard error where there is more than one."""
    text = f"{statistics.mean(values):+.3f} %"
    if len(values) > 1:
        text += f" (standard error {statistics.stdev(values) / len(values) ** 0.5:.3f})"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="one layer, 64 wide")
    parser.add_argument("--steps", type=int, help="default: 1000, tiny: 300")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of weights and batches")
    parser.add_argument("--logits", choices=PRECISIONS, default=HIGH_PRECISION)
    parser.add_argument("--recipe", choices=sorted(fp8compile.RECIPES), default="delayed")
    parser.add_argument("--attention", nargs="+", choices=ATTENTION, default=[HIGH_PRECISION])
    parser.add_argument("--noise", action="store_true", help="also another run in high precision")
    parser.add_argument("--csv", type=Path, help="append the numbers to this file")
    args = parser.parse_args()
    config = CONFIGS[args.tiny, args.attention != [HIGH_PRECISION]]
    config = replace(config, steps=args.steps or config.steps)
    if config.steps <= WARMUP_STEPS:
        parser.error(f"--steps must be more than {WARMUP_STEPS}, got {config.steps}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{device_name(device)}, {versions()}, {config}")

    problems = soak_all(args, config, device)
    for problem in problems:
        print(f"FAILED: {problem}")
    return 1 if problems else 0


def write(
    path: Path, one: Soak, first: Soak, config: train_gpt.Config, device: torch.device
) -> None:
    rows: list[tuple[str, str, float, str]] = [
        (one.name, "final loss", one.final_loss, "nats"),
        (one.name, "loss of its weights in high precision", one.evaluated, "nats"),
        (one.name, "step", one.step_ms, "ms"),
        (one.name, "in use between steps", one.mib, "MiB"),
        (one.name, "graphs compiled", one.graphs, ""),
    ]
    if one is not first:
        loss, weights = one.against(first)
        rows += [
            (one.name, "final loss against the other", loss, "%"),
            (one.name, "loss of its weights against the other", weights, "%"),
        ]
    if one.saturated:
        steps = sum(one.saturated.values())
        rows += [(one.name, "steps with a saturated operand", steps, "")]
    append_csv(path, device, str(config), rows)


if __name__ == "__main__":
    sys.exit(main())
