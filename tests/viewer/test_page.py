"""The page is one file, which loads nothing."""

from __future__ import annotations

import base64
import io
import json
import re
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fp8compile
from fp8compile import OptionError
from fp8compile.viewer.page import HERE, LIBRARIES, SCRIPTS, packed, write_page
from tests.viewer.common import Up

pytestmark = pytest.mark.filterwarnings("ignore:FP8 is emulated here")
# What would make a browser load something: attributes, CSS, and calls of scripts.
LOADS = re.compile(
    r"""(?:src|href|srcset|poster|action)\s*=|url\(|@import|import\s*\(|fetch\(|XMLHttpRequest"""
    r"""|WebSocket|EventSource|sendBeacon|importScripts"""
)


def unpacked(page: str, name: str) -> Any:
    (text,) = re.findall(f'<script type="text/plain" id="{name}">([^<]*)</script>', page)
    return json.loads(zlib.decompress(base64.b64decode(text)))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch._dynamo.reset()
    path = tmp_path_factory.mktemp("page") / "graph.html"
    assert fp8compile.view(Up(), torch.randn(16, 16), path=path) == path
    return path.read_text()


def test_it_loads_nothing(page: str) -> None:
    own = re.sub(r"url\(#to-\$\{edge\.format\}\)", "", page)  # an arrowhead of this page
    assert LOADS.findall(own) == []
    assert set(re.findall(r"https?://[^\s\"'`<)]+", page)) == {"http://www.w3.org/2000/svg"}
    assert "<!--" not in page.replace("<!-- The layout is by elkjs", "")


def test_the_search_for_loads_finds_them() -> None:
    for text in ('<img src="a">', "@import 'a'", "url(a.png)", "fetch('a')", "import('a')"):
        assert LOADS.search(text), text


def test_it_holds_the_data_and_the_library(page: str) -> None:
    data = unpacked(page, "data")
    assert data["title"] == "Up" and data["summary"] == "2 of 2 GEMMs in FP8"
    assert "delayed" in data["recipe"]
    assert [len(graph["snapshots"]) for graph in data["graphs"]] == [15]
    libraries = unpacked(page, "libraries")
    assert set(libraries) == set(LIBRARIES)
    assert all(libraries[name] == (HERE / "vendor" / name).read_text() for name in LIBRARIES)


def test_every_file_is_used() -> None:
    assert {file.name for file in (HERE / "assets").iterdir()} == {
        *SCRIPTS,
        "index.html",
        "style.css",
    }
    assert {file.name for file in (HERE / "vendor").iterdir()} == {
        *LIBRARIES,
        "LICENSE.md",
        "README.md",
    }


def test_text_cannot_end_the_script() -> None:
    assert re.fullmatch(r"[A-Za-z0-9+/=]+", packed({"label": "</script>"}))


def test_a_title_is_escaped(tmp_path: Path) -> None:
    torch._dynamo.reset()
    odd = type("<Odd>", (nn.Linear,), {})
    page = fp8compile.view(odd(16, 16), torch.randn(16, 16), path=tmp_path / "odd.html")
    assert "<title>&lt;Odd&gt; - fp8compile</title>" in page.read_text()


def test_the_code_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (code,) = re.findall(r"## See the graph\n.*?```python\n(.*?)```", readme, re.DOTALL)
    torch._dynamo.reset()
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    data = unpacked((tmp_path / "graph.html").read_text(), "data")
    assert data["summary"] == "15 of 15 GEMMs in FP8"
    for snapshot in data["graphs"][0]["snapshots"]:
        assert [0, 3] in [fold[1:] for fold in snapshot["folds"]], snapshot["name"]


def test_wrong_options() -> None:
    with pytest.raises(OptionError, match="did you mean 'recipe'"):
        fp8compile.view(Up(), torch.randn(16, 16), options={"recipy": "current"})


def test_files_are_utf8_in_any_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io, "text_encoding", lambda given, level=2: given or pytest.fail("none"))
    write_page(tmp_path / "graph.html", [], [], title="größer", recipe="current")
    assert "größer" in (tmp_path / "graph.html").read_bytes().decode()


def test_a_path_that_cannot_be_written_is_refused_before_all_work(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing" / "graph.html"):
        with pytest.raises(OptionError, match=r"cannot write to .* in a folder that exists"):
            fp8compile.view(lambda: pytest.fail("it was traced"), path=path)
