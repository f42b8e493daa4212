"""Run the kernels in Triton's interpreter where there is no GPU, and skip what needs one."""

from __future__ import annotations

import os

# CPU threads that wait for each other sleep: spinning is several times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from tests import interpreter

if not torch.cuda.is_available():
    interpreter.enable()


@pytest.fixture(autouse=True)
def _same_numbers_in_any_order() -> None:
    """Else a test's data depends on the tests that its worker ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def fresh_dynamo() -> None:
    """Nothing that a test before has compiled."""
    torch._dynamo.reset()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0):
        return
    reason = "needs an NVIDIA GPU of compute capability 9.0 (H100, H200)"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))
