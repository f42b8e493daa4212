"""Settings of PyTorch that people change for a whole process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch._functorch.config
from torch import nn

import fp8compile
from fp8compile import RECIPES
from tests.habits.common import EMULATED, assert_near, batch, loss_of, mlp, plain_loop, sgd
from tests.helpers import compile_interpreted

pytestmark = pytest.mark.filterwarnings(EMULATED)


@pytest.fixture
def default(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "default", [torch.bfloat16, torch.float16, torch.float64], indirect=True, ids=str
)
def test_the_default_dtype(default: torch.dtype, recipe: str) -> None:
    """A model in float32, whatever is made without a dtype."""
    model, x = mlp().float(), batch(32).float()
    call = compile_interpreted(model, {"recipe": recipe})
    plain_loop(model, [x] * 2, sgd(model), call)
    assert_near(model(x), call(x), 20.0)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], indirect=True, ids=str)
def test_the_tools_under_a_default_dtype(default: torch.dtype) -> None:
    model, x = mlp().float(), batch(32).float()
    found = fp8compile.profile(model, [x], step=lambda call, x: loss_of(call(x)))
    assert len(found.groups) == 2
    fp8compile.calibrate(model, [x])
    before = model(x)
    fp8compile.freeze(model, "rowwise", batches=[x])
    assert_near(before, model(x))


@pytest.mark.parametrize("budget", [0.0, 0.5, 0.9])
def test_a_memory_budget_for_activations(budget: float) -> None:
    """The partitioner asks for the size of every node, also of one that returns nothing."""
    blocks = [nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))]
    model, x = nn.Sequential(*blocks * 2), batch()
    with torch._functorch.config.patch(activation_memory_budget=budget):
        losses = plain_loop(model, [x] * 3, call=compile_interpreted(model))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("recipe", ["delayed", "static"])
def test_compiled_autograd(recipe: str) -> None:
    """Inputs that may change before backward runs must reach it there, too."""
    model, x = mlp(), batch()
    optimizer, options = sgd(model), {"recipe": recipe}
    with torch._dynamo.config.patch(compiled_autograd=True):

        @torch.compile(backend="fp8", options=options)
        def step() -> torch.Tensor:
            loss = loss_of(model(x))
            loss.backward()
            return loss

        losses = []
        for _ in range(3):
            losses.append(float(step()))
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < losses[0]
