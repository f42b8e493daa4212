"""The benchmark of prefill and decode."""

from __future__ import annotations

import re
from pathlib import Path

from tests.examples.common import run


def test_inference_benchmark_runs_in_tiny_form(tmp_path: Path) -> None:
    where = ("--device", "cpu", "--tiny", "--contenders", "bf16", "fp8-frozen")
    out = run("bench/inference.py", tmp_path, *where, "--csv", "numbers.csv")
    assert "These times mean nothing" in out
    found = re.findall(r"^prefill \d x \d+ +fp8-frozen .* ([\d.]+) dB$", out, re.MULTILINE)
    assert len(found) == 2 and min(map(float, found)) > 25
    sizes = re.findall(r"(bf16|fp8-frozen) .* parameters ([\d.]+) MiB", out)
    megabytes = {name: float(size) for name, size in sizes}
    assert megabytes["fp8-frozen"] < 0.55 * megabytes["bf16"]
    assert (tmp_path / "numbers.csv").read_text().count(",call,") == 4
