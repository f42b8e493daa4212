"""The command line: ``python -m fp8compile --help``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..errors import Fp8CompileError
from .parser import parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 1 if the doctor found problems, 2 for what is wrong with
    the arguments.
    """
    args = parser().parse_args(argv)
    try:
        status: int = args.run(args)
    except Fp8CompileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return status
