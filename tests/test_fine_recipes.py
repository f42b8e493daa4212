"""Recipes with a scale per row or block, on whole models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fp8compile
from fp8compile.cost import H100
from fp8compile.passes.site_costs import _as_used, _rereads
from fp8compile.recipe import Operand
from tests.helpers import compile_interpreted
from tests.models import Llama, sqnr_db

FINE = ("rowwise", "blockwise", "mx")


@pytest.fixture(autouse=True)
def compile_anew() -> None:
    """Dynamo gives up a function that was compiled in too many ways, and runs it as it is."""
    torch._dynamo.reset()


def mlp(width: int = 96, hidden: int = 200) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def step(call: Any, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    output = call(x)
    output.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    return {"output": output.detach(), "x": x.grad, **grads}


@pytest.mark.parametrize("recipe", FINE)
@pytest.mark.parametrize("tokens", [64, 33, 1])
def test_outputs_and_gradients(tokens: int, recipe: str) -> None:
    model, x = mlp(), torch.randn(tokens, 96)
    want = step(model, model, x)
    compiled = compile_interpreted(model, {"recipe": recipe, "strict": True})
    got = step(compiled, model, x)
    found = [float(sqnr_db(want[name], got[name])) for name in want]
    # The errors of a single token do not average out.
    assert min(found) > (22 if tokens > 1 else 19) and max(found) < 40
    assert fp8compile.state_dict(model) == {} == fp8compile.events(model)


@pytest.mark.parametrize("recipe", FINE)
def test_llama_gradients_gain_by_finer_scales(recipe: str) -> None:
    """In E4M3 throughout; the gates of one scale per tensor are 18 and 19 dB."""
    torch.manual_seed(0)
    model, ids = Llama(), torch.randint(0, 256, (2, 64))
    want = step_of_llama(model, model, ids)
    got = step_of_llama(compile_interpreted(model, {"recipe": recipe}), model, ids)
    found = sorted(float(sqnr_db(want[name], got[name])) for name in want)
    assert found[0] > 20 and 22 < found[len(found) // 2] < 40


def step_of_llama(call: Any, model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    call(ids).float().square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recipe", FINE)
def test_merging_checkpointing_and_stored_activations(recipe: str) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(128, 128), nn.Linear(128, 256)
            self.o = nn.Linear(256, 128)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.body, x, use_reentrant=False)

        def body(self, x: Tensor) -> Tensor:
            return self.o(torch.cat([self.q(x), self.q(x)], 1).sigmoid() * self.k(x))

    torch.manual_seed(0)
    model, x = Block(), torch.randn(512, 128)
    want = step(model, model, x)
    for options in ({}, {"save_activations": "fp8"}):
        torch._dynamo.reset()
        compiled = compile_interpreted(model, {"recipe": recipe, **options})
        got = step(compiled, model, x)
        found = [float(sqnr_db(want[name], got[name])) for name in want]
        assert 18 < min(found) < 40


@pytest.mark.parametrize("recipe", FINE)
def test_inference_keeps_no_state(recipe: str) -> None:
    model, x = mlp().eval(), torch.randn(40, 96)
    compiled = compile_interpreted(model, {"recipe": recipe})
    with torch.no_grad():
        assert 24 < sqnr_db(model(x), compiled(x)) < 40
    assert fp8compile.state_dict(model) == {}


def test_a_dynamic_number_of_tokens() -> None:
    model = mlp(128, 256)
    compiled = compile_interpreted(model, {"recipe": "blockwise"}, dynamic=True)
    for tokens in (64, 130, 33):
        x = torch.randn(tokens, 128)
        want = step(model, model, x)
        got = step(compiled, model, x)
        assert 22 < min(float(sqnr_db(want[name], got[name])) for name in want) < 40


def test_compiled_by_inductor() -> None:
    model, x = mlp(), torch.randn(64, 96)
    options = {"recipe": "blockwise"}
    interpreted = step(compile_interpreted(model, options), model, x)
    torch._dynamo.reset()
    generated = step(torch.compile(model, backend="fp8", options=options), model, x)
    assert min(float(sqnr_db(interpreted[n], generated[n])) for n in interpreted) > 30


def test_explain_names_the_granularity() -> None:
    rows = fp8compile.explain(mlp(), torch.randn(64, 96), options={"recipe": "blockwise"}).rows
    assert {(row.gemm, row.formats) for row in rows} >= {
        ("fprop", "e4m3:1x128 x e4m3:128x128"),
        ("wgrad", "e4m3:1x128 x e4m3:1x128"),
    }


def test_what_costs_depend_on() -> None:
    """A block's scale is found in the tile that casts it; its GEMMs are slower than others."""
    recipes = fp8compile.RECIPES
    for again, reread in ((False, ["current", "rowwise"]), (True, ["rowwise"])):
        found = [name for name, r in recipes.items() if _rereads(r, Operand.INPUT, again)]
        assert found == reread
    seen = {n: _as_used(H100, r).fp8_flops for n, r in recipes.items()}
    assert seen["delayed"] == H100.fp8_flops > seen["rowwise"] > seen["blockwise"] > seen["mx"]
    assert [name for name, recipe in recipes.items() if recipe.is_emulated] == ["mx"]


def test_only_some_operands_in_high_precision() -> None:
    """Such as torchao's rowwise_with_gw_hp: wgrad, which sums over tokens, stays as it is."""
    kept = replace(
        fp8compile.RECIPES["rowwise"], name="own", high_precision=(fp8compile.Gemm.WGRAD,)
    )
    rows = fp8compile.explain(mlp(), torch.randn(64, 96), options={"recipe": kept}).rows
    assert {row.gemm for row in rows if not row.is_fp8} == {"wgrad"}
    assert kept.granularity_of(Operand.GRAD_OUTPUT) is fp8compile.Granularity.ROW
