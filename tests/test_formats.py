"""The formats as values."""

from __future__ import annotations

import pytest
import torch

from fp8compile import Format
from fp8compile.formats import FP8_DTYPES


@pytest.mark.parametrize(
    ("fmt", "largest", "name"), [(Format.E4M3, 448.0, "e4m3"), (Format.E5M2, 57344.0, "e5m2")]
)
def test_format(fmt: Format, largest: float, name: str) -> None:
    assert (fmt.max, str(fmt)) == (largest, name)
    assert Format.of(fmt.dtype) is fmt
    stored = torch.tensor([largest, -largest]).to(fmt.dtype).float()
    assert stored.tolist() == [largest, -largest]


def test_no_format_stores_other_dtypes() -> None:
    with pytest.raises(ValueError, match="bfloat16"):
        Format.of(torch.bfloat16)


def test_dtypes() -> None:
    assert set(FP8_DTYPES) == {torch.float8_e4m3fn, torch.float8_e5m2}
