"""The example of a pass of ones own."""

from __future__ import annotations

import re
from pathlib import Path

from tests.examples.common import run_on_terminal


def test_a_pass_of_ones_own(tmp_path: Path) -> None:
    out, shown = run_on_terminal("write_a_pass.py", tmp_path)
    assert "running it in both precisions" in shown and "2/2" in shown
    assert "head  wgrad  f32          its weight's gradient matters" in out
    assert "body  wgrad  e5m2 x e4m3" in out
    before, after = re.findall(r"^gradients.*head.weight ([\d.]+) dB$", out, re.MULTILINE)
    assert float(after) > float(before) + 3
