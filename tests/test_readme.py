"""The README about explain, checkpoints and the command line: its code runs, and shows what it
says.
"""

from __future__ import annotations

import csv
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fp8compile
from fp8compile.cli import main
from fp8compile.cli.parser import parser
from fp8compile.frozen import FrozenWeight

pytestmark = pytest.mark.filterwarnings("ignore:FP8 is emulated here")
ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = ROOT / "examples" / "guides"
QUANTIZE = (GUIDES / "quantize_for_inference.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def code_of(title: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", section(title), re.DOTALL)


def test_the_first_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In one file, from the top, as a reader would have it."""
    torch._dynamo.reset()
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    train, save = code_of("Use it")
    exec(train, names)
    exec(save, names)
    state = fp8compile.state_dict(names["model"])
    assert state["0.weight.scale"].count_nonzero() and (tmp_path / "scales.pt").exists()


def test_what_explain_shows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first example of the README, and what it says that explain prints for it."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    shown = re.search(r"gives, before it,\n\n```\n(.*?)\n```", section("Use it"), re.DOTALL)
    assert shown and str(fp8compile.explain(model, torch.randn(128, 64))) == shown[1]


def test_code_about_explain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch._dynamo.reset()
    monkeypatch.chdir(tmp_path)
    linear = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    names: dict[str, Any] = {"torch": torch, "nn": nn, "model": linear, "x": torch.randn(128, 64)}
    found, large, _ = code_of("See what it does")
    exec(found, names)
    assert (tmp_path / "explanation.html").exists() and (tmp_path / "explanation.json").exists()
    exec(large, names)
    assert names["large"][0].weight.is_meta


def test_code_about_checkpoints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch._dynamo.reset()
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    (code,) = code_of("Checkpoints")
    exec(code, names)
    assert names["left"] == eval(re.search(r'"mlp-fp8"\)  # (\{.*\})', code)[1])  # type: ignore[index]
    x = torch.randn(4, 64).bfloat16()
    assert torch.equal(names["again"](x), names["model"](x))


def test_commands(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch._dynamo.reset()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.py").write_text(code_of("See what it does")[2])
    rows = re.findall(r"^\| (`.*?`) \|", section("See what it does"), re.MULTILINE)[1:]
    commands = [shlex.split(c) for row in rows for c in re.findall(r"`(.*?)`", row)]
    assert [command[0] for command in commands] == [
        "doctor", "explain", "explain", "view", "bench", "cache", "cache",
    ]  # fmt: skip
    for command in commands:
        assert callable(parser().parse_args(command).run)
    for command in (command for command in commands if command[0] == "explain"):
        assert main(command) == 0
    assert "2 sites, 5 of 5 GEMMs in FP8" in capsys.readouterr().out
    assert (tmp_path / "tiny.html").exists()


def test_code_about_serving() -> None:
    torch._dynamo.reset()
    names: dict[str, Any] = {}
    blocks = code_of("Serve")
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
    assert not isinstance(names["model"][2], FrozenWeight)
    assert isinstance(names["model"][0], FrozenWeight)


def test_code_about_quantizing_for_inference(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch._dynamo.reset()
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"torch": torch}
    exec(code_of("Serve")[0], names)
    blocks = re.findall(r"```python\n(.*?)```", QUANTIZE, re.DOTALL)
    for code in blocks[:2]:
        exec(code, names)
    assert list(names["amaxes"]) == ["0.weight.input", "2.weight.input"]
    state = fp8compile.state_dict(names["model"])
    loaded = torch.load(tmp_path / "scales.pt")
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    groups = [group.sites for group in names["found"].groups]
    assert groups == [("0",), ("2",)]
    with torch.no_grad():
        x = torch.randn(128, 64)
        exact, out = names["model"](x), names["careful"](x)
    noise = float((out - exact).square().sum() / exact.square().sum())
    assert noise < 10 ** (-27.0 / 10)
    for code in blocks[2:]:
        exec(code, names)
    linears = {"0", "2"}
    for name, wanted in (
        ("careful", linears - set(names["found"].kept_for(27.0))),
        ("frozen", linears),
    ):
        modules = names[name].named_modules()
        assert {n for n, m in modules if isinstance(m, FrozenWeight)} == wanted


def test_how_a_kernel_is_added(capsys: pytest.CaptureFixture[str]) -> None:
    """The code of the guide runs, and the lines that it names are where it says."""
    guide = (GUIDES / "add_a_kernel.md").read_text(encoding="utf-8")
    operator, gemm = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    exec(operator, {})
    assert "def fp8_" in capsys.readouterr().out
    exec(gemm, {})
    lines = re.findall(r"^\| `(\S+\.py)` \| `(.*?)` \|", guide, re.MULTILINE)
    assert len(lines) == 4
    for file, line in lines:
        source = (ROOT / file).read_text(encoding="utf-8").splitlines()
        assert line in map(str.strip, source), f"{file}: {line}"


def test_links_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "tests/zoo/README.md", ROOT / "examples/bench/README.md"]
    for page in (*pages, *GUIDES.glob("*.md")):
        for link in re.findall(r"\]\((?!http)(.*?)\)", page.read_text(encoding="utf-8")):
            file, _, anchor = link.partition("#")
            target = (page.parent / file).resolve() if file else page
            assert target.exists(), f"{page}: {link}"
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
            assert not anchor or anchor in slugs, f"{page}: {link}"


def test_the_table_of_the_encoder_is_its_results() -> None:
    """examples/quantize_encoder.csv, which the example writes, and the README say the same."""
    path = ROOT / "examples" / "quantize_encoder.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        numbers = f"{row['mean cosine']} | {row['worst cosine']} | {float(row['same top 5']):.1%}"
        sites = f"{row['sites in fp8']} of {row['sites']}"
        assert f"| {row['scales']} | {sites} | {numbers} |" in QUANTIZE, row["scales"]
