"""What save_pretrained writes, load reads: to the same bits, and the same compiled results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fp8compile
from tests.checkpoints.common import (
    RECIPES,
    bits,
    bits_of,
    buffers_of,
    config_of,
    frozen,
    on_meta,
    saved,
    served,
    small,
    tensors_in,
)
from tests.helpers import compile_interpreted

pytestmark = pytest.mark.filterwarnings("ignore:FP8 is emulated here")
TOKENS = torch.arange(32).reshape(2, 16)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_with_other_weights_gets_the_same_bits(tmp_path: Path, recipe: str) -> None:
    model, other = saved(tmp_path / "fp8", recipe), small().eval()
    left = fp8compile.load(other, tmp_path / "fp8")
    assert left == {"lm_head": "in high precision in the checkpoint"}
    assert bits_of(other) == bits_of(model)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_on_meta_gets_the_same_bits(tmp_path: Path, recipe: str) -> None:
    model, other = saved(tmp_path / "fp8", recipe), on_meta()
    fp8compile.load(other, tmp_path / "fp8", buffers=buffers_of(model))
    assert bits_of(other) == bits_of(model)


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_what_is_loaded_in_inference_mode_may_be_written_to_later(
    tmp_path: Path, place: str
) -> None:
    model, other = saved(tmp_path / "fp8"), small() if place == "cpu" else on_meta()
    with torch.inference_mode():
        fp8compile.load(
            other, tmp_path / "fp8", buffers=buffers_of(model) if place == "meta" else {}
        )
    assert bits_of(other) == bits_of(model)
    assert not any(tensor.is_inference() for tensor in other.state_dict().values())


def test_a_model_that_was_made_in_inference_mode(tmp_path: Path) -> None:
    model = saved(tmp_path / "fp8")
    with torch.inference_mode():
        other = small()
    fp8compile.load(other, tmp_path / "fp8")
    assert bits_of(other) == bits_of(model)


def test_a_frozen_layer_that_was_given_another_weight(tmp_path: Path) -> None:
    model, other = frozen("rowwise", skip=()), small()
    with torch.no_grad():
        model.lm_head.weight = nn.Parameter(model.lm_head.weight + 1)
    fp8compile.save_pretrained(model, tmp_path / "fp8")
    assert "lm_head.weight_scale" not in tensors_in(tmp_path / "fp8")
    assert config_of(tmp_path / "fp8")["quantization_config"]["ignore"] == ["lm_head"]
    left = fp8compile.load(other, tmp_path / "fp8")
    assert left == {"lm_head": "in high precision in the checkpoint"}
    assert bits_of(other) == bits_of(model)


OTHER_DTYPES = (torch.complex64, torch.uint16, torch.uint32, torch.uint64)


@pytest.mark.parametrize("dtype", OTHER_DTYPES, ids=str)
def test_buffers_of_any_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    def build(value: int) -> nn.Module:
        model = nn.Sequential(nn.Linear(128, 128))
        model.register_buffer("held", torch.tensor([value, 7]).to(dtype))
        return model

    model, other = build(3), build(0)
    fp8compile.freeze(model)
    fp8compile.save_pretrained(model, tmp_path / "fp8")
    fp8compile.load(other, tmp_path / "fp8")
    assert bits_of(other) == bits_of(model)


def assert_served_alike(folder: Path, recipe: str, **options: Any) -> None:
    """Saved after a call: by then weights that are multiplied together lie in one memory."""
    model = frozen(recipe).eval()
    before = served(model, TOKENS, **options)
    fp8compile.save_pretrained(model, folder)
    other = on_meta().eval()
    left = fp8compile.load(other, folder, buffers=buffers_of(model))
    assert bits(served(other, TOKENS, **options)) == bits(before)
    assert bits(served(model, TOKENS, **options)) == bits(before)
    assert [*left] == options["skip"]


@pytest.mark.parametrize("recipe", ("rowwise", "blockwise", "current"))
def test_compiled_results_are_the_same_bits(tmp_path: Path, recipe: str) -> None:
    assert_served_alike(tmp_path / "fp8", recipe, skip=["lm_head"])


def test_results_of_inductor_are_the_same_bits(tmp_path: Path) -> None:
    assert_served_alike(tmp_path / "fp8", "rowwise", skip=["lm_head"], inductor=True)


def trained(steps: int = 3) -> nn.Module:
    """With delayed scales, of a layer that is not frozen, too."""
    torch._dynamo.reset()
    model = small()
    compiled = compile_interpreted(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        compiled(TOKENS).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_kept_scales_give_the_same_bits(tmp_path: Path) -> None:
    model = trained()
    fp8compile.freeze(model, "delayed", skip=("lm_head",))
    before = served(model, TOKENS)
    fp8compile.save_pretrained(model, tmp_path / "fp8")
    other = on_meta().eval()
    fp8compile.load(other, tmp_path / "fp8", buffers=buffers_of(model))
    state, loaded = fp8compile.state_dict(model), fp8compile.state_dict(other)
    assert {key: bits(t) for key, t in state.items()} == {k: bits(t) for k, t in loaded.items()}
    assert any(float(scale[0]) > 0 for key, scale in loaded.items() if key.endswith(".scale"))
    assert bits(served(other, TOKENS)) == bits(before)


def test_kept_scales_are_written_for_others(tmp_path: Path) -> None:
    """Of sites that share an input, all have the scale that stands under the name of the first."""
    model = trained()
    fp8compile.freeze(model, "delayed", skip=("lm_head",))
    state = fp8compile.state_dict(model)
    fp8compile.save_pretrained(model, tmp_path / "fp8")
    tensors = tensors_in(tmp_path / "fp8")
    attention, mlp = "layers.0.attention", "layers.0.mlp"
    for name, first in (
        *((f"{attention}.{key}", f"{attention}.wq") for key in ("wq", "wk", "wv")),
        *((f"{mlp}.{key}", f"{mlp}.gate") for key in ("gate", "up")),
        (f"{mlp}.down", f"{mlp}.down"),
    ):
        scale = state[f"{first}.weight.scale"][:1]
        assert scale > 0 and torch.equal(tensors[f"{name}.input_scale"], scale.reciprocal())
    (group,) = config_of(tmp_path / "fp8")["quantization_config"]["config_groups"].values()
    assert group["input_activations"]["dynamic"] is False
    assert group["input_activations"]["strategy"] == "tensor"


@pytest.mark.parametrize(
    ("recipe", "strategy", "inputs"),
    [
        ("rowwise", "channel", "token"),
        ("current", "tensor", "tensor"),
        ("blockwise", "block", "group"),
    ],
)
def test_what_config_json_says(tmp_path: Path, recipe: str, strategy: str, inputs: str) -> None:
    saved(tmp_path / "fp8", recipe)
    found = config_of(tmp_path / "fp8")["quantization_config"]
    assert found["quant_method"] == "compressed-tensors"
    assert found["format"] == "float-quantized" and found["ignore"] == ["lm_head"]
    (group,) = found["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert (group["weights"]["strategy"], group["weights"]["dynamic"]) == (strategy, False)
    assert (group["input_activations"]["strategy"], group["input_activations"]["dynamic"]) == (
        inputs,
        True,
    )
    assert group["weights"].get("block_structure") == ([128, 128] if strategy == "block" else None)
    assert group["input_activations"].get("group_size") == (128 if inputs == "group" else None)


def test_two_granularities_are_two_groups(tmp_path: Path) -> None:
    def model() -> nn.Sequential:
        return nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32), nn.Linear(32, 8))

    first, other = model(), model()
    fp8compile.freeze(first, "blockwise", skip=("2", "3"))
    fp8compile.freeze(first, "rowwise", skip=("3",))
    fp8compile.save_pretrained(first, tmp_path / "fp8")
    groups = config_of(tmp_path / "fp8")["quantization_config"]["config_groups"].values()
    assert [group["targets"] for group in groups] == [["0"], ["2"]]
    fp8compile.load(other, tmp_path / "fp8")
    assert bits_of(other) == bits_of(first)


class Tied(nn.Module):
    """An embedding that is the head, a layer under two names, buffers, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.norm = nn.BatchNorm1d(16)
        self.first = nn.Linear(16, 16)
        self.again = self.first
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.again(self.first(self.norm(self.embed(ids)))))


@pytest.mark.parametrize("make", (Tied, lambda: on_meta(Tied)), ids=("real", "meta"))
def test_what_is_tied_is_written_once_and_stays_tied(tmp_path: Path, make: Any) -> None:
    model, other = Tied().eval(), make().eval()
    assert fp8compile.freeze(model) == {"head": "its weight is also embed.weight"}
    fp8compile.save_pretrained(model, tmp_path / "fp8")
    names = set(tensors_in(tmp_path / "fp8"))
    assert names == {
        "embed.weight",
        "first.weight",
        "first.weight_scale",
        "first.bias",
        *(f"norm.{key}" for key in ("weight", "bias", "running_mean", "running_var")),
        "norm.num_batches_tracked",
    }
    fp8compile.load(other, tmp_path / "fp8")
    assert bits_of(other) == bits_of(model)
    assert other.head.weight is other.embed.weight and other.again is other.first
    assert torch.equal(other(torch.arange(4)), model(torch.arange(4)))


def test_parameters_that_have_data_stay_the_same_objects(tmp_path: Path) -> None:
    saved(tmp_path / "fp8")
    other = small()
    embed = other.embed.weight
    fp8compile.load(other, tmp_path / "fp8")
    assert other.embed.weight is embed and embed.requires_grad


def test_a_model_does_not_depend_on_the_file(tmp_path: Path) -> None:
    """Which safetensors maps into memory."""
    model, other = saved(tmp_path / "fp8"), on_meta()
    fp8compile.load(other, tmp_path / "fp8", buffers=buffers_of(model))
    file = tmp_path / "fp8" / "model.safetensors"
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    assert bits_of(other) == bits_of(model)


def test_tensors_that_lie_in_one_memory(tmp_path: Path) -> None:
    """As one, side by side, and transposed: safetensors itself takes only the second."""

    def model() -> nn.Sequential:
        return nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))

    first, other = model(), model()
    fp8compile.freeze(first, skip=("2",))
    weights = [first[i]._parameters["weight"] for i in range(2)]
    joined = torch.cat([weight.view(torch.uint8) for weight in weights]).view(weights[0].dtype)
    for weight, lies in zip(weights, joined.split(16), strict=True):
        weight.data = lies
    first[1].bias.data = first[0].bias.data
    first[2].weight.data = first[2].weight.data.t()
    fp8compile.save_pretrained(first, tmp_path / "fp8")
    fp8compile.load(other, tmp_path / "fp8")
    assert bits_of(other) == bits_of(first)


def test_a_frozen_model_is_loaded_again(tmp_path: Path) -> None:
    model = saved(tmp_path / "fp8")
    other = frozen()
    assert bits_of(other) != bits_of(model)
    fp8compile.load(other, tmp_path / "fp8")
    assert bits_of(other) == bits_of(model)


def test_a_compiled_model_is_saved_and_loaded_as_its_own(tmp_path: Path) -> None:
    model = frozen()
    fp8compile.save_pretrained(torch.compile(model, backend="fp8"), tmp_path / "fp8")
    other = small()
    fp8compile.load(torch.compile(other, backend="fp8"), tmp_path / "fp8")
    assert {**bits_of(other)} == bits_of(model)


def test_large_checkpoints_have_several_files(tmp_path: Path) -> None:
    model, limit = frozen(), 100_000
    fp8compile.save_pretrained(model, tmp_path / "fp8", max_shard_bytes=limit)
    index = json.loads((tmp_path / "fp8" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "fp8").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    tensors = tensors_in(tmp_path / "fp8")
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for file in files:
        held = [tensors[name].nbytes for name, f in index["weight_map"].items() if f == file]
        assert sum(held) <= limit or len(held) == 1
    other = small().eval()
    fp8compile.load(other, tmp_path / "fp8")
    assert bits_of(other) == bits_of(model)
