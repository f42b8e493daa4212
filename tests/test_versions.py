"""The script that runs the tests on several versions: what it counts, prints and returns."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests import versions

CASES = """
import pytest

def test_good(): pass
def test_bad(): assert False
def test_broken(missing): pass
@pytest.mark.skip
def test_left_out(): pass
"""


@pytest.fixture(autouse=True)
def this_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of new ones, which take minutes."""
    monkeypatch.setattr(versions, "_install", lambda version, environment: environment.mkdir())
    monkeypatch.setattr(versions, "_python", lambda environment: sys.executable)


def cases(folder: Path, text: str) -> str:
    file = folder / "test_cases.py"
    file.write_text(text)
    return f"-p no:cacheprovider {file}"


def test_what_fails_is_counted_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["9.9.0", "--pytest", cases(tmp_path, CASES), "--folder", str(tmp_path)]
    assert versions.main(given) == 1
    out = capsys.readouterr().out
    (row,) = [line for line in out.splitlines() if version("torch") in line and "\u2502" in line]
    assert [cell.strip() for cell in row.split("\u2502")][3:6] == ["1", "2", "1"]
    assert "test_bad" in out and "test_broken" in out and "test_good" not in out


def test_all_is_well(tmp_path: Path) -> None:
    only_good = cases(tmp_path, "def test_good(): pass")
    assert versions.main(["9.9.0", "9.9.1", "--pytest", only_good]) == 0


def test_a_run_that_breaks_off_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    aborting = cases(tmp_path, "import os\ndef test_bad(): os.abort()")
    assert versions.main(["9.9.0", "--pytest", aborting]) == 1
    assert "exit status is" in capsys.readouterr().out


def test_a_version_that_cannot_be_installed_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def install(version: str, environment: Path) -> None:
        raise subprocess.CalledProcessError(1, "pip", output="no such version")

    monkeypatch.setattr(versions, "_install", install)
    assert versions.main(["9.9.0"]) == 1
    assert "9.9.0: no such version" in capsys.readouterr().out
