"""Recipes: what is legal, and what a wrong one says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from fp8compile import (
    RECIPES,
    Format,
    Gemm,
    Granularity,
    Operand,
    OptionError,
    Recipe,
    RecipeError,
    Scaling,
)
from fp8compile.recipe import OPERANDS, get_recipe

E4M3, E5M2 = Format.E4M3, Format.E5M2


def formats(*values: Format) -> tuple[tuple[Operand, Format], ...]:
    return tuple(zip(Operand, values, strict=True))


def test_named_recipes() -> None:
    assert {name: recipe.scaling for name, recipe in RECIPES.items()} == {
        "delayed": Scaling.DELAYED,
        "current": Scaling.CURRENT,
        "e4m3_only": Scaling.DELAYED,
        "rowwise": Scaling.CURRENT,
        "blockwise": Scaling.CURRENT,
        "mx": Scaling.CURRENT,
        "static": Scaling.STATIC,
    }
    for name, recipe in RECIPES.items():
        wide = name in ("delayed", "current", "static")
        assert recipe.formats == formats(E4M3, E4M3, E5M2 if wide else E4M3)
        assert recipe.history_len == (1 if name == "static" else 16)
        assert recipe.high_precision == ()


def test_granularities_of_the_named_recipes() -> None:
    found = {n: [str(r.granularity_of(operand)) for operand in Operand] for n, r in RECIPES.items()}
    assert found == {
        **dict.fromkeys(("delayed", "current", "e4m3_only", "static"), ["tensorwise"] * 3),
        "rowwise": ["rowwise"] * 3,
        "blockwise": ["1x128", "128x128", "1x128"],
        "mx": ["1x32"] * 3,
    }
    assert [name for name, recipe in RECIPES.items() if recipe.power_of_two] == ["mx"]


def test_get_recipe() -> None:
    assert get_recipe("current") is RECIPES["current"]
    own = Recipe("own", history_len=4)
    assert get_recipe(own) is own


def test_unknown_recipe_lists_the_names() -> None:
    with pytest.raises(RecipeError, match=r"'delyed'.*\['blockwise', 'current', 'delayed', "):
        get_recipe("delyed")
    with pytest.raises(RecipeError, match=r"\{'scaling': 'current'\}; choose one of"):
        get_recipe({"scaling": "current"})  # type: ignore[arg-type]


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


@pytest.mark.parametrize("limit", ["jump_limit", "saturation_limit"])
@pytest.mark.parametrize("value", [0.5, -2.0, 0.0, float("nan"), float("-inf")])
def test_a_limit_below_one_is_refused(limit: str, value: float) -> None:
    with pytest.raises(RecipeError, match=rf"^{limit} is {value}; .*at least 1, .*'inf'\) turns"):
        Recipe("bad", **{limit: value})
    for legal in (1.0, 2, float("inf")):
        assert getattr(Recipe("own", **{limit: legal}), limit) == legal


def test_recipe_error_is_a_value_error() -> None:
    assert issubclass(RecipeError, ValueError) and issubclass(OptionError, ValueError)


def test_every_operand_takes_part_in_two_gemms() -> None:
    for operand in Operand:
        assert sum(operand in pair for pair in OPERANDS.values()) == 2


def test_text() -> None:
    expected = "current (current tensorwise, input=e4m3 weight=e4m3 grad_output=e5m2)"
    assert str(RECIPES["current"]) == expected
    expected = "current, input=e4m3:1x128 weight=e4m3:128x128 grad_output=e4m3:1x128"
    assert str(RECIPES["blockwise"]) == f"blockwise ({expected})"
    expected = "current 1x32, input=e4m3 weight=e4m3 grad_output=e4m3, power-of-two scales"
    assert str(RECIPES["mx"]) == f"mx ({expected})"
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


PRECISE = tuple((gemm, False) for gemm in Gemm)
ROW, ONE_ROW, SQUARE = Granularity.ROW, Granularity.BLOCK_1X128, Granularity.BLOCK_128X128


def fine(*granularities: Granularity, **kwargs: object) -> Recipe:
    """A recipe with a granularity for input, weight and grad_output."""
    pairs = tuple(zip(Operand, granularities, strict=True))
    given = {"scaling": Scaling.CURRENT, "formats": formats(E4M3, E4M3, E4M3), **kwargs}
    return Recipe("own", granularities=pairs, **given)  # type: ignore[arg-type]


def test_operands_need_granularities_that_a_gemm_takes() -> None:
    with pytest.raises(RecipeError, match=r"fprop .* rowwise x 1x128; .* Legal: .*1x128 x 128x128"):
        fine(ROW, ONE_ROW, ROW, fast_accum=PRECISE)
    with pytest.raises(RecipeError, match=r"fprop .* 128x128 x 128x128"):
        fine(SQUARE, SQUARE, ONE_ROW, fast_accum=PRECISE)
    assert (
        fine(SQUARE, ONE_ROW, ONE_ROW, fast_accum=PRECISE).granularity_of(Operand.INPUT) is SQUARE
    )


def test_a_gemm_in_high_precision_may_have_any() -> None:
    kept = fine(ROW, ROW, ONE_ROW, high_precision=(Gemm.DGRAD, Gemm.WGRAD))
    assert kept.granularity_of(Operand.GRAD_OUTPUT) is ONE_ROW


def test_delayed_scaling_is_tensorwise() -> None:
    with pytest.raises(RecipeError, match=r"one amax per tensor.*scaling=Scaling.CURRENT"):
        fine(ROW, ROW, ROW, scaling=Scaling.DELAYED)
    with pytest.raises(RecipeError, match=r"static scaling keeps one scale per tensor.*CURRENT"):
        fine(ROW, ROW, ROW, scaling=Scaling.STATIC)


def test_a_scale_per_block_of_k_rules_out_fast_accumulation() -> None:
    with pytest.raises(RecipeError, match=r"1x128 x 128x128: .*\(fast_accum\); set it to False"):
        fine(ONE_ROW, SQUARE, ONE_ROW)
    assert fine(ROW, ROW, ROW).fast_accum_of(Gemm.FPROP)


def test_powers_of_two_are_for_finer_scales() -> None:
    with pytest.raises(RecipeError, match="power_of_two is for scales that are not tensorwise"):
        Recipe("bad", Scaling.CURRENT, power_of_two=True)
    assert fine(ROW, ROW, ROW, power_of_two=True).power_of_two


@pytest.mark.parametrize("as_pairs", [tuple, list, dict])
def test_names_stand_for_enums(as_pairs: Callable[[Iterable[Any]], Any]) -> None:
    named = Recipe(
        "own",
        "current",  # type: ignore[arg-type]
        as_pairs((str(operand), "e4m3") for operand in Operand),
        granularities=as_pairs((str(operand), "rowwise") for operand in Operand),
        fast_accum=as_pairs((str(gemm), False) for gemm in Gemm),
        high_precision=["wgrad"],  # type: ignore[arg-type]
    )
    same = fine(ROW, ROW, ROW, fast_accum=PRECISE, high_precision=(Gemm.WGRAD,))
    assert named == same and hash(named) == hash(same) and str(named) == str(same)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"name": 3}, "name of a recipe is a string"),
        ({"scaling": "nosuch"}, r"scaling is 'nosuch'; choose one of \['delayed', 'current', "),
        ({"scaling": None}, r"scaling is None; choose one of"),
        (
            {"formats": {"output": "e4m3"}},
            r"formats is 'output'; choose one of \['input', 'weight'",
        ),
        ({"formats": {"input": "e4m4"}}, r"formats of input is 'e4m4'; .*\['e4m3', 'e5m2'\]"),
        ({"formats": "e4m3"}, r"formats is 'e4m3'; give pairs, or a dict, from \['input', "),
        ({"granularities": {"weight": "row"}}, r"granularities of weight is 'row'; .*'rowwise'"),
        ({"granularities": (Operand.INPUT, ROW)}, "granularities is .*; give pairs, or a dict"),
        ({"power_of_two": "no"}, "power_of_two is 'no'; choose True or False"),
        ({"fast_accum": {"wgrad": "no"}}, "fast_accum of wgrad is 'no'; choose True or False"),
        ({"fast_accum": {"fprop": True}}, "gives no fast_accum for dgrad"),
        ({"high_precision": ("wgrd",)}, r"high_precision is 'wgrd'; .*\['fprop', 'dgrad', "),
        ({"high_precision": "wgrad"}, r"high_precision is 'wgrad'; give a tuple of \['fprop', "),
        ({"history_len": "a"}, "history_len is 'a'"),
        ({"history_len": 2.5}, "history_len is 2.5"),
        ({"jump_limit": "a"}, "jump_limit is 'a'; it is a factor"),
        ({"saturation_limit": None}, "saturation_limit is None; it is a factor"),
    ],
)
def test_what_is_not_legal_is_named(given: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        Recipe(**{"name": "bad", **given})
