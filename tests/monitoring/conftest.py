"""Every test starts with nothing compiled, and nobody listening."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fp8compile import Monitor, states


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    others = list(states._listeners)
    states._listeners.clear()
    yield
    # Tests leave monitors open. Whoever else began to listen does so once, for good.
    added = [each for each in states._listeners if not isinstance(owner_of(each), Monitor)]
    states._listeners[:] = [*others, *added]


def owner_of(listener: object) -> object:
    return getattr(listener, "__self__", None)
