"""How the benchmarks time, and tell kernels apart."""

from __future__ import annotations

import pytest
import torch

from tests.examples.common import EXAMPLES


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
        ("void at::native::unrolled_elementwise_kernel<Max, 4, LoadWithoutCast>", "other"),
        ("my_kernel", "unclassified"),
    ],
)
def test_kernels_are_counted_where_they_belong(
    kernel: str, category: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "bench"))
    from timing import category_of

    assert category_of(kernel) == category


def test_categories_add_up_to_the_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "bench"))
    from timing import KernelTime, print_categories

    kernels = {
        "bf16": {"nvjet_a": KernelTime(2.0, 3), "nvjet_b": KernelTime(1.0, 1)},
        "fp8": {"fp8_cast": KernelTime(0.5, 4), "triton_poi_fused_add": KernelTime(0.25, 2)},
        "on a CPU": {},
    }
    print_categories(kernels, {"bf16": 5.0, "fp8": 1.0, "on a CPU": 9.0})
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[2] == ["bf16", "fp8"]
    assert ["GEMM", "3.00", "(4)", "0.00", "(0)"] in rows
    assert ["fused", "casts", "0.00", "(0)", "0.50", "(4)"] in rows
    assert ["left", "over", "2.00", "0.25"] in rows
    assert ["0.250", "ms", "2", "launches", "triton_poi_fused_add"] in rows
