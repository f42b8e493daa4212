"""The benchmark of whole models."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.examples.common import EXAMPLES, run_on_terminal


def test_models_benchmark_runs_in_tiny_form(tmp_path: Path) -> None:
    where = ("--device", "cpu", "--tiny", "--steps", 1)
    sizes = ("--models", "llama-768", *where, "--csv", "numbers.csv")
    out, shown = run_on_terminal("bench/models.py", tmp_path, *sizes)
    assert "llama-768" in shown and "4/4" in shown
    assert "These times mean nothing" in out
    times = r"\W+[\d.]+\W+[\d.]+\W+[\d.]+x\W+[\d.]+, [\d.]+"  # both, their ratio, the host's
    row = re.search(rf"Llama d 64.*tokens{times}\W+21 of 21\W+([\d.]+)", out)
    assert row and float(row[1]) > 20
    numbers = (tmp_path / "numbers.csv").read_text()
    for what in ("fp8,step", "fp8,host", "bf16,compile"):
        assert numbers.count(f",{what},") == 1
    assert numbers.count(",fp8,FP8 GEMMs,21,of 21") == 1


MODELS = (
    *(f"llama-{width}" for width in (768, 1024, 2048, 4096, 8192)),
    *("gpt2", "bert-large", "vit-large"),
)


def test_models_of_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes its inputs, and gives what is compared and what backward starts from."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "bench"))
    import models

    assert tuple(models.MODELS) == MODELS
    job = models.Job(torch.device("cpu"), tiny=True, steps=1)
    for workload in map(job.build, MODELS):
        result = workload.model(**workload.inputs)
        assert workload.output(result).isfinite().all()
        workload.loss(result).backward(workload.grad_output)
        assert all(p.grad is not None for p in workload.model.parameters() if p.requires_grad)
