"""Every example runs alone, in a short form, and prints what it promises."""

from __future__ import annotations

import csv
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script: str, folder: Path, *arguments: object) -> str:
    """Run an example as a user does, in a folder of its own; return what it printed."""
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    # These tests share a process with those that run kernels in Triton's interpreter.
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["OMP_WAIT_POLICY"] = "passive"  # they also share the cores, with tests that run beside them
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_train_gpt_compares_both_precisions_and_plots_them(tmp_path: Path) -> None:
    out = run("train_gpt.py", tmp_path, "--steps", 6, "--layers", 1, "--width", 64)
    assert re.search(r"blocks\.0\.mlp\.\{gate,up\}\W+fprop", out)
    assert "6 sites, 12 of 15 GEMMs in FP8" in out  # gate and up are one; the head is kept
    difference = re.search(r"final loss differs by ([+-][\d.]+) %", out)
    assert difference and abs(float(difference[1])) < 1
    assert (tmp_path / "train_gpt.png").read_bytes().startswith(b"\x89PNG")


def test_hf_llama_learns_to_count(tmp_path: Path) -> None:
    out = run("hf_llama.py", tmp_path)
    assert "state_dict keys unchanged: True" in out
    assert "continued 4 5 6 7 8 9 10 11" in out


def test_inspect_graph_shows_the_graph_before_and_after(tmp_path: Path) -> None:
    out = run("inspect_graph.py", tmp_path)
    joint, forward, backward = re.split(r"===== .*\.txt =====\n", out)[1:]
    assert joint.count("aten.mm(") == 9
    for graph in (forward, backward):
        assert "aten.mm(" not in graph
        assert "f8e4m3" in graph or "e4m3" in graph


def test_guard_rails_save_a_run_that_diverges_without_them(tmp_path: Path) -> None:
    """Only what `jump_limit` does makes the difference; the reference is float32."""
    out = run("guard_rails.py", tmp_path)
    rows = re.findall(r"^(float32|FP8, [\w() ]+?) {2,}([\d. ]+)$", out, re.MULTILINE)
    losses = {name: [float(number) for number in numbers.split()] for name, numbers in rows}
    reference, bare, saturation, both = losses.values()
    chance = math.log(16)
    for before, _, second, worst, last, _ in (bare, saturation):
        assert before == pytest.approx(reference[0], rel=0.05)
        assert second > chance and worst > chance and last > 2 * reference[4]
    assert bare[1] > chance and saturation[1] == pytest.approx(reference[1], rel=0.05)
    assert both[:5] == pytest.approx(reference[:5], rel=0.05)
    assert [row[5] for row in losses.values()] == [0, 0, 0, 2]
    where = r"^stem\.weight\.input: Events\(not_finite=0, saturated=\d+, jumped=1\)$"
    assert re.search(where, out, re.MULTILINE)


def test_benchmark_runs_in_tiny_form(tmp_path: Path) -> None:
    sizes = ("--layers", 1, "--width", 64, "--batch", 1, "--tokens", 64, "--steps", 1)
    who = ("--contenders", "bf16", "fp8", "--csv", "numbers.csv", "--device", "cpu")
    out = run("bench/training_step.py", tmp_path, *sizes, *who)
    assert "These times mean nothing" in out
    assert re.search(r"^bf16 .* 1\.00x", out, re.MULTILINE)
    assert re.search(r"^fp8 +[\d.]+ +[\d.]+ +[\d.]+ +\(worst: ", out, re.MULTILINE)
    assert (tmp_path / "numbers.csv").read_text().count(",fp8,step,") == 1


def test_models_benchmark_runs_in_tiny_form(tmp_path: Path) -> None:
    where = ("--device", "cpu", "--tiny", "--steps", 1)
    out = run("bench/models.py", tmp_path, "--models", "llama-768", *where, "--csv", "numbers.csv")
    assert "These times mean nothing" in out
    row = re.search(r"Llama d 64.*tokens\W+[\d.]+\W+[\d.]+\W+[\d.]+x\W+21 of 21\W+([\d.]+)", out)
    assert row and float(row[1]) > 20
    numbers = (tmp_path / "numbers.csv").read_text()
    assert numbers.count(",fp8,step,") == numbers.count(",bf16,compile,") == 1
    assert numbers.count(",fp8,FP8 GEMMs,21,of 21") == 1


def test_a_pass_of_ones_own(tmp_path: Path) -> None:
    out = run("write_a_pass.py", tmp_path)
    assert "head  wgrad  f32          its weight's gradient matters" in out
    assert "body  wgrad  e5m2 x e4m3" in out
    before, after = re.findall(r"^gradients.*head.weight ([\d.]+) dB$", out, re.MULTILINE)
    assert float(after) > float(before) + 3


def test_inference_benchmark_runs_in_tiny_form(tmp_path: Path) -> None:
    where = ("--device", "cpu", "--tiny", "--contenders", "bf16", "fp8-rowwise")
    out = run("bench/inference.py", tmp_path, *where, "--csv", "numbers.csv")
    assert "These times mean nothing" in out
    found = re.findall(r"^prefill \d x \d+ +fp8-rowwise .* ([\d.]+) dB$", out, re.MULTILINE)
    assert len(found) == 2 and min(map(float, found)) > 25
    assert (tmp_path / "numbers.csv").read_text().count(",call,") == 4


def test_monitor_benchmark_runs_in_tiny_form(tmp_path: Path) -> None:
    where = ("--device", "cpu", "--tiny", "--rounds", 1, "--intervals", 1, 10)
    out = run("bench/monitor.py", tmp_path, *where, "--csv", "numbers.csv")
    assert "These times mean nothing" in out
    rows = re.findall(r"^(without|every \d+) +[\d.]+ +([+-][\d.]+)%$", out, re.MULTILINE)
    assert [name for name, _ in rows] == ["without", "every 1", "every 10"]
    assert rows[0][1] == "+0.00"
    numbers = (tmp_path / "numbers.csv").read_text()
    assert numbers.count(",step,") == 3 and numbers.count(",every 10,cost,") == 1


def rows_of(folder: Path, kind: str) -> list[dict[str, str]]:
    with (folder / f"{kind}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


PICTURES = ("loss.png", "gradients.png", "scales.png")


def test_recipe_study_writes_its_numbers_and_pictures(tmp_path: Path) -> None:
    """In two folders, as on two machines, that are merged and drawn."""
    other = tmp_path / "other"
    sizes = ("--tiny", "--steps", 3, "--sqnr-every", 2, "--no-draw", "--out")
    out = run("recipe_study.py", tmp_path, *sizes, tmp_path, "--recipes", "reference", "mx")
    out += run("recipe_study.py", tmp_path, *sizes, other, "--recipes", "auto")
    line = r"^\w+ +final loss \d\.\d+, gradients [\d.]+ dB at worst, [\d.]+ median \(compiled in"
    assert len(re.findall(line, out, re.M)) == 3 and not (tmp_path / "loss.png").exists()
    run("recipe_study.py", tmp_path, "--out", tmp_path, "--merge", other)
    own = "bf16" if torch.cuda.is_available() else "fp32"
    runs = {row["recipe"]: row for row in rows_of(tmp_path, "runs")}
    assert list(runs) == [own, "mx", "auto"]
    assert all(row["device"] and row["torch"] == torch.__version__ for row in runs.values())
    assert runs["auto"]["gradients"] == "e4m3" and runs[own]["gradients"] == ""
    losses, gradients = (rows_of(tmp_path, kind) for kind in ("losses", "gradients"))
    for recipe in runs:
        found = [float(row["nats"]) for row in losses if row["recipe"] == recipe]
        assert len(found) == 3 and 5 < found[0] < 7
        sqnr = [row for row in gradients if row["recipe"] == recipe]
        assert {row["step"] for row in sqnr} == {"0", "2"} and len({r["layer"] for r in sqnr}) == 6
        assert all(float(row["db"]) > (15 if recipe != own else 30) for row in sqnr)
    scales = {
        (row["recipe"], row["role"]): float(row["median"])
        for row in rows_of(tmp_path, "scales")
        if row["step"] == "2"
    }
    assert len(scales) == 6, "weights, activations and gradients of two recipes"
    assert all(scales[recipe, "gradients"] > scales[recipe, "weights"] for recipe in ("auto", "mx"))
    assert all(scales["mx", role].is_integer() for role in ("weights", "activations"))
    for name in PICTURES:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import recipe_results

    return recipe_results


def made_up(results: Any, name: str, steps: int = 2) -> Any:
    config = results.train_gpt.Config(1, 64, 64, 4, steps, 2e-3)
    place = results.Place("a GPU", config)
    run = results.Run(name, place, ("2", "3", "0"), dict.fromkeys(results.ROLES.values(), "e4m3"))
    run.losses, run.sqnr, run.step_ms = [2.5, 1.25], {0: {"a": 20.0}, 1: {"a": 21.0}}, 3.5
    run.scales = {0: {"weights": [1.0, 2.0, 3.0, 4.0, 5.0]}}
    return run


def test_results_of_a_recipe_replace_its_older_ones(results: Any, tmp_path: Path) -> None:
    old, new, other = (made_up(results, name) for name in ("mx", "mx", "delayed"))
    old.losses = [9.0, 9.0]
    results.save(tmp_path, old, other)
    results.save(tmp_path, new)
    assert results.load(tmp_path) == [other, new]  # in the order of the recipes
    with pytest.raises(SystemExit, match=r"'delayed' with 1 layer, width 64.* 2 steps .*--out"):
        results.save(tmp_path, made_up(results, "rowwise", steps=3))
    assert len(results.load(tmp_path)) == 2


def test_soak_runs_in_tiny_form(tmp_path: Path) -> None:
    out = run("bench/soak.py", tmp_path, "--tiny", "--steps", 12, "--csv", "numbers.csv")
    assert len(re.findall(r"final loss \d\.\d+, .* graphs compiled: 1$", out, re.M)) == 2
    assert "fp8,final loss against the other," in (tmp_path / "numbers.csv").read_text()


def test_kernels_benchmark_checks_every_region(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, where kernels run in Triton's interpreter if there is no GPU."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "bench"))
    import kernels

    numbers = tmp_path / "numbers.csv"
    kernels.main(["--device", "cpu", "--tiny", "--csv", str(numbers)])
    out = capsys.readouterr().out
    assert "Nothing is timed" in out
    fused = re.search(r"fused regions +(\d+) +(\d+) +(\d+)", out)
    assert fused and int(fused[3]) == int(fused[1]) + int(fused[2]) > 12
    verdict = "not run" if torch.cuda.is_available() else r"0|\de-\d+"
    checked = re.findall(rf"^ *\w+ +\d/\d +\d+x\d+ .* (?:{verdict}) *$", out, re.MULTILINE)
    assert len(checked) == int(fused[3])
    assert numbers.read_text().count(" bytes,") == len(checked) + 1


@pytest.mark.parametrize(
    ("kernel", "kind", "moves"),
    [
        ("fp8_rsqrt_mean_2", "fused regions", False),
        ("fp8_cast_colsum_sums_0", "their sums over rows", False),
        ("fp8_cast_amax", "search for amax", False),
        ("fp8_tanh_colsum_column_sums_12", "sums over columns", False),
        ("nvjet_sm90_qqtst_128x256_128x6_2x1_v_bz_TNT", "GEMM", False),
        ("triton_poi_fused__unsafe_view_clone_transpose_3", "other", True),
        ("triton_poi_fused_add_clone_transpose_3", "other", False),
    ],
)
def test_kernels_of_a_step_are_told_apart(
    kernel: str, kind: str, moves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "bench"))
    import kernels

    assert (kernels.kind_of(kernel), kernels.only_transposes(kernel)) == (kind, moves)


MODELS = (
    *(f"llama-{width}" for width in (768, 1024, 2048, 4096, 8192)),
    *("gpt2", "bert-large", "vit-large"),
)


def test_models_of_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes its inputs, and gives what is compared and what backward starts from."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "bench"))
    import models

    assert tuple(models.MODELS) == MODELS
    job = models.Job(torch.device("cpu"), tiny=True, steps=1)
    for workload in map(job.build, MODELS):
        result = workload.model(**workload.inputs)
        assert workload.output(result).isfinite().all()
        workload.loss(result).backward(workload.grad_output)
        assert all(p.grad is not None for p in workload.model.parameters() if p.requires_grad)


def test_contenders_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "bench"))
    from timing import median_ms_in_turns

    calls: list[str] = []
    steps = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    times = median_ms_in_turns(steps, steps=2, rounds=2, device=torch.device("cpu"))
    assert set(times) == {"a", "b"} and "".join(calls) == "aaabbb" * 2


@pytest.mark.parametrize(
    ("kernel", "category"),
    [
        ("_scaled_mm_kernel_3", "GEMM"),
        ("nvjet_sm90_qqtst_128x256_128x6_2x1_v_bz_TNT", "GEMM"),
        ("void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<...>>", "GEMM"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "GEMM"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Traits<cutlass::bfloat16_t>>", "attention"),
        ("triton_poi_fused__scaled_dot_product_cudnn_attention_mul_2", "other"),
        ("triton_red_fused__to_copy_mean_mul_pow_rsqrt_0", "other"),
        ("fp8_rsqrt_mean", "fused casts"),
        ("fp8_cat_colsum_amax", "fused casts"),
        ("void at::native::vectorized_elementwise_kernel<4, FillFunctor<float>>", "other"),
        ("Memcpy DtoD (Device -> Device)", "other"),
        ("my_kernel", "unclassified"),
    ],
)
def test_kernels_are_counted_where_they_belong(
    kernel: str, category: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "bench"))
    from timing import category_of

    assert category_of(kernel) == category
