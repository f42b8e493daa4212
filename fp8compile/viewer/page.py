"""Put collected graphs, the scripts and the layout library into one HTML file."""

from __future__ import annotations

import base64
import html
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import OptionError
from ..report import Row
from .collect import Collector, Snapshot
from .records import Record

HERE = Path(__file__).parent
SCRIPTS = ("data.js", "tree.js", "layout.js", "draw.js", "panel.js", "app.js")
LIBRARIES = ("elk-api.js", "elk-worker.min.js")


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise OptionError for a path that no page can be written to, before there is one."""
    file = Path(path)
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise OptionError(
            f"cannot write to {str(path)!r}; give the path of a file in a folder that exists"
        )


def write_page(
    path: Path, collectors: Sequence[Collector], rows: Sequence[Row], *, title: str, recipe: str
) -> Path:
    """Write the page; returns its path."""
    data = {
        "title": title,
        "recipe": recipe,
        "summary": summary(rows),
        "graphs": [graph_data(collector) for collector in collectors if collector.snapshots],
    }
    libraries = {name: _text(HERE / "vendor" / name) for name in LIBRARIES}
    parts = {
        "TITLE": html.escape(title),
        "STYLE": _asset("style.css"),
        "DATA": packed(data),
        "LIBRARIES": packed(libraries),
        "SCRIPT": "\n".join(_asset(name) for name in SCRIPTS),
    }
    page = _asset("index.html")
    for name, text in parts.items():
        page = page.replace(f"<!--{name}-->", text)
    path.write_text(page, encoding="utf-8")
    return path


def _asset(name: str) -> str:
    return _text(HERE / "assets" / name)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def packed(value: Any) -> str:
    """JSON, deflated, as base64: what a browser inflates with ``DecompressionStream``."""
    text = json.dumps(value, separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def summary(rows: Sequence[Row]) -> str:
    """How many of the GEMMs are in FP8."""
    gemms = [row for row in rows if row.k != ""]
    return f"{sum(row.is_fp8 for row in gemms)} of {len(gemms)} GEMMs in FP8"


def graph_data(collector: Collector) -> dict[str, Any]:
    """One graph: records, each once however many snapshots it is in, and which each has."""
    numbers: dict[Record, int] = {}
    snapshots = [_snapshot(snapshot, numbers) for snapshot in collector.snapshots]
    return {
        "records": [_record(record) for record in numbers],
        "snapshots": snapshots,
        "sources": collector.sources,
    }


def _snapshot(snapshot: Snapshot, numbers: dict[Record, int]) -> dict[str, Any]:
    found = [numbers.setdefault(record, len(numbers)) for record in snapshot.records]
    return {
        "name": snapshot.name,
        "records": runs(found),
        "folds": [[fold.parent, fold.first, fold.last] for fold in snapshot.folds],
    }


def runs(numbers: Sequence[int]) -> list[list[int]]:
    """``[first, count]`` of every run of numbers that follow each other."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == sum(found[-1]):
            found[-1][1] += 1
        else:
            found.append([number, 1])
    return found


def _record(record: Record) -> dict[str, Any]:
    """A record without what is empty."""
    fields = {name: getattr(record, name) for name in record.__dataclass_fields__}
    fields["inputs"] = [[i.name, i.type, 1] if i.small else [i.name, i.type] for i in record.inputs]
    return {name: value for name, value in fields.items() if value}
