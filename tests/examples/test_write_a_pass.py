"""The example of a pass of ones own."""

from __future__ import annotations

import re
from pathlib import Path

from tests.examples.common import run


def test_a_pass_of_ones_own(tmp_path: Path) -> None:
    out = run("write_a_pass.py", tmp_path)
    assert "head  wgrad  f32          its weight's gradient matters" in out
    assert "body  wgrad  e5m2 x e4m3" in out
    before, after = re.findall(r"^gradients.*head.weight ([\d.]+) dB$", out, re.MULTILINE)
    assert float(after) > float(before) + 3
