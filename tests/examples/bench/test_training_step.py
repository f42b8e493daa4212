"""The benchmark of a training step."""

from __future__ import annotations

import re
from pathlib import Path

from tests.examples.common import run


def test_benchmark_runs_in_tiny_form(tmp_path: Path) -> None:
    sizes = ("--layers", 1, "--width", 64, "--batch", 1, "--tokens", 64, "--steps", 1)
    who = ("--contenders", "bf16", "fp8", "--csv", "numbers.csv", "--device", "cpu")
    out = run("bench/training_step.py", tmp_path, *sizes, *who)
    assert "These times mean nothing" in out
    assert re.search(r"^bf16 .* 1\.00x", out, re.MULTILINE)
    assert re.search(r"^fp8 +[\d.]+ +[\d.]+ +[\d.]+ +\(worst: ", out, re.MULTILINE)
    assert (tmp_path / "numbers.csv").read_text().count(",fp8,step,") == 1
