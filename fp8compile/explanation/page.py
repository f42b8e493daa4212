"""An explanation as one HTML page that needs nothing else: no script, no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from string import Template

from ..report import KernelRow
from .tables import Cells

_PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --line: #8884; --mark: #d08b0022; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 90rem; padding: 0 1rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .2rem .7rem; text-align: left; border-bottom: 1px solid var(--line); }
.number { text-align: right; }
.marked { background: var(--mark); }
td.long { white-space: normal; min-width: 16rem; }
details { border-bottom: 1px solid var(--line); padding: .3rem 0; }
summary { cursor: pointer; }
pre { overflow-x: auto; font-size: 13px; padding: .7rem; border: 1px solid var(--line); }
</style>
<h1>$title</h1>
$lines
$tables
$sources
</html>
""")
_LONG = 40  # characters; such a cell may wrap


def page(
    title: str,
    lines: Sequence[str],
    tables: Sequence[tuple[str, Cells]],
    kernels: Sequence[KernelRow],
) -> str:
    """The page: ``lines`` in words, the ``tables`` under their headings, the kernels' source."""
    sources = "".join(map(_source, kernels))
    return _PAGE.substitute(
        title=escape(title),
        lines="\n".join(f"<p>{escape(line)}</p>" for line in lines),
        tables="\n".join(f"<h2>{escape(name)}</h2>\n{_table(cells)}" for name, cells in tables),
        sources=f"<h2>Source of the fused kernels</h2>\n{sources}" if sources else "",
    )


def _table(cells: Cells) -> str:
    numbers = [name in cells.right for name in cells.columns]
    head = "".join(
        f"<th{' class=number' if number else ''}>{escape(name)}"
        for name, number in zip(cells.columns, numbers, strict=True)
    )
    body = "\n".join(
        f"<tr{' class=marked' if i in cells.marked else ''}>"
        + "".join(_cell(text, number) for text, number in zip(row, numbers, strict=True))
        for i, row in enumerate(cells.rows)
    )
    return f"<div class=table><table>\n<tr>{head}\n{body}\n</table></div>"


def _cell(text: str, number: bool) -> str:
    kind = " class=number" if number else " class=long" if len(text) > _LONG else ""
    return f"<td{kind}>{escape(text)}"


def _source(row: KernelRow) -> str:
    what = f"{row.name}, {row.direction}, {row.size or f'{row.regions} regions'}"
    feeds = f" for {', '.join(row.feeds)}" if row.feeds else ""
    return (
        f"<details><summary>{escape(what)}, {row.launches} launches{escape(feeds)}</summary>\n"
        f"<pre>{escape(row.source)}</pre></details>\n"
    )
