"""Frozen weights, adapters, and weights that are frozen or thawed on the way."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fp8compile
from tests.habits.common import (
    EMULATED,
    GRAD_OUTPUT,
    HIDDEN,
    INPUT,
    WIDTH,
    assert_equal,
    assert_near,
    assert_same_training,
    batch,
    gradients,
    history,
    loss_of,
    mlp,
    only_state,
    plain_loop,
    scale,
    twins,
)
from tests.helpers import compile_interpreted
from tests.models import sqnr_db

pytestmark = pytest.mark.filterwarnings(EMULATED)


class Lora(nn.Module):
    """A frozen linear layer and a trained update of low rank."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def adapted(rank: int, zero: bool = True) -> nn.Sequential:
    model = nn.Sequential(
        Lora(nn.Linear(WIDTH, HIDDEN), rank), nn.Tanh(), Lora(nn.Linear(HIDDEN, WIDTH), rank)
    )
    if not zero:
        for layer in (model[0], model[2]):
            nn.init.normal_(layer.up.weight, std=0.1)
    return model


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("rank", [8, 16, 64])
def test_adapters_of_any_rank_have_the_gradients_of_eager(rank: int) -> None:
    model, reference = twins(adapted(rank, zero=False))
    rows = fp8compile.explain(copy.deepcopy(model), batch()).rows
    in_fp8 = {(site, row.gemm) for row in rows for site in row.sites if row.is_fp8}
    assert {("0.base", "fprop"), ("2.base", "fprop"), ("2.base", "dgrad")} <= in_fp8
    assert not {("0.base", "wgrad"), ("2.base", "wgrad")} & in_fp8
    assert all(row.is_fp8 for row in rows)
    compiled, x = compile_interpreted(model), batch()
    loss_of(reference(x)).backward()
    loss_of(compiled(x)).backward()
    assert gradients(model).keys() == {
        f"{layer}.{part}.weight" for layer in (0, 2) for part in ("down", "up")
    }
    for name, gradient in gradients(reference).items():
        assert sqnr_db(gradient, gradients(model)[name]) >= 18, name


def test_adapters_train_and_the_base_keeps_still() -> None:
    model = adapted(16)
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    losses = plain_loop(model, [batch()] * 20, optimizer)
    assert losses[-1] < 0.8 * losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("base" in name), name
    assert only_state(model).updates == 20


def test_the_base_alone_is_scaled_as_if_it_were_trained() -> None:
    """Backward goes through the frozen second layer: its weight and gradient are cast, too."""
    frozen, trained = models = twins(mlp())
    frozen[2].requires_grad_(False)
    for model in models:
        loss_of(compile_interpreted(model)(torch.ones(16, WIDTH))).backward()
        fp8compile.update_scales(model)
    assert torch.equal(scale(frozen, "2.weight"), scale(trained, "2.weight"))
    assert frozen[2].weight.grad is None
    torch.testing.assert_close(frozen[0].weight.grad, trained[0].weight.grad)


def test_nothing_trainable_but_the_input() -> None:
    """Textual inversion, adversarial examples: every weight is frozen."""
    model = mlp().requires_grad_(False)
    x = nn.Parameter(batch())
    compiled = compile_interpreted(model)
    optimizer = torch.optim.SGD([x], lr=0.1)
    for step in range(1, 3):
        loss_of(compiled(x)).backward()
        optimizer.step()
        assert only_state(model).updates == step
    assert x.grad is not None and gradients(model) == {}


def test_freezing_and_thawing_keeps_the_state() -> None:
    """Dynamo compiles again; the amax history goes on."""
    model, x = mlp(), batch()
    torch._dynamo.utils.counters.clear()
    compiled = compile_interpreted(model)
    for step in range(6):
        model[0].requires_grad_(step % 2 == 0)
        plain_loop(model, [(6 - step) * x], call=compiled)
    seen = [float((6 - step) * x.abs().amax()) for step in range(6)]
    assert history(model, "0.weight", INPUT) == pytest.approx(seen)
    assert only_state(model).updates == 6
    # While the first layer was frozen no gradient reached it; but torch 2.11 does not compile again
    # for that, and computes a gradient that it drops.
    compiled_again = torch._dynamo.utils.counters["stats"]["unique_graphs"] > 1
    assert len(history(model, "0.weight", GRAD_OUTPUT)) == (3 if compiled_again else 6)
    assert len(history(model, "2.weight", GRAD_OUTPUT)) == 6


def test_a_frozen_layer_trains_on_as_one_that_never_was_once_thawed() -> None:
    """Freeze, run without a step, thaw: no trace is left."""
    interrupted, plain = models = twins(mlp())
    x = batch()
    for model in models:
        compiled = compile_interpreted(model)
        plain_loop(model, [x], call=compiled)
        if model is interrupted:
            model.requires_grad_(False)
            compiled(x)
            model.requires_grad_(True)
        plain_loop(model, [x], call=compiled)
    assert_same_training(interrupted, plain)


class Probe(nn.Module):
    """A frozen backbone in eval mode, a head that is trained: one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(WIDTH, HIDDEN).requires_grad_(False)
        self.head = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.backbone(x)))


def test_a_backbone_in_eval_mode_does_not_stop_the_scales_of_the_head() -> None:
    model = Probe()
    model.backbone.eval()
    plain_loop(model, [batch()] * 3)
    assert only_state(model).updates == 3
    assert (scale(model, "head.weight") > 0).all()


def test_the_head_alone_in_eval_mode_is_no_evaluation() -> None:
    model = Probe()
    model.head.eval()
    plain_loop(model, [batch()] * 3)
    assert only_state(model).updates == 3


def test_a_model_in_eval_mode_trains_without_leaving_a_trace() -> None:
    model = Probe().eval()
    plain_loop(model, [batch()] * 3)
    assert only_state(model).updates == 0


def test_a_weight_that_starts_at_zero_is_as_good_from_its_first_steps_on() -> None:
    """As the second factor of an adapter, whose amax grows by more than half for some steps: the
    noise has at most four times the power of that of current scaling (20 times without care).
    """
    model, reference, current = twins(adapted(16), 3)
    compiled = compile_interpreted(model)
    compiled_current = compile_interpreted(current, {"recipe": "current"})
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    for _ in range(10):
        x = batch()
        for m, call in ((reference, reference), (current, compiled_current), (model, compiled)):
            m.load_state_dict(model.state_dict())
            m.zero_grad()
            loss_of(call(x)).backward()
        best, found = gradients(current), gradients(model)
        for name, expected in gradients(reference).items():
            noise, least = (g[name] - expected for g in (found, best))
            assert noise.square().sum() <= 4 * least.square().sum(), name
        optimizer.step()


def test_merged_adapter() -> None:
    """The weight is computed in the graph: a site without a parameter of its own."""

    class Merged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(WIDTH, HIDDEN).requires_grad_(False)
            self.down = nn.Parameter(torch.randn(16, WIDTH) / 8)
            self.up = nn.Parameter(torch.randn(HIDDEN, 16) / 8)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.base.weight + self.up @ self.down, self.base.bias)

    model, reference = twins(Merged())
    compiled = compile_interpreted(model)
    for _ in range(3):
        x = batch()
        expected, out = reference(x), compiled(x)
        assert_near(expected, out, db=24)
        for m, y in ((reference, expected), (model, out)):
            m.zero_grad()
            loss_of(y).backward()
        fp8compile.update_scales(model)
        for name, gradient in gradients(reference).items():
            assert sqnr_db(gradient, gradients(model)[name]) >= 18, name
    assert_equal(model.state_dict(), reference.state_dict())
