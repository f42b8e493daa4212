"""Weights of inference graphs are quantized once, and again whenever they have changed."""

from __future__ import annotations

import copy
import gc
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fp8compile
from fp8compile import quantized_weights
from fp8compile.ir import is_cast
from fp8compile.quantized_weights import QuantizedWeights, split_weights
from tests.helpers import compile_interpreted
from tests.models import SharedInput
from tests.passes.common import lines_of, negated_linear


@pytest.fixture(autouse=True)
def compile_anew() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """One number per time that weights were quantized: of how many values."""
    found: list[int] = []
    original = QuantizedWeights._computed

    def counted(self: QuantizedWeights, inputs: list[Tensor], old: list[Tensor]) -> list[Tensor]:
        values = original(self, inputs, old)
        found.append(len(values))
        return values

    monkeypatch.setattr(QuantizedWeights, "_computed", counted)
    yield found


def served(compiled: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return compiled(x)


RECIPES = ["delayed", "current", "static", "rowwise", "blockwise", "mx"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_served_forward_is_that_of_training_bit_for_bit(
    recipe: str, computed: list[int]
) -> None:
    model, x = SharedInput(), torch.randn(32, 48)
    compiled = compile_interpreted(model, {"recipe": recipe})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        compiled(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert computed == []  # training casts its weights in the graph
    served(compiled, x)
    assert torch.equal(served(compiled, x), compiled(x))
    assert len(computed) == 1


def multiplied(model: SharedInput) -> None:
    with torch.no_grad():
        model.q.weight.mul_(3)


def loaded(model: SharedInput) -> None:
    model.load_state_dict({k: 2 * v for k, v in copy.deepcopy(model.state_dict()).items()})


def replaced(model: SharedInput) -> None:
    model.k.weight.data = 2 * model.k.weight.data


def stepped(
    make: Callable[..., torch.optim.Optimizer], **settings: Any
) -> Callable[[SharedInput], None]:
    def step(model: SharedInput) -> None:
        optimizer = make(model.parameters(), lr=0.3, **settings)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    return step


def written_through_data(model: SharedInput) -> None:
    model.out.weight.data.mul_(2)
    fp8compile.refresh(model)


def stepped_through_data(model: SharedInput) -> None:
    model.out.weight.data.mul_(2)
    fp8compile.update_scales(model)


CHANGES = {
    "in place": multiplied,
    "load_state_dict": loaded,
    "another tensor": replaced,
    "SGD": stepped(torch.optim.SGD),
    "Adam, foreach": stepped(torch.optim.Adam, foreach=True),
    "AdamW, fused": stepped(torch.optim.AdamW, fused=True),
    "through .data, and refresh": written_through_data,
    "through .data, and update_scales": stepped_through_data,
}


@pytest.mark.parametrize("recipe", ["rowwise", "delayed"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_quantized_again(change: str, recipe: str, computed: list[int]) -> None:
    model, x = SharedInput(), torch.randn(32, 48)
    compiled = compile_interpreted(model, {"recipe": recipe})
    before = served(compiled, x)
    CHANGES[change](model)
    after = served(compiled, x)
    assert served(compiled, x) is not after and torch.equal(served(compiled, x), after)
    assert len(computed) == 2
    torch._dynamo.reset()
    fresh = compile_interpreted(copy.deepcopy(model), {"recipe": recipe})
    assert torch.equal(served(fresh, x), after) and not torch.equal(before, after)


def test_scales_that_move_without_the_weights_count(computed: list[int]) -> None:
    """As those of a checkpoint do."""
    model, x = SharedInput(), torch.randn(32, 48)
    compiled = compile_interpreted(model)
    compiled(x).sum().backward()
    fp8compile.update_scales(model)
    scales = fp8compile.state_dict(model)
    before = served(compiled, x)
    scales["out.weight.scale"][1] /= 3
    fp8compile.load_state_dict(model, scales)
    after = served(compiled, x)
    assert len(computed) == 2 and not torch.equal(before, after)
    assert torch.equal(compiled(x), after)


def test_the_graphs_of_a_model_share_them(computed: list[int]) -> None:
    model = SharedInput()
    compiled = compile_interpreted(model, {"recipe": "rowwise"}, dynamic=False)
    for tokens in (32, 5, 1):
        served(compiled, torch.randn(tokens, 48))
    with torch.inference_mode():
        compiled(torch.randn(32, 48))
    assert len(computed) == 1


def test_a_graph_that_serves_several_modules_keeps_them_apart(computed: list[int]) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(48, 48) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    model, x = Twice(), torch.randn(32, 48)
    for layer in model.layers:
        layer.forward = compile_interpreted(layer.forward, {"recipe": "rowwise"})
    first = served(model, x)
    assert torch.equal(served(model, x), first)
    assert len(computed) == 2


def kept() -> int:
    """How many quantized weights, and scales, there are."""
    gc.collect()
    found = [entry for known in quantized_weights._entries.values() for entry in known]
    return sum(len(entry.values) for entry in found)


def test_they_are_freed_by_training_and_with_the_model() -> None:
    before = kept()
    model, x = SharedInput(), torch.randn(32, 48)
    compiled = compile_interpreted(model, {"recipe": "rowwise"})
    served(compiled, x)
    assert kept() == before + 4  # q and k are one
    stepped(torch.optim.SGD)(model)
    assert kept() == before
    served(compiled, x)
    assert kept() == before + 4
    del model, compiled
    torch._dynamo.reset()
    assert kept() == before


def test_they_are_freed_with_the_last_graph_that_takes_them() -> None:
    before = kept()
    model, x = SharedInput(), torch.randn(32, 48)
    for recipe in ("rowwise", "current"):
        compiled = compile_interpreted(model, {"recipe": recipe})
        served(compiled, x)
        del compiled
        torch._dynamo.reset()
        assert kept() == before


def test_frozen_models_train_as_before(computed: list[int]) -> None:
    """A graph without gradients of its own may lie in one that has some."""
    model, x = SharedInput().requires_grad_(False), torch.randn(32, 48, requires_grad=True)
    compile_interpreted(model, {"recipe": "rowwise"})(x).sum().backward()
    assert x.grad is not None and computed == []


def test_real_code_computes_the_same(computed: list[int]) -> None:
    model, x = SharedInput(), torch.randn(32, 48)
    want = served(compile_interpreted(model, {"recipe": "rowwise"}), x)
    torch._dynamo.reset()
    gc.collect()
    compiled = torch.compile(model, backend="fp8", options={"recipe": "rowwise"})
    torch.testing.assert_close(served(compiled, x), want)
    assert torch.equal(served(compiled, x), served(compiled, x))
    assert len(computed) == 2  # those of the first were freed with it


# --- the graphs ---------------------------------------------------------------------------------


def casts(gm: fx.GraphModule) -> list[str]:
    return [node.name for node in gm.graph.nodes if is_cast(node)]


def test_what_depends_on_static_inputs_only_is_taken_out() -> None:
    gm = negated_linear()
    assert casts(gm) == ["neg_q", "w_q"]
    split = split_weights(gm, static=[1, 2])
    assert split is not None and split.positions == [1, 2]
    assert casts(gm) == ["neg_q"]
    inputs = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    assert inputs == ["x", "w", "scale", "w_fp8_once", "w_scale_inv_once"]
    assert [str(value.dtype) for value in split.outputs] == ["torch.float8_e4m3fn", "torch.float32"]
    text = lines_of(split.weights)
    assert text.splitlines()[:2] == ["arg1 : bf16[64, 32]", "arg2 : f32[3]"]
    assert "fp8.quantize(arg1, arg2, 1, e4m3, True, False)" in text


@pytest.mark.parametrize("static", [[], [0], [2]], ids=str)
def test_nothing_is_taken_out_of_what_depends_on_other_inputs(static: list[int]) -> None:
    gm = negated_linear()
    text = lines_of(gm)
    split = split_weights(gm, static=[i for i in static if i != 0])
    assert split is None
    assert lines_of(gm) == text


def test_the_readme_serves(computed: list[int]) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    code = re.search(r"## Serve\n.*?```python\n(.*?)```", readme, re.DOTALL)
    assert code
    exec(code[1], {})
    assert len(computed) == 1


def test_a_function_that_turns_gradients_off_itself() -> None:
    """Such a graph looks like one for training when it is compiled."""
    model, x = SharedInput(), torch.randn(32, 48)

    def without_gradients(x: Tensor) -> Tensor:
        with torch.no_grad():
            return model(x)

    want = served(compile_interpreted(model, {"recipe": "rowwise"}), x)
    compiled = torch.compile(without_gradients, backend="fp8", options={"recipe": "rowwise"})
    torch.testing.assert_close(compiled(x), want)
    assert torch.equal(compiled(x), compiled(x))
