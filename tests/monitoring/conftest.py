"""Every test starts with nothing compiled, and nobody listening."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fp8compile import scaling


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    scaling._listeners.clear()  # tests leave monitors open
