"""The benchmark of compiling."""

from __future__ import annotations

import re
from pathlib import Path

from tests.examples.common import run


def test_compile_benchmark_runs_in_tiny_form(tmp_path: Path) -> None:
    where = ("--device", "cpu", "--tiny", "--layers", 1, "--contenders", "fp8")
    where += ("--states", "cold", "graphs")
    out = run("bench/compile_time.py", tmp_path, *where, "--csv", "numbers.csv")
    row = re.search(r"^fp8 +([\d.]+) \(1.00x\) +([\d.]+) \(1.00x\)$", out, re.MULTILINE)
    assert row is not None
    cold, graphs = map(float, row.groups())
    assert graphs < cold / 2  # found in the caches, not compiled again
    numbers = (tmp_path / "numbers.csv").read_text()
    states = [line.split(",")[-3] for line in numbers.splitlines()[1:]]
    assert states == ["cold", "graphs"]
