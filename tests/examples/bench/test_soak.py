"""The long training run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.examples.common import run


@pytest.mark.parametrize(
    "options, name",
    [((), "fp8"), (("--attention", "fp8_both"), '"fp8, attention fp8_both"')],
)
def test_soak_runs_in_tiny_form(tmp_path: Path, options: tuple[str, ...], name: str) -> None:
    arguments = ("--tiny", "--steps", 12, "--csv", "numbers.csv", *options)
    out = run("bench/soak.py", tmp_path, *arguments)
    assert len(re.findall(r"final loss \d\.\d+, .* graphs compiled: 1$", out, re.M)) == 2
    assert f"{name},final loss against the other," in (tmp_path / "numbers.csv").read_text()
