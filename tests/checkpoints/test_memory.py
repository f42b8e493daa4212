"""Loading a model that fits only in FP8: a checkpoint in bfloat16 is cast as it is read.

``python -m tests.checkpoints.test_memory FOLDER`` is the process that the test starts: it loads the
checkpoint there into a model on meta, and prints how much memory that took at most.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import fp8compile
from tests.checkpoints.common import on_meta, write

ROOT = Path(__file__).parents[2]
WIDTH, LAYERS = 2048, 24
LAYER = WIDTH * WIDTH  # bytes in FP8


def model() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))).bfloat16()


def anonymous() -> int:
    """Bytes of memory that the process has written to, in which no mapped file counts."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel does not say")


class Watch:
    """The most memory in the meantime, looked at in a thread, since numbers are cast without the
    interpreter's lock.
    """

    def __enter__(self) -> Watch:
        self.before = self.most = anonymous()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._stop.wait(0.0005):
            self.most = max(self.most, anonymous())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.most = max(self.most, anonymous())


def main(folder: str) -> None:
    torch.set_num_threads(1)
    # What the first cast loads and builds is no memory of the model.
    small = nn.Sequential(nn.Linear(16, 16))
    write(Path(folder) / "small", small.state_dict())
    fp8compile.load(small, Path(folder) / "small", recipe="rowwise")
    empty = on_meta(model)
    with Watch() as watch:
        fp8compile.load(empty, Path(folder) / "large", recipe="rowwise")
    print(json.dumps({"most": watch.most - watch.before, "held": anonymous() - watch.before}))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_model_that_fits_only_in_fp8(tmp_path: Path) -> None:
    write(tmp_path / "large", model().state_dict())
    command = [sys.executable, "-m", "tests.checkpoints.test_memory", str(tmp_path)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory goes back
    process = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout.splitlines()[-1])
    total = LAYERS * LAYER
    assert total <= found["held"] <= 1.02 * total
    # One layer in bfloat16, and float32 numbers of its cast: as they are, scaled, clamped, chosen.
    assert found["most"] <= 1.02 * total + 2 * LAYER + 4 * (4 * LAYER)
    assert found["most"] < 2 * total  # the model in bfloat16


if __name__ == "__main__":
    main(sys.argv[1])
