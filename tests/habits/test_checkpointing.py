"""Activations that are computed again in backward: inside and around what is compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import fp8compile
from tests.habits.common import (
    EMULATED,
    INPUT,
    assert_same_training,
    batch,
    history,
    loss_of,
    mlp,
    only_state,
    plain_loop,
    sgd,
    step_in_backward,
    twins,
)
from tests.helpers import compile_interpreted

pytestmark = pytest.mark.filterwarnings(EMULATED)


def keep_matmuls(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def keep_nothing(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_RECOMPUTE


WAYS: dict[str, Callable[..., Any]] = {
    "non_reentrant": partial(checkpoint, use_reentrant=False),
    "reentrant": partial(checkpoint, use_reentrant=True),
    "keep_matmuls": partial(
        checkpoint,
        use_reentrant=False,
        context_fn=partial(create_selective_checkpoint_contexts, keep_matmuls),
    ),
    "keep_nothing": partial(
        checkpoint,
        use_reentrant=False,
        context_fn=partial(create_selective_checkpoint_contexts, keep_nothing),
    ),
}


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(torch.tanh(self.inner(x)))


class Inside(Plain):
    """The checkpoint is a part of what is compiled."""

    way: str

    def forward(self, x: Tensor) -> Tensor:
        return WAYS[self.way](self.body, torch.tanh(self.inner(x)))


@pytest.mark.parametrize("way", [name for name in WAYS if name != "reentrant"])
def test_a_checkpoint_inside_trains_as_none(way: str) -> None:
    plain = Plain()
    inside = Inside()
    inside.way = way
    inside.load_state_dict(plain.state_dict())
    batches = [(1 + step) * batch() for step in range(3)]
    for model in (plain, inside):
        plain_loop(model, batches)
    assert_same_training(plain, inside)


class Around(nn.Module):
    """Blocks that are compiled one by one, each inside a checkpoint."""

    def __init__(self, blocks: list[nn.Module], way: str | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.way = way
        self.calls = [compile_interpreted(block) for block in blocks]

    def forward(self, x: Tensor) -> Tensor:
        for call in self.calls:
            x = call(x) if self.way is None else WAYS[self.way](call, x)
        return x


@pytest.mark.parametrize("way", ["non_reentrant", "reentrant"])
def test_a_checkpoint_around_trains_as_none(way: str) -> None:
    blocks: list[nn.Module] = [mlp(), mlp()]
    models = [Around(copy.deepcopy(blocks), None), Around(blocks, way)]
    batches = [(1 + step) * batch().requires_grad_() for step in range(3)]
    for model in models:
        plain_loop(model, [x.detach().requires_grad_() for x in batches], call=model)
    assert_same_training(*models)
    assert len(history(models[1], "blocks.0.0.weight", INPUT)) == 3


@pytest.mark.parametrize("way", ["non_reentrant", "reentrant"])
def test_another_forward_between_forward_and_recomputation(way: str) -> None:
    """The scale is only read: what was computed in between does not change what is recomputed."""
    models = twins(mlp())
    x = batch()
    for model, between in zip(models, (False, True), strict=True):
        compiled = compile_interpreted(model)
        plain_loop(model, [x], call=compiled)
        loss = loss_of(WAYS[way](compiled, x.clone().requires_grad_()))
        if between:
            with torch.no_grad():
                compiled(50 * x)
            compiled(x / 2)
        loss.backward()
        sgd(model).step()
    assert_same_training(*models)


def test_an_update_between_forward_and_recomputation() -> None:
    """The recomputation takes the new scale, with its own scale_inv: close, and not corrupt."""
    models = twins(mlp())
    x = batch()
    for model, between in zip(models, (False, True), strict=True):
        compiled = compile_interpreted(model)
        plain_loop(model, [x / 3], call=compiled)
        loss = loss_of(checkpoint(compiled, x, use_reentrant=False))
        if between:
            fp8compile.update_scales(model)
        loss.backward()
    expected, actual = ([p.grad for p in model.parameters()] for model in models)
    for left, right in zip(expected, actual, strict=True):
        assert torch.nn.functional.cosine_similarity(left.flatten(), right.flatten(), dim=0) > 0.9
    for model in models:
        fp8compile.update_scales(model)
    assert only_state(models[0]).updates == 2 and only_state(models[1]).updates == 3


@pytest.mark.parametrize("way", ["non_reentrant", "reentrant"])
def test_optimizers_in_backward_step_between_the_recomputations(way: str) -> None:
    """The second block has stepped, and its scales have moved, when the first is computed again."""
    blocks: list[nn.Module] = [mlp(), mlp()]
    plain, checkpointed = models = Around(copy.deepcopy(blocks), None), Around(blocks, way)
    batches = [(1 + step) * batch() for step in range(3)]
    plain_loop(plain, [x.requires_grad_() for x in batches], call=plain)
    step_in_backward(checkpointed)
    for x in batches:
        loss_of(checkpointed(x)).backward()
    assert_same_training(*models)


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(32, 64), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.fc, x, use_reentrant=False)


def test_dropout_is_recomputed_with_the_same_numbers() -> None:
    """By Inductor's code: eager bodies of its random numbers do not look at their seed."""
    model = Dropped()
    compiled = torch.compile(model, backend="fp8")
    for _ in range(3):
        model.zero_grad()
        out = compiled(batch())
        out.sum().backward()
        kept = (out != 0).sum(0)
        assert torch.equal(model.fc[0].bias.grad, 2.0 * kept)


def test_nested_checkpoints_around_compiled_blocks() -> None:
    blocks: list[nn.Module] = [mlp(), mlp()]
    plain, nested = Around(copy.deepcopy(blocks), None), Around(blocks, "non_reentrant")
    x = batch()
    plain_loop(plain, [x, x], call=plain)
    outer = partial(checkpoint, nested, use_reentrant=False)
    plain_loop(nested, [x, x], call=outer)
    assert_same_training(plain, nested)
