"""Recipes: what is legal, and what a wrong one says."""

from __future__ import annotations

import dataclasses

import pytest

from fp8compile import RECIPES, Format, Gemm, Operand, OptionError, Recipe, RecipeError, Scaling
from fp8compile.recipe import OPERANDS, get_recipe

E4M3, E5M2 = Format.E4M3, Format.E5M2


def formats(*values: Format) -> tuple[tuple[Operand, Format], ...]:
    return tuple(zip(Operand, values, strict=True))


def test_named_recipes() -> None:
    assert {name: recipe.scaling for name, recipe in RECIPES.items()} == {
        "delayed": Scaling.DELAYED,
        "current": Scaling.CURRENT,
        "e4m3_only": Scaling.DELAYED,
    }
    for name, recipe in RECIPES.items():
        assert recipe.formats == formats(E4M3, E4M3, E4M3 if name == "e4m3_only" else E5M2)
        assert recipe.history_len == 16 and recipe.high_precision == ()


def test_get_recipe() -> None:
    assert get_recipe("current") is RECIPES["current"]
    own = Recipe("own", history_len=4)
    assert get_recipe(own) is own


def test_unknown_recipe_lists_the_names() -> None:
    with pytest.raises(RecipeError, match=r"'delyed'.*\['current', 'delayed', 'e4m3_only'\]"):
        get_recipe("delyed")


def test_a_recipe_is_frozen_and_hashable() -> None:
    recipe = RECIPES["delayed"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.name = "other"  # type: ignore[misc]
    assert hash(recipe) == hash(dataclasses.replace(recipe))


@pytest.mark.parametrize(
    ("values", "gemm"),
    [((E5M2, E5M2, E4M3), "fprop"), ((E4M3, E5M2, E5M2), "dgrad"), ((E5M2, E4M3, E5M2), "wgrad")],
)
def test_two_e5m2_operands_are_refused(values: tuple[Format, ...], gemm: str) -> None:
    with pytest.raises(RecipeError, match=f"{gemm} would multiply .* both in e5m2"):
        Recipe("bad", formats=formats(*values))


def test_a_missing_format_is_refused() -> None:
    with pytest.raises(RecipeError, match="no format for grad_output"):
        Recipe("bad", formats=formats(E4M3, E4M3, E5M2)[:2])


def test_an_empty_history_is_refused() -> None:
    with pytest.raises(RecipeError, match="history_len is 0"):
        Recipe("bad", history_len=0)


def test_recipe_error_is_a_value_error() -> None:
    assert issubclass(RecipeError, ValueError) and issubclass(OptionError, ValueError)


def test_every_operand_takes_part_in_two_gemms() -> None:
    for operand in Operand:
        assert sum(operand in pair for pair in OPERANDS.values()) == 2


def test_text() -> None:
    expected = "current (current tensorwise, input=e4m3 weight=e4m3 grad_output=e5m2)"
    assert str(RECIPES["current"]) == expected
    assert [str(gemm) for gemm in Gemm] == ["fprop", "dgrad", "wgrad"]


def test_fast_accumulation_is_per_gemm() -> None:
    recipe = Recipe("slow", fast_accum=tuple((gemm, gemm is Gemm.FPROP) for gemm in Gemm))
    assert [recipe.fast_accum_of(gemm) for gemm in Gemm] == [True, False, False]


def test_a_recipe_that_leaves_nothing_for_fp8_is_refused() -> None:
    with pytest.raises(RecipeError, match="leaves nothing for FP8"):
        Recipe("bad", high_precision=(Gemm.DGRAD, Gemm.WGRAD, Gemm.FPROP))


def test_a_recipe_says_what_it_keeps() -> None:
    recipe = Recipe("careful", high_precision=(Gemm.WGRAD,))
    assert str(recipe).endswith("grad_output=e5m2, wgrad in high precision)")
