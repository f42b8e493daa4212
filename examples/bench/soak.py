"""Train a GPT of 100 M parameters for 1000 steps in bf16 and in FP8, and see that nothing drifts.

    python examples/bench/soak.py                      # on a GPU, minutes
    python examples/bench/soak.py --logits fp8 --csv soak.csv   # the head in FP8, too
    python examples/bench/soak.py --recipe e4m3_only
    python examples/bench/soak.py --attention fp8_both   # longer sequences, heads of 128
    python examples/bench/soak.py --tiny --steps 20    # does it run at all?

The model, the text and the loop are those of `examples/train_gpt.py`; both runs start from the same
seed and see the same batches. What must hold, or the exit status is 1:

- the final losses (means of the last tenth of the steps) differ by at most 0.5 %;
- no amax was ever infinite or NaN;
- after the first steps, no new graph is compiled and no more memory is in use.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
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
LARGE = replace(train_gpt.ON_GPU, width=832, steps=1000)  # 108 M parameters
TINY = replace(train_gpt.ON_CPU, layers=1, width=64, context=64, batch=4)
CONFIGS = {  # by whether tiny, and whether attention is in FP8, which takes long heads
    (False, False): LARGE,
    (False, True): replace(LARGE, width=896, head_dim=128, context=4096, batch=4),
    (True, False): TINY,
    (True, True): replace(TINY, width=128, head_dim=128, context=128, batch=2),
}


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


@dataclass
class Soak:
    """One training run and what was seen of it."""

    run: train_gpt.Run
    watched: Watched
    events: dict[str, fp8compile.Events]

    @property
    def saturated(self) -> int:
        return sum(events.saturated for events in self.events.values())

    def problems(self) -> list[str]:
        not_finite = {name: e.not_finite for name, e in self.events.items() if e.not_finite}
        found = [f"amax was not finite: {not_finite}"] if not_finite else []
        return [f"{self.run.name}: {text}" for text in (*found, *self.watched.problems())]


def soak(
    name: str,
    compiler: Callable[[nn.Module], Callable[..., Tensor]],
    text: Tensor,
    config: train_gpt.Config,
    device: str,
) -> Soak:
    torch._dynamo.reset()
    watched: list[Watched] = []

    def compile_model(model: nn.Module) -> Watched:
        watched.append(Watched(compiler(model)))
        return watched[0]

    run = train_gpt.train(name, text, config, torch.device(device), compile_model)
    return Soak(run, watched[0], fp8compile.events(run.model))


def report(high: Soak, fp8: Soak) -> list[str]:
    """Print what came out; returns what is wrong with it."""
    for one in (high, fp8):
        mib = one.watched.bytes[-1] / 2**20
        print(
            f"{one.run.name} final loss {one.run.final_loss:.4f}, {one.run.step_ms:.1f} ms per"
            f" step, {mib:.0f} MiB in use between steps, graphs compiled: {one.watched.compiled}"
        )
    difference = 100 * (fp8.run.final_loss / high.run.final_loss - 1)
    print(f"FP8's final loss differs by {difference:+.3f} %.")
    print(f"Steps with a saturated operand, summed over {len(fp8.events)} edges: {fp8.saturated}")
    found = [*high.problems(), *fp8.problems()]
    if not abs(difference) <= LARGEST_DIFFERENCE:
        found.append(f"the losses differ by more than {LARGEST_DIFFERENCE} %")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="one layer, 64 wide")
    parser.add_argument("--steps", type=int, help="default: 1000, tiny: 300")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    parser.add_argument("--logits", choices=PRECISIONS, default=HIGH_PRECISION)
    parser.add_argument("--recipe", choices=sorted(fp8compile.RECIPES), default="delayed")
    parser.add_argument("--attention", choices=ATTENTION, default=HIGH_PRECISION)
    parser.add_argument("--csv", type=Path, help="append the numbers to this file")
    args = parser.parse_args()
    in_fp8 = args.attention != HIGH_PRECISION
    config = CONFIGS[args.tiny, in_fp8]
    config = replace(config, steps=args.steps or config.steps, seed=args.seed)
    if config.steps <= WARMUP_STEPS:
        parser.error(f"--steps must be more than {WARMUP_STEPS}, got {config.steps}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{device_name(torch.device(device))}, {versions()}, {config}")

    text = train_gpt.standard_library_text()
    high = soak("bf16" if device == "cuda" else "fp32", torch.compile, text, config, device)
    options = {"logits": args.logits, "recipe": args.recipe, "attention": args.attention}
    if in_fp8:  # an error, then, where it is not
        options |= {"strict": True, "decline_slower": False}
    compile_fp8 = partial(torch.compile, backend="fp8", options=options)
    name = "fp8" if args.recipe == "delayed" else f"fp8, {args.recipe}"
    name += ", its logits too" if args.logits == FP8 else ""
    name += f", attention {args.attention}" if in_fp8 else ""
    fp8 = soak(name, compile_fp8, text, config, device)
    problems = report(high, fp8)
    for problem in problems:
        print(f"FAILED: {problem}")
    if args.csv is not None:
        write(args.csv, (high, fp8), config, torch.device(device))
    return 1 if problems else 0


def write(path: Path, soaks: tuple[Soak, Soak], config: object, device: torch.device) -> None:
    rows: list[tuple[str, str, float, str]] = []
    for one in soaks:
        rows += [
            (one.run.name, "final loss", one.run.final_loss, "nats"),
            (one.run.name, "step", one.run.step_ms, "ms"),
            (one.run.name, "in use between steps", one.watched.bytes[-1] / 2**20, "MiB"),
            (one.run.name, "graphs compiled", one.watched.compiled, ""),
        ]
    high, fp8 = soaks
    difference = 100 * (fp8.run.final_loss / high.run.final_loss - 1)
    rows += [(fp8.run.name, "final loss against the other", difference, "%")]
    rows += [(fp8.run.name, "steps with a saturated operand", fp8.saturated, "")]
    append_csv(path, device, str(config), rows)


if __name__ == "__main__":
    sys.exit(main())
