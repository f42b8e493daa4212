"""What a step took is attributed to kernels and GEMMs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import fp8compile
from fp8compile import OptionError
from fp8compile.explanation.timed import StepTimes, with_gemm_times, with_kernel_times
from fp8compile.report import KernelRow, Measured
from fp8compile.states import states_left_as_they_were
from tests.helpers import compile_interpreted
from tests.models import MLP

pytestmark = pytest.mark.filterwarnings("ignore:FP8 is emulated here")


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
