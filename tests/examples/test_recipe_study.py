"""The study of recipes: its runs, files and pictures."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.examples.common import EXAMPLES, run


def rows_of(folder: Path, kind: str) -> list[dict[str, str]]:
    with (folder / f"{kind}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


PICTURES = ("loss.png", "gradients.png", "scales.png")


def test_recipe_study_writes_its_numbers_and_pictures(tmp_path: Path) -> None:
    """In two folders, as on two machines, that are merged and drawn."""
    other = tmp_path / "other"
    sizes = ("--tiny", "--steps", 3, "--sqnr-every", 2, "--no-draw", "--out")
    out = run("recipe_study.py", tmp_path, *sizes, tmp_path, "--recipes", "reference", "mx")
    out += run("recipe_study.py", tmp_path, *sizes, other, "--recipes", "auto")
    line = r"^\w+ +final loss \d\.\d+, gradients [\d.]+ dB at worst, [\d.]+ median \(compiled in"
    assert len(re.findall(line, out, re.M)) == 3 and not (tmp_path / "loss.png").exists()
    run("recipe_study.py", tmp_path, "--out", tmp_path, "--merge", other)
    own = "bf16" if torch.cuda.is_available() else "fp32"
    runs = {row["recipe"]: row for row in rows_of(tmp_path, "runs")}
    assert list(runs) == [own, "mx", "auto"]
    assert all(row["device"] and row["torch"] == torch.__version__ for row in runs.values())
    assert runs["auto"]["gradients"] == "e4m3" and runs[own]["gradients"] == ""
    losses, gradients = (rows_of(tmp_path, kind) for kind in ("losses", "gradients"))
    for recipe in runs:
        found = [float(row["nats"]) for row in losses if row["recipe"] == recipe]
        assert len(found) == 3 and 5 < found[0] < 7
        sqnr = [row for row in gradients if row["recipe"] == recipe]
        assert {row["step"] for row in sqnr} == {"0", "2"} and len({r["layer"] for r in sqnr}) == 6
        assert all(float(row["db"]) > (15 if recipe != own else 30) for row in sqnr)
    scales = {
        (row["recipe"], row["role"]): float(row["median"])
        for row in rows_of(tmp_path, "scales")
        if row["step"] == "2"
    }
    assert len(scales) == 6, "weights, activations and gradients of two recipes"
    assert all(scales[recipe, "gradients"] > scales[recipe, "weights"] for recipe in ("auto", "mx"))
    assert all(scales["mx", role].is_integer() for role in ("weights", "activations"))
    for name in PICTURES:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import recipe_results

    return recipe_results


def made_up(results: Any, name: str, steps: int = 2) -> Any:
    config = results.train_gpt.Config(1, 64, 64, 4, steps, 2e-3)
    place = results.Place("a GPU", config)
    run = results.Run(name, place, ("2", "3", "0"), dict.fromkeys(results.ROLES.values(), "e4m3"))
    run.losses, run.sqnr, run.step_ms = [2.5, 1.25], {0: {"a": 20.0}, 1: {"a": 21.0}}, 3.5
    run.scales = {0: {"weights": [1.0, 2.0, 3.0, 4.0, 5.0]}}
    return run


def test_results_of_a_recipe_replace_its_older_ones(results: Any, tmp_path: Path) -> None:
    old, new, other = (made_up(results, name) for name in ("mx", "mx", "delayed"))
    old.losses = [9.0, 9.0]
    results.save(tmp_path, old, other)
    results.save(tmp_path, new)
    assert results.load(tmp_path) == [other, new]  # in the order of the recipes
    with pytest.raises(SystemExit, match=r"'delayed' with 1 layer, width 64.* 2 steps .*--out"):
        results.save(tmp_path, made_up(results, "rowwise", steps=3))
    assert len(results.load(tmp_path)) == 2
