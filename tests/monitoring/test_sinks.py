"""Where a Monitor writes, and what it says of other targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fp8compile import Monitor, OptionError, Record
from fp8compile.records import COLUMNS
from tests.helpers import compile_interpreted
from tests.monitoring.common import rows_of, sgd, train, two_layers

pytestmark = pytest.mark.filterwarnings("ignore:FP8 is emulated here")


class Writer:
    """What a Monitor needs of TensorBoard's SummaryWriter."""

    def __init__(self) -> None:
        self.scalars: dict[str, dict[int, float]] = {}

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.scalars.setdefault(tag, {})[global_step] = scalar_value


def test_several_sinks_at_once(tmp_path: Path) -> None:
    model = two_layers()
    writer, called, path = Writer(), [], tmp_path / "run.csv"
    monitor = Monitor(model, every=2, to=[writer, str(path), called.append])
    train(compile_interpreted(model), sgd(model), 4)
    records = monitor.records
    assert called == records and len(records) == 2 * 6
    rows = rows_of(path)
    assert list(rows[0]) == list(COLUMNS)
    for row, record in zip(rows, records, strict=True):
        assert (row["step"], row["site"]) == (str(record.step), record.site)
        assert (row["operand"], row["format"]) == (record.operand, str(record.format))
        assert torch.tensor(float(row["amax"])) == record.amax, "no bit of a float32 is lost"
        assert torch.tensor(float(row["scale"])) == record.scale
        assert row["saturated"] == "0" and row["sqnr_db"] == ""
        assert writer.scalars[f"fp8_scale/{record.site}.{record.operand}"][record.step] == (
            record.scale
        )
    assert {tag.partition("/")[0] for tag in writer.scalars} == {"fp8_amax", "fp8_scale"}
    monitor.measure(torch.randn(16, 32))
    assert "fp8_sqnr_db/0.input" in writer.scalars and float(rows_of(path)[-1]["sqnr_db"]) > 20


def test_a_run_goes_on_in_its_csv(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    model = two_layers()
    compiled, optimizer = compile_interpreted(model), sgd(model)
    with Monitor(model, every=2, to=path):
        train(compiled, optimizer, 4)
    whole = path.read_text()
    path.write_text(whole + "6,0,inp")  # it was killed here
    with Monitor(model, every=2, to=path) as monitor:
        assert monitor.step == 4 and path.read_text() == whole
        train(compiled, optimizer, 2)
    assert path.read_text().startswith(whole)
    steps = [row["step"] for row in rows_of(path)]
    assert steps == ["2"] * 6 + ["4"] * 6 + ["6"] * 6
    with Monitor(model, every=2, to=path, step=100) as monitor:
        assert monitor.step == 100


@pytest.mark.parametrize("content", ["", "step,si", ",".join(COLUMNS), ",".join(COLUMNS) + "\r\n"])
def test_a_csv_that_has_no_rows_yet(content: str, tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    path.write_text(content, newline="")
    model = two_layers()
    with Monitor(model, every=1, to=path) as monitor:
        assert monitor.step == 0
        train(compile_interpreted(model), sgd(model), 1)
    assert path.read_text().count("step") == 1 and len(rows_of(path)) == 6


def test_a_long_csv_is_read_from_its_end(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    rows = "".join(f"{step},0,input,e4m3,1,448,0,0,0,,,\r\n" for step in range(1, 5001))
    path.write_text(",".join(COLUMNS) + "\r\n" + rows + "50", newline="")
    assert path.stat().st_size > 2**17
    assert Monitor(two_layers(), to=path).step == 5000
    assert path.read_text().endswith("0,0,0,,,\n")


def test_a_file_of_another_kind_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.csv"
    path.write_text("mine\n")
    with pytest.raises(OptionError, match="does not begin with the columns"):
        Monitor(two_layers(), to=path)
    assert path.read_text() == "mine\n"


@pytest.mark.parametrize(
    ("name", "says"), [("missing/run.csv", "No such file or directory"), (".", "Is a directory")]
)
def test_a_path_that_cannot_be_written(name: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=f"cannot write to .*: {says}; give the path of a file"):
        Monitor(two_layers(), to=tmp_path / name)


def test_blank_lines_at_the_end_and_what_is_no_row(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    path.write_text(",".join(COLUMNS) + "\n7,0,input,e4m3,1,1,0,0,0,,,\n\n  \n")
    assert Monitor(two_layers(), to=path).step == 7
    path.write_text(",".join(COLUMNS) + "\nlast,0\n")
    with pytest.raises(OptionError, match=r"does not end with a row.*its step is 'last'"):
        Monitor(two_layers(), to=path)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"to": 3}, "cannot write to 3"),
        ({"every": 0}, "every=0: give a number"),
        ({"every": 2.5}, "every=2.5: give a number"),
        ({"every": True}, "every=True: give a number"),
        ({"step": -1}, "step=-1: give a number of optimizer steps, 0 or more"),
        ({"step": "2"}, "step='2': give a number"),
        ({"options": {"recipes": "delayed"}}, "recipes"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        Monitor(two_layers(), **arguments)


def test_a_function_has_no_names() -> None:
    with pytest.raises(OptionError, match=r"Monitor takes a model, an nn\.Module"):
        Monitor(F.relu)  # type: ignore[arg-type]


def test_an_exception_of_a_callback_reaches_the_training_loop() -> None:
    model = two_layers()

    def stop(record: Record) -> None:
        raise KeyboardInterrupt

    monitor = Monitor(model, every=1, to=stop)
    with pytest.raises(KeyboardInterrupt):
        train(compile_interpreted(model), sgd(model), 1)
    assert len(monitor.records) == 6, "and is not raised again"


def test_sinks_behind_one_that_raises_lose_nothing(tmp_path: Path) -> None:
    model, path = two_layers(), tmp_path / "run.csv"
    called: list[Record] = []

    def refuse(record: Record) -> None:
        raise ValueError("not this one")

    Monitor(model, every=1, to=[called.append, refuse, path])
    with pytest.raises(ValueError, match="not this one"):
        train(compile_interpreted(model), sgd(model), 1)
    assert len(called) == len(rows_of(path)) == 6
