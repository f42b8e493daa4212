"""How the examples are run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script: str, folder: Path, *arguments: object) -> str:
    """Run an example as a user does, in a folder of its own; return what it printed."""
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    # These tests share a process with those that run kernels in Triton's interpreter.
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["OMP_WAIT_POLICY"] = "passive"  # they also share the cores, with tests that run beside them
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout
