"""What recipes lose to outliers and in a small Llama, by `examples/recipe_errors.py`."""

from __future__ import annotations

from typing import Any

import pytest

from tests.examples.common import EXAMPLES

pytestmark = pytest.mark.filterwarnings("ignore:FP8 is emulated here")
SEEDS = range(3)


@pytest.fixture
def errors(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import recipe_errors

    return recipe_errors


# A scale maps the largest value of a block to the format's maximum, without an error. Where every
# block has an outlier that is most of what there is: blockwise gains 1.4 dB or more over the seeds.
# Powers of two do not map it so, and gain nothing: mx has 0.3 dB more with normal inputs as well,
# for the sake of the weights, uniform up to 2^-5. At 100 times nothing underflows in E4M3 yet.
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["channel", "element"])
def test_fine_scales_are_no_worse_on_outliers(errors: Any, name: str, seed: int) -> None:
    found = {r: errors.gemm_db(r, name, seed) for r in ("current", "blockwise", "mx")}
    print(name, seed, found)
    assert found["blockwise"] >= found["current"] + 1
    assert found["mx"] >= found["current"]


def test_fine_scales_keep_extreme_outliers_to_their_blocks(errors: Any) -> None:
    """Under one scale, tokens without an outlier underflow: they are lost."""
    found = {r: errors.gemm_db(r, "extreme") for r in ("current", "rowwise", "blockwise", "mx")}
    print(found)
    assert found.pop("current") < 10 and min(found.values()) > 27


def test_static_scales_are_close_to_current_ones(errors: Any) -> None:
    static, current = (errors.llama_db(recipe) for recipe in ("static", "current"))
    print(static, current)
    assert all(static[what] >= current[what] - 3 for what in current)
    # The gates of formats chosen by a profile.
    chosen = errors.llama_db(errors.AUTO)
    assert chosen["worst gradient"] >= 21 and chosen["median gradient"] >= 22.5
