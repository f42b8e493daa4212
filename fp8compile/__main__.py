"""The command line: ``python -m fp8compile --help``."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence

from .doctor import examine
from .internals import cache_folder


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    args = _parser().parse_args(argv)
    return args.run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fp8compile",
        description="FP8 for PyTorch, done by a compiler: torch.compile(model, backend='fp8').",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    doctor = commands.add_parser(
        "doctor",
        help="check this installation and its devices",
        description="Print versions, what runs on each device and why, the cache folder, and train "
        "a small model on each device as a test. The exit status is 1 if something is wrong.",
    )
    doctor.set_defaults(run=_doctor)
    cache = commands.add_parser(
        "cache",
        help="show or clear the compiled kernels and measurements",
        description="What is kept on disk: the source of fused kernels, the fastest kernel per "
        "GEMM shape, the constants of devices. All of it is made again when it is missing.",
    )
    cache.add_argument("action", choices=["path", "clear"], help="print the folder, or remove it")
    cache.set_defaults(run=_cache)
    return parser


def _doctor(args: argparse.Namespace) -> int:
    problems = examine()
    for problem in problems:
        print(f"PROBLEM: {problem}")
    print("FP8 works here." if not problems else f"{len(problems)} problems.")
    return 1 if problems else 0


def _cache(args: argparse.Namespace) -> int:
    folder = cache_folder()
    if args.action == "path":
        print(folder)
        return 0
    files = sum(file.is_file() for file in folder.rglob("*"))
    if folder.exists():
        shutil.rmtree(folder)
    print(f"removed {files} files from {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
