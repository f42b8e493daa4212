"""Batches in the wrong unit: what they do to training in FP8, and what the guard rails change.

    python examples/guard_rails.py                 # a bad batch every 12th step, from step 30 on
    python examples/guard_rails.py --every 0       # only one
    python examples/guard_rails.py --factor 1000   # smaller numbers

A classifier normalizes what its first layer makes of its inputs. So in float32 a batch whose
inputs are a million times larger is as good as any. In FP8 with delayed scaling the bad batch
itself is clipped, whatever one does. What matters is what comes after: its amax stays in the
history for 16 steps, and with the scale that follows from it ordinary inputs round to zero.

All runs have the same initial weights and the same batches. They differ in the recipe:

    saturation_limit    after a clipped step, the next finds its own scale
    jump_limit          so do all steps until the history's amax agree again
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from typing import Any

# CPU threads that wait for each other sleep: spinning is several times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fp8compile
from fp8compile import Recipe
from fp8compile.progress import progress

FEATURES, WIDTH, CLASSES, ROWS = 64, 32, 16, 128
FIRST_BAD = 30
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RECIPES = {
    "float32": None,
    "FP8, no guard rail": Recipe("bare", jump_limit=math.inf, saturation_limit=math.inf),
    "FP8, saturation_limit": Recipe("saturation", jump_limit=math.inf),
    "FP8, both (default)": Recipe("both"),
}


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        )
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.mlp(self.norm(self.stem(x)))), labels)


def batches(args: argparse.Namespace) -> list[tuple[Tensor, Tensor]]:
    """Inputs, and which of a fixed set of directions each is closest to; bad ones among them."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(FEATURES, CLASSES, generator=generator)
    made = []
    for step in range(args.steps):
        x = torch.randn(ROWS, FEATURES, generator=generator)
        factor = args.factor if is_bad(step, args.every) else 1.0
        made.append(((factor * x).to(DEVICE), (x @ directions).argmax(1).to(DEVICE)))
    return made


def is_bad(step: int, every: int) -> bool:
    since = step - FIRST_BAD
    return since == 0 or (every > 0 and since > 0 and since % every == 0)


def train(
    compile_model: Callable[[nn.Module], Callable[..., Tensor]], args: argparse.Namespace, name: str
) -> tuple[nn.Module, list[float]]:
    torch.manual_seed(0)
    model = Classifier().to(DEVICE)
    compiled = compile_model(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for x, labels in progress(batches(args), name):
        loss = compiled(x, labels)
        loss.backward()
        optimizer.step()  # in FP8 this also updates the scales
        optimizer.zero_grad()
        losses.append(loss.detach())
    return model, torch.stack(losses).tolist()


def compiler(recipe: Recipe | None) -> Any:
    if recipe is None:
        return lambda model: model
    options = {"recipe": recipe, "decline_slower": False}  # this model is too small to be faster
    return lambda model: torch.compile(model, backend="fp8", options=options)


def mean(losses: list[float]) -> float:
    return sum(losses) / len(losses)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--factor", type=float, default=1e6, help="how much too large")
    parser.add_argument("--every", type=int, default=12, help="steps to the next; 0: only one")
    args = parser.parse_args(argv)
    if args.steps < FIRST_BAD + 12:
        parser.error(f"--steps must be at least {FIRST_BAD + 12}: step {FIRST_BAD} is the bad one")

    print(f"Loss (chance: {math.log(CLASSES):.2f}); the first bad batch comes in step {FIRST_BAD}")
    columns = ("before", "1 after", "2 after", "worst after", "last 10", "jumps")
    print(f"{'':<22}" + "".join(f"{column:>12}" for column in columns))
    for name, recipe in RECIPES.items():
        model, losses = train(compiler(recipe), args, name)
        before, _, first, second, *_ = losses[FIRST_BAD - 1 :]
        good = [loss for step, loss in enumerate(losses) if not is_bad(step, args.every)]
        shown = (before, first, second, max(good[FIRST_BAD:]), mean(losses[-10:]))
        jumps = sum(event.jumped for event in fp8compile.events(model).values())
        print(f"{name:<22}" + "".join(f"{value:>12.3f}" for value in shown) + f"{jumps:>12}")
    jumped = {edge: event for edge, event in fp8compile.events(model).items() if event.jumped}
    print("\nWhere, in the last run:", *(f"{e}: {event}" for e, event in jumped.items()), sep="\n")


if __name__ == "__main__":
    main()
