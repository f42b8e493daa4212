"""Run the tests on several versions of PyTorch, without a GPU, and print what became of them.

python -m tests.versions                                  # about 20 minutes each on two cores
python -m tests.versions 2.15.0 --pytest "tests/passes -x"
python -m tests.versions --folder environments            # made once, and kept with their logs

Each version is installed from scratch, as the README says, with the triton that it asks for. Where
from is up to pip: its configuration and PIP_* are passed on. The exit status is 1 if a test fails.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from subprocess import PIPE, STDOUT
from xml.etree import ElementTree

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

ROOT = Path(__file__).parents[1]
VERSIONS = ("2.11.0", "2.13.0", "2.15.0")  # the oldest, the one of CI, the newest
COLUMNS = ("torch", "triton", "passed", "failed", "skipped", "minutes")
_PERCENT = re.compile(r"\[ *(\d+)%\]$")
_TAIL = 20  # lines of a log, where there is nothing better to show


@dataclass
class Outcome:
    """What became of the tests on one version. ``failed`` counts errors, too."""

    torch: str
    triton: str = ""
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    minutes: float = 0.0
    problems: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Test the versions asked for, one after the other; the exit status."""
    args = _parser().parse_args(argv)
    outcomes = []
    with contextlib.ExitStack() as stack:
        folder = args.folder or stack.enter_context(tempfile.TemporaryDirectory())
        progress = stack.enter_context(Progress(console=Console(stderr=True)))
        for version in args.versions:
            environment = Path(folder).resolve() / f"torch-{version}"
            task = progress.add_task(f"torch {version}: install", total=100)

            show = partial(progress.update, task, description=f"torch {version}: test")
            outcomes.append(check_version(version, environment, shlex.split(args.pytest), show))
    _print(outcomes)
    return 1 if any(outcome.problems for outcome in outcomes) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.versions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("versions", nargs="*", default=list(VERSIONS), metavar="VERSION")
    parser.add_argument("--pytest", default="", help="arguments for pytest, in one string")
    parser.add_argument("--folder", type=Path, help="for the environments; else they are deleted")
    return parser


def check_version(
    version: str, environment: Path, arguments: Sequence[str], show: Callable[..., None]
) -> Outcome:
    """Make the environment and run pytest in it; ``show`` is told the percentage done."""
    outcome = Outcome(version)
    start = time.perf_counter()
    try:
        _install(version, environment)
    except subprocess.CalledProcessError as error:
        outcome.problems = ["cannot be installed", *error.stdout.splitlines()[-_TAIL:]]
        return outcome
    outcome.torch, outcome.triton = _installed(environment)
    results, log = environment / "results.xml", environment / "pytest.log"
    results.unlink(missing_ok=True)
    status = _pytest(environment, [f"--junit-xml={results}", *arguments], log, show)
    outcome.minutes = (time.perf_counter() - start) / 60
    if results.exists():
        _count(outcome, results)
    if status != 0 and not outcome.problems:
        tail = log.read_text().splitlines()[-_TAIL:]
        outcome.problems = [f"pytest's exit status is {status}", *tail]
    return outcome


def _install(version: str, environment: Path) -> None:
    """The README's command, and what the zoo asks for; no more than a look if it was done before.

    timm comes without the torchvision that it asks for, which would replace torch.
    """
    python = _python(environment)
    make = [sys.executable, "-m", "venv", str(environment)]
    for command in (
        *([] if Path(python).exists() else [make]),
        [python, "-m", "pip", "install", f"torch=={version}", "-e", ".[test]"],
        [python, "-m", "pip", "install", "--no-deps", "timm"],
    ):
        subprocess.run(command, cwd=ROOT, check=True, stdout=PIPE, stderr=STDOUT, text=True)


def _python(environment: Path) -> str:
    return str(environment / "bin" / "python")


def _installed(environment: Path) -> list[str]:
    code = "from importlib.metadata import version as v; print(v('torch'), v('triton'))"
    return subprocess.check_output([_python(environment), "-c", code], text=True).split()


def _pytest(
    environment: Path, arguments: Sequence[str], log: Path, show: Callable[..., None]
) -> int:
    """Run pytest, and keep what it prints in the log; its exit status."""
    command = [_python(environment), "-m", "pytest", "-q", *arguments]
    show(completed=0)
    with (
        log.open("w") as kept,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=_variables(environment),
            stdout=PIPE,
            stderr=STDOUT,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            kept.write(line)
            if percent := _PERCENT.search(line.rstrip()):
                show(completed=int(percent[1]))
    return process.returncode


def _variables(environment: Path) -> Mapping[str, str]:
    """No GPU, and caches of its own: compiled code of another run must not help this one."""
    caches = {
        name: tempfile.mkdtemp(dir=environment)
        for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    }
    return {**os.environ, **caches, "CUDA_VISIBLE_DEVICES": ""}


def _count(outcome: Outcome, results: Path) -> None:
    """Read pytest's results: a test case holds what kept it from passing."""
    for case in ElementTree.parse(results).iter("testcase"):
        kinds = {element.tag for element in case}
        if kinds & {"failure", "error"}:
            outcome.failed += 1
            outcome.problems.append(f"{case.get('classname')}::{case.get('name')}")
        elif "skipped" in kinds:
            outcome.skipped += 1
        else:
            outcome.passed += 1


def _print(outcomes: Sequence[Outcome]) -> None:
    table = Table()
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for outcome in outcomes:
        counts = (outcome.passed, outcome.failed, outcome.skipped)
        row = (outcome.torch, outcome.triton, *map(str, counts), f"{outcome.minutes:.0f}")
        table.add_row(*row, style="red" if outcome.problems else None)
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(table)
    for outcome in outcomes:
        for problem in outcome.problems:
            console.print(f"{outcome.torch}: {problem}", style="red", markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
