"""Where a Monitor can send its records: TensorBoard, a CSV file, a callback."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import OptionError
from ..named_state import Events
from ..records import COLUMNS, Record

_HEADER = ",".join(COLUMNS)

Sink = Callable[[Sequence[Record]], None]


def sinks_of(to: Any) -> list[Sink]:
    """How to write to each of ``to``: one target or several; OptionError for what is none."""
    several = to if isinstance(to, list | tuple) else [] if to is None else [to]
    return [_sink(each) for each in several]


def _sink(to: Any) -> Sink:
    if hasattr(to, "add_scalar"):
        return _TensorBoard(to)
    if isinstance(to, str | os.PathLike):
        return CsvFile(Path(to))
    if callable(to):

        def call(records: Sequence[Record]) -> None:
            for record in records:
                to(record)

        return call
    raise OptionError(
        f"a Monitor cannot write to {to!r}; give it a TensorBoard SummaryWriter (any object with "
        "add_scalar), the path of a CSV file, a function of one record, or a list of these"
    )


class _TensorBoard:
    """One scalar per number, such as ``fp8_amax/layers.0.wq.input``; counts once they are not 0."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def __call__(self, records: Sequence[Record]) -> None:
        for record in records:
            for name, value in record.numbers().items():
                if value or name not in Events._fields:
                    tag = f"fp8_{name}/{record.site}.{record.operand}"
                    self._writer.add_scalar(tag, value, record.step)


class CsvFile:
    """A row per record, appended; the header stands in the file once, whoever goes on with it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.open("a").close()  # not at the first interval of a training
            self.last_step = _last_step(path)  # 0 if there is none
        except OSError as error:
            raise OptionError(
                f"a Monitor cannot write to {str(path)!r}: {error.strerror}; give the path of a "
                "file, new or a Monitor's, in a folder that exists"
            ) from error

    def __call__(self, records: Sequence[Record]) -> None:
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if file.tell() == 0:
                writer.writerow(COLUMNS)
            writer.writerows(map(_row, records))


def _row(record: Record) -> Iterable[object]:
    numbers = record.numbers()
    yield from (record.step, record.site, record.operand, record.format)
    for name in COLUMNS[4:]:
        value = numbers.get(name, "")
        yield f"{value:.9g}" if isinstance(value, float) else value  # every float32 has its own


def _last_step(path: Path) -> int:
    """The step of the last row; cuts off a row that whoever wrote it did not finish."""
    if not path.stat().st_size:
        return 0
    with path.open("r+b") as file:
        header = file.readline().decode(errors="replace")
        if not header.endswith("\n") and _HEADER.startswith(header):
            file.truncate(0)
            return 0
        if header.rstrip() != _HEADER:
            raise OptionError(
                f"{path} is not of this kind: it does not begin with the columns "
                f"{', '.join(COLUMNS)}; give the Monitor another path, or move the file away"
            )
        start = max(file.tell(), file.seek(0, os.SEEK_END) - 2**16)
        file.seek(start)
        whole, end, _ = file.read().rpartition(b"\n")
        file.truncate(start + len(whole + end))
    rows = [row for row in whole.decode(errors="replace").splitlines() if row.strip()]
    step = rows[-1].split(",")[0] if rows else "0"
    if not step.isdecimal():
        raise OptionError(
            f"{path} does not end with a row that a Monitor wrote: its step is {step!r}; give the "
            "Monitor another path, or move the file away"
        )
    return int(step)
