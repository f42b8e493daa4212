"""When the scaling state moves, what it holds, and how it is saved and loaded."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fp8compile
from fp8compile import Recipe, ScalingStateError
from fp8compile.scaling import ScalingState, states_of
from tests.helpers import compile_interpreted
from tests.models import sqnr_db

pytestmark = pytest.mark.filterwarnings("ignore:FP8 is emulated here")
INPUT, WEIGHT, GRAD_OUTPUT = range(3)
E4M3_MAX, E5M2_MAX = 448.0, 57344.0


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))


def train(call: Callable[..., Tensor], *inputs: Tensor) -> None:
    """One forward and backward for each input."""
    for x in inputs:
        call(x).square().mean().backward()


def only_state(model: nn.Module) -> ScalingState:
    states = states_of(model)
    assert len(states) == 1
    return states[0]


def snapshot(model: nn.Module) -> list[Tensor | int]:
    """Everything in the states of a model that a later step could depend on."""
    found: list[Tensor | int] = []
    for s in states_of(model):
        tensors = (s.scale, s.amax_fwd, s.amax_bwd, s.history, s.events)
        found += [*(t.clone() for t in tensors), s.position, s.updates]
    return found


def same(left: list[Tensor | int], right: list[Tensor | int]) -> bool:
    pairs = zip(left, right, strict=True)
    return all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs)


# --- the values ---------------------------------------------------------------------------------


def test_scales_are_the_formats_maximum_over_the_amax() -> None:
    model, x = nn.Linear(32, 64), torch.randn(16, 32)
    compiled = compile_interpreted(model)
    out = compiled(x)
    gradient = torch.randn_like(out)
    out.backward(gradient)
    fp8compile.update_scales(model)
    amax = torch.stack([x.abs().amax(), model.weight.detach().abs().amax(), gradient.abs().amax()])
    state = fp8compile.state_dict(model)
    expected = torch.tensor([E4M3_MAX, E4M3_MAX, E5M2_MAX]) / amax
    torch.testing.assert_close(state["weight.scale"], expected, rtol=1e-6, atol=0)
    assert torch.equal(state["weight.amax_history"][-1], amax)
    assert torch.count_nonzero(state["weight.amax_history"][:-1]) == 0


def test_first_step_is_as_good_as_the_tenth() -> None:
    model, x = two_layers(), torch.randn(16, 32)
    compiled = compile_interpreted(model)
    expected = model(x).detach()
    quality = []
    for _ in range(10):
        out = compiled(x)
        quality.append(sqnr_db(expected, out.detach()))
        out.sum().backward()
        fp8compile.update_scales(model)
    assert min(quality) >= 25
    assert abs(quality[0] - quality[9]) <= 0.5


def test_a_delayed_scale_is_really_used() -> None:
    model, x = nn.Linear(32, 64, bias=False), torch.randn(16, 32)
    compiled = compile_interpreted(model)
    train(compiled, x)
    fp8compile.update_scales(model)
    grown = 100 * x  # saturates: the scale still is that of x
    assert sqnr_db(model(grown).detach(), compiled(grown).detach()) < 3
    fp8compile.update_scales(model)
    assert sqnr_db(model(grown).detach(), compiled(grown).detach()) >= 25


def test_history_keeps_sixteen_steps_from_oldest_to_newest() -> None:
    model = nn.Linear(32, 64)
    compiled = compile_interpreted(model)
    x = torch.randn(16, 32)
    x /= x.abs().amax()
    for step in range(1, 20):
        train(compiled, step * x)
        fp8compile.update_scales(model)
    history = fp8compile.state_dict(model)["weight.amax_history"][:, INPUT]
    torch.testing.assert_close(history, torch.arange(4.0, 20.0))


def test_a_peak_is_forgotten_after_sixteen_steps() -> None:
    model, x = nn.Linear(32, 64), torch.randn(16, 32)
    x /= x.abs().amax()
    compiled = compile_interpreted(model)
    scales = []
    for step in range(18):
        train(compiled, 8 * x if step == 0 else x)
        fp8compile.update_scales(model)
        scales.append(float(fp8compile.state_dict(model)["weight.scale"][INPUT]))
    assert scales == [E4M3_MAX / 8] * 16 + [E4M3_MAX] * 2


def test_a_recipe_with_a_shorter_history() -> None:
    model = nn.Linear(32, 64)
    compiled = compile_interpreted(model, {"recipe": Recipe("short", history_len=2)})
    for _ in range(3):
        train(compiled, torch.randn(16, 32))
        fp8compile.update_scales(model)
    assert fp8compile.state_dict(model)["weight.amax_history"].shape == (2, 3)


def test_zero_amax_keeps_the_last_scale() -> None:
    model = nn.Linear(32, 64, bias=False)
    compiled = compile_interpreted(model, {"recipe": Recipe("short", history_len=2)})
    train(compiled, torch.randn(16, 32))
    fp8compile.update_scales(model)
    before = fp8compile.state_dict(model)["weight.scale"]
    for _ in range(3):  # the history has forgotten the first step
        train(compiled, torch.zeros(16, 32))
        fp8compile.update_scales(model)
    after = fp8compile.state_dict(model)["weight.scale"]
    assert after[INPUT] == before[INPUT] and after.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_step_is_counted_and_leaves_the_scales(bad: float) -> None:
    model, x = nn.Linear(32, 64, bias=False), torch.randn(16, 32)
    compiled = compile_interpreted(model)
    compiled(x).sum().backward()
    fp8compile.update_scales(model)
    state = only_state(model)
    scale = state.scale.clone()
    poisoned = x.clone()
    poisoned[0, 0] = bad
    out = compiled(poisoned)
    assert not out[0].isfinite().any() and out[1:].isfinite().all()
    out.sum().backward()
    fp8compile.update_scales(model)
    assert torch.equal(state.scale, scale)
    assert state.events[0, INPUT] == 1 and state.events[0, WEIGHT] == 0
    model.zero_grad()
    clean = compiled(x)  # and the next step is as if nothing had happened
    assert sqnr_db(model(x).detach(), clean.detach()) >= 25
    clean.sum().backward()
    fp8compile.update_scales(model)
    assert torch.equal(state.scale, scale) and state.events[0, INPUT] == 1
    assert model.weight.grad is not None and model.weight.grad.isfinite().all()


def test_events_are_read_by_name() -> None:
    model, x = two_layers(), torch.randn(16, 32)
    compiled = compile_interpreted(model)
    assert fp8compile.events(compiled) == {}
    for magnitude in (1, 1, 3, 3):  # outgrows its scale once; the weights never do
        train(compiled, magnitude * x)
        fp8compile.update_scales(model)
    found = fp8compile.events(compiled)
    assert found["0.weight.input"] == fp8compile.Events(not_finite=0, saturated=1, jumped=0)
    assert not any(name.endswith("weight.weight") for name in found)
    train(compiled, torch.full_like(x, torch.nan))
    fp8compile.update_scales(model)
    assert fp8compile.events(model)["0.weight.input"] == (1, 1, 0)
    assert fp8compile.events(model)["2.weight.grad_output"].not_finite == 1


def test_a_module_used_twice_has_events_of_both_uses() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 32)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.fc(x) + self.fc(y)

    model, x = Twice(), torch.randn(16, 32)
    compiled = compile_interpreted(model)
    for y in (-x, 5 * x):
        compiled(x, y).sum().backward()
        fp8compile.update_scales(model)
    assert fp8compile.events(model) == {"fc.weight#1.input": (0, 1, 0)}


def test_a_bad_first_step_leaves_no_scale() -> None:
    model, x = nn.Linear(32, 64), torch.randn(16, 32)
    compiled = compile_interpreted(model)
    train(compiled, torch.full_like(x, torch.nan))
    fp8compile.update_scales(model)
    assert only_state(model).scale[INPUT] == 0
    assert sqnr_db(model(x).detach(), compiled(x).detach()) >= 25


# --- exactly one update per step ----------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_update_per_optimizer_step(name: str) -> None:
    model = two_layers()
    optimizer = OPTIMIZERS[name](model.parameters())
    compiled = compile_interpreted(model)
    for step in range(1, 4):
        train(compiled, torch.randn(16, 32))
        optimizer.step()
        assert only_state(model).updates == step
    optimizer.step()  # without a training call in between there is nothing to learn
    fp8compile.update_scales(model)
    assert only_state(model).updates == 3


def test_update_scales_without_an_optimizer() -> None:
    model, other = two_layers(), two_layers()
    for m in (model, other):
        train(compile_interpreted(m), torch.randn(16, 32))
    fp8compile.update_scales(model)
    assert (only_state(model).updates, only_state(other).updates) == (1, 0)
    fp8compile.update_scales()
    assert (only_state(model).updates, only_state(other).updates) == (1, 1)


def test_update_scales_takes_a_compiled_model() -> None:
    model = two_layers()
    compiled = compile_interpreted(model)
    train(compiled, torch.randn(16, 32))
    fp8compile.update_scales(compiled)
    assert only_state(model).updates == 1


def test_nothing_moves_under_no_grad() -> None:
    model = two_layers()
    compiled = compile_interpreted(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    train(compiled, torch.randn(16, 32))
    optimizer.step()
    before = snapshot(model)
    with torch.no_grad():
        compiled(9 * torch.randn(16, 32))
    optimizer.step()
    # The inference graph has a state of its own, which starts with what training has learned.
    assert same(snapshot(model)[: len(before)], before)
    for state in states_of(model)[1:]:
        assert state.updates == 0 and torch.count_nonzero(state.amax_fwd) == 0


def test_inference_uses_the_scales_of_training() -> None:
    model, x = nn.Linear(32, 64, bias=False), torch.randn(16, 32)
    compiled = compile_interpreted(model)
    train(compiled, x)
    fp8compile.update_scales(model)
    in_training = compiled(x).detach()
    with torch.no_grad():
        assert torch.equal(compiled(x), in_training)


def test_inference_follows_further_training() -> None:
    model, x = nn.Linear(32, 64, bias=False), torch.randn(16, 32)
    compiled = compile_interpreted(model)
    for magnitude in (1, 100):  # the inference graph exists when training goes on
        train(compiled, magnitude * x)
        fp8compile.update_scales(model)
        with torch.no_grad():
            out = compiled(magnitude * x)
        assert sqnr_db(model(magnitude * x).detach(), out) >= 25


@pytest.mark.parametrize("wrapped_by", ["module", "function"])
def test_nothing_is_observed_in_eval_even_with_gradients(wrapped_by: str) -> None:
    model = two_layers()
    call = model if wrapped_by == "module" else lambda x: model(x)
    compiled = compile_interpreted(call)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    train(compiled, torch.randn(16, 32))
    optimizer.step()
    before = snapshot(model)
    model.eval()
    train(compiled, 9 * torch.randn(16, 32))
    assert same(snapshot(model)[: len(before)], before)
    optimizer.step()  # the scales are of what was before
    scale, *others = snapshot(model)[: len(before)]
    assert not torch.as_tensor(scale).any() and same(others, before[1:])
    model.train()
    train(compiled, 9 * torch.randn(16, 32))
    optimizer.step()
    assert not same(snapshot(model)[: len(before)], before)


def test_gradient_accumulation_takes_the_maximum() -> None:
    model, x = nn.Linear(32, 64), torch.randn(16, 32)
    compiled = compile_interpreted(model)
    train(compiled, x, 5 * x, 2 * x)
    fp8compile.update_scales(model)
    amax = fp8compile.state_dict(model)["weight.amax_history"][-1]
    assert amax[INPUT] == (5 * x).abs().amax()
    assert only_state(model).updates == 1


def test_several_forwards_before_the_backwards() -> None:
    model, x = nn.Linear(32, 64, bias=False), torch.randn(16, 32)
    compiled = compile_interpreted(model)
    outs = [compiled(x), compiled(3 * x)]
    fp8compile.update_scales(model)  # in between: what backward needs is saved with its scale_inv
    for out in outs:
        out.sum().backward()
    reference = torch.ones(16, 64).t() @ (4 * x)
    assert model.weight.grad is not None
    assert sqnr_db(reference, model.weight.grad) >= 25
    fp8compile.update_scales(model)
    history = fp8compile.state_dict(model)["weight.amax_history"]
    assert history[:, INPUT].amax() == 3 * x.abs().amax()


def test_second_backward_with_retain_graph() -> None:
    model, x = two_layers(), torch.randn(16, 32)
    compiled = compile_interpreted(model)
    loss = compiled(x).square().mean()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    tracked = only_state(model).amax_bwd.clone()
    loss.backward()
    assert torch.equal(only_state(model).amax_bwd, tracked)
    twice = [p.grad for p in model.parameters()]
    for first, both in zip(once, twice, strict=True):
        torch.testing.assert_close(both, 2 * first)
    fp8compile.update_scales(model)
    assert only_state(model).updates == 1


def test_checkpointing_tracks_the_same_amax() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = body

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.body, x, use_reentrant=False)

    plain = two_layers()
    checkpointed = Checkpointed(copy.deepcopy(plain))
    x = torch.randn(16, 32)
    for model in (plain, checkpointed):
        train(compile_interpreted(model), x)
        fp8compile.update_scales(model)
    expected, actual = only_state(plain), only_state(checkpointed)
    assert torch.equal(actual.history, expected.history) and all(
        (actual.site_entry(site)[".scale"] > 0).all() for site in range(2)
    )
    assert actual.updates == 1


def test_two_optimizers_over_one_model_update_once() -> None:
    model = two_layers()
    optimizers = [torch.optim.SGD(part.parameters(), lr=1e-3) for part in (model[0], model[2])]
    compiled = compile_interpreted(model)
    for step in range(1, 4):
        train(compiled, torch.randn(16, 32))
        for optimizer in optimizers:
            optimizer.step()
        assert only_state(model).updates == step


def test_two_models_with_their_own_optimizers() -> None:
    models = [two_layers(), two_layers()]
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3) for m in models]
    calls = [compile_interpreted(m) for m in models]
    for call in calls:
        train(call, torch.randn(16, 32))
    optimizers[0].step()
    assert [only_state(m).updates for m in models] == [1, 0]
    optimizers[1].step()
    assert [only_state(m).updates for m in models] == [1, 1]


def test_frozen_weights_move_with_what_is_trained() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(32, 64).requires_grad_(False)
            self.shift = nn.Parameter(torch.zeros(32))

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x + self.shift)

    model = Adapted()
    train(compile_interpreted(model), torch.randn(16, 32))
    torch.optim.SGD([model.shift], lr=1e-3).step()
    assert only_state(model).updates == 1


def test_deepcopy_has_a_state_of_its_own() -> None:
    model = two_layers()
    train(compile_interpreted(model), torch.randn(16, 32))
    fp8compile.update_scales(model)
    before = snapshot(model)
    twin = copy.deepcopy(model)
    assert states_of(twin) == [] and fp8compile.state_dict(twin) == {}
    train(compile_interpreted(twin), 7 * torch.randn(16, 32))
    fp8compile.update_scales(twin)
    assert only_state(twin) is not only_state(model)
    assert same(snapshot(model), before) and not same(snapshot(twin), before)


def test_state_is_freed_with_its_model() -> None:
    model = two_layers()
    compiled = compile_interpreted(model)
    train(compiled, torch.randn(16, 32))
    ref = weakref.ref(only_state(model))
    del model, compiled
    torch._dynamo.reset()
    gc.collect()
    assert ref() is None


def test_dynamic_batch_sizes_share_one_state() -> None:
    model = two_layers()
    compiled = compile_interpreted(model)
    torch._dynamo.utils.counters.clear()
    for batch in (16, 32, 48, 80, 16):
        train(compiled, torch.randn(batch, 32))
        fp8compile.update_scales(model)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs <= 2
    scales = {tuple(v.tolist()) for k, v in fp8compile.state_dict(model).items() if "scale" in k}
    assert len(scales) == 2  # two sites, one state each
    assert sum(s.updates for s in states_of(model)) == 5


# --- saving and loading -------------------------------------------------------------------------


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
    "scale_shape": (lambda s: s.update({"0.weight.scale": torch.ones(4)}), "(4,): 0.weight.scale"),
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
