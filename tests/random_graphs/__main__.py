"""Check many random programs: ``python -m tests.random_graphs --graphs 500``."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from dataclasses import dataclass, field

from tests import interpreter

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
interpreter.enable()  # as tests/conftest.py does for pytest, before triton is imported

from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import seed as seeded  # noqa: E402

from .check import Tally, check  # noqa: E402
from .programs import Program, programs  # noqa: E402


@dataclass
class Checker:
    """Checks each program once, and prints those that fail."""

    graphs: int  # how many programs to check
    kernels: int  # how many programs are run with Triton kernels
    minimize: bool  # let hypothesis have the first one that fails, and stop
    tally: Tally = field(default_factory=Tally)
    seen: set[str] = field(default_factory=set)
    failed: int = 0

    def run(self, program: Program) -> None:
        text = repr(program)
        if text in self.seen or len(self.seen) == self.graphs:
            return
        try:
            check(program, self.tally, kernels=self.tally.programs < self.kernels)
        except Exception:
            if self.minimize:
                raise
            self.failed += 1
            print(f"FAILED:\n{text}\n{traceback.format_exc(limit=-4)}", flush=True)
        self.seen.add(text)
        print(f"\r{len(self.seen)} of {self.graphs}", end="", file=sys.stderr, flush=True)


def main() -> int:
    """Run the command; its exit status is 1 if a program fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--graphs", type=int, default=500, help="how many different programs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kernels", type=int, default=10, help="how many of them in Triton too")
    parser.add_argument("--minimize", action="store_true", help="shrink the first failure")
    args = parser.parse_args()
    checker = Checker(args.graphs, args.kernels, args.minimize)
    start, seed = time.perf_counter(), args.seed
    chosen = settings(
        max_examples=args.graphs,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    try:
        while len(checker.seen) < args.graphs:  # some programs are drawn several times
            seeded(seed)(chosen(given(programs())(checker.run)))()
            seed += 1
    finally:
        print(f"\n{checker.tally}\n{checker.failed} failed, seed {args.seed}", end=", ")
        print(f"{time.perf_counter() - start:.0f} s")
    return 1 if checker.failed else 0


if __name__ == "__main__":
    sys.exit(main())
