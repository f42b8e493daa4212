"""Train the same small GPT with every recipe, and draw what each does to loss, gradients, scales.

    python examples/recipe_study.py                    # on a GPU, minutes per recipe
    python examples/recipe_study.py --tiny             # one layer, 64 wide: minutes on a CPU
    python examples/recipe_study.py --recipes delayed blockwise --steps 1000

All runs start from the same seed and see the same batches of real text; the model and the loop are
those of `train_gpt.py`. The first run is in the model's own precision: fp32 on a CPU, bf16 on a
GPU. All others have every GEMM in FP8 but the head's, also where it does not pay. Into a folder
beside this file go

    results.csv    every number, with the device and the versions it was found with
    loss.png       loss curves, and how far each is from the model's own precision
    gradients.png  SQNR of every layer's weight gradient, against float32 in eager PyTorch
    scales.png     scales of weights, activations and gradients over the steps, by recipe, as in
                   arXiv 2309.17224 ("Training and inference of large language models using 8-bit
                   floating point")

Gradients and scales are looked at in a few steps, the samples, spread over the run. A delayed or
static scale is read from the scaling state. Other recipes find theirs in the tensors: shown are
those that they find in the operands of the float32 run that the gradients are compared with.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import train_gpt
import triton
from recipe_pictures import QUANTILES, ROLES, Seen, draw_gradients, draw_losses, draw_scales
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

import fp8compile
from fp8compile import Operand, Recipe, Scaling
from fp8compile.ops import quantize, quantize_blocks

sys.path.insert(0, str(Path(__file__).parent / "bench"))
from soak import TINY
from timing import device_name, median_ms, sqnr_db

PER_TENSOR = 1000  # of a tensor's scales so many count, evenly spread over them in sorted order
WARMUP_STEPS, TIMED_STEPS = 3, 20
COLUMNS = ("device", "torch", "triton", "fp8compile", "config", "recipe", "what", "step", "of")

Scales = dict[Operand, dict[str, Tensor]]  # by role and layer


# ---- one run -------------------------------------------------------------------------------------
def study(
    name: str,
    recipe: Recipe | None,
    config: train_gpt.Config,
    samples: set[int],
    advance: Callable[[], None],
) -> Seen:
    """Train a new model with a recipe, or without FP8."""
    torch._dynamo.reset()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text, model = train_gpt.standard_library_text(), train_gpt.new_model(config, device)
    fp8 = {"backend": "fp8", "options": {"recipe": recipe, "decline_slower": False}}
    compiled = torch.compile(model, **(fp8 if recipe else {}))
    train = partial(train_gpt.training_steps, model, compiled, text)
    formats = {name: str(recipe.format_of(role)) for role, name in ROLES.items()} if recipe else {}
    seen, losses = Seen(name, formats), []
    for step, (loss, batch) in enumerate(train(config, device)):
        losses.append(loss.detach())
        if step in samples:
            exact, found = float32_gradients(model, batch, recipe)
            seen.sqnr[step] = {
                layer: sqnr_db(exact[layer], linear.weight.grad)
                for layer, linear in linears(model).items()
            }
            if recipe is not None:
                seen.scales[step] = quantiles(with_kept(found, model, recipe))
        advance()
    seen.losses = torch.stack(losses).tolist()
    if device.type == "cuda":
        more = train(replace(config, steps=WARMUP_STEPS + TIMED_STEPS), device)
        for _ in range(WARMUP_STEPS):
            next(more)
        seen.step_ms = median_ms(lambda: next(more), TIMED_STEPS, device)
    return seen


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def float32_gradients(
    model: train_gpt.GPT, batch: tuple[Tensor, Tensor], recipe: Recipe | None
) -> tuple[dict[str, Tensor], Scales]:
    """The weights' gradients in eager float32, and the scales that a recipe finds on the way."""
    found: Scales = {role: {} for role in ROLES}

    def look(layer: str, role: Operand, value: Tensor) -> None:
        if recipe is not None:
            found[role][layer] = scales_of(value.detach(), role, recipe)

    def look_at_operands(layer: str, linear: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        look(layer, Operand.INPUT, inputs[0])
        look(layer, Operand.WEIGHT, linear.weight)
        output.register_hook(partial(look, layer, Operand.GRAD_OUTPUT))

    layers = linears(model)
    hooks = [
        linear.register_forward_hook(partial(look_at_operands, name))
        for name, linear in layers.items()
        if linear is not model.lm_head  # makes the loss's logits, and stays in high precision
    ]
    loss = model(*batch)
    for hook in hooks:
        hook.remove()
    gradients = torch.autograd.grad(loss, [linear.weight for linear in layers.values()])
    return dict(zip(layers, gradients, strict=True)), found


def scales_of(value: Tensor, role: Operand, recipe: Recipe) -> Tensor:
    """The scales that a recipe finds in an operand, sorted: one, or one per block of a row."""
    matrix, dtype = value.flatten(0, -2).float(), recipe.format_of(role).dtype

    def scale_inv(x: Tensor) -> Tensor:
        if recipe.is_tensorwise:
            return quantize(x, None, 0, dtype)[2]
        block = list(recipe.granularity_of(role).block)
        return quantize_blocks(x, block, recipe.power_of_two, dtype, True, False)[2].flatten()

    found = scale_inv(matrix)
    # What is all zeros has a scale of 1, which says nothing, and twice as much of it has too.
    scales = found[found != scale_inv(2 * matrix)].reciprocal().sort().values
    return evenly(scales, min(len(scales), PER_TENSOR))


def evenly(values: Tensor, count: int) -> Tensor:
    """So many of the values, from the first to the last."""
    return values[torch.linspace(0, len(values) - 1, count, device=values.device).long()]


def with_kept(found: Scales, model: nn.Module, recipe: Recipe) -> Scales:
    """With the scales of the last step where the recipe keeps them, and knows any."""
    if recipe.scaling is Scaling.CURRENT:
        return found
    state = fp8compile.state_dict(model)
    kept: Scales = {}
    for role, layers in found.items():
        scales = {layer: state[f"{layer}.weight.scale"][[role.value]] for layer in layers}
        # 0: its cast finds one, or the layer is merged with another, whose scale it shares.
        known = {layer: scale for layer, scale in scales.items() if scale > 0}
        kept[role] = known or layers
    return kept


def quantiles(scales: Scales) -> dict[str, list[float]]:
    """log2 of the QUANTILES of each role's scales."""
    found = {}
    for role, layers in scales.items():
        values = torch.cat(list(layers.values())).log2().sort().values
        found[ROLES[role]] = [
            float(values[round(q * (len(values) - 1))]) for q in QUANTILES.values()
        ]
    return found


# ---- what comes out ------------------------------------------------------------------------------
def write_csv(path: Path, runs: Sequence[Seen], config: train_gpt.Config, device: str) -> None:
    versions = (torch.__version__, triton.__version__, fp8compile.__version__)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow((*COLUMNS, "value", "unit"))
        for run in runs:
            for what, step, of, value, unit in run.rows():
                where = (device, *versions, config, run.name, what, step, of)
                writer.writerow((*where, f"{value:.5g}", unit))


# ---- all runs ------------------------------------------------------------------------------------
def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args = parse()
    default = train_gpt.ON_GPU if device.type == "cuda" else train_gpt.ON_CPU
    config = TINY if args.tiny else default
    config = replace(config, steps=args.steps or (60 if args.tiny else config.steps))
    count = max(1, min(args.samples, config.steps) - 1)
    samples = {round(i * (config.steps - 1) / count) for i in range(count + 1)}
    own = "bf16" if device.type == "cuda" else "fp32"
    chosen: dict[str, Recipe | None] = {
        own: None,
        **{n: fp8compile.RECIPES[n] for n in args.recipes},
    }
    console = Console(stderr=True)
    runs = []
    with Progress(console=console, disable=not console.is_terminal) as progress:
        for name, recipe in chosen.items():
            task = progress.add_task(name.ljust(10), total=config.steps)
            advance = partial(progress.advance, task)
            runs.append(study(name, recipe, config, samples, advance))
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(args.out / "results.csv", runs, config, device_name(device))
    layers = f"{config.layers} layer{'s' if config.layers > 1 else ''}, width {config.width}"
    title = f"{layers}, {config.batch} x {config.context} bytes a step; {device_name(device)}"
    draw_losses(runs, args.out / "loss.png", title)
    draw_gradients(runs, args.out / "gradients.png", title)
    if args.recipes:
        draw_scales(runs, args.out / "scales.png", title)
    for run in runs:
        worst = min(min(layers.values()) for layers in run.sqnr.values())
        print(f"{run.name:10} final loss {run.final_loss:.4f}, worst gradient {worst:.1f} dB")
    print(f"Results: {args.out}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = list(fp8compile.RECIPES)
    parser.add_argument(
        "--recipes",
        nargs="+",
        choices=names,
        default=names,
        metavar="NAME",
        help=f"default: {' '.join(names)}",
    )
    parser.add_argument("--tiny", action="store_true", help="one layer, 64 wide")
    parser.add_argument("--steps", type=int, help="default: as train_gpt.py; tiny: 60")
    parser.add_argument("--samples", type=int, default=12, help="steps that are looked at closely")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(""))
    return parser.parse_args()


if __name__ == "__main__":
    main()
