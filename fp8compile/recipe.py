"""Recipes: named, frozen sets of choices about scaling, formats and accumulation.

A recipe says, for each operand role, which format it is cast to, and for each GEMM role, how
partial sums are accumulated. ``RECIPES`` holds the named ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from .errors import RecipeError
from .formats import Format


class Gemm(Enum):
    """The three GEMMs of a linear layer, by TransformerEngine's names."""

    FPROP = "fprop"
    DGRAD = "dgrad"
    WGRAD = "wgrad"

    def __str__(self) -> str:
        return self.value


class Operand(Enum):
    """The role of a GEMM's operand. The value is its slot within a site's scaling state."""

    INPUT = 0
    WEIGHT = 1
    GRAD_OUTPUT = 2

    def __str__(self) -> str:
        return self.name.lower()


class Scaling(Enum):
    """Where a scale comes from: an amax history (delayed) or the tensor itself (current)."""

    DELAYED = "delayed"
    CURRENT = "current"

    def __str__(self) -> str:
        return self.value


# Which two operands each GEMM multiplies.
OPERANDS: dict[Gemm, tuple[Operand, Operand]] = {
    Gemm.FPROP: (Operand.INPUT, Operand.WEIGHT),
    Gemm.DGRAD: (Operand.GRAD_OUTPUT, Operand.WEIGHT),
    Gemm.WGRAD: (Operand.GRAD_OUTPUT, Operand.INPUT),
}


@dataclass(frozen=True)
class Recipe:
    """A named set of choices. Raises RecipeError if they do not go together.

    ``name``: how users refer to it. ``scaling``: delayed or current, always tensorwise.
    ``formats``: the format of each operand role. ``fast_accum``: for each GEMM role, whether
    partial sums stay in the tensor core's reduced-precision accumulator (about 14 bits of
    mantissa on Hopper, arXiv 2412.19437 section 3.3.2) over the whole of K.
    ``high_precision``: GEMM roles that are not cast at all.
    ``history_len``: how many optimizer steps of amax a delayed scale looks back on.
    """

    name: str
    scaling: Scaling = Scaling.DELAYED
    formats: tuple[tuple[Operand, Format], ...] = (
        (Operand.INPUT, Format.E4M3),
        (Operand.WEIGHT, Format.E4M3),
        (Operand.GRAD_OUTPUT, Format.E5M2),
    )
    fast_accum: tuple[tuple[Gemm, bool], ...] = field(
        default=((Gemm.FPROP, True), (Gemm.DGRAD, True), (Gemm.WGRAD, True))
    )
    high_precision: tuple[Gemm, ...] = ()
    history_len: int = 16

    def __post_init__(self) -> None:
        if set(self.high_precision) == set(Gemm):
            raise RecipeError(
                f"recipe {self.name!r} keeps fprop, dgrad and wgrad in high precision, which "
                "leaves nothing for FP8; keep two of them at most, or compile without this backend"
            )
        if self.history_len < 1:
            raise RecipeError(f"history_len is {self.history_len}; it must be at least 1")
        for gemm, (left, right) in OPERANDS.items():
            if self.format_of(left) is self.format_of(right) is Format.E5M2:
                raise RecipeError(
                    f"recipe {self.name!r}: {gemm} would multiply {left} and {right}, both in "
                    "e5m2, which no tensor core supports; give one of them e4m3"
                )

    def format_of(self, operand: Operand) -> Format:
        """The format of an operand role; RecipeError if the recipe gives it none."""
        formats = dict(self.formats)
        if operand not in formats:
            raise RecipeError(
                f"recipe {self.name!r} gives no format for {operand}; it needs one of e4m3, e5m2"
            )
        return formats[operand]

    def fast_accum_of(self, gemm: Gemm) -> bool:
        """Whether a GEMM role accumulates in the tensor core's fast mode."""
        return dict(self.fast_accum)[gemm]

    def __str__(self) -> str:
        formats = " ".join(f"{operand}={fmt}" for operand, fmt in self.formats)
        kept = "".join(f", {gemm} in high precision" for gemm in self.high_precision)
        return f"{self.name} ({self.scaling} tensorwise, {formats}{kept})"


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("delayed", Scaling.DELAYED),
        Recipe("current", Scaling.CURRENT),
        Recipe("e4m3_only", formats=tuple((operand, Format.E4M3) for operand in Operand)),
    )
}


def get_recipe(recipe: str | Recipe) -> Recipe:
    """The recipe of that name, or the recipe itself; RecipeError lists the names there are."""
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise RecipeError(f"unknown recipe {recipe!r}; choose one of {sorted(RECIPES)}")
    return RECIPES[recipe]
