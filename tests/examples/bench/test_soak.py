"""The long training run."""

from __future__ import annotations

import re
from pathlib import Path

from tests.examples.common import run


def test_soak_runs_in_tiny_form(tmp_path: Path) -> None:
    out = run("bench/soak.py", tmp_path, "--tiny", "--steps", 12, "--csv", "numbers.csv")
    assert len(re.findall(r"final loss \d\.\d+, .* graphs compiled: 1$", out, re.M)) == 2
    assert "fp8,final loss against the other," in (tmp_path / "numbers.csv").read_text()
