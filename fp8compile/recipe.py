"""Recipes: named, frozen sets of choices about scaling, formats and accumulation.

A recipe says, for each operand role, which format it is cast to, and for each GEMM role, how
partial sums are accumulated. ``RECIPES`` holds the named ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, TypeVar

from .errors import RecipeError
from .formats import Format

Member = TypeVar("Member", bound=Enum)
V = TypeVar("V")


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
    """Where a scale comes from: an amax history (delayed), the tensor itself (current), or the
    weights' statistics and the graph (static).
    """

    DELAYED = "delayed"
    CURRENT = "current"
    STATIC = "static"

    def __str__(self) -> str:
        return self.value


class Granularity(Enum):
    """How many elements of an operand share a scale. The value is its name.

    Given as rows x elements of the dimension that the GEMM sums over (K): a copy for another GEMM,
    which sums over the other dimension, has blocks, and scales, of its own.
    """

    TENSOR = "tensorwise", (0, 0)
    ROW = "rowwise", (1, 0)
    BLOCK_1X128 = "1x128", (1, 128)
    BLOCK_128X128 = "128x128", (128, 128)
    BLOCK_1X32 = "1x32", (1, 32)

    block: tuple[int, int]  # rows and elements of K; 0 stands for all

    def __new__(cls, name: str, block: tuple[int, int]) -> Granularity:
        self = object.__new__(cls)
        self._value_, self.block = name, block
        return self

    def __str__(self) -> str:
        return self.value


# What a GEMM's operands may have, in either order.
GRANULARITIES = (
    *((same, same) for same in Granularity if same is not Granularity.BLOCK_128X128),
    (Granularity.BLOCK_1X128, Granularity.BLOCK_128X128),
)


# Which two operands each GEMM multiplies.
OPERANDS: dict[Gemm, tuple[Operand, Operand]] = {
    Gemm.FPROP: (Operand.INPUT, Operand.WEIGHT),
    Gemm.DGRAD: (Operand.GRAD_OUTPUT, Operand.WEIGHT),
    Gemm.WGRAD: (Operand.GRAD_OUTPUT, Operand.INPUT),
}


@dataclass(frozen=True)
class Recipe:
    """A named set of choices. Raises RecipeError if they do not go together.

    Enums may be given by name, such as ``"wgrad"``, and pairs as a dict or a list: the fields hold
    what they are declared as.

    ``name``: how users refer to it. ``scaling``: delayed, current or static.
    ``formats``: the format of each operand role. ``granularities``: how many of its elements share
    a scale; all of them for a role that is not named. Delayed and static scaling are tensorwise,
    and the operands of a GEMM have the same, or one has 1x128 and the other 128x128.
    ``power_of_two``: round scales that are not tensorwise down to a power of two.
    ``fast_accum``: for each GEMM role, whether partial sums stay in the tensor core's
    reduced-precision accumulator (about 14 bits of mantissa on Hopper, arXiv 2412.19437 section
    3.3.2) over the whole of K, which blocks of K with a scale of their own rule out.
    ``high_precision``: GEMM roles that are not cast at all.
    ``history_len``: how many optimizer steps of amax a delayed scale looks back on.
    ``jump_limit``, ``saturation_limit``: the guard rails of delayed scaling, factors of at least 1;
    ``inf`` turns one off. The largest amax in the history may be ``jump_limit`` times the smallest
    (a history of one step has no jumps). The amax of a step may be ``saturation_limit`` times the
    largest of the steps before: by so much its largest value was clipped. How many others were,
    too, nobody counts, which would cost every cast. Beyond a limit an operand goes back to current
    scaling from the next step on, without a recompilation, until its amax agree again.
    """

    name: str
    scaling: Scaling = Scaling.DELAYED
    formats: tuple[tuple[Operand, Format], ...] = (
        (Operand.INPUT, Format.E4M3),
        (Operand.WEIGHT, Format.E4M3),
        (Operand.GRAD_OUTPUT, Format.E5M2),
    )
    granularities: tuple[tuple[Operand, Granularity], ...] = ()
    power_of_two: bool = False
    fast_accum: tuple[tuple[Gemm, bool], ...] = (
        (Gemm.FPROP, True),
        (Gemm.DGRAD, True),
        (Gemm.WGRAD, True),
    )
    high_precision: tuple[Gemm, ...] = ()
    history_len: int = 16
    jump_limit: float = 32.0
    saturation_limit: float = 1 + 2**-4  # clipping by less does no more than rounding does

    def __post_init__(self) -> None:
        self._take_names()
        if set(self.high_precision) == set(Gemm):
            raise RecipeError(
                f"recipe {self.name!r} keeps fprop, dgrad and wgrad in high precision, which "
                "leaves nothing for FP8; keep two of them at most, or compile without this backend"
            )
        if type(self.history_len) is not int or self.history_len < 1:
            raise RecipeError(
                f"history_len is {self.history_len!r}; it is a number of steps, at least 1"
            )
        for name, limit in (("jump", self.jump_limit), ("saturation", self.saturation_limit)):
            if not isinstance(limit, int | float) or not limit >= 1:  # nor is NaN
                raise RecipeError(
                    f"{name}_limit is {limit!r}; it is a factor between two amax, at least 1, and "
                    "float('inf') turns this guard rail off"
                )
        if self.power_of_two and self.is_tensorwise:
            raise RecipeError(
                f"recipe {self.name!r}: power_of_two is for scales that are not tensorwise; choose "
                f"granularities, or leave it out"
            )
        if self.scaling is not Scaling.CURRENT and not self.is_tensorwise:
            kept = "amax" if self.scaling is Scaling.DELAYED else "scale"
            raise RecipeError(
                f"recipe {self.name!r}: {self.scaling} scaling keeps one {kept} per tensor, which "
                f"{self} cannot use; choose scaling=Scaling.CURRENT"
            )
        for gemm, (left, right) in OPERANDS.items():
            if gemm not in self.high_precision:
                self._check_gemm(gemm, left, right)

    def _take_names(self) -> None:
        """Make enums of names and tuples of dicts and lists: all others compare by identity."""
        what = f"recipe {self.name!r}:"
        if not isinstance(self.name, str):
            raise RecipeError(f"{what} the name of a recipe is a string")
        if not isinstance(self.high_precision, tuple | list):
            legal = [str(gemm) for gemm in Gemm]
            raise RecipeError(
                f"{what} high_precision is {self.high_precision!r}; give a tuple of {legal}"
            )
        _flag(f"{what} power_of_two", self.power_of_two)
        kept = [_member(f"{what} high_precision", gemm, Gemm) for gemm in self.high_precision]
        fast = _pairs(f"{what} fast_accum", self.fast_accum, Gemm, _flag)
        formats = _pairs(f"{what} formats", self.formats, Operand, partial(_member, kind=Format))
        granularity = partial(_member, kind=Granularity)
        granularities = _pairs(f"{what} granularities", self.granularities, Operand, granularity)
        taken = {
            "scaling": _member(f"{what} scaling", self.scaling, Scaling),
            "formats": formats,
            "granularities": granularities,
            "fast_accum": fast,
            "high_precision": tuple(kept),
        }
        for field, value in taken.items():
            object.__setattr__(self, field, value)  # the class is frozen

    def _check_gemm(self, gemm: Gemm, left: Operand, right: Operand) -> None:
        what = f"recipe {self.name!r}: {gemm} would multiply {left} and {right},"
        if self.format_of(left) is self.format_of(right) is Format.E5M2:
            raise RecipeError(
                f"{what} both in e5m2, which no tensor core supports; give one of them e4m3"
            )
        pair = self.granularity_of(left), self.granularity_of(right)
        if not {pair, pair[::-1]} & set(GRANULARITIES):
            legal = "; ".join(f"{one} x {other}" for one, other in GRANULARITIES)
            raise RecipeError(f"{what} {pair[0]} x {pair[1]}; no GEMM takes these. Legal: {legal}")
        if self.fast_accum_of(gemm) and any(one.block[1] for one in pair):
            raise RecipeError(
                f"{what} {pair[0]} x {pair[1]}: every block of K has a scale, so {gemm} cannot "
                "accumulate over all of K (fast_accum); set it to False"
            )

    def format_of(self, operand: Operand) -> Format:
        """The format of an operand role; RecipeError if the recipe gives it none."""
        formats = dict(self.formats)
        if operand not in formats:
            raise RecipeError(
                f"recipe {self.name!r} gives no format for {operand}; it needs one of e4m3, e5m2"
            )
        return formats[operand]

    def granularity_of(self, operand: Operand) -> Granularity:
        """How many elements of an operand role share a scale."""
        return dict(self.granularities).get(operand, Granularity.TENSOR)

    @property
    def is_tensorwise(self) -> bool:
        """Whether every operand has one scale."""
        return all(self.granularity_of(operand) is Granularity.TENSOR for operand in Operand)

    @property
    def is_emulated(self) -> bool:
        """Whether no tensor core of Hopper takes its scales, those of 1x32 blocks: a kernel of ours
        multiplies with the right numerics, slower than bfloat16.
        """
        return any(self.granularity_of(o) is Granularity.BLOCK_1X32 for o in Operand)

    def fast_accum_of(self, gemm: Gemm) -> bool:
        """Whether a GEMM role accumulates in the tensor core's fast mode."""
        chosen = dict(self.fast_accum)
        if gemm not in chosen:
            raise RecipeError(f"recipe {self.name!r} gives no fast_accum for {gemm}; True or False")
        return chosen[gemm]

    def __str__(self) -> str:
        chosen = {self.granularity_of(operand) for operand in Operand}
        one = next(iter(chosen)) if len(chosen) == 1 else None
        formats = " ".join(
            f"{operand}={fmt}" + ("" if one else f":{self.granularity_of(operand)}")
            for operand, fmt in self.formats
        )
        rounded = ", power-of-two scales" if self.power_of_two else ""
        kept = "".join(f", {gemm} in high precision" for gemm in self.high_precision)
        scaling = f"{self.scaling} {one}" if one else str(self.scaling)
        return f"{self.name} ({scaling}, {formats}{rounded}{kept})"


def _member(what: str, value: object, kind: type[Member]) -> Member:
    """A member, given as it is or by its name; RecipeError lists the names there are."""
    named = {str(member): member for member in kind}
    if isinstance(value, kind):
        return value
    if not isinstance(value, str) or value not in named:
        raise RecipeError(f"{what} is {value!r}; choose one of {list(named)}")
    return named[value]


def _flag(what: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise RecipeError(f"{what} is {value!r}; choose True or False")
    return value


def _pairs(
    what: str, given: Any, keys: type[Member], taken: Callable[[str, object], V]
) -> tuple[tuple[Member, V], ...]:
    """Pairs from members of ``keys``, given as such or as a dict, with what ``taken`` makes of
    their values.
    """
    pairs = list(given.items()) if isinstance(given, Mapping) else given
    if not isinstance(pairs, tuple | list) or not all(
        isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs
    ):
        legal = [str(key) for key in keys]
        raise RecipeError(f"{what} is {given!r}; give pairs, or a dict, from {legal} to a value")
    return tuple((_member(what, k, keys), taken(f"{what} of {k}", v)) for k, v in pairs)


_ALL_E4M3 = tuple((operand, Format.E4M3) for operand in Operand)
_PROMOTED = tuple((gemm, False) for gemm in Gemm)  # every block of K is summed up in float32


def _everywhere(granularity: Granularity) -> tuple[tuple[Operand, Granularity], ...]:
    return tuple((operand, granularity) for operand in Operand)


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("delayed", Scaling.DELAYED),
        Recipe("current", Scaling.CURRENT),
        Recipe("static", Scaling.STATIC, history_len=1),  # of an empty history
        Recipe("e4m3_only", formats=_ALL_E4M3),
        # Per token and per channel, as torchao's rowwise recipe.
        Recipe("rowwise", Scaling.CURRENT, _ALL_E4M3, granularities=_everywhere(Granularity.ROW)),
        # DeepSeek-V3, arXiv 2412.19437, section 3.3.2.
        Recipe(
            "blockwise",
            Scaling.CURRENT,
            _ALL_E4M3,
            granularities=(
                (Operand.INPUT, Granularity.BLOCK_1X128),
                (Operand.WEIGHT, Granularity.BLOCK_128X128),
                (Operand.GRAD_OUTPUT, Granularity.BLOCK_1X128),
            ),
            fast_accum=_PROMOTED,
        ),
        # OCP Microscaling Formats 1.0; E4M3 for gradients too, as arXiv 2506.08027 recommends.
        Recipe(
            "mx",
            Scaling.CURRENT,
            _ALL_E4M3,
            granularities=_everywhere(Granularity.BLOCK_1X32),
            power_of_two=True,
            fast_accum=_PROMOTED,
        ),
    )
}


def get_recipe(recipe: str | Recipe) -> Recipe:
    """The recipe of that name, or the recipe itself; RecipeError lists the names there are."""
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise RecipeError(f"unknown recipe {recipe!r}; choose one of {sorted(RECIPES)}")
    return RECIPES[recipe]
