"""What a Monitor draws, and the example of the README."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from fp8compile import Monitor, MonitorError
from tests.helpers import compile_interpreted
from tests.models import MLP
from tests.monitoring.common import rows_of, sgd, train, two_layers

pytestmark = pytest.mark.filterwarnings("ignore:FP8 is emulated here")


README = Path(__file__).parents[2] / "README.md"


def test_plot_shows_scales_and_amax_of_every_role(tmp_path: Path) -> None:
    model = two_layers()
    monitor = Monitor(model, every=1)
    compiled, optimizer = compile_interpreted(model), sgd(model)
    train(compiled, optimizer, 3)
    compiled(100 * torch.randn(16, 32)).square().mean().backward()
    optimizer.step()
    figure = monitor.plot(tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["input (e4m3)", "weight (e4m3)", "grad_output (e5m2)"]
    medians = figure.axes[0].lines[0].get_xydata()
    records = [r for r in monitor.records if r.operand == "input" and r.step == 2]
    expected = sum(math.log2(r.scale or 1) for r in records) / 2
    assert medians[1].tolist() == pytest.approx([2, expected])
    heat = figure.axes[3]
    assert [label.get_text() for label in heat.get_yticklabels()] == ["0", "2"]
    marked = heat.collections[-1].get_offsets().tolist()
    assert [4, 0] in marked, "the input of 0 has outgrown its scale in step 4"


def test_plot_of_measured_records_only(tmp_path: Path) -> None:
    model = two_layers()
    monitor = Monitor(model, options={"recipe": "rowwise"})
    monitor.measure(torch.randn(16, 32))
    texts = [text.get_text() for axes in monitor.plot().axes for text in axes.texts]
    assert texts == ["no scale per tensor"] * 2
    assert monitor.plot_edge("2", "weight", tmp_path / "edge.svg")
    assert b"<svg" in (tmp_path / "edge.svg").read_bytes()


def test_plot_edge_colours_what_is_lost() -> None:
    model = MLP(32, 64)
    monitor = Monitor(model, every=1)
    train(compile_interpreted(model), sgd(model), 1)
    x = torch.randn(16, 32)
    with torch.no_grad():
        model.norm.weight.copy_(8.0 ** torch.arange(1, -31, -1))  # from 8 to 2^-90
    monitor.measure(x)
    figure = monitor.plot_edge("up", "input")  # which shares its scale with gate
    histogram, grids = figure.axes
    labels = [text.get_text() for text in histogram.get_legend().get_texts()]
    assert labels == ["becomes zero", "representable in e4m3", "saturates"]
    edge = monitor.measured["gate", "input"]
    heights = sum(bar.get_height() for bar in histogram.patches)
    assert heights == pytest.approx(1) and edge.underflowed > edge.nonzero / 2
    e4m3, e5m2 = (len(lines.get_segments()) for lines in grids.collections)
    assert (e4m3, e5m2) == (126, 123), "finite values above zero, OCP 8-bit specification"


def test_plots_say_what_they_lack() -> None:
    model = two_layers()
    monitor = Monitor(model, every=10)
    train(compile_interpreted(model), sgd(model), 2)
    with pytest.raises(MonitorError, match="2 steps have ended, and every=10"):
        monitor.plot()
    with pytest.raises(MonitorError, match=r"call monitor\.measure"):
        monitor.plot_edge("0")
    monitor.measure(torch.randn(16, 32))
    with pytest.raises(MonitorError, match=r"no edge '1', 'input' is measured; there are 0 input"):
        monitor.plot_edge("1")
    with (
        mock.patch.dict("sys.modules", {"matplotlib.figure": None}),
        pytest.raises(MonitorError, match="pip install matplotlib"),
    ):
        monitor.plot()


# --- the README ---------------------------------------------------------------------------------


def test_the_example_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    section = README.read_text().split("\n## Watch the numbers\n")[1].split("\n## ")[0]
    code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    names: dict[str, Any] = {}
    exec(code, names)
    monitor = names["monitor"]
    assert {r.step for r in monitor.records} == {10, 20, 30}
    assert len(rows_of(tmp_path / "scales.csv")) == len(monitor.records)
    assert {file.suffix for file in tmp_path.iterdir()} == {".csv", ".png"}
