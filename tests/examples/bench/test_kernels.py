"""The benchmark of the fused kernels."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.examples.common import EXAMPLES


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
