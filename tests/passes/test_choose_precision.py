"""choose_precision: what stays in high precision, and why."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from fp8compile.ir import gemms
from fp8compile.passes import choose_precision, find_gemms
from fp8compile.passes.choose_precision import SKIPPED
from tests.passes.common import before, check_pass, fprop


def reasons(gm: fx.GraphModule) -> list[str | None]:
    return [info.reason for _, info in gemms(gm)]


def test_aligned_gemms_have_no_reason() -> None:
    gm, run = before("choose_precision")
    assert check_pass(gm, run) == 0
    assert reasons(gm) == [None, None, None]


@pytest.mark.parametrize(
    ("n", "k", "dtype", "reason"),
    [
        (17, 32, torch.bfloat16, "N = 17 is not divisible by 16"),
        (64, 24, torch.bfloat16, "K = 24 is not divisible by 16"),
        (0, 32, torch.bfloat16, "N is 0"),
        (64, 32, torch.float64, "dtype float64 has no FP8 form"),
        (64, 32, torch.complex64, "dtype complex64 has no FP8 form"),
        (64, 32, torch.int32, "dtype int32 has no FP8 form"),
    ],
)
def test_reasons(n: int, k: int, dtype: torch.dtype, reason: str) -> None:
    gm = fprop(n, k, dtype)
    find_gemms(gm)
    assert check_pass(gm, choose_precision) == 1
    assert reasons(gm) == [reason]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_that_have_an_fp8_form(dtype: torch.dtype) -> None:
    gm = fprop(dtype=dtype)
    find_gemms(gm)
    choose_precision(gm)
    assert reasons(gm) == [None]


def test_what_the_user_skips() -> None:
    gm, _ = before("choose_precision")
    assert choose_precision(gm, skips=lambda fqn: fqn == "w") == 3
    assert reasons(gm) == [SKIPPED] * 3


def test_tokens_not_divisible_by_16_only_matter_to_wgrad() -> None:
    from tests.passes.common import linear_joint

    gm, run = before("choose_precision", linear_joint(tokens=24))
    run(gm)
    assert {str(i.gemm): i.reason for _, i in gemms(gm)} == {
        "fprop": None,
        "dgrad": None,
        "wgrad": "K = 24 is not divisible by 16",
    }
