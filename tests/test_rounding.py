"""Weights rounded for given inputs: the errors of a layer's output, not of its weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fp8compile
from fp8compile import Granularity, OptionError, rounding
from fp8compile.frozen import GRANULARITIES, quantize_weight
from fp8compile.ops import dequantized
from fp8compile.rounding import in_groups, rounded
from tests.helpers import compile_interpreted
from tests.models import sqnr_db


def correlated(rows: int, width: int = 256) -> Tensor:
    """Inputs of which a quarter of all directions hold most: as behind most layers."""
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(width // 4, width, generator=generator)
    return torch.randn(rows, width // 4) @ mixed / 8 + 0.1 * torch.randn(rows, width)


def output_db(x: Tensor, weight: Tensor, q: Tensor, scale: Tensor, block: Granularity) -> float:
    return sqnr_db(x @ weight.t(), x @ dequantized(q, scale, block.block, torch.float32).t())


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_outputs_lose_less_than_half(granularity: Granularity) -> None:
    """On other inputs of the same kind than those that the weight was rounded for."""
    weight, x, other = torch.randn(200, 256), correlated(2048), correlated(512)
    q, scale = quantize_weight(weight, granularity)
    better = rounded(weight, scale, granularity, x.t() @ x)
    nearest = output_db(other, weight, q, scale, granularity)
    assert output_db(other, weight, better, scale, granularity) > nearest + 4.0


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_inputs_that_know_nothing_of_each_other_leave_the_nearest(granularity: Granularity) -> None:
    weight = torch.randn(200, 256)
    q, scale = quantize_weight(weight, granularity)
    got = rounded(weight, scale, granularity, 3 * torch.eye(256))
    # Divided by a scale_inv, not multiplied with the scale: another neighbour where it is a tie.
    apart = (got.float() != q.float()).float().mean()
    assert apart < 1e-3


def test_inputs_that_are_always_zero_or_the_same_do_no_harm() -> None:
    weight = torch.randn(48, 64)
    x = torch.randn(512, 64)
    x[:, 5] = 0
    x[:, 7] = x[:, 6]
    q, scale = quantize_weight(weight, Granularity.ROW)
    better = rounded(weight, scale, Granularity.ROW, x.t() @ x)
    assert better.float().isfinite().all()
    nearest = output_db(x, weight, q, scale, Granularity.ROW)
    assert output_db(x, weight, better, scale, Granularity.ROW) > nearest
    zero = rounded(weight, scale, Granularity.ROW, torch.zeros(64, 64))
    assert (zero.float() != q.float()).float().mean() < 1e-3


def test_a_matrix_that_float32_cannot_factor_is_damped_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rounding, "_DAMPING", 1e-12)
    x = correlated(8, 64)  # of rank 8
    weight = torch.randn(16, 64)
    q, scale = quantize_weight(weight, Granularity.ROW)
    better = rounded(weight, scale, Granularity.ROW, x.t() @ x)
    nearest = output_db(x, weight, q, scale, Granularity.ROW)
    assert output_db(x, weight, better, scale, Granularity.ROW) > nearest


class Net(nn.Module):
    """Two layers, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(256, 256), nn.Linear(256, 64)
        self.unused = nn.Linear(64, 64)
        self.norm = nn.BatchNorm1d(256)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)).relu())


def frozen(batches: list[Tensor] | None) -> tuple[Net, Net]:
    """A model, and the same frozen."""
    torch.manual_seed(0)
    model, other = Net().eval(), Net().eval()
    other.load_state_dict(model.state_dict())
    fp8compile.freeze(other, batches=batches)
    return model, other


@pytest.mark.parametrize("groups", [1, 2])
def test_a_frozen_model_is_closer_to_what_it_was(
    groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if groups == 2:
        monkeypatch.setattr(rounding, "_BYTES", 1)  # each matrix alone
        modules = {name: nn.Linear(8, 8) for name in "abc"}
        assert [list(group) for group in in_groups(modules)] == [["a"], ["b"], ["c"]]
    batches, x = [correlated(512) for _ in range(4)], correlated(256)
    found = {}
    for name, given in {"nearest": None, "batches": batches}.items():
        model, other = frozen(given)
        with torch.no_grad():
            compiled = compile_interpreted(other)
            found[name] = sqnr_db(model(x), compiled(x))
            eager = sqnr_db(model(x), other(x))
        found[f"{name}, weights alone"] = eager
        torch._dynamo.reset()
    assert found["batches, weights alone"] > found["nearest, weights alone"] + 3.0
    assert found["batches"] > found["nearest"] + 1.0  # with inputs in FP8, too


def test_what_is_not_called_is_rounded_to_the_nearest() -> None:
    _, nearest = frozen(None)
    _, better = frozen([correlated(64)])
    same = (
        nearest.state_dict()["unused.weight"].float()
        == better.state_dict()["unused.weight"].float()
    )
    assert same.all()


def test_looking_at_batches_leaves_no_trace() -> None:
    model = Net().train()
    mean = model.norm.running_mean.clone()
    batches = [{"x": correlated(64)}, (correlated(64),), correlated(64)]
    fp8compile.freeze(model, batches=batches)
    assert torch.equal(model.norm.running_mean, mean)
    assert not model.first._forward_pre_hooks
    calls = []
    fp8compile.freeze(Net(), batches=[1, 2], step=lambda call, batch: calls.append(batch))
    assert calls == [1, 2]


def test_no_batch_is_refused_and_an_iterator_is_not() -> None:
    with pytest.raises(OptionError, match="at least one"):
        fp8compile.freeze(Net(), batches=[])
    model, better = frozen(None)[1], Net().eval()
    better.load_state_dict(frozen(None)[0].state_dict())
    fp8compile.freeze(better, batches=iter([correlated(64)]))
    q, other = (m.state_dict()["first.weight"].float() for m in (model, better))
    assert not torch.equal(q, other)


def test_a_layer_may_be_called_by_keyword_and_with_a_vector() -> None:
    class ByKeyword(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.second(input=self.first(input=x).relu())

    x = correlated(4)
    found = []
    for model, batches in ((ByKeyword(), [x]), (ByKeyword(), [*x]), (Net().eval(), [x])):
        torch.manual_seed(0)
        for module in (model.first, model.second):
            module.reset_parameters()
        fp8compile.freeze(model, batches=batches)
        found.append(model.state_dict()["first.weight"].float())
    for each in found[1:]:  # sums in another order may round otherwise
        assert (each != found[0]).float().mean() < 1e-2


@pytest.mark.parametrize("batches", [torch.ones(4, 256), {"x": torch.ones(4, 256)}, "x"], ids=type)
def test_one_batch_that_is_no_list_is_refused(batches: Any) -> None:
    model = Net().eval()
    with pytest.raises(OptionError, match=r"batches is of type \w+; give a list .* such as \[x\]"):
        fp8compile.freeze(model, batches=batches)
    assert model.first.weight.dtype is torch.float32


def test_a_model_without_data_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Linear(16, 16)
    with pytest.raises(OptionError, match="weight has no data"):
        fp8compile.freeze(model, batches=[torch.randn(4, 16)])


def test_inputs_that_are_not_finite_are_refused() -> None:
    model = Net().eval()
    bad = torch.full((4, 256), torch.inf)
    with pytest.raises(OptionError, match="inputs of first are not finite"):
        fp8compile.freeze(model, batches=[bad])
    assert model.first.weight.dtype is torch.float32
