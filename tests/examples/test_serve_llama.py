"""examples/serve_llama.py: the model that counts goes on counting, in half of the memory."""

from __future__ import annotations

import re

import pytest

from examples import serve_llama


@pytest.mark.filterwarnings("ignore:FP8 is emulated here")
def test_the_small_model_counts_on(capsys: pytest.CaptureFixture[str]) -> None:
    serve_llama.main(["--layers", "1", "--new-tokens", "6", "--batch", "2"])
    printed = capsys.readouterr().out
    rows = re.findall(r"(bf16|FP8 rowwise) +│ +([\d.]+) │.*? 16 17 18 19 20 21 \.\.\.", printed)
    megabytes = {name: float(size) for name, size in rows}
    assert megabytes["FP8 rowwise"] < 0.55 * megabytes["bf16"]
    assert "the same tokens in 2 of 2 sequences" in printed
