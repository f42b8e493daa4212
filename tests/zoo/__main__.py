"""Compile every model of the zoo in FP8 and print what became of it.

python -m tests.zoo                                       # on a CPU, FP8 emulated; minutes
python -m tests.zoo --models Llama T5                     # some of them
python -m tests.zoo --inductor --device cuda --dtype bfloat16 --jobs 12

The exit status is 1 if a model fails.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import platform
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .check import Settings
from .models import ZOO
from .rows import COLUMNS, be_quiet, run

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TEXT = ("model", "left in high precision", "result")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the models asked for; the exit status."""
    args = _parser().parse_args(argv)
    settings = Settings(args.device, DTYPES[args.dtype], args.inductor)
    rows: dict[str, list[str]] = {}
    problems: dict[str, list[str]] = {}
    for name, row, found in _run_all(args.models, settings, args.jobs):
        rows[name], problems[name] = row, found
        if args.csv is not None:  # at once: who stops it keeps what is done
            _write(args.csv, _in_order(args.models, rows), settings)
    _print(_in_order(args.models, rows), problems)
    return 1 if any(problems.values()) else 0


def _in_order(names: Sequence[str], rows: dict[str, list[str]]) -> list[list[str]]:
    return [rows[name] for name in names if name in rows]


def _run_all(
    names: Sequence[str], settings: Settings, jobs: int
) -> Iterator[tuple[str, list[str], list[str]]]:
    """Each model, its row and its problems, as they are done, by ``jobs`` processes."""
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with (
        Progress(console=Console(stderr=True)) as progress,
        ProcessPoolExecutor(jobs, context, initializer=be_quiet) as pool,
    ):
        started = {pool.submit(run, name, settings): name for name in names}
        for done in progress.track(as_completed(started), total=len(started), description="models"):
            yield started[done], *done.result()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.zoo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", choices=list(ZOO), default=list(ZOO), metavar="NAME")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--inductor", action="store_true", help="generate code, not interpret")
    parser.add_argument("--jobs", type=int, default=1, help="so many models at once")
    parser.add_argument("--csv", type=Path, help="a file for the table")
    return parser


def _print(rows: Sequence[Sequence[str]], problems: dict[str, list[str]]) -> None:
    table = Table()
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in TEXT else "right")
    for row in rows:
        table.add_row(*row, style=None if row[-1] == "passed" else "red")
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    for name, found in problems.items():
        for problem in found:
            console.print(f"{name}: {problem}", style="red", markup=False)


def _write(path: Path, rows: Sequence[Sequence[str]], settings: Settings) -> None:
    """The table as CSV, below a comment that says what it was measured with."""
    packages = ("torch", "triton", "transformers", "timm")
    versions = [f"{name} {_version(name)}" for name in packages]
    made = "Inductor" if settings.inductor else "graphs interpreted"
    with path.open("w", newline="") as file:
        file.write(f"# {', '.join(versions)}, Python {platform.python_version()}\n")
        file.write(f"# {_device_name(settings.device)}, {settings.dtype}, {made}\n")
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"


if __name__ == "__main__":
    sys.exit(main())
