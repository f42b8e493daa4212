"""``python -m fp8compile``: explain, view and bench, what they are given, and what they refuse."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import fp8compile
from fp8compile.cli import commands, main, targets
from fp8compile.cli.parser import parser
from fp8compile.explanation import Explanation
from fp8compile.report import Measured

pytestmark = pytest.mark.filterwarnings("ignore:FP8 is emulated here")
SCRIPT = """
import torch
from torch import nn

def job():
    return nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 16)), (torch.randn(16, 32),)

value = nn.Linear(32, 32), (torch.randn(16, 32),)
alone = nn.Linear(32, 32)

def one_tensor():
    return nn.Linear(32, 32), torch.randn(16, 32)
"""
COMMANDS = ("doctor", "explain", "view", "bench", "cache")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / f"script_{tmp_path.name}.py"
    path.write_text(SCRIPT)
    return path


def test_explain_prints_tables_and_writes_files(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = tmp_path / "a.json", tmp_path / "a.html"
    flags = ["--recipe", "current", "--options", '{"skip": ["1"]}']
    paths = ["--json", str(files[0]), "--html", str(files[1])]
    assert main(["explain", f"{script}:job", *flags, *paths]) == 0
    out = capsys.readouterr().out
    assert "2 sites, 2 of 5 GEMMs in FP8" in out and "recipe current" in out
    assert "skipped by the user" in out and "fp8_cast" in out and "kept for backward: " in out
    assert json.loads(files[0].read_text())["recipe"]["name"] == "current"
    assert files[1].read_text().startswith("<!doctype html>")


def test_explain_prints_json_alone(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{script}:value", "--json", "-"]) == 0
    assert len(json.loads(capsys.readouterr().out)["gemms"]) == 2


def test_explain_prints_json_and_writes_a_page(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.html"
    assert main(["explain", f"{script}:value", "--json", "-", "--html", str(path)]) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)["gemms"]) == 2 and f"wrote {path}" in err
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize("flags", [["explain", "--json"], ["explain", "--html"], ["view", "--out"]])
@pytest.mark.parametrize("name", ["missing/a.html", "."])
def test_a_file_that_cannot_be_written_is_refused_before_all_work(
    flags: list[str], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, flag = flags
    assert main([command, "nowhere.py:job", flag, str(tmp_path / name)]) == 2
    assert "error: cannot write to " in capsys.readouterr().err


def test_nobody_reads_on(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["explain", f"{script}:value", "--json", "-"]) == 141


def test_a_stdout_that_knows_only_ascii(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main(["explain", f"{script}:value"]) == 0
    assert b"1 sites, 2 of 2 GEMMs in FP8" in written.getvalue()


def test_a_script_does_not_replace_a_module(
    tmp_path: Path, script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    taken = ModuleType("taken")  # as random is, or torch
    monkeypatch.setitem(sys.modules, "taken", taken)
    paths = [tmp_path / folder / "taken.py" for folder in ("one", "other")]
    for path in paths:
        path.parent.mkdir()
        shutil.copy(script, path)
    found = [targets._from_file(path) for path in paths]
    assert sys.modules["taken"] is taken and found[0] is not found[1]
    assert [targets._from_file(path) for path in paths] == found
    assert [sys.modules[module.__name__] for module in found] == found


def test_a_module_and_a_device(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(script.parent)
    made = []

    def explain_nothing(model: nn.Module, x: Any, **options: Any) -> Explanation:
        made.append({tensor.is_meta for tensor in (x, *model.parameters())})
        return Explanation((), fp8compile.RECIPES["delayed"])

    monkeypatch.setattr(commands, "explain_model", explain_nothing)
    for name in ("value", "job"):  # on the CPU, then elsewhere
        assert main(["explain", f"{script.stem}:{name}"]) == 0
        assert main(["explain", f"{script.stem}:{name}", "--device", "meta"]) == 0
    assert made == [{False}, {True}, {False}, {True}]


def test_view_calls_the_viewer(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []

    def view(model: nn.Module, *inputs: Any, **kwargs: Any) -> None:
        calls.append((type(model), len(inputs), kwargs))

    monkeypatch.setattr(fp8compile, "view", view, raising=False)
    assert main(["view", f"{script}:job", "--out", "g.html", "--recipe", "static"]) == 0
    given = {"path": "g.html", "options": {"recipe": "static"}}
    assert calls == [(nn.Sequential, 1, given)]
    assert "wrote g.html" in capsys.readouterr().out


def test_bench_prints_medians(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def time_step(model: nn.Module, inputs: Any, kwargs: Any, options: Any) -> Measured:
        return Measured("a GPU", 3.0 if torch.is_grad_enabled() else 1.0, 2.0)

    monkeypatch.setattr(commands, "time_step", time_step)
    assert main(["bench", f"{script}:job"]) == 0
    out = capsys.readouterr().out
    assert "a GPU, median step" in out and "3.000 ms" in out and "1.50x as fast" in out
    assert main(["bench", f"{script}:job", "--forward"]) == 0
    out = capsys.readouterr().out
    assert "a GPU, median forward" in out and "0.50x as fast" in out


def test_bench_says_that_emulation_is_not_timed(
    script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", f"{script}:job"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: FP8 is emulated here, and its time says nothing")
    assert "an NVIDIA GPU; the model is on cpu" in error


WRONG = [
    ("{script}", [], "write path/to/file.py:name or package.module:name"),
    ("nowhere.py:job", [], "there is no file 'nowhere.py'"),
    ("no.such.module:job", [], "'no.such.module' cannot be imported"),
    ("{script}:jobs", [], "has no 'jobs'; it has job, value, alone, one_tensor"),
    ("{script}:alone", [], "gives a Linear; it must give (model, inputs)"),
    ("{script}:one_tensor", [], "gives the inputs as a Tensor"),
    ("{script}:job", ["--options", "[1"], "is not JSON"),
    ("{script}:job", ["--options", "[1]"], "write an object"),
    ("{script}:job", ["--recipe", "int4"], "unknown recipe 'int4'"),
    ("{script}:job", ["--options", '{"skip": ["nope"]}'], "error: skip='nope' matches nothing"),
    ("{script}:job", ["--device", "tpu9"], "--device='tpu9'"),
]


@pytest.mark.parametrize(("target", "flags", "message"), WRONG, ids=[w[2] for w in WRONG])
def test_errors_name_what_was_given_and_what_is_legal(
    target: str, flags: list[str], message: str, script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", target.format(script=script), *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    out = capsys.readouterr().out
    assert exit_.value.code == 0 and f"example:\n  python -m fp8compile {command}" in out
    assert ("(model, inputs)" in out) == (command in ("explain", "view", "bench"))


def test_the_examples_in_the_help_parse() -> None:
    for command in COMMANDS:
        action = next(a for a in parser()._actions if a.choices)
        epilog = action.choices[command].epilog  # type: ignore[index,call-overload]
        for line in epilog.splitlines()[1:]:
            words = line.split("#")[0].split()
            assert parser().parse_args(words[3:]).run.__name__ == command
