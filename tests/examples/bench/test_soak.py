"""The long training run."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from tests.examples.common import run


@pytest.mark.parametrize(
    "options, names",
    [
        ((), ["fp8"]),
        (
            ("--attention", "high_precision", "fp8_both", "--seeds", 0, 1, "--noise"),
            ["fp32, other weights", "fp8", "fp8, attention fp8_both"],
        ),
    ],
)
def test_soak_runs_in_tiny_form(
    tmp_path: Path, options: tuple[str | int, ...], names: list[str]
) -> None:
    arguments = ("--tiny", "--steps", 12, "--csv", "numbers.csv", *options)
    out = run("bench/soak.py", tmp_path, *arguments)
    seeds = 2 if options else 1
    with (tmp_path / "numbers.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["what"] == "final loss"]
    assert [row["who"] for row in rows] == ["fp32", *names] * seeds
    assert len({row["job"] for row in rows}) == seeds
    compared = re.findall(r"^(.*) against fp32: ([+-]\d\.\d+) %", out, re.M)
    assert [name for name, _ in compared] == names
    assert any(float(difference) for _, difference in compared)
    assert out.count("standard error") == 2 * len(names) * (seeds - 1)
