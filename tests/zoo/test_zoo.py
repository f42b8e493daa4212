"""Every model of the zoo, compiled in FP8: each output and gradient against eager PyTorch.

One layer keeps this short; ``python -m tests.zoo`` has two.
"""

from __future__ import annotations

import importlib.util

import pytest

from .check import Settings, check
from .models import TIMM, ZOO
from .timm_import import INSTALL

pytestmark = [
    pytest.mark.filterwarnings("ignore:FP8 is emulated here"),
    pytest.mark.filterwarnings("ignore:no GEMM of this graph runs in FP8"),
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`"),
]


@pytest.mark.parametrize("name", ZOO)
def test_model(name: str) -> None:
    if name in TIMM and importlib.util.find_spec("timm") is None:
        pytest.skip(INSTALL)
    report = check(name, Settings(layers=1))
    assert report.in_fp8 > 0
    assert report.problems == []
