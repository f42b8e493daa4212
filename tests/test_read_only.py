"""What is refused, and what is not, of functions that are given a read-only tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fp8compile import FrozenError
from fp8compile.read_only import ReadOnly, ordinary, read_only


@pytest.mark.parametrize("name", ["add_", "copy_", "relu_", "__iadd__", "__ipow__"])
def test_operators_in_place_are_refused(name: str) -> None:
    x = read_only(torch.ones(2, 2))
    with pytest.raises(FrozenError, match=r"frozen in FP8, and \w+_ would write"):
        getattr(x, name)(*() if name == "relu_" else (torch.ones(2, 2),))
    assert torch.equal(ordinary(x), torch.ones(2, 2))


def test_arguments_that_ask_for_a_write_are_refused() -> None:
    x = read_only(torch.ones(2, 2))
    for call in (lambda: F.relu(x, inplace=True), lambda: torch.neg(torch.ones(2, 2), out=x)):
        with pytest.raises(FrozenError):
            call()
    assert type(torch.neg(x, out=None)) is type(F.relu(x, inplace=False)) is Tensor


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("view", "is_view"),
    [
        (lambda x: x.t(), True),
        (lambda x: x[0], True),
        (lambda x: x.detach(), True),
        (lambda x: x.data, True),
        (lambda x: x.chunk(2)[1], True),
        (lambda x: x.to(torch.float32), True),
        (lambda x: x.to(torch.float64), False),
        (lambda x: x.clone(), False),
        (lambda x: ~x.bool(), False),
        (lambda x: x * 2, False),
        (lambda x: torch.cat([x, x]), False),
    ],
)
def test_views_are_read_only_too(
    view: Callable[[Tensor], Tensor], is_view: bool, device: str
) -> None:
    assert type(view(read_only(torch.ones(2, 2, device=device)))) is (
        ReadOnly if is_view else Tensor
    )


def test_values_and_memory_are_the_same() -> None:
    x = torch.randn(2, 2)
    y = read_only(x)
    assert torch.equal(x, y) and y.data_ptr() == x.data_ptr() == ordinary(y).data_ptr()
    assert type(ordinary(y)) is Tensor
