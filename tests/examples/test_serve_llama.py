"""The model that counts goes on counting, in half of the memory."""

from __future__ import annotations

import re
from pathlib import Path

from tests.examples.common import run


def test_serve_llama_counts_on_in_half_of_the_memory(tmp_path: Path) -> None:
    out = run("serve_llama.py", tmp_path, "--layers", 1, "--new-tokens", 6, "--batch", 2)
    rows = re.findall(r"(bf16|FP8 rowwise) +│ +([\d.]+) +│ 16 17 18 19 20 21 \.\.\.", out)
    megabytes = {name: float(size) for name, size in rows}
    assert megabytes["FP8 rowwise"] < 0.55 * megabytes["bf16"]
    assert "the same tokens in 2 of 2 sequences" in out
