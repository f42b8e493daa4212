"""Sites with a recipe of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fp8compile
from fp8compile import RECIPES, OptionError
from fp8compile.compile import _may_be_cached
from fp8compile.options import parse_options
from tests.helpers import compile_interpreted
from tests.models import sqnr_db

DELAYED = ["2.weight.scale", "2.weight.amax_history"]


@pytest.fixture(autouse=True)
def compile_anew() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(96, 160), nn.GELU(), nn.Linear(160, 96))


def gradients(call: Any, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    call(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("own", ["rowwise", "blockwise", "current", "mx"])
def test_each_site_is_cast_as_its_recipe_says(own: str) -> None:
    model, x = mlp(), torch.randn(64, 96)
    explanation = fp8compile.explain(model, x, options={"overrides": {"0": own}})
    assert {row.fqn: row.recipe for row in explanation.rows} == {"0": own, "2": ""}
    assert f", {own} for 2 GEMMs" in explanation.summary()
    compiled = compile_interpreted(model, {"overrides": {"0": own}, "strict": True})
    want, got = gradients(model, model, x), gradients(compiled, model, x)
    found = [float(sqnr_db(want[name], got[name])) for name in want]
    assert min(found) > 20 and max(found) < 60
    fp8compile.update_scales(model)
    state = fp8compile.state_dict(model)
    assert list(state) == DELAYED  # the other finds its own scales
    assert state["2.weight.scale"].min() > 0


def test_delayed_scales_of_one_site_are_saved_and_loaded() -> None:
    options = {"recipe": "rowwise", "overrides": {"2": "delayed"}}
    model, x = mlp(), torch.randn(64, 96)
    gradients(compile_interpreted(model, options), model, x)
    fp8compile.update_scales(model)
    saved = fp8compile.state_dict(model)
    torch.manual_seed(0)
    other = mlp()
    fp8compile.load_state_dict(other, saved)
    torch._dynamo.reset()
    with torch.no_grad():
        compile_interpreted(other, options)(x)
    found = fp8compile.state_dict(other)
    assert all(torch.equal(found[key], saved[key]) for key in DELAYED)


class Branches(nn.Module):
    """Three projections of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.q(x)) * self.k(x) + self.v(x)


def test_only_gemms_of_one_recipe_are_merged() -> None:
    model, x = Branches(), torch.randn(32, 64)
    rows = fp8compile.explain(model, x, options={"overrides": {"k": "current"}}).rows
    assert {(row.fqn, row.recipe) for row in rows} == {("{q,v}", ""), ("k", "current")}


def test_one_value_in_two_formats() -> None:
    """E4M3 and E5M2 copies of the input, each with its own amax."""
    wide = replace(
        RECIPES["delayed"],
        name="wide inputs",
        formats=tuple(zip(fp8compile.Operand, _formats("e5m2", "e4m3", "e4m3"), strict=True)),
    )
    model, x = Branches(), torch.randn(32, 64)
    compiled = compile_interpreted(model, {"overrides": {"k": wide}, "strict": True})
    want, got = gradients(model, model, x), gradients(compiled, model, x)
    assert min(float(sqnr_db(want[name], got[name])) for name in want) > 18
    fp8compile.update_scales(model)
    state = fp8compile.state_dict(model)
    amax = float(x.abs().max())
    assert float(state["k.weight.scale"][0]) == pytest.approx(57344 / amax)
    assert float(state["q.weight.scale"][0]) == pytest.approx(448 / amax)


def _formats(*names: str) -> list[fp8compile.formats.Format]:
    return [fp8compile.formats.Format[name.upper()] for name in names]


def test_static_scales_of_one_site_keep_its_graph_from_the_caches() -> None:
    """From there it would come without them."""
    options = {"recipe": "current", "overrides": {"2": "static"}}
    assert not _may_be_cached(parse_options(options), None)
    model, x = mlp(), torch.randn(64, 96)
    compile_interpreted(model, options)(x)
    assert list(fp8compile.state_dict(model)) == DELAYED
    assert fp8compile.state_dict(model)["2.weight.scale"][0] > 0


def test_the_first_glob_that_matches_counts() -> None:
    options = parse_options({"overrides": {"layers.0.*": "current", "layers.*": "rowwise"}})
    assert options.own_recipe("layers.0.w") is RECIPES["current"]
    assert options.own_recipe("layers.1.w") is RECIPES["rowwise"]
    assert options.own_recipe("head") is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("rowwise", "give a dict from globs"),
        ({1: "rowwise"}, "give a dict from globs"),
        ({"0": 3}, r"overrides\['0'\]\" is 3; give one of"),
        ({"0": replace(RECIPES["delayed"], name="short", history_len=4)}, "history_len is 16 in"),
        ({"0": replace(RECIPES["delayed"], name="own", jump_limit=4)}, "jump_limit is 32.0 in"),
    ],
)
def test_what_is_wrong_with_overrides(overrides: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_options({"overrides": overrides})


def test_a_glob_that_matches_nothing() -> None:
    with pytest.raises(OptionError, match="overrides='lm_head' matches nothing; the sites are"):
        fp8compile.explain(mlp(), torch.randn(8, 96), options={"overrides": {"lm_head": "current"}})
