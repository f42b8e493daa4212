"""``python -m fp8compile``: what the doctor finds, and the cache it may clear."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp8compile import __version__, cli, doctor
from fp8compile.cli import commands


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of the caches, which does not exist yet."""
    for module in (doctor, commands):
        monkeypatch.setattr(module, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def quality_of(**db: float) -> object:
    return lambda model, x: {"output": 25.0, "up.weight": 19.0, **db}


def test_a_healthy_machine(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"fp8compile {__version__}" in out and f"cache: {folder}, 0 files" in out
    assert "self-test on cpu: 3 steps, output 2" in out
    assert out.endswith("FP8 works here.\n")


def test_wrong_numbers_are_a_problem(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_train", quality_of(**{"down.bias": 3.0}))
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "worst down.bias 3.0 dB" in out
    assert "PROBLEM: cpu: the self-test should reach 15 dB everywhere" in out


def test_an_error_is_a_problem(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(model: object, x: object) -> dict[str, float]:
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(doctor, "_train", fail)
    assert cli.main(["doctor"]) == 1
    assert "PROBLEM: cpu: the self-test raised RuntimeError: no compiler" in capsys.readouterr().out


def test_a_folder_that_keeps_nothing_is_a_problem(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_train", quality_of())
    folder.write_text("a file where a folder should be")
    assert cli.main(["doctor"]) == 1
    assert f"PROBLEM: nothing can be kept in {folder} (" in capsys.readouterr().out


def test_the_cache_is_shown_and_cleared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kernel = folder / "kernels" / "a.py"
    kernel.parent.mkdir(parents=True)
    kernel.write_text("")
    assert cli.main(["cache", "path"]) == 0
    assert cli.main(["cache", "clear"]) == 0
    assert cli.main(["cache", "clear"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        str(folder),
        f"removed 1 files from {folder}",
        f"removed 0 files from {folder}",
    ]
    assert not folder.exists()


def test_an_unknown_command_lists_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["docto"])
    assert "doctor" in capsys.readouterr().err
