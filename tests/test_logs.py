"""What a compile says: to ``logging``, by TORCH_LOGS, and to the structured trace of tlparse."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from fp8compile import internals
from tests.helpers import compile_interpreted
from tests.models import MLP

ROOT = Path(__file__).parents[1]
ARTIFACTS = (
    *("fp8_joint_before_passes", "fp8_joint_after_passes", "fp8_gemms"),
    *("fp8_forward_graph", "fp8_backward_graph"),
)
# As a user does: nothing of fp8compile is imported.
SCRIPT = """
import torch
model = torch.nn.Linear(32, 32)
torch.compile(model, backend="fp8")(torch.randn(16, 32)).sum().backward()
"""


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def run(folder: Path, **variables: str) -> str:
    """The script in a process of its own, where nothing is compiled yet; what it printed."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    env |= {"TORCH_TRACE": str(folder / "trace"), **variables}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def printed(folder: Path) -> str:
    return run(folder, TORCH_LOGS="+fp8compile")


def test_torch_logs_takes_the_name_of_the_package(printed: str) -> None:
    """PyTorch reads the variable while it is imported, before any backend can register a name; but
    it takes the name of whatever can be imported.
    """
    info = r"^I.*compile\.py:\d+\] \[0/0\] compiled 1 sites: 2 of 2 GEMMs in FP8 \(reference kern"
    assert len(re.findall(info, printed, re.MULTILINE)) == 1
    debug = re.findall(r"^V.*pipeline\.py:\d+\] \[0/0\] (\w+): \d+ rewrites,", printed, re.M)
    assert debug[0] == "unbatch_gemms" and len(set(debug)) == len(debug) >= 8


def test_the_structured_trace_has_our_artifacts(printed: str, folder: Path) -> None:
    """In the format that tlparse reads: a line of JSON, and the text behind it, indented."""
    (trace,) = (folder / "trace").iterdir()
    blocks = re.split(r"^(?=[VIWE]\d{4} )", trace.read_text(), flags=re.MULTILINE)
    texts = {}
    for head, _, text in (block.partition("\n") for block in blocks if '"artifact": {' in block):
        entry = json.loads(head.partition("] ")[2])
        if entry["artifact"]["name"].startswith("fp8_"):
            assert entry["artifact"]["encoding"] == "string" and entry["frame_id"] == 0
            texts[entry["artifact"]["name"]] = text
    assert set(texts) == set(ARTIFACTS)
    assert "aten.mm" in texts["fp8_joint_before_passes"]
    assert "quantize" not in texts["fp8_joint_before_passes"]
    assert "fp8.scaled_mm" in texts["fp8_joint_after_passes"]
    head, *rows = texts["fp8_gemms"].split("\n")
    assert head.split() == ["site", "GEMM", "M", "N", "K", "runs", "in", "kernel", "or", "reason"]
    assert [row.split()[1:5] for row in rows if row.strip()] == [
        ["fprop", "16", "32", "32"],
        ["wgrad", "32", "32", "16"],
    ]


def test_one_info_line_per_compile_and_a_debug_line_per_pass(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.DEBUG, "fp8compile"):
        compile_interpreted(MLP(32, 64))(torch.randn(16, 32)).sum().backward()
    info = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    assert len(info) == 1
    assert re.fullmatch(
        r"compiled 3 sites: 6 of 6 GEMMs in FP8 \(reference kernels\), \d+\.\d s", info[0]
    )
    passes = [r for r in caplog.records if r.name == "fp8compile.passes.pipeline"]
    assert {r.levelno for r in passes} == {logging.DEBUG} and len(passes) >= 8
    assert all(re.match(r"\w+: \d+ rewrites, \d\.\d{3} s", r.getMessage()) for r in passes)


def test_nothing_is_written_where_nothing_is_traced() -> None:
    """A graph's text is not even made; the first line of any trace ends the handler's waiting."""
    from torch._logging import _internal as torch_logs

    with mock.patch.object(torch_logs.trace_log, "handlers", []):
        internals.trace_artifact("never", mock.Mock(side_effect=AssertionError))
        with mock.patch("fp8compile.compile.format_graph", side_effect=AssertionError) as made:
            compile_interpreted(nn.Linear(32, 32))(torch.randn(16, 32)).sum().backward()
    assert not made.called
