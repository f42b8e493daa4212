"""The main example compares both precisions."""

from __future__ import annotations

import re
from pathlib import Path

from tests.examples.common import run


def test_train_gpt_compares_both_precisions_and_plots_them(tmp_path: Path) -> None:
    out = run("train_gpt.py", tmp_path, "--steps", 6, "--layers", 1, "--width", 64)
    assert re.search(r"blocks\.0\.mlp\.\{gate,up\}\W+fprop", out)
    assert "6 sites, 12 of 15 GEMMs in FP8" in out  # gate and up are one; the head is kept
    difference = re.search(r"final loss differs by ([+-][\d.]+) %", out)
    assert difference and abs(float(difference[1])) < 1
    assert (tmp_path / "train_gpt.png").read_bytes().startswith(b"\x89PNG")
