"""What an explanation says of a model: predictions, kernels, memory; as text, JSON and a page."""

from __future__ import annotations

import io
import json
import pickle
from dataclasses import asdict
from html import escape
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, fx, nn
from torch._inductor.utils import fresh_cache

import fp8compile
from fp8compile import compile as compile_module
from fp8compile.backends import kernel_rows
from fp8compile.explanation import Explanation
from fp8compile.internals import copy_of
from fp8compile.passes import grow_regions
from tests.helpers import compile_interpreted
from tests.models import MLP

pytestmark = pytest.mark.filterwarnings("ignore:FP8 is emulated here")


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
    sigmoid = {"sigmoid", "reciprocal"}  # of SiLU's derivative, in torch 2.13 and in 2.11
    assert any("e5m2^T" in row.writes and sigmoid & {*row.fused} for row in backward)
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


def test_inference_casts_weights_once_and_keeps_nothing() -> None:
    with torch.no_grad():
        explanation = fp8compile.explain(MLP(), torch.randn(16, 64))
    assert [(row.direction, row.per_step) for row in explanation.kernels] == [
        ("weights", 0), ("forward", 1), ("forward", 1),
    ]  # fmt: skip
    assert "2 launches of 2 fused kernels" in str(explanation) and " once " in str(explanation)
    moved = [row.megabytes for row in explanation.kernels[1:]]
    gemms = sum(float(row.megabytes) for row in explanation.rows)
    assert explanation.megabytes == pytest.approx(sum(filter(None, moved)) + gemms)
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


@pytest.mark.parametrize("recipe", ["delayed", "rowwise", "blockwise", "mx"])
def test_kernels_name_granularities_as_gemms_do(recipe: str) -> None:
    x = torch.randn(128, 128, requires_grad=True)
    found = fp8compile.explain(nn.Linear(128, 128), x, options={"recipe": recipe})
    taken = {cast for row in found.rows for cast in row.formats.split(" x ")}
    written = {name.removesuffix("^T") for row in found.kernels for name in row.writes}
    assert {name for name in written if name.startswith(("e4m3", "e5m2"))} == taken


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


def test_a_pickle_may_name_the_folder() -> None:
    """As all did while it was a module."""
    assert pickle.loads(b"cfp8compile.explanation\nExplanation\n.") is Explanation


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
