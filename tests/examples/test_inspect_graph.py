"""The example that prints graphs."""

from __future__ import annotations

import re
from pathlib import Path

from tests.examples.common import run


def test_inspect_graph_shows_the_graph_before_and_after(tmp_path: Path) -> None:
    out = run("inspect_graph.py", tmp_path)
    joint, forward, backward = re.split(r"===== .*\.txt =====\n", out)[1:]
    assert joint.count("aten.mm(") == 9
    for graph in (forward, backward):
        assert "aten.mm(" not in graph
        assert "f8e4m3" in graph or "e4m3" in graph
