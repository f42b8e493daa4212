"""What every recipe loses, on a CPU: in one GEMM of several inputs, and in the tests' small Llama.

    python examples/recipe_errors.py      # two minutes; also into recipe_study/errors.csv
    python examples/recipe_errors.py --csv my.csv

Numbers are dB of signal to quantization noise against float32. For the GEMM, `x @ w.t()` of
`[512, 1024]` and `[512, 1024]`, every token counts alike: noise is taken over signal for each row
of the result, and averaged. Its inputs are

    normal    of variance 1
    t3        Student's t, with 3 degrees of freedom
    channel   normal, one column 100 times as large
    element   normal, one element in 1000 100 times as large
    extreme   normal, one element in 1000 a million times as large: most rows have one, others none

The Llama has 4 layers, as in the numerics gates (`tests/models.py`), at initialisation; its
gradients are those of all parameters. `auto` is `delayed` with formats chosen by a profile. Each
number is of the second step, for which delayed scales have been found in the first.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fp8compile
from fp8compile.progress import progress

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.helpers import compile_interpreted
from tests.models import Llama, sqnr_db

AUTO = "auto"
TOKENS, WIDTH, FEATURES = 512, 1024, 512


def student_t(shape: tuple[int, int], freedom: int) -> Tensor:
    """A normal number over the root of the mean of so many squared ones."""
    return torch.randn(shape) / torch.randn(freedom, *shape).square().mean(0).sqrt()


def with_channel(x: Tensor, factor: float) -> Tensor:
    return torch.cat([x[:, :1] * factor, x[:, 1:]], 1)


def with_elements(x: Tensor, factor: float) -> Tensor:
    return torch.where(torch.rand(x.shape) < 1e-3, x * factor, x)


INPUTS: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: torch.randn(TOKENS, WIDTH),
    "t3": lambda: student_t((TOKENS, WIDTH), 3),
    "channel": lambda: with_channel(torch.randn(TOKENS, WIDTH), 100),
    "element": lambda: with_elements(torch.randn(TOKENS, WIDTH), 100),
    "extreme": lambda: with_elements(torch.randn(TOKENS, WIDTH), 1e6),
}


# ---- what is measured ----------------------------------------------------------------------------
def gemm_db(recipe: str, name: str, seed: int = 0) -> float:
    """SQNR of one GEMM, each row of the result counting alike."""
    torch.manual_seed(seed)
    x, linear = INPUTS[name](), nn.Linear(WIDTH, FEATURES, bias=False)
    exact = linear(x).detach()
    call = compiled(linear, {"recipe": recipe})
    call(x)
    fp8compile.update_scales(linear)
    noise = (call(x).detach() - exact).square().sum(1) / exact.square().sum(1)
    return float(-10 * noise.mean().log10())


def llama_db(recipe: str, seed: int = 0) -> dict[str, float]:
    """SQNR of the Llama's output, and of its worst and median gradient."""
    torch.manual_seed(seed)
    model, ids = Llama(), torch.randint(0, 256, (4, 64))
    exact = step(model, model, ids)
    call = compiled(model, options_of(recipe, model, ids))
    step(call, model, ids)
    fp8compile.update_scales(model)
    found = {name: sqnr_db(exact[name], value) for name, value in step(call, model, ids).items()}
    output = found.pop("output")
    worst, median = min(found.values()), statistics.median(found.values())
    return {"output": output, "worst gradient": worst, "median gradient": median}


def options_of(recipe: str, model: nn.Module, ids: Tensor) -> dict[str, Any]:
    if recipe != AUTO:
        return {"recipe": recipe}
    found = fp8compile.profile(
        model, [ids], step=lambda call, ids: loss_of(call(ids), ids), sensitivity=False
    )
    return {"profile": found, "formats": "auto"}


def step(call: Callable[[Tensor], Tensor], model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """The output and every parameter's gradient."""
    model.zero_grad()
    logits = call(ids)
    loss_of(logits, ids).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": logits.detach(), **gradients}


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten())


def compiled(model: nn.Module, options: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """With the final graphs run as they are, which says the same as Inductor's code, and sooner."""
    torch._dynamo.reset()
    return compile_interpreted(model, options)


# ---- what comes out ------------------------------------------------------------------------------
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = Path(__file__).with_name("recipe_study") / "errors.csv"
    parser.add_argument("--csv", type=Path, default=default, help=f"default: {default}")
    path = parser.parse_args().csv
    warnings.filterwarnings("ignore", message="FP8 is emulated here")
    table = Table(title="SQNR in dB, of one GEMM and of four Llama layers")
    rows: list[tuple[str, str, float]] = []
    for recipe in progress((*fp8compile.RECIPES, AUTO), "recipes"):
        # A profile of one linear layer would choose among E4M3 and E5M2, and always E4M3.
        found = {} if recipe == AUTO else {name: gemm_db(recipe, name) for name in INPUTS}
        found |= llama_db(recipe)
        rows += [(recipe, what, db) for what, db in found.items()]
    columns = list(dict.fromkeys(what for _, what, _ in rows))
    table.add_column("recipe")
    for column in columns:
        table.add_column(column, justify="right")
    for recipe in dict.fromkeys(recipe for recipe, _, _ in rows):
        found = {what: f"{db:.1f}" for name, what, db in rows if name == recipe}
        table.add_row(recipe, *(found.get(column, "") for column in columns))
    Console(width=max(100, Console().width)).print(table)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("torch", "fp8compile", "recipe", "what", "db"))
        versions = (torch.__version__, fp8compile.__version__)
        writer.writerows((*versions, recipe, what, f"{db:.3f}") for recipe, what, db in rows)
    print(f"Results: {path}")


if __name__ == "__main__":
    main()
