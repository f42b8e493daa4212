"""The progress bar: on a terminal only, and gone at its end."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

SCRIPT = """
from fp8compile.progress import progress
print([x for x in progress(range(3), "counting")])
for i in progress(range(2), "outer", total=2):
    list(progress("ab", "inner"))
    print("printed")
"""
PRINTED = "[0, 1, 2]\nprinted\nprinted\n"


def run(stderr: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT]
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    pipe = subprocess.PIPE
    return subprocess.run(
        command, stdout=pipe, stderr=stderr, text=True, env=env, timeout=120, check=True
    )


def test_nothing_is_written_where_stderr_is_no_terminal() -> None:
    done = run(subprocess.PIPE)
    assert (done.stdout, done.stderr) == (PRINTED, "")


def test_a_bar_is_written_on_a_terminal_and_taken_away() -> None:
    master, slave = pty.openpty()
    done = run(slave)
    os.close(slave)
    shown = os.read(master, 1 << 20).decode()
    os.close(master)
    assert done.stdout == PRINTED, "a pipe gets all that is printed, also under a bar"
    assert "counting" in shown and "3/3" in shown and "outer" in shown
    assert "inner" not in shown, "one bar at a time"
    assert shown.rstrip("\r\n").endswith("\x1b[2K"), "the line is erased"
