"""Compile every model of the zoo in FP8 and print what became of it.

python -m tests.zoo                                       # on a CPU, FP8 emulated; minutes
python -m tests.zoo --models Llama T5                     # some of them
python -m tests.zoo --inductor --device cuda --dtype bfloat16

The exit status is 1 if a model fails.
"""

from __future__ import annotations

import argparse
import csv
import platform
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .check import Report, Settings, check
from .models import ZOO

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COLUMNS = (
    "model",
    "graphs",
    "GEMMs",
    "in FP8",
    "left in high precision",
    "output dB",
    "worst gradient dB",
    "agrees to dB",
    "seconds",
    "result",
)
TEXT = ("model", "left in high precision", "result")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the models asked for; the exit status."""
    args = _parser().parse_args(argv)
    warnings.filterwarnings("ignore", message="FP8 is emulated here")
    warnings.filterwarnings("ignore", message="no GEMM of this graph runs in FP8")
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    transformers.logging.set_verbosity_error()
    settings = Settings(args.device, DTYPES[args.dtype], args.inductor)
    rows, problems = [], {}
    with Progress(console=Console(stderr=True)) as progress:
        for name in progress.track(args.models, description="models"):
            row, problems[name] = _run(name, settings)
            rows.append(row)
    _print(rows, problems)
    if args.csv is not None:
        _write(args.csv, rows, settings)
    return 1 if any(problems.values()) else 0


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
    parser.add_argument("--csv", type=Path, help="a file for the table")
    return parser


def _run(name: str, settings: Settings) -> tuple[list[str], list[str]]:
    """A model's row, and what is wrong with it. What is raised is printed, and is a failure."""
    start = time.perf_counter()
    try:
        report = check(name, settings)
    except Exception as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        return [name, *[""] * (len(COLUMNS) - 2), "raised"], [message]
    return _row(report, time.perf_counter() - start), report.problems


def _row(report: Report, seconds: float) -> list[str]:
    output, gradient = report.worst(is_output=True), report.worst(is_output=False)
    agreement = min(q.agreement for q in report.qualities if q.has_signal)
    return [
        report.name,
        str(report.graphs),
        str(len(report.gemms)),
        str(report.in_fp8),
        "; ".join(f"{count} {what}" for what, count in report.left_out.items()),
        f"{output.fp8:.1f} (simulated {output.simulated:.1f})",
        f"{gradient.fp8:.1f} (simulated {gradient.simulated:.1f})",
        f"{agreement:.0f}",
        f"{seconds:.0f}",
        "failed" if report.problems else "passed",
    ]


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
