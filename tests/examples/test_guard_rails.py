"""The example of a run that guard rails save."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from tests.examples.common import run


def test_guard_rails_save_a_run_that_diverges_without_them(tmp_path: Path) -> None:
    """Only what `jump_limit` does makes the difference; the reference is float32."""
    out = run("guard_rails.py", tmp_path)
    rows = re.findall(r"^(float32|FP8, [\w() ]+?) {2,}([\d. ]+)$", out, re.MULTILINE)
    losses = {name: [float(number) for number in numbers.split()] for name, numbers in rows}
    reference, bare, saturation, both = losses.values()
    chance = math.log(16)
    for before, _, second, worst, last, _ in (bare, saturation):
        assert before == pytest.approx(reference[0], rel=0.05)
        assert second > chance and worst > chance and last > 2 * reference[4]
    assert bare[1] > chance and saturation[1] == pytest.approx(reference[1], rel=0.05)
    assert both[:5] == pytest.approx(reference[:5], rel=0.05)
    assert [row[5] for row in losses.values()] == [0, 0, 0, 2]
    where = r"^stem\.weight\.input: Events\(not_finite=0, saturated=\d+, jumped=1\)$"
    assert re.search(where, out, re.MULTILINE)
