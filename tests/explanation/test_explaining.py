"""What `explain` finds, and that it leaves everything as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fp8compile
from fp8compile import OptionError, RecipeError
from fp8compile.explanation import Explanation
from tests.helpers import compile_interpreted
from tests.models import MLP, Llama, sqnr_db

pytestmark = pytest.mark.filterwarnings("ignore:FP8 is emulated here")


def test_rows_of_an_mlp() -> None:
    rows = fp8compile.explain(MLP(), torch.randn(2, 16, 64)).rows
    found = [(r.fqn, r.gemm, r.m, r.n, r.k, r.formats) for r in rows]
    wide = [
        ("fprop", 32, 256, 64, "e4m3 x e4m3"),
        ("dgrad", 32, 64, 256, "e5m2 x e4m3"),
        ("wgrad", 256, 64, 32, "e5m2 x e4m3"),
    ]
    narrow = [
        ("fprop", 32, 64, 128, "e4m3 x e4m3"),
        ("dgrad", 32, 128, 64, "e5m2 x e4m3"),
        ("wgrad", 64, 128, 32, "e5m2 x e4m3"),
    ]
    assert found == [("{gate,up}", *r) for r in wide] + [("down", *r) for r in narrow]
    assert all((r.decision, r.kernel, r.reason) == ("fp8", "reference", "") for r in rows)
    assert all(r.gflops == pytest.approx(2 * r.m * r.n * r.k / 1e9) for r in rows)


def test_rows_in_high_precision_have_a_reason_and_no_kernel() -> None:
    rows = fp8compile.explain(nn.Linear(32, 48).double(), torch.randn(16, 32).double()).rows
    assert [(r.gemm, r.decision, r.kernel, r.formats) for r in rows] == [
        ("fprop", "f64", "", ""),
        ("wgrad", "f64", "", ""),
    ]
    assert [r.reason for r in rows] == ["dtype float64 has no FP8 form"] * 2


def test_matmuls_without_a_weight_are_listed() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x, self.fc(x).transpose(1, 2))

    rows = fp8compile.explain(Attention(), torch.randn(2, 16, 32)).rows
    others = [row for row in rows if row.fqn != "fc"]
    assert others and all("bmm" in row.fqn and row.reason and not row.is_fp8 for row in others)


def test_summary_and_share() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 10))
    explanation = fp8compile.explain(model, torch.randn(16, 32), options={"skip": ["1"]})
    gflops = {(r.fqn, r.gemm): r.gflops for r in explanation.rows}
    fp8 = [("0", "fprop"), ("0", "wgrad")]
    assert explanation.fp8_share == pytest.approx(
        sum(gflops[key] for key in fp8) / sum(gflops.values())
    )
    assert explanation.summary().startswith("2 sites, 2 of 5 GEMMs in FP8, ")
    assert "recipe delayed" in explanation.summary()


def test_the_summary_counts_every_site_of_a_merged_gemm() -> None:
    explanation = fp8compile.explain(MLP(), torch.randn(16, 64, requires_grad=True))
    assert explanation.summary().startswith("3 sites, 6 of 6 GEMMs in FP8, 100.0%")
    assert explanation.rows[0].sites == ("gate", "up")


def test_text_shows_every_row() -> None:
    model = nn.Sequential(nn.Linear(32, 10), nn.Linear(10, 16))
    text = str(fp8compile.explain(model, torch.randn(16, 32), options={"skip": ["1"]}))
    for part in ("site", "fprop", "wgrad", "skipped by the user", "2 sites, 2 of 5 GEMMs"):
        assert part in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_forward_only_under_no_grad() -> None:
    with torch.no_grad():
        rows = fp8compile.explain(MLP(), torch.randn(16, 64)).rows
    assert [(r.fqn, r.gemm) for r in rows] == [("{gate,up}", "fprop"), ("down", "fprop")]


def test_options_are_those_of_torch_compile() -> None:
    explanation = fp8compile.explain(
        MLP(), torch.randn(16, 64), options={"recipe": "current", "skip": ["up"]}
    )
    assert explanation.recipe.name == "current"
    assert {r.fqn for r in explanation.rows if not r.is_fp8} == {"up"}
    with pytest.raises(OptionError, match="unknown option"):
        fp8compile.explain(MLP(), torch.randn(16, 64), options={"skipp": []})
    with pytest.raises(RecipeError, match="unknown recipe"):
        fp8compile.explain(MLP(), torch.randn(16, 64), options={"recipe": "int4"})


def test_strict_explains_instead_of_raising() -> None:
    explanation = fp8compile.explain(
        nn.Linear(32, 48).double(), torch.randn(16, 32).double(), options={"strict": True}
    )
    assert len(explanation.rows) == 2 and not any(r.is_fp8 for r in explanation.rows)


def test_keyword_arguments_reach_the_model() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 32)

        def forward(self, x: Tensor, *, factor: float) -> Tensor:
            return self.fc(x * factor)

    assert len(fp8compile.explain(Scaled(), torch.randn(16, 32), factor=2.0).rows) == 2


def test_compiled_model_and_function() -> None:
    model, x = MLP(), torch.randn(16, 64)
    expected = fp8compile.explain(model, x).rows
    assert fp8compile.explain(torch.compile(model, backend="fp8"), x).rows == expected
    torch._dynamo.reset()

    def function(x: Tensor) -> Tensor:
        return model(x)

    assert [r.gemm for r in fp8compile.explain(function, x).rows] == [r.gemm for r in expected]
    assert len(fp8compile.explain(torch.compile(function, backend="fp8"), x).rows) == len(expected)


def test_symbolic_sizes() -> None:
    model = nn.Linear(32, 48)
    x = torch.randn(16, 32)
    torch._dynamo.mark_dynamic(x, 0)
    explanation = fp8compile.explain(model, x)
    fprop, wgrad = explanation.rows
    assert isinstance(fprop.m, str) and (fprop.n, fprop.k) == (48, 32)
    assert fprop.is_fp8 and wgrad.is_fp8 and wgrad.k == fprop.m
    assert explanation.fp8_share is None
    assert "2 of 2 GEMMs in FP8;" in explanation.summary() and str(fprop.m) in str(explanation)


# --- it leaves everything as it was -------------------------------------------------------------


class WithBuffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)
        self.norm = nn.BatchNorm1d(32)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(self.fc(x)))


def test_changes_nothing() -> None:
    model, x = WithBuffers(), torch.randn(16, 32, requires_grad=True)
    compiled = compile_interpreted(model)
    compiled(x).sum().backward()
    fp8compile.update_scales(model)
    before = copy.deepcopy(model.state_dict())
    grads = [p.grad.clone() for p in (*model.parameters(), x) if p.grad is not None]
    scaling = fp8compile.state_dict(model)
    rng = torch.get_rng_state()
    assert len(fp8compile.explain(model, 100 * x).rows) == 3
    assert torch.equal(torch.get_rng_state(), rng)
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    now = [p.grad for p in (*model.parameters(), x) if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(now, grads, strict=True))
    assert fp8compile.state_dict(model).keys() == scaling.keys()
    assert all(torch.equal(v, scaling[k]) for k, v in fp8compile.state_dict(model).items())
    assert model.training


def test_before_training_leaves_no_scaling_state() -> None:
    model = MLP()
    fp8compile.explain(model, torch.randn(16, 64))
    assert fp8compile.state_dict(model) == {}


def test_can_be_asked_again_and_again() -> None:
    model, x = nn.Linear(32, 48), torch.randn(16, 32)
    counts = [len(fp8compile.explain(model, x).rows) for _ in range(10)]
    assert counts == [2] * 10


def test_asking_often_does_not_push_the_compiled_model_out_of_fp8() -> None:
    model, x = nn.Linear(32, 48), torch.randn(16, 32)
    for _ in range(10):
        fp8compile.explain(model, x)
    assert 25 <= sqnr_db(model(x).detach(), compile_interpreted(model)(x).detach()) < 60


def test_other_sizes_do_not_make_a_later_compile_dynamic() -> None:
    model = nn.Linear(32, 48)
    for batch in (16, 32):
        fp8compile.explain(model, torch.randn(batch, 32))
    rows = fp8compile.explain(model, torch.randn(48, 32)).rows
    assert [(r.gemm, r.m, r.is_fp8) for r in rows] == [("fprop", 48, True), ("wgrad", 48, True)]


@pytest.mark.parametrize("call", [F.linear, lambda x, w: x @ w.t()], ids=["linear", "matmul"])
def test_weights_that_are_arguments(call: Callable[..., Any]) -> None:
    x, w = torch.randn(16, 32, requires_grad=True), torch.randn(48, 32, requires_grad=True)
    rows = fp8compile.explain(call, x, w).rows
    assert [r.gemm for r in rows if r.is_fp8] == ["fprop", "dgrad", "wgrad"]


# --- without data -------------------------------------------------------------------------------


def small_llama() -> Llama:
    return Llama(layers=1, width=64, heads=4, kv_heads=2, hidden=128, max_tokens=16)


def without_source(explanation: Explanation) -> tuple[object, ...]:
    kernels = [replace(row, source="") for row in explanation.kernels]
    return explanation.rows, kernels, explanation.saved


def test_meta_and_fake_models_are_explained_like_real_ones() -> None:
    ids = torch.zeros(2, 16, dtype=torch.int64)
    expected = without_source(fp8compile.explain(small_llama(), ids))
    torch._dynamo.reset()
    with torch.device("meta"):
        meta = small_llama()
    parameters = list(meta.parameters())
    assert without_source(fp8compile.explain(meta, ids.to("meta"))) == expected
    assert all(a is b for a, b in zip(meta.parameters(), parameters, strict=True))
    assert meta.cos.is_meta and not any("bmm" in row.fqn for row in expected[0])
    torch._dynamo.reset()
    with FakeTensorMode():
        fake, fake_ids = small_llama(), torch.zeros(2, 16, dtype=torch.int64)
    assert without_source(fp8compile.explain(fake, fake_ids)) == expected


def test_tied_weights_without_data_stay_tied() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
        model[1].weight = model[0].weight
        x = torch.empty(16, 32)
    rows = fp8compile.explain(model, x).rows
    assert model[1].weight is model[0].weight and model[0].weight.is_meta
    assert [row.gemm for row in rows if row.is_fp8].count("wgrad") == 2


# --- after training -----------------------------------------------------------------------------


def test_scales_and_events_after_training() -> None:
    model, x = MLP(), torch.randn(16, 64, requires_grad=True)
    model.norm = nn.Identity()  # type: ignore[assignment]  # it would undo the factor
    before = fp8compile.explain(model, x)
    assert before.edges and all(edge.scale is None for edge in before.edges)
    assert "saturated" not in str(before)
    torch._dynamo.reset()
    compiled = compile_interpreted(model)
    for factor in (1.0, 1.0, 1e6):  # the last outgrows the scale of x
        compiled(factor * x).sum().backward()
        fp8compile.update_scales(model)
    for target in (model, compiled):
        edges = fp8compile.explain(target, x).edges
        found = {(edge.site, edge.operand): edge for edge in edges}
        sites, operands = ("{gate,up}", "down"), ("input", "weight", "grad_output")
        assert list(found) == [(site, operand) for site in sites for operand in operands]
        state = fp8compile.state_dict(model)
        for site, name in (("{gate,up}", "gate"), ("down", "down")):
            for i, operand in enumerate(operands):
                edge = found[site, operand]
                assert edge.scale == pytest.approx(float(state[f"{name}.weight.scale"][i]) or None)
                amax = float(state[f"{name}.weight.amax_history"][-1, i])
                assert edge.amax == pytest.approx(amax) and amax > 0
        weight = found["down", "weight"]
        assert weight.amax == pytest.approx(float(model.down.weight.abs().max()))
    events = fp8compile.events(model)
    assert events, "the test is about some"
    for edge in edges:
        name = {"{gate,up}": "gate"}.get(edge.site, edge.site)
        counts = events.get(f"{name}.weight.{edge.operand}", (0, 0, 0))
        assert (edge.not_finite, edge.saturated, edge.jumped) == tuple(counts)
    text = str(fp8compile.explain(model, x))
    assert "saturated" in text and f"6 FP8 operands, {len(events)} with events" in text


def test_a_model_that_pytorch_cannot_trace() -> None:
    """Nothing would say that it is compiled in vain: no backend is called."""

    class Scripted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(32, 32), torch.jit.script(nn.Linear(32, 32))])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    with pytest.warns(UserWarning, match=r"no graph of Scripted.*TORCH_LOGS=graph_breaks"):
        explained = fp8compile.explain(Scripted(), torch.randn(16, 32))
    assert explained.rows == ()
