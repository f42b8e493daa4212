"""How the examples are run."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script: str, folder: Path, *arguments: object, stderr: int = subprocess.PIPE) -> str:
    """Run an example as a user does, in a folder of its own; return what it printed."""
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    # These tests share a process with those that run kernels in Triton's interpreter.
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["OMP_WAIT_POLICY"] = "passive"  # they also share the cores, with tests that run beside them
    pipe = subprocess.PIPE
    done = subprocess.run(
        command, cwd=folder, env=env, stdout=pipe, stderr=stderr, text=True, timeout=600
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def run_on_terminal(script: str, folder: Path, *arguments: object) -> tuple[str, str]:
    """What an example printed to a pipe, and what it showed on a terminal, its stderr."""
    master, slave = pty.openpty()
    shown: list[bytes] = []

    def read() -> None:  # meanwhile: a terminal holds only so much
        with contextlib.suppress(OSError):  # of a terminal that nobody writes to any more
            while part := os.read(master, 2**16):
                shown.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        printed = run(script, folder, *arguments, stderr=slave)
    finally:
        os.close(slave)
        reader.join()
        os.close(master)
    return printed, b"".join(shown).decode()
