"""The command line: ``python -m fp8compile --help``."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

from ..errors import Fp8CompileError
from .parser import parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 1 if the doctor found problems, 2 for what is wrong with
    the arguments, 141 where nobody reads on, which is how shells report SIGPIPE.
    """
    args = parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # tables are drawn with more than ASCII
    try:
        status: int = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # it is flushed at the exit
        return 141
    except Fp8CompileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return status
