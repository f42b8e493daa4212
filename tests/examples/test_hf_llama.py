"""A Hugging Face model learns in FP8."""

from __future__ import annotations

from pathlib import Path

from tests.examples.common import run


def test_hf_llama_learns_to_count(tmp_path: Path) -> None:
    out = run("hf_llama.py", tmp_path)
    assert "state_dict keys unchanged: True" in out
    assert "continued 4 5 6 7 8 9 10 11" in out
