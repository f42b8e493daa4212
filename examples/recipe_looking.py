"""What `recipe_study.py` looks at in a step: exact gradients, and the scales of every operand."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import train_gpt
from recipe_results import QUANTILES, ROLES
from torch import Tensor, nn

import fp8compile
from fp8compile import Operand, Recipe, Scaling
from fp8compile.ops import quantize, quantize_blocks
from fp8compile.options import parse_options

PER_TENSOR = 1000  # of a tensor's scales so many count, evenly spread over them in sorted order

Scales = dict[Operand, dict[str, Tensor]]  # by role and layer


class Watch:
    """A model that is trained with the options of the FP8 backend; without any, without FP8."""

    def __init__(self, model: train_gpt.GPT, options: Mapping[str, Any]) -> None:
        self.model = model
        modules = model.named_modules()
        self.linears = {name: m for name, m in modules if isinstance(m, nn.Linear)}
        chosen = parse_options(options)
        self.recipes: dict[str, Recipe] = {
            name: chosen.own_recipe(name) or chosen.recipe
            for name, linear in self.linears.items()
            if options and linear is not model.lm_head  # makes the logits, stays in high precision
        }

    def formats(self) -> dict[str, str]:
        """By the names of the roles; several where layers differ."""
        found = {
            name: {str(recipe.format_of(role)) for recipe in self.recipes.values()}
            for role, name in ROLES.items()
        }
        return {name: " and ".join(sorted(formats)) for name, formats in found.items()}

    def look(
        self, batch: tuple[Tensor, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
        """The weights' gradients in eager float32, by layer, and log2 of the QUANTILES of scales,
        by role.
        """
        kept = self._kept_scales()
        wanted = [role for role in ROLES if not kept.get(role)] if self.recipes else []
        found: Scales = {role: {} for role in wanted}

        def look_at(layer: str, role: Operand, value: Tensor) -> None:
            if role in wanted:
                found[role][layer] = scales_of(value.detach(), role, self.recipes[layer])

        def look_at_operands(layer: str, linear: Any, inputs: tuple[Tensor], out: Tensor) -> None:
            look_at(layer, Operand.INPUT, inputs[0])
            look_at(layer, Operand.WEIGHT, linear.weight)
            out.register_hook(partial(look_at, layer, Operand.GRAD_OUTPUT))

        hooks = [
            self.linears[layer].register_forward_hook(partial(look_at_operands, layer))
            for layer in self.recipes
        ]
        loss = self.model(*batch)
        for hook in hooks:
            hook.remove()
        weights = [linear.weight for linear in self.linears.values()]
        gradients = dict(zip(self.linears, torch.autograd.grad(loss, weights), strict=True))
        return gradients, quantiles(kept | found)

    def _kept_scales(self) -> Scales:
        """The scales that the recipe keeps, of roles of which it knows any."""
        state = fp8compile.state_dict(self.model)
        kept: Scales = {}
        for layer, recipe in self.recipes.items():
            if recipe.scaling is Scaling.CURRENT:
                continue
            for role in ROLES:
                scale = state[f"{layer}.weight.scale"][[role.value]]
                if scale > 0:  # else its cast finds one, or it shares that of another layer
                    kept.setdefault(role, {})[layer] = scale
        return kept


def scales_of(value: Tensor, role: Operand, recipe: Recipe) -> Tensor:
    """The scales that a recipe finds in an operand, sorted: one, or one per block of a row."""
    matrix, dtype = value.flatten(0, -2).float(), recipe.format_of(role).dtype

    def scale_inv(x: Tensor) -> Tensor:
        if recipe.is_tensorwise:
            return quantize(x, None, 0, dtype, True, False)[2]
        block = list(recipe.granularity_of(role).block)
        return quantize_blocks(x, block, recipe.power_of_two, dtype, True, False)[2].flatten()

    found = scale_inv(matrix)
    if (found == 1).any():  # where all is zero, which says nothing: there twice as much has it too
        found = found[found != scale_inv(2 * matrix)]
    scales = found.reciprocal().sort().values
    return evenly(scales, min(len(scales), PER_TENSOR))


def evenly(values: Tensor, count: int) -> Tensor:
    """So many of the values, from the first to the last."""
    return values[torch.linspace(0, len(values) - 1, count, device=values.device).long()]


def quantiles(scales: Scales) -> dict[str, list[float]]:
    """log2 of the QUANTILES of each role's scales."""
    found = {}
    for role, name in ROLES.items():
        if layers := scales.get(role):
            values = torch.cat(list(layers.values())).log2().sort().values
            places = [round(q * (len(values) - 1)) for q in QUANTILES.values()]
            found[name] = values[places].tolist()
    return found
