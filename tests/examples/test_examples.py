"""Every example runs alone, in a short form, and prints what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
    assert re.search(r"blocks\.0\.mlp\.gate\W+fprop", out)
    assert "18 of 18 GEMMs in FP8" in out
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


def test_benchmark_runs_in_tiny_form(tmp_path: Path) -> None:
    sizes = ("--layers", 1, "--width", 64, "--batch", 1, "--tokens", 64, "--steps", 1)
    who = ("--contenders", "bf16", "fp8", "--csv", "numbers.csv", "--device", "cpu")
    out = run("bench/training_step.py", tmp_path, *sizes, *who)
    assert "These times mean nothing" in out
    assert re.search(r"^bf16 .* 1\.00x", out, re.MULTILINE)
    assert re.search(r"^fp8 +[\d.]+ +[\d.]+ +[\d.]+ +\(worst: ", out, re.MULTILINE)
    assert (tmp_path / "numbers.csv").read_text().count(",fp8,step,") == 1


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
        ("_quantize_kernel_0", "casts and transposes"),
        ("_amax_kernel_1", "casts and transposes"),
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
