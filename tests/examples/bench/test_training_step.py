"""The benchmark of a training step."""

from __future__ import annotations

import re
from pathlib import Path

from tests.examples.common import run

SIZES = ("--layers", 1, "--width", 64, "--batch", 1, "--tokens", 64, "--steps", 1)
TINY = (*SIZES, "--csv", "numbers.csv", "--device", "cpu")


def test_benchmark_runs_in_tiny_form(tmp_path: Path) -> None:
    out = run("bench/training_step.py", tmp_path, *TINY, "--contenders", "bf16", "fp8")
    assert "These times mean nothing" in out
    assert re.search(r"^bf16 .* 1\.00x", out, re.MULTILINE)
    assert re.search(r"^fp8 +[\d.]+ +[\d.]+ +[\d.]+ +\(worst: ", out, re.MULTILINE)
    assert (tmp_path / "numbers.csv").read_text().count(",fp8,step,") == 1


def test_contenders_in_turns(tmp_path: Path) -> None:
    who = ("--contenders", "fp8", "fp8-static", "--rounds", 2)
    out = run("bench/training_step.py", tmp_path, *TINY, *who)
    assert re.search(r"^fp8 +[\d.]+ +1\.000x", out, re.MULTILINE)
    assert re.search(r"^fp8-static +[\d.]+ +[\d.]+x", out, re.MULTILINE)
    assert (tmp_path / "numbers.csv").read_text().count(",step in 2 rounds,") == 2
