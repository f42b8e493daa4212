"""Every model of the zoo, compiled in FP8: each output and gradient against eager PyTorch.

One layer keeps this short; ``python -m tests.zoo`` has two.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from unittest import mock

import pytest

from . import simulation
from .check import GRADIENT_DB, Quality, Settings, check
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


def test_a_gradient_without_signal_is_not_compared() -> None:
    """Softmax does not see what is added to all its inputs: a key's bias has no gradient."""
    report = check("ViT", Settings(layers=1))
    silent = [quality.name for quality in report.qualities if not quality.has_signal]
    assert silent == ["vit.layers.0.attention.k_proj.bias"]


def test_a_difference_that_noise_hides_is_seen() -> None:
    """With gradients in the other format, one is as good as FP8 should be, but not the same."""
    with mock.patch.object(simulation, "E5M2", simulation.E4M3):
        report = check("GPT-NeoX", Settings(layers=1))
    embedding = next(q for q in report.qualities if q.name == "gpt_neox.embed_in.weight")
    assert embedding.fp8 >= GRADIENT_DB
    assert "agrees with simulated FP8" in str(embedding.problem(exact=True))


def test_the_compiled_step_need_not_agree_better_than_rounding_allows() -> None:
    spread = Quality("x.grad", fp8=20.0, simulated=20.0, agreement=19.0, signal=100.0)
    assert "agrees with simulated FP8 to 19.0 dB" in (spread.problem(exact=True) or "")
    assert replace(spread, stable=19.5).problem(exact=True) is None
    assert replace(spread, stable=40.0).problem(exact=True) is not None
