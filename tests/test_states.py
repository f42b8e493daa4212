"""When the scaling states move: once per step."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fp8compile
from fp8compile.states import states_of
from tests.helpers import compile_interpreted
from tests.models import sqnr_db
from tests.scaled import (
    INPUT,
    only_state,
    same,
    snapshot,
    train,
    two_layers,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:FP8 is emulated here"),
    pytest.mark.usefixtures("fresh_dynamo"),
]


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
