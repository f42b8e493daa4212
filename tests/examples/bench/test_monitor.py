"""The benchmark of a Monitor."""

from __future__ import annotations

import re
from pathlib import Path

from tests.examples.common import run


def test_monitor_benchmark_runs_in_tiny_form(tmp_path: Path) -> None:
    where = ("--device", "cpu", "--tiny", "--rounds", 1, "--intervals", 1, 10)
    out = run("bench/monitor.py", tmp_path, *where, "--csv", "numbers.csv")
    assert "These times mean nothing" in out
    rows = re.findall(r"^(without|every \d+) +[\d.]+ +([+-][\d.]+)%$", out, re.MULTILINE)
    assert [name for name, _ in rows] == ["without", "every 1", "every 10"]
    assert rows[0][1] == "+0.00"
    numbers = (tmp_path / "numbers.csv").read_text()
    assert numbers.count(",step,") == 3 and numbers.count(",every 10,cost,") == 1
