"""Quantized values against torchao's, a third party's: the same bits from the same input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fp8compile import ops  # noqa: F401  (registers the operators)

torchao = pytest.importorskip("torchao.float8", reason="torchao is not installed")

E4M3 = torch.float8_e4m3fn


def torchao_cast(x: Tensor, axis: int | None, power_of_two: bool) -> Any:
    from torchao.float8.config import ScalingGranularity
    from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic
    from torchao.float8.float8_training_tensor import LinearMMConfig

    by = ScalingGranularity.TENSORWISE if axis is None else ScalingGranularity.AXISWISE
    return hp_tensor_to_float8_dynamic(
        x,
        E4M3,
        LinearMMConfig(),
        scaling_granularity=by,
        axiswise_dim=axis,
        round_scales_to_power_of_2=power_of_two,
    )


def uneven(m: int, n: int) -> Tensor:
    return (torch.randn(m, n) * 10 ** torch.randn(m, 1) * 10 ** torch.randn(1, n)).bfloat16()


@pytest.mark.parametrize("shape", [(64, 128), (33, 48)], ids=str)
def test_current(shape: tuple[int, int]) -> None:
    x = uneven(*shape)
    q, _, scale_inv, _, _ = torch.ops.fp8.quantize(x, None, 0, E4M3)
    theirs = torchao_cast(x, None, False)
    assert torch.equal(q.float(), theirs._data.float())
    torch.testing.assert_close(scale_inv.reciprocal().squeeze(), theirs._scale.squeeze())


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", [(64, 128), (32, 48)], ids=str)
def test_rowwise(shape: tuple[int, int], power_of_two: bool) -> None:
    x = uneven(*shape)
    q, q_t, scale_inv, scale_inv_t = torch.ops.fp8.quantize_blocks(x, (1, 0), power_of_two, E4M3)
    for ours, inverse, axis in ((q, scale_inv.t(), -1), (q_t.t(), scale_inv_t, 0)):
        theirs = torchao_cast(x, axis, power_of_two)
        assert torch.equal(ours.float(), theirs._data.float())
        torch.testing.assert_close(inverse.reciprocal(), theirs._scale)
