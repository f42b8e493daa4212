"""``explain``: its rows, its text, and that it leaves everything as it was."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from html import escape
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, fx, nn
from torch._inductor.utils import fresh_cache
from torch._subclasses.fake_tensor import FakeTensorMode

import fp8compile
from fp8compile import OptionError, RecipeError
from fp8compile import compile as compile_module
from fp8compile.backends import kernel_rows
from fp8compile.explanation import Explanation
from fp8compile.explanation.timed import StepTimes, with_gemm_times, with_kernel_times
from fp8compile.internals import copy_of
from fp8compile.passes import grow_regions
from fp8compile.report import KernelRow, Measured
from fp8compile.scaling import states_left_as_they_were
from tests.helpers import compile_interpreted
from tests.models import MLP, Llama, sqnr_db

pytestmark = pytest.mark.filterwarnings("ignore:FP8 is emulated here")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield


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


# --- predictions --------------------------------------------------------------------------------


def test_every_gemm_has_its_times_and_its_site_a_crossover() -> None:
    rows = fp8compile.explain(MLP(), torch.randn(2, 16, 64)).rows
    assert all(r.high_us and r.fp8_us for r in rows)
    assert sum(r.fp8_us or 0.0 for r in rows) > sum(r.high_us or 0.0 for r in rows)
    assert all(r.is_fp8 for r in rows), "emulation declines nothing"
    assert {"H200" in r.predicted_for for r in rows} == {True}
    crossovers = {(r.fqn, r.pays_from) for r in rows}
    assert len(crossovers) == len({r.fqn for r in rows})


def test_prediction_in_the_summary_says_for_which_device() -> None:
    x = torch.randn(16, 64)
    explanation = fp8compile.explain(MLP(), x)
    assert explanation.predicted_ratio is not None and explanation.predicted_ratio > 1
    assert "predicted for an NVIDIA H200, for want of an FP8 GPU here" in explanation.summary()
    declined = fp8compile.explain(MLP(), x, options={"decline_slower": "H100"})
    assert declined.predicted_ratio == 1
    assert "GEMM time 1.00x, predicted for NVIDIA H100;" in declined.summary()


def test_large_layers_are_predicted_to_gain() -> None:
    model = nn.Linear(4096, 2048, bias=False, dtype=torch.bfloat16)
    explanation = fp8compile.explain(model, torch.randn(4096, 4096, dtype=torch.bfloat16))
    fprop = explanation.rows[0]
    assert fprop.fp8_us is not None and fprop.high_us is not None and fprop.fp8_us < fprop.high_us
    assert fprop.pays_from is not None and 16 <= fprop.pays_from < 4096
    assert explanation.predicted_ratio is not None and explanation.predicted_ratio < 1


def test_table_fits_120_columns() -> None:
    options = {"decline_slower": "H200"}
    names = nn.ModuleDict({"layers": nn.ModuleDict({"0": nn.ModuleDict({"mlp": MLP()})})})
    explanation = fp8compile.explain(
        lambda x: names["layers"]["0"]["mlp"](x), torch.randn(16, 64), options=options
    )
    text = io.StringIO()
    Console(file=text, width=120, color_system=None).print(explanation)
    table = text.getvalue()
    assert "FP8 would not be faster │" in table and " -> " in table
    assert "pays from" in table and max(map(len, table.splitlines())) <= 120


def test_sizes_without_a_prediction_show_none() -> None:
    explanation = fp8compile.explain(nn.Linear(16, 32).double(), torch.randn(16, 16).double())
    assert {(r.high_us, r.fp8_us, r.pays_from) for r in explanation.rows} == {(None, None, None)}
    assert explanation.predicted_ratio is None and "predicted" not in explanation.summary()


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


# --- kernels and memory -------------------------------------------------------------------------


def test_kernels_say_what_is_fused_written_and_fed() -> None:
    kernels = fp8compile.explain(MLP(), torch.randn(2, 16, 64, requires_grad=True)).kernels
    norm = next(row for row in kernels if "{gate,up} fprop" in row.feeds and row.fused)
    assert norm.direction == "forward" and norm.size == "32 x 64" and norm.launches == 1
    assert {"mean", "rsqrt"} <= set(norm.fused) and {"e4m3", "amax"} <= set(norm.writes)
    # x, the norm's weight -> the fp8 copy and 1 / rms, a float a row
    assert norm.mb_read == pytest.approx((32 * 64 + 64) * 4 / 1e6)
    assert norm.mb_written == pytest.approx((32 * 64 + 32 * 4) / 1e6)
    assert norm.predicted_us is not None and norm.predicted_us > 2.5
    assert f"def {norm.name}(" in norm.source and norm.functions[-1] == norm.name
    weights = next(row for row in kernels if row.regions > 1 and row.direction == "forward")
    assert weights.name == "fp8_bundle" and weights.feeds == ("{gate,up} fprop", "down fprop")
    backward = [row for row in kernels if row.direction == "backward"]
    assert any("e5m2^T" in row.writes and "sigmoid" in row.fused for row in backward)
    fed = {name for row in kernels for name in row.feeds}
    gemms = [f"{site} {gemm}" for site in ("{gate,up}", "down") for gemm in ("dgrad", "wgrad")]
    assert fed == {"{gate,up} fprop", "down fprop", *gemms}


def test_layers_that_look_alike_are_one_row() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32)) for _ in range(4)))
    kernels = fp8compile.explain(model, torch.randn(16, 32)).kernels
    counts = [(r.launches, len(r.feeds)) for r in kernels if r.direction == "forward" and r.fused]
    assert counts == [(1, 1), (3, 3)], "nothing has to write the first one's input"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_kernels_are_those_of_the_final_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's own passes, which ``explain`` leaves out, change nothing of the regions."""
    found: list[list[tuple[str, int, float | str]]] = []
    model, x = MLP(), torch.randn(16, 64, requires_grad=True)

    def lower(gm: fx.GraphModule, kernels: str) -> dict[str, str]:
        copy = fx.GraphModule(gm, copy_of(gm.graph))
        grow_regions(copy)
        rows = kernel_rows(copy, "forward", None)
        found.append([(row.name, row.launches, row.mb_read) for row in rows])
        return {}

    monkeypatch.setattr(compile_module, "lower", lower)
    with fresh_cache():
        torch.compile(model, backend="fp8")(x).sum().backward()
    torch._dynamo.reset()
    kernels = fp8compile.explain(model, x).kernels
    explained = [[(row.name, row.launches, row.mb_read) for row in kernels if row.direction == way]
                 for way in ("forward", "backward")]  # fmt: skip
    assert len(found) == 2 and explained == found


def test_inference_has_forward_kernels_and_keeps_nothing() -> None:
    with torch.no_grad():
        explanation = fp8compile.explain(MLP(), torch.randn(16, 64))
    assert explanation.kernels and {row.direction for row in explanation.kernels} == {"forward"}
    assert explanation.saved == () and explanation.saved_bytes == 0


def test_saved_bytes_are_what_a_forward_keeps_alive() -> None:
    """Against the tensors that autograd's node holds in a real call."""
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).bfloat16()
    x = torch.randn(256, 64, dtype=torch.bfloat16)
    explanation = fp8compile.explain(model, x)
    torch._dynamo.reset()
    output = compile_interpreted(model)(x)
    inputs = {p.data_ptr() for p in (*model.parameters(), x)}
    kept = {
        t.data_ptr(): (t.dtype, t.untyped_storage().nbytes())
        for t in output.grad_fn.saved_tensors
        if t.data_ptr() not in inputs
    }
    held = {row.format: row.bytes for row in explanation.saved}
    for dtype, name in ((torch.float8_e4m3fn, "e4m3"), (torch.bfloat16, "bf16")):
        sizes = [size for found, size in kept.values() if found is dtype]
        assert held[name] == sum(sizes) > 0
    assert explanation.saved_bytes == sum(row.bytes for row in explanation.saved)


def test_text_of_kernels_is_a_second_table() -> None:
    explanation = fp8compile.explain(MLP(), torch.randn(16, 64))
    text = str(explanation)
    assert text.index("fused kernel") > text.index("recipe delayed")
    assert f"{sum(row.launches for row in explanation.kernels)} launches of " in text
    assert "here FP8 is emulated" in text and "kept for backward: " in text
    out = io.StringIO()
    Console(file=out, width=100, color_system=None).print(explanation.table())
    assert "fused kernel" not in out.getvalue()


def test_symbolic_sizes_of_kernels_and_memory() -> None:
    x = torch.randn(16, 32)
    torch._dynamo.mark_dynamic(x, 0)
    explanation = fp8compile.explain(nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 16)), x)
    assert any(isinstance(row.mb_read, str) for row in explanation.kernels)
    assert explanation.saved_bytes is None and explanation.megabytes is None
    assert "kept for backward:" in str(explanation)
    json.loads(explanation.to_json())


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


# --- files --------------------------------------------------------------------------------------

FIELDS = {
    "": "schema version recipe summary gemms kernels saved edges measured",
    "recipe": "name text",
    "summary": "text notes fp8_share gflops megabytes saved_bytes predicted_ratio predicted_for",
    "gemms": "fqn gemm m n k gflops megabytes formats decision kernel reason sites recipe scaling"
    " high_us fp8_us pays_from predicted_for measured_us",
    "kernels": "name direction functions launches regions size fused writes feeds mb_read"
    " mb_written source predicted_us measured_us",
    "saved": "format tensors bytes",
    "edges": "site operand cast scale amax not_finite saturated jumped",
}


def test_json_has_the_documented_schema(tmp_path: Path) -> None:
    explanation = fp8compile.explain(MLP(), torch.randn(16, 64))
    text = explanation.to_json(tmp_path / "explanation.json")
    assert (tmp_path / "explanation.json").read_text() == text
    found = json.loads(text)
    assert (found["schema"], found["version"]) == ("fp8compile.explanation", 1)
    for key, fields in FIELDS.items():
        part = found[key] if key else found
        for entry in part if isinstance(part, list) else [part]:
            assert list(entry) == fields.split(), f"{key}: raise VERSION if a field changes"
    assert found["gemms"][0] == json.loads(json.dumps(asdict(explanation.rows[0])))
    assert found["summary"]["saved_bytes"] == explanation.saved_bytes and found["measured"] is None


def test_html_needs_nothing_else_and_folds_the_source(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleDict({"<b>": nn.Linear(32, 32)})

        def forward(self, x: Tensor) -> Tensor:
            return self.layers["<b>"](x)

    explanation = fp8compile.explain(Named(), torch.randn(16, 32))
    text = explanation.to_html(tmp_path / "explanation.html")
    assert (tmp_path / "explanation.html").read_text(encoding="utf-8") == text
    assert "http" not in text and "<script" not in text and "src=" not in text
    assert "layers.&lt;b&gt;" in text and "<b>" not in text
    assert text.count("<details>") == text.count("</details>") == len(explanation.kernels)
    assert escape(explanation.summary()) in text and escape(explanation.kernels[0].source) in text
    assert text.count("<h2>") == 3


# --- measuring ----------------------------------------------------------------------------------


def test_measuring_without_a_gpu_is_refused() -> None:
    message = "to measure takes an NVIDIA GPU; the model is on cpu"
    with pytest.raises(OptionError, match=message):
        fp8compile.explain(MLP(), torch.randn(16, 64), measure=True)


def test_kernels_of_one_name_share_its_time_by_what_they_move() -> None:
    row = KernelRow("fp8_cast", "forward", ("fp8_cast",), 2, 1, "", (), (), (), 2.0, 1.0, "a")
    half = replace(row, launches=1, mb_read=1.0, mb_written=2.0, source="b")
    sums = replace(row, name="fp8_mean", functions=("fp8_mean_sums", "fp8_mean"), launches=1)
    unseen = replace(row, name="fp8_tanh", functions=("fp8_tanh",))
    us = {"fp8_cast": 60.0, "fp8_cast_1": 30.0, "fp8_mean_sums_0": 5.0, "fp8_mean_0": 7.0}
    times = StepTimes(Measured("a GPU", 3.0, 2.0), us, {})
    found = with_kernel_times([row, half, sums, unseen], times)
    assert [row.measured_us for row in found] == [30.0, 30.0, 12.0, None]


def test_gemms_get_the_time_of_their_size_or_a_share_by_flops() -> None:
    rows = fp8compile.explain(MLP(), torch.randn(16, 64, requires_grad=True)).rows
    rows = tuple(
        replace(row, kernel="cublaslt" if i < 3 else "triton") for i, row in enumerate(rows)
    )
    rows += (replace(rows[0], decision="f32"),)
    (m, n, k) = rows[0].m, rows[0].n, rows[0].k
    times = StepTimes(Measured("a GPU", 3.0, 2.0), {"_scaled_mm_kernel_0": 9.0}, {(m, n, k): 4.0})
    found = [row.measured_us for row in with_gemm_times(rows, times)]
    assert found[:3] == [4.0, None, None] and found[6] is None
    assert found[3:6] == pytest.approx([3.0, 3.0, 3.0]), "they have the same FLOPs"


def test_measured_time_stands_beside_the_prediction() -> None:
    explanation = fp8compile.explain(nn.Linear(32, 64), torch.randn(16, 32))
    rows = tuple(replace(row, high_us=2000.0, fp8_us=1000.0) for row in explanation.rows)
    measured = Measured("a GPU", high_ms=8.0, fp8_ms=5.0)
    kernels = tuple(replace(row, measured_us=7.5) for row in explanation.kernels)
    text = str(replace(explanation, rows=rows, kernels=kernels, measured=measured))
    assert "8.00 ms in its own precision, 5.00 in FP8, 1.60x (predicted 1.33x)" in text
    assert "predicted, measured us" in text and ", 7.5" in text


def test_what_steps_leave_in_scaling_states_is_forgotten() -> None:
    model, other, x = nn.Linear(32, 32), nn.Linear(32, 32), torch.randn(16, 32)
    compiled = compile_interpreted(model)
    compiled(x).sum().backward()
    fp8compile.update_scales(model)
    before = fp8compile.state_dict(model)
    with states_left_as_they_were():
        compiled(100 * x).sum().backward()
        compile_interpreted(other)(x).sum().backward()
    fp8compile.update_scales()
    after = fp8compile.state_dict(model)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert fp8compile.state_dict(other) == {}
