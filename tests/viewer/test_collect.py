"""What the viewer collects: records of every snapshot, their modules, folds and sources."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn

from fp8compile.passes import pipeline, split_regions
from fp8compile.viewer.collect import FINAL
from fp8compile.viewer.page import graph_data, runs
from fp8compile.viewer.paths import Fold, common, folds, home, layer_of
from fp8compile.viewer.records import Record
from tests.models import MLP, Llama, Residual
from tests.viewer.common import Up, collected, records_of

pytestmark = pytest.mark.filterwarnings("ignore:FP8 is emulated here")
PASSES = [
    *("joint", "unbatch_gemms", "find_gemms", "choose_precision", "merge_gemms"),
    *("choose_formats", "insert_casts"),
    *("take_frozen_weights", "fold_scales", "share_casts", "drop_unused_outputs", "track_amax"),
    *("plan_saved", "keep_scales", FINAL),
]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield


def lines_of(data: dict[str, Any], snapshot: str) -> str:
    """A snapshot's records, one a line, without the notes that name source lines and costs."""
    found = next(s for s in data["snapshots"] if s["name"] == snapshot)
    numbers = [first + i for first, count in found["records"] for i in range(count)]
    lines = []
    for record in (data["records"][i] for i in numbers):
        notes = [n for n in record.pop("notes", []) if n[0] not in ("call", "line", "predicted")]
        lines.append(json.dumps({**record, **({"notes": notes} if notes else {})}))
    return "\n".join(lines)


def test_the_json_of_a_linear_layer_with_its_regions() -> None:
    (collector,) = collected(Up(), torch.randn(16, 16))
    data = graph_data(collector)
    assert [snapshot["name"] for snapshot in data["snapshots"]] == PASSES
    assert_expected_inline(
        lines_of(data, FINAL),
        """\
{"name": "primals_1", "kind": "parameter", "type": "f32[32, 16]", "path": "up", "label": "up.weight"}
{"name": "primals_2", "kind": "input", "type": "f32[16, 16]", "label": "x"}
{"name": "forward.region_0", "kind": "region", "op": "region_0", "type": "(e4m3[16, 16], e4m3[16, 16], f32[1], f32[1])", "path": "up", "source": "fp8_cast.0", "label": "fp8_cast", "notes": [["reads", "1.02 kB"], ["writes", "512 B"], ["holds", "quantize"], ["launch", "one for 2 casts like this"]]}
{"name": "primals_2_q", "kind": "cast", "op": "fp8.quantize", "type": "(e4m3[16, 16], e4m3[16, 16], f32[1], f32[1], f32[1])", "path": "up", "inputs": [["primals_2", "f32[16, 16]"]], "region": "forward.region_0", "label": "quantize", "notes": [["copies", "row-major, transposed"], ["scale", "slot 0, of up.input"], ["size", "524 B"]]}
{"name": "forward.region_1", "kind": "region", "op": "region_1", "type": "(e4m3[32, 16], f32[1], f32[1])", "path": "up", "source": "fp8_cast.1", "label": "fp8_cast", "notes": [["reads", "2.05 kB"], ["writes", "512 B"], ["holds", "quantize"], ["launch", "one for 2 casts like this"]]}
{"name": "primals_1_q", "kind": "cast", "op": "fp8.quantize", "type": "(e4m3[32, 16], e4m3[0], f32[1], f32[1], f32[1])", "path": "up", "inputs": [["primals_1", "f32[32, 16]"]], "region": "forward.region_1", "label": "quantize", "notes": [["copies", "row-major"], ["scale", "slot 1, of up.weight"], ["size", "524 B"]]}
{"name": "mm_fp8", "kind": "gemm", "op": "fp8.scaled_mm", "type": "f32[16, 32]", "path": "up", "inputs": [["primals_2_q", "e4m3[16, 16]"], ["primals_1_q", "e4m3[32, 16]"]], "label": "fprop", "notes": [["site", "up"], ["GEMM", "fprop, M 16, N 32, K 16, 16.4 k FLOPs"], ["left", "input: e4m3"], ["right", "weight, transposed: e4m3"], ["size", "2.05 kB"]]}
{"name": "neg", "kind": "op", "op": "aten.neg", "type": "f32[16, 32]", "inputs": [["mm_fp8", "f32[16, 32]"]], "label": "neg", "notes": [["size", "2.05 kB"], ["returned as", "output 0"]]}
{"name": "track_amax_fwd", "kind": "state", "op": "fp8.track_amax", "type": "none", "label": "track_amax"}
{"name": "tangents_1", "kind": "input", "type": "f32[16, 32]", "backward": true, "label": "gradient of output 0"}
{"name": "backward.region_0", "kind": "region", "op": "region_0", "type": "(e5m2[32, 16], f32[1], f32[1])", "path": "up", "backward": true, "source": "fp8_cast.2", "label": "fp8_cast", "notes": [["reads", "2.05 kB"], ["writes", "512 B"], ["holds", "neg, quantize"]]}
{"name": "neg_1", "kind": "op", "op": "aten.neg", "type": "f32[16, 32]", "backward": true, "inputs": [["tangents_1", "f32[16, 32]"]], "region": "backward.region_0", "label": "neg", "notes": [["size", "2.05 kB"]]}
{"name": "neg_1_q", "kind": "cast", "op": "fp8.quantize", "type": "(e5m2[0], e5m2[32, 16], f32[1], f32[1], f32[1])", "path": "up", "backward": true, "inputs": [["neg_1", "f32[16, 32]"]], "region": "backward.region_0", "label": "quantize", "notes": [["copies", "transposed"], ["scale", "slot 2, of up.grad_output"], ["size", "524 B"]]}
{"name": "mm_1_fp8", "kind": "gemm", "op": "fp8.scaled_mm", "type": "f32[32, 16]", "path": "up", "backward": true, "inputs": [["neg_1_q", "e5m2[32, 16]"], ["primals_2_q", "e4m3[16, 16]"]], "label": "wgrad", "notes": [["site", "up"], ["GEMM", "wgrad, M 32, N 16, K 16, 16.4 k FLOPs"], ["left", "grad_output, transposed: e5m2"], ["right", "input: e4m3"], ["size", "2.05 kB"], ["returned as", "gradient of up.weight"]]}
{"name": "track_amax_bwd", "kind": "state", "op": "fp8.track_amax", "type": "none", "backward": true, "label": "track_amax"}""",  # noqa: E501
    )


def test_a_pass_adds_only_what_it_changes() -> None:
    data = graph_data(collected(Up(), torch.randn(16, 16))[0])
    shown = {
        snapshot["name"]: {first + i for first, n in snapshot["records"] for i in range(n)}
        for snapshot in data["snapshots"]
    }
    changed = [data["records"][i] for i in shown["choose_formats"] - shown["merge_gemms"]]
    assert sorted(record["label"] for record in changed) == ["fprop", "wgrad"]
    assert shown["fold_scales"] == shown["insert_casts"], "no constant factor to fold"
    names = [(record["name"], json.dumps(record)) for record in data["records"]]
    assert len(set(names)) == len(names), "a record is stored once"


def test_runs() -> None:
    assert runs([3, 4, 5, 9, 2, 3]) == [[3, 3], [9, 1], [2, 2]]
    assert runs([]) == []


def test_forward_and_backward_are_one_graph_by_module() -> None:
    (collector,) = collected(MLP(), torch.randn(4, 16, 64))
    records = records_of(collector, FINAL)
    gemms = {r.name: r for r in records.values() if r.kind == "gemm"}
    found = sorted((r.path, r.label, r.backward) for r in gemms.values())
    assert found == [
        ("down", "dgrad", True),
        ("down", "fprop", False),
        ("down", "wgrad", True),
        ("gate", "dgrad", True),
        ("gate", "fprop", False),
        ("gate", "wgrad", True),
    ]
    merged = next(r for r in gemms.values() if r.path == "gate" and r.label == "fprop")
    assert dict(merged.notes)["site"] == "{gate,up}"
    assert dict(merged.notes)["left"] == "input: e4m3"
    formats = {(r.label, i.type.split("[")[0]) for r in gemms.values() for i in r.inputs}
    assert formats == {
        *(("fprop", "e4m3"), ("dgrad", "e4m3"), ("dgrad", "e5m2")),
        *(("wgrad", "e4m3"), ("wgrad", "e5m2")),
    }
    for record in records.values():
        assert all(i.name in records for i in record.inputs), record
        assert not record.region or records[record.region].kind == "region"


def test_what_is_kept_and_returned() -> None:
    (collector,) = collected(MLP(), torch.randn(4, 16, 64, requires_grad=True))
    joint = {name for name, r in records_of(collector, "joint").items() if not r.backward}
    for snapshot in ("joint", FINAL):
        records = records_of(collector, snapshot).values()
        returned = [dict(r.notes)["returned as"] for r in records if "returned as" in dict(r.notes)]
        weights = ("norm", "gate", "up", "down")
        gradients = [f"gradient of {name}.weight" for name in weights]
        assert sorted(returned) == sorted(["gradient of x", "output 0", *gradients])
    final = records_of(collector, FINAL).values()
    kept = {r.label: dict(r.notes)["kept for backward"] for r in final if "kept" in str(r.notes)}
    assert kept == {"rsqrt": "f32[4, 16, 1]", "fprop": "f32[64, 256]"}
    again = {r.name for r in final if r.backward and r.name.removesuffix("'") in joint}
    assert "view_4'" in again, "the input of the cast for wgrad is computed again"


def test_inputs_are_called_as_the_model_calls_them() -> None:
    (collector,) = collected(MLP(), torch.randn(4, 16, 64))
    inputs = {r.label: (r.kind, r.path) for r in collector.snapshots[0].records if not r.op}
    assert inputs == {
        "x": ("input", ""),
        "norm.weight": ("parameter", "norm"),
        "gate.weight": ("parameter", "gate"),
        "up.weight": ("parameter", "up"),
        "down.weight": ("parameter", "down"),
        "gradient of output 0": ("input", ""),
    }


def test_scales_and_reasons() -> None:
    (collector,) = collected(MLP(), torch.randn(4, 16, 64), options={"skip": ["down"]})
    records = records_of(collector, FINAL).values()
    scales = {dict(r.notes)["scale"] for r in records if r.kind == "cast"}
    assert "slot 0, of gate.input" in scales and "slot 1, of gate.weight" in scales
    kept = [r for r in records if r.kind == "gemm" and r.path == "down"]
    assert len(kept) == 3
    assert {dict(r.notes)["stays in high precision"] for r in kept} == {"skipped by the user"}
    current = collected(MLP(), torch.randn(4, 16, 64), options={"recipe": "current"})
    casts = [r for r in records_of(current[0], FINAL).values() if r.kind == "cast"]
    assert {dict(r.notes)["scale"] for r in casts} == {
        "current",
        "current, found in forward",  # weights, and what is computed again
    }
    torch._dynamo.reset()
    blocks = collected(MLP(128, 256), torch.randn(1, 128, 128), options={"recipe": "blockwise"})
    casts = [r for r in records_of(blocks[0], FINAL).values() if r.kind == "cast"]
    assert {"current, one per 1 x 128", "current, one per 128 x 128"} == {
        dict(r.notes)["scale"] for r in casts
    }


def test_the_parts_of_a_region_are_boxes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    always = partial(split_regions, least_bytes=-sys.maxsize)
    monkeypatch.setattr(pipeline, "split_regions", always)
    (collector,) = collected(
        Residual(), torch.randn(32, 64).requires_grad_(), options={"recipe": "current"}
    )
    records = records_of(collector, FINAL)
    first = records["backward.region_2_part_0"]
    assert (first.label, first.path) == ("fp8_value_colsum", "norm")
    inside = [r.label for r in records.values() if r.region == first.name and r.kind != "view"]
    assert "find_scale" in inside and "quantize" not in inside
    (cast,) = (r for r in records.values() if r.region == "backward.region_2_part_2")
    assert cast.label == "quantize" and records[cast.inputs[0].name].region == first.name


def test_every_region_has_its_bytes_and_its_source() -> None:
    (collector,) = collected(Llama(layers=2), torch.zeros(1, 16, dtype=torch.long))
    regions = [r for r in collector.snapshots[-1].records if r.kind == "region"]
    assert len(regions) > 20
    for region in regions:
        assert f"def {region.label}" in collector.sources[region.source]
        assert {"reads", "writes", "holds"} <= dict(region.notes).keys()
    assert len(collector.sources) < len(regions), "equal sources are stored once"


def test_layers_that_are_alike_are_folded_after_every_pass() -> None:
    (collector,) = collected(Llama(layers=3), torch.zeros(1, 16, dtype=torch.long))
    for snapshot in collector.snapshots:
        assert snapshot.folds == (Fold("layers", 0, 2),), snapshot.name


def test_a_layer_with_another_decision_is_not_folded() -> None:
    options = {"skip": ["layers.1.mlp.down"]}
    (collector,) = collected(Llama(layers=4), torch.zeros(1, 16, dtype=torch.long), options=options)
    assert collector.snapshots[0].folds == (Fold("layers", 0, 3),)
    assert collector.snapshots[-1].folds == (Fold("layers", 2, 3),)


def weight(path: str, shape: str) -> Record:
    return Record(f"{path}.weight", "parameter", "", shape, path, False, label=f"{path}.weight")


def test_folds_of_nested_layers_and_of_runs() -> None:
    shapes = {"a.0": "1", "a.1": "1", "a.2": "2", "a.3": "2", "a.4": "2", "a.6": "2", "b.c.10": "1"}
    found = folds([weight(f"{path}.x", shape) for path, shape in shapes.items()])
    assert found == [Fold("a", 0, 1), Fold("a", 2, 4)]
    nested = folds([weight(f"a.{i}.b.{j}", "1") for i in range(2) for j in range(3)])
    assert nested == [Fold("a", 0, 1), Fold("a.0.b", 0, 2), Fold("a.1.b", 0, 2)]


def test_paths() -> None:
    assert (layer_of("layers.3.mlp.up"), layer_of("lm_head"), layer_of("")) == (
        "layers.3",
        "lm_head",
        "",
    )
    assert common(["a.b.c", "a.b.d"]) == "a.b" and common(["a", "b"]) == ""
    assert home("layers.1.mlp.up", ["layers.0.mlp", "layers.1.norm"]) == "layers.1"
    assert home("lm_head", ["layers.1.norm"]) == "lm_head"


def test_graph_breaks_functions_and_inference() -> None:
    first, second = Up(), nn.Linear(32, 16)

    def call(x: Tensor) -> Tensor:
        x = first(x)
        torch._dynamo.graph_break()
        return F.relu(second(x))

    with torch.no_grad():
        graphs = collected(call, torch.randn(16, 16))
    assert len(graphs) == 2
    for graph in graphs:
        assert [s.name for s in graph.snapshots] == [*PASSES[:-4], FINAL]
        labels = [r.label for r in graph.snapshots[-1].records if r.kind == "gemm"]
        assert labels == ["fprop"]


def test_meta_tensors() -> None:
    with torch.device("meta"):
        model, ids = Llama(layers=2).bfloat16(), torch.zeros(1, 16, dtype=torch.long)
    (collector,) = collected(model, ids)
    gemms = [r.label for r in collector.snapshots[-1].records if r.kind == "gemm"]
    assert {label: gemms.count(label) for label in gemms} == {"fprop": 9, "dgrad": 9, "wgrad": 9}


def test_a_loss_over_meta_tensors() -> None:
    # On the meta device itself its decomposition leaves no gradients in the joint graph.
    with torch.device("meta"):
        model, x = nn.Linear(32, 16), torch.zeros(16, 32)
        target = torch.zeros(16, dtype=torch.long)

    def loss(x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(model(x), target)

    (collector,) = collected(loss, x, target)
    gemms = [r.label for r in collector.snapshots[-1].records if r.kind == "gemm"]
    assert sorted(gemms) == ["fprop", "wgrad"]
    assert model.weight.is_meta and model.weight.grad is None


def test_the_model_is_left_as_it_was() -> None:
    model, x = MLP(), torch.randn(4, 16, 64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    collected(model, x)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
