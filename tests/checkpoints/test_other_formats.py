"""Checkpoints that others have written: with scales of other names, shapes and dtypes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fp8compile
from fp8compile.frozen import quantize_weight
from fp8compile.recipe import Granularity
from tests.checkpoints.common import BLOCK, bits, bits_of, on_meta, small, write
from tests.helpers import compile_interpreted
from tests.models import sqnr_db

pytestmark = pytest.mark.filterwarnings("ignore:FP8 is emulated here")
DEEPSEEK = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(256, 192), nn.Linear(192, 8, bias=False)).bfloat16()


def dequantized(q: Tensor, scale: Tensor) -> Tensor:
    """Every element times the scale of the block that it is in."""
    row, column = (torch.arange(size) // BLOCK for size in q.shape)
    return q.float() * scale[row][:, column]


def test_blocks_of_deepseek(tmp_path: Path) -> None:
    """Rows that do not fill a block, and a layer that the file has in bfloat16."""
    first = model()
    weight = first[0].weight.detach()
    q = (weight.float() * 64).to(torch.float8_e4m3fn)
    scale = torch.tensor([[0.5, 2.0], [1.0, 0.25]])  # 192 rows are two blocks, 256 columns are two
    rest = {n: t for n, t in first.state_dict().items() if n != "0.weight"}
    write(tmp_path / "x", {**rest, "0.weight": q, "0.weight_scale_inv": scale}, DEEPSEEK)
    other = on_meta(model)
    assert fp8compile.load(other, tmp_path / "x") == {"1": "in high precision in the checkpoint"}
    assert bits(other[0]._parameters["weight"]) == bits(q)
    assert bits(other[0].weight_scale) == bits(scale)
    assert torch.equal(other[0].weight, dequantized(q, scale).bfloat16())
    assert torch.equal(other[0].bias, first[0].bias) and torch.equal(
        other[1].weight, first[1].weight
    )


def test_power_of_two_scales_of_deepseek_as_exponents(tmp_path: Path) -> None:
    first = nn.Linear(128, 128, bias=False)
    q, _ = quantize_weight(first.weight.detach(), Granularity.BLOCK_128X128)
    scale = torch.tensor([[0.125]])
    exponents = scale.to(torch.float8_e8m0fnu)
    write(tmp_path / "x", {"weight": q, "weight_scale_inv": exponents}, DEEPSEEK)
    other = nn.Linear(128, 128, bias=False)
    fp8compile.load(other, tmp_path / "x")
    assert bits(other.weight_scale) == bits(scale)


def compressed(strategy: str, **changes: Any) -> dict[str, Any]:
    float8 = {"num_bits": 8, "type": "float", "symmetric": True}
    inputs = {**float8, "strategy": "tensor", "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**float8, "strategy": strategy, "dynamic": False},
                "input_activations": inputs,
                **changes,
            }
        },
        "ignore": ["re:.*1$"],
    }


@pytest.mark.parametrize(
    ("granularity", "strategy", "change"),
    [
        (Granularity.TENSOR, "tensor", lambda s: s.reshape(())),
        (Granularity.TENSOR, "tensor", lambda s: s.reshape(1, 1)),
        (Granularity.ROW, "channel", lambda s: s.flatten()),
        (Granularity.ROW, "channel", lambda s: s.bfloat16()),
    ],
    ids=["no dimensions", "two dimensions", "one dimension", "bfloat16"],
)
def test_scales_of_other_shapes_and_dtypes(
    tmp_path: Path, granularity: Granularity, strategy: str, change: Callable[[Tensor], Tensor]
) -> None:
    first, other = model(), model()
    q, scale = quantize_weight(first[0].weight.detach(), granularity)
    tensors = {**first.state_dict(), "0.weight": q, "0.weight_scale": change(scale)}
    write(tmp_path / "x", tensors, compressed(strategy))
    fp8compile.load(other, tmp_path / "x")
    assert bits(other[0].weight_scale) == bits(change(scale).float().reshape(scale.shape))
    assert bits(other[0]._parameters["weight"]) == bits(q)
    assert type(other[1]) is nn.Linear  # by a regular expression in ignore


def test_weights_only(tmp_path: Path) -> None:
    first, other = model(), model()
    q, scale = quantize_weight(first[0].weight.detach(), Granularity.ROW)
    tensors = {**first.state_dict(), "0.weight": q, "0.weight_scale": scale}
    write(tmp_path / "x", tensors, compressed("channel", input_activations=None))
    fp8compile.load(other, tmp_path / "x")
    assert bits(other[0]._parameters["weight"]) == bits(q)


def test_scales_of_inputs_become_the_scaling_state(tmp_path: Path) -> None:
    first, other = model(), on_meta(model)
    q, scale = quantize_weight(first[0].weight.detach(), Granularity.TENSOR)
    inputs = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    tensors = {**first.state_dict(), "0.weight": q, "0.weight_scale": scale}
    write(
        tmp_path / "x",
        {**tensors, "0.input_scale": torch.tensor(0.25)},
        compressed("tensor", input_activations=inputs),
    )
    fp8compile.load(other, tmp_path / "x")
    state = fp8compile.state_dict(other)
    assert state["0.weight.scale"].tolist() == [4.0, 0.0, 0.0]
    assert state["1.weight.scale"].tolist() == [0.0, 0.0, 0.0]
    torch._dynamo.reset()
    x = torch.full((4, 256), 1000.0).bfloat16()  # 4 * 1000 is beyond 448: it saturates at 112
    compiled = compile_interpreted(other, {"skip": ["1"]})
    with torch.no_grad():
        assert torch.equal(compiled(x), compiled(torch.full_like(x, 112.0)))
        assert not torch.equal(compiled(x), compiled(torch.full_like(x, 100.0)))


class Routed(nn.Module):
    """A layer that is called twice, and a matrix that belongs to no ``nn.Linear``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16, bias=False)
        self.router = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.layer(self.layer(x).tanh() * 1000), self.router)


def test_scales_of_inputs_are_for_every_use_and_other_sites_find_their_own(tmp_path: Path) -> None:
    first, other = Routed(), Routed()
    q, scale = quantize_weight(first.layer.weight.detach(), Granularity.TENSOR)
    inputs = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    tensors = {"router": first.router, "layer.weight": q, "layer.weight_scale": scale}
    write(
        tmp_path / "x",
        {**tensors, "layer.input_scale": torch.tensor(2.0**-9)},  # up to 0.875
        compressed("tensor", input_activations=inputs),
    )
    fp8compile.load(other, tmp_path / "x")
    torch._dynamo.reset()
    seen = torch.full((16, 16), 0.875)
    with torch.no_grad():
        got = compile_interpreted(other)(seen * 100)
        second = other.layer(seen).tanh().sign() * 0.875
        assert sqnr_db(other.layer(second) @ other.router.t(), got) > 25


def test_scales_of_inputs_where_weights_are_tied(tmp_path: Path) -> None:
    """A state is under the first name that a weight has."""

    def tied() -> nn.Sequential:
        made = nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 16), nn.Linear(16, 8, bias=False))
        made[2].weight = made[0].weight
        return made

    first, other = tied(), on_meta(tied)
    q, scale = quantize_weight(first[1].weight.detach(), Granularity.TENSOR)
    inputs = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    tensors = {"0.weight": first[0].weight, "1.bias": first[1].bias, "1.weight": q}
    write(
        tmp_path / "x",
        {**tensors, "1.weight_scale": scale, "1.input_scale": torch.tensor([0.5])},
        {**compressed("tensor", input_activations=inputs), "ignore": ["2"]},
    )
    fp8compile.load(other, tmp_path / "x")
    scales = {k: t[0] for k, t in fp8compile.state_dict(other).items() if k.endswith(".scale")}
    assert scales == {"0.weight.scale": 0.0, "1.weight.scale": 2.0}
    assert other[2].weight is other[0].weight and torch.equal(other[0].weight, first[0].weight)


def test_names_that_the_model_does_not_need(tmp_path: Path) -> None:
    first, other = model(), model()
    q, scale = quantize_weight(first[0].weight.detach(), Granularity.ROW)
    tensors = {**first.state_dict(), "0.weight": q, "0.weight_scale": scale}
    write(tmp_path / "x", {**tensors, "mtp.2.weight": torch.ones(3)}, compressed("channel"))
    with pytest.raises(fp8compile.CheckpointError, match=r"unexpected: mtp\.2\.weight"):
        fp8compile.load(other, tmp_path / "x")
    fp8compile.load(other, tmp_path / "x", ignore=["mtp.*"])
    assert torch.equal(other[1].weight, first[1].weight)


@pytest.mark.parametrize("recipe", ("rowwise", "current", "blockwise"))
def test_high_precision_is_cast_as_freeze_does(tmp_path: Path, recipe: str) -> None:
    first = small().eval()
    write(tmp_path / "x", first.state_dict())
    other, names = small().eval(), ["lm_head", "*.wk"]
    left = fp8compile.load(other, tmp_path / "x", recipe=recipe, skip=names)
    assert left == fp8compile.freeze(first, recipe, skip=names)
    assert set(left.values()) == {"skipped by the user"} and len(left) == 2
    assert bits_of(other) == bits_of(first)


def test_float32_is_cast_to_the_dtype_of_the_model_first(tmp_path: Path) -> None:
    first = small().eval()
    write(tmp_path / "x", {n: t.float() for n, t in first.state_dict().items()})
    other = small().eval()
    fp8compile.load(other, tmp_path / "x", recipe="rowwise")
    fp8compile.freeze(first)
    assert bits_of(other) == bits_of(first)
