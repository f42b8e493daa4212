"""How the scaling state is saved and loaded."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fp8compile
from fp8compile import Recipe, ScalingStateError
from tests.helpers import compile_interpreted
from tests.scaled import (
    INPUT,
    same,
    snapshot,
    train,
    two_layers,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:FP8 is emulated here"),
    pytest.mark.usefixtures("fresh_dynamo"),
]


def trained(steps: int = 3) -> tuple[nn.Sequential, Callable[..., Any]]:
    model = two_layers()
    compiled = compile_interpreted(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        train(compiled, 4 * torch.randn(16, 32))
        optimizer.step()
        optimizer.zero_grad()
    return model, compiled


def resumed(model: nn.Module, state: dict[str, Tensor]) -> tuple[nn.Sequential, Callable[..., Any]]:
    """What a new process would build: a fresh model, its weights and its scaling state loaded."""
    torch._dynamo.reset()
    fresh = two_layers()
    fresh.load_state_dict(model.state_dict())
    fp8compile.load_state_dict(fresh, state)
    return fresh, compile_interpreted(fresh)


def test_keys_and_shapes() -> None:
    model, _ = trained()
    shapes = {key: tuple(value.shape) for key, value in fp8compile.state_dict(model).items()}
    assert shapes == {
        "0.weight.scale": (3,),
        "0.weight.amax_history": (16, 3),
        "2.weight.scale": (3,),
        "2.weight.amax_history": (16, 3),
    }
    assert set(model.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_resumed_training_continues_bit_for_bit() -> None:
    model, compiled = trained()
    file = io.BytesIO()
    torch.save(fp8compile.state_dict(model), file)
    file.seek(0)
    fresh, fresh_compiled = resumed(model, torch.load(file, weights_only=True))
    fresh_optimizer = torch.optim.SGD(fresh.parameters(), lr=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        x = torch.randn(16, 32)
        losses = [call(x).square().mean() for call in (compiled, fresh_compiled)]
        assert torch.equal(losses[0], losses[1])
        for loss in losses:
            loss.backward()
        optimizer.step()
        fresh_optimizer.step()
    old, new = fp8compile.state_dict(model), fp8compile.state_dict(fresh)
    assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)


def test_the_state_matters_for_the_next_loss() -> None:
    """The bit-for-bit test above could not fail if a fresh state gave the same loss anyway."""
    model, compiled = trained()
    torch._dynamo.reset()
    fresh = two_layers()
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(16, 32)
    assert not torch.equal(compiled(x), compile_interpreted(fresh)(x))


def test_load_after_the_first_compiled_call() -> None:
    model, compiled = trained()
    state = fp8compile.state_dict(model)
    fresh = two_layers()
    fresh.load_state_dict(model.state_dict())
    fresh_compiled = compile_interpreted(fresh)
    for _ in range(5):  # its ring stands elsewhere
        train(fresh_compiled, torch.randn(16, 32))
        fp8compile.update_scales(fresh)
    fp8compile.load_state_dict(fresh, state)
    restored = fp8compile.state_dict(fresh)
    assert all(torch.equal(restored[key], state[key]) for key in state)
    x = torch.randn(16, 32)
    assert torch.equal(compiled(x), fresh_compiled(x))


def test_load_drops_what_was_seen_since_the_last_update() -> None:
    model, compiled = trained()
    state = fp8compile.state_dict(model)
    train(compiled, 1000 * torch.randn(16, 32))  # this step is undone by the load
    fp8compile.load_state_dict(model, state)
    train(compiled, torch.randn(16, 32))
    fp8compile.update_scales(model)
    assert fp8compile.state_dict(model)["0.weight.amax_history"][-1, INPUT] < 10


def test_loaded_but_not_yet_used_entries_are_saved_again() -> None:
    model, _ = trained()
    state = fp8compile.state_dict(model)
    fresh = two_layers()
    fp8compile.load_state_dict(fresh, state)
    again = fp8compile.state_dict(fresh)
    assert again.keys() == state.keys() and all(torch.equal(again[k], state[k]) for k in state)


def test_saved_tensors_do_not_change_with_further_training() -> None:
    model, compiled = trained()
    state = fp8compile.state_dict(model)
    copies = {key: value.clone() for key, value in state.items()}
    train(compiled, 50 * torch.randn(16, 32))
    fp8compile.update_scales(model)
    assert all(torch.equal(state[key], copies[key]) for key in state)


def test_a_compiled_model_is_saved_and_loaded_under_the_same_keys() -> None:
    model, compiled = trained()
    assert fp8compile.state_dict(compiled).keys() == fp8compile.state_dict(model).keys()
    state = {key: 2 * value for key, value in fp8compile.state_dict(model).items()}
    fp8compile.load_state_dict(compiled, state)
    restored = fp8compile.state_dict(model)
    assert all(torch.equal(restored[key], state[key]) for key in state)


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing_site": (lambda s: [s.pop("2.weight.scale"), s.pop("2.weight.amax_history")], "2.w"),
    "missing_entry": (lambda s: s.pop("2.weight.scale"), "missing: 2.weight.scale"),
    "foreign_site": (lambda s: s.update({"9.weight.scale": torch.ones(3)}), "9.weight.scale"),
    "foreign_entry": (lambda s: s.update({"0.weight.zero": torch.ones(3)}), "0.weight.zero"),
    "foreign_use": (
        lambda s: s.update({k.replace("weight", "weight#1"): v for k, v in s.items()}),
        "0.weight#1",
    ),
    "not_a_key": (lambda s: s.update({"nonsense": torch.ones(3)}), "nonsense"),
    "scale_shape": (lambda s: s.update({"0.weight.scale": torch.ones(5)}), "(5,): 0.weight.scale"),
    "history_shape": (
        lambda s: s.update({"0.weight.amax_history": torch.ones(8, 3)}),
        "0.weight.amax_history",
    ),
    "not_a_tensor": (lambda s: s.update({"0.weight.scale": 1.0}), "0.weight.scale"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_state_that_does_not_fit_is_listed_and_changes_nothing(case: str) -> None:
    model, _ = trained(steps=1)
    before = snapshot(model)
    state: dict[str, Any] = {key: 2 * v for key, v in fp8compile.state_dict(model).items()}
    break_it, message = BROKEN[case]
    break_it(state)
    with pytest.raises(ScalingStateError) as error:
        fp8compile.load_state_dict(model, state)
    assert message in str(error.value)
    assert same(snapshot(model), before)


def test_every_problem_is_listed_at_once() -> None:
    model, _ = trained(steps=1)
    with pytest.raises(ScalingStateError) as error:
        fp8compile.load_state_dict(model, {"9.weight.scale": torch.ones(3), "x": torch.ones(3)})
    for part in ("foreign: 9.weight.scale", "foreign: x", "missing: 0.weight", "missing: 2.weight"):
        assert part in str(error.value)


def test_what_is_no_state_is_refused() -> None:
    with pytest.raises(TypeError, match="a NoneType is no scaling state; give what fp8compile"):
        fp8compile.load_state_dict(two_layers(), None)  # type: ignore[arg-type]


def test_part_of_a_state_loaded_before_the_first_call_raises_there() -> None:
    model, _ = trained(steps=1)
    part = {k: v for k, v in fp8compile.state_dict(model).items() if k.startswith("0.")}
    fresh = two_layers()
    fp8compile.load_state_dict(fresh, part)
    with pytest.raises(ScalingStateError, match="missing"):
        compile_interpreted(fresh)(torch.randn(16, 32))


def test_a_history_of_another_recipe_loaded_before_the_first_call() -> None:
    model, _ = trained(steps=1)
    fresh = two_layers()
    fp8compile.load_state_dict(fresh, fp8compile.state_dict(model))
    short = compile_interpreted(fresh, {"recipe": Recipe("short", history_len=4)})
    with pytest.raises(ScalingStateError, match="16"):
        short(torch.randn(16, 32))


def test_an_empty_state_for_a_model_without_sites() -> None:
    model = nn.LayerNorm(8)
    fp8compile.load_state_dict(model, fp8compile.state_dict(model))
    assert fp8compile.state_dict(model) == {}
