"""Checkpoints that are not whole, foreign, or do not fit: what load says, and changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fp8compile
from fp8compile import CheckpointError, OptionError
from tests.checkpoints.common import bits_of, config_of, edited, on_meta, saved, small, write

WQ = "layers.0.attention.wq"


def refused(model: nn.Module, path: Path, *says: str, **options: Any) -> None:
    """``load`` raises an error with all of these texts, and the model stays as it was."""
    before = bits_of(model)
    with pytest.raises(CheckpointError) as caught:
        fp8compile.load(model, path, **options)
    for text in says:
        assert text in str(caught.value), str(caught.value)
    assert bits_of(model) == before


@pytest.fixture
def path(tmp_path: Path) -> Path:
    saved(tmp_path / "fp8")
    return tmp_path / "fp8"


# --- tensors ------------------------------------------------------------------------------------


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    def damage(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return damage


def to(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name]).contiguous()

    return damage


def with_one(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed[1] = value
        return changed

    return change


def more(tensors: dict[str, Tensor]) -> None:
    tensors["layers.1.mlp.up.weight"] = torch.ones(2, 2)


SCALE = f"{WQ}.weight_scale"
DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], None], tuple[str, ...]]] = {
    "no weight": (without(f"{WQ}.weight"), (f"missing: {WQ}.weight, bfloat16 [128, 128]",)),
    "no other tensor": (without("norm.weight"), ("missing: norm.weight, bfloat16 [128]",)),
    "no scale": (without(SCALE), (f"missing: {SCALE}, without which {WQ} means nothing",)),
    "too much": (more, ("unexpected: layers.1.mlp.up.weight", "ignore=['layers.1.mlp.up.weight']")),
    "shape of a weight": (
        to(f"{WQ}.weight", lambda t: t[:64]),
        (f"shape: {WQ}.weight is [64, 128], in the model [128, 128]",),
    ),
    "shape of another tensor": (
        to("embed.weight", lambda t: t[:, :8]),
        ("shape: embed.weight is [64, 8], in the model [64, 128]",),
    ),
    "shape of a scale": (
        to(SCALE, lambda t: t[:64]),
        (f"scale: {SCALE} is float32 [64, 1]; it should be float32 [128, 1]",),
    ),
    "scales along the wrong dimension": (
        to(SCALE, lambda t: t.t()),
        (f"scale: {SCALE} is float32 [1, 128]; it should be float32 [128, 1]",),
    ),
    "one scale for all rows": (
        to(SCALE, lambda t: t[:1]),
        (f"scale: {SCALE} is float32 [1, 1]; it should be float32 [128, 1]",),
    ),
    "a scale that is NaN": (to(SCALE, with_one(torch.nan)), (f"scale: {SCALE} has values",)),
    "a scale that is inf": (to(SCALE, with_one(torch.inf)), ("negative or not finite",)),
    "a negative scale": (to(SCALE, with_one(-1.0)), ("negative or not finite",)),
    "scales that are integers": (
        to(SCALE, lambda t: t.to(torch.int32)),
        (f"scale: {SCALE} is int32 [128, 1]",),
    ),
    "a weight in bfloat16": (
        to(f"{WQ}.weight", lambda t: t.bfloat16()),
        (f"dtype: {WQ}.weight is bfloat16; config.json says that it is float8_e4m3fn",),
    ),
    "a weight in E5M2": (
        to(f"{WQ}.weight", lambda t: t.bfloat16().to(torch.float8_e5m2)),
        (f"dtype: {WQ}.weight is float8_e5m2",),
    ),
    "another tensor in integers": (
        to("norm.weight", lambda t: t.to(torch.int8)),
        ("dtype: norm.weight is int8, in the model bfloat16",),
    ),
    "another tensor in FP8": (
        to("lm_head.weight", lambda t: t.to(torch.float8_e4m3fn)),
        ("dtype: lm_head.weight is float8_e4m3fn, in the model bfloat16",),
    ),
}


@pytest.mark.parametrize("what", DAMAGES)
@pytest.mark.parametrize("make", (small, on_meta), ids=("real", "meta"))
def test_tensors_that_do_not_fit(path: Path, what: str, make: Callable[[], nn.Module]) -> None:
    damage, says = DAMAGES[what]
    with edited(path) as tensors:
        damage(tensors)
    buffers = {"cos": torch.ones(64, 32), "sin": torch.ones(64, 32)}
    given = {"buffers": buffers} if make is on_meta else {}
    refused(make(), path, "does not fit this Llama; nothing was changed", *says, **given)


def test_everything_that_is_wrong_is_said_at_once(path: Path) -> None:
    with edited(path) as tensors:
        del tensors[SCALE], tensors["norm.weight"]
    refused(small(), path, f"missing: {SCALE}", "missing: norm.weight")


def test_a_model_of_another_size(path: Path) -> None:
    refused(small(hidden=384), path, "gate.weight is [256, 128], in the model [384, 128]")


def test_many_problems_are_counted(path: Path) -> None:
    refused(small(width=256), path, "and ", " more")


def test_tied_weights_that_differ_in_the_file(path: Path) -> None:
    model = small()
    model.lm_head.weight = model.embed.weight
    says = "tied: embed.weight and lm_head.weight are one in the model, and differ in the file"
    refused(model, path, says)


def test_an_fp8_weight_that_the_model_ties(path: Path) -> None:
    model = small()
    model.layers[0].mlp.up.weight = model.layers[0].mlp.gate.weight
    with edited(path) as tensors:
        tensors["layers.0.mlp.up.weight"] = tensors["layers.0.mlp.gate.weight"].clone()
    refused(model, path, "which the model cannot have: its weight is also layers.0.mlp.")


def test_a_frozen_weight_that_the_file_has_in_high_precision(path: Path) -> None:
    model = small()
    fp8compile.freeze(model)
    refused(model, path, "lm_head is frozen, but in high precision in the checkpoint: build")


# --- files --------------------------------------------------------------------------------------


def test_no_such_folder(tmp_path: Path) -> None:
    refused(small(), tmp_path / "none", "none is no folder; give the one that save_pretrained")


def test_a_folder_without_weights(tmp_path: Path) -> None:
    write(tmp_path / "x", {})
    (tmp_path / "x" / "model.safetensors").unlink()
    refused(small(), tmp_path / "x", "model.safetensors is missing; download", recipe="rowwise")


def test_a_folder_with_weights_of_another_kind(tmp_path: Path) -> None:
    write(tmp_path / "x", {})
    (tmp_path / "x" / "model.safetensors").rename(tmp_path / "x" / "pytorch_model.bin")
    said = "model.safetensors is missing, and of pytorch_model.bin nothing is read; download"
    refused(small(), tmp_path / "x", said, recipe="rowwise")


@pytest.mark.parametrize("size", (0, 4, 100, -1), ids=("empty", "in the size", "header", "data"))
def test_a_truncated_file(path: Path, size: int) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    refused(small(), path, "model.safetensors is no whole safetensors file", "download or save")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    model = small()
    fp8compile.freeze(model, skip=("lm_head",))
    fp8compile.save_pretrained(model, tmp_path / "fp8", max_shard_bytes=100_000)
    return tmp_path / "fp8"


def test_a_missing_file_of_several(shards: Path) -> None:
    file = sorted(shards.glob("*.safetensors"))[1]
    file.unlink()
    refused(small(), shards, f"{file.name} is missing; download or save the checkpoint again, as")


def test_files_that_lack_what_the_index_says(shards: Path) -> None:
    first, second, *_ = sorted(shards.glob("*.safetensors"))
    second.write_bytes(first.read_bytes())
    refused(small(), shards, "speaks of tensors that its files do not have", second.name)


def test_an_index_without_names(shards: Path) -> None:
    (shards / "model.safetensors.index.json").write_text("{}")
    refused(small(), shards, "has no weight_map")


@pytest.mark.parametrize(
    ("text", "says"), [("{", "config.json is no JSON"), ("[]", "holds a list, not an object")]
)
def test_a_config_that_is_none(path: Path, text: str, says: str) -> None:
    (path / "config.json").write_text(text)
    refused(small(), path, says)


def test_scales_of_ours_that_are_none(path: Path) -> None:
    for held, says in (
        ({f"{WQ}.weight.scale": ["?"]}, "does not hold a scaling state"),
        ({"nothing.weight.scale": [1.0, 1.0, 1.0]}, "foreign: nothing.weight.scale"),
        ({f"{WQ}.weight.scale": [1.0, 1.0, 1.0]}, f"missing: {WQ}.weight.amax_history"),
    ):
        (path / "fp8compile_scales.json").write_text(json.dumps(held))
        refused(small(), path, says)


# --- schemes ------------------------------------------------------------------------------------


def nested(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(found: dict[str, Any]) -> None:
        for role, values in changes.items():
            held = found["config_groups"]["group_0"]
            held[role] = {**held.get(role, {}), **values} if isinstance(values, dict) else values

    return change


SCHEMES: dict[str, Callable[[dict[str, Any]], None] | dict[str, Any]] = {
    "another method": {"quant_method": "gptq"},
    "int4": {"format": "pack-quantized"},
    "int8": nested(weights={"type": "int"}),
    "4-bit floats": nested(weights={"num_bits": 4}),
    "asymmetric": nested(weights={"symmetric": False}),
    "groups of 32": nested(weights={"strategy": "group", "group_size": 32}),
    "blocks of 64": nested(weights={"strategy": "block", "block_structure": [64, 64]}),
    "inputs in int8": nested(input_activations={"type": "int"}),
    "outputs": nested(output_activations={"num_bits": 8}),
    "a cache": {"kv_cache_scheme": {"num_bits": 8}},
    "sparsity": {"sparsity_config": {"format": "sparse-24-bitmask"}},
    "rotations": {"transform_config": {"config_groups": {"v": {}}}},
    "groups that are a list": {"config_groups": [{"targets": ["Linear"]}]},
    "a group that is a name": {"config_groups": {"FP8_DYNAMIC": ["Linear"]}},
    "weights that are a name": nested(weights="fp8"),
    "a pattern that is none": {"ignore": ["re:*head("]},
    "no names": {"ignore": [7]},
    "DeepSeek with other blocks": {"quant_method": "fp8", "weight_block_size": [64, 128]},
    "DeepSeek without blocks": {"quant_method": "fp8"},
}


@pytest.mark.parametrize("what", SCHEMES)
def test_schemes_that_are_not_fp8_or_not_ours(path: Path, what: str) -> None:
    config, change = config_of(path), SCHEMES[what]
    if callable(change):
        change(config["quantization_config"])
    else:
        config["quantization_config"] |= change
    (path / "config.json").write_text(json.dumps(config))
    refused(small(), path, "cannot read a checkpoint whose config.json says", "Legal: compressed")


def test_static_inputs_without_scales(path: Path) -> None:
    config = config_of(path)
    nested(input_activations={"strategy": "tensor", "dynamic": False})(
        config["quantization_config"]
    )
    (path / "config.json").write_text(json.dumps(config))
    refused(small(), path, f"missing: {WQ}.input_scale")


@pytest.mark.parametrize("value", (0.0, -1.0, torch.nan, torch.inf))
def test_scales_of_inputs_that_are_none(path: Path, value: float) -> None:
    config = config_of(path)
    nested(input_activations={"strategy": "tensor", "dynamic": False})(
        config["quantization_config"]
    )
    (path / "config.json").write_text(json.dumps(config))
    with edited(path) as tensors:
        names = [name for name in tensors if name.endswith(".weight_scale")]
        for name in names:
            tensors[name.replace("weight_scale", "input_scale")] = torch.tensor([1.0])
        tensors[f"{WQ}.input_scale"] = torch.tensor([value])
    refused(small(), path, f"fit this Llama; nothing was changed:\n  scale: {WQ}.input_scale ")


def test_blocks_that_do_not_divide_the_inputs(tmp_path: Path) -> None:
    tensors = {"weight": torch.ones(8, 96).to(torch.float8_e4m3fn)}
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    write(tmp_path / "x", {**tensors, "weight_scale_inv": torch.ones(1, 1)}, config)
    says = "weight is FP8 128x128, which the model cannot have: in_features, 96, is not divisible"
    refused(nn.Linear(96, 8, bias=False), tmp_path / "x", says)


# --- high precision -----------------------------------------------------------------------------


def test_high_precision_without_a_recipe(tmp_path: Path) -> None:
    write(tmp_path / "x", small().state_dict())
    refused(small(), tmp_path / "x", "speaks of no quantization", "recipe='rowwise'")


def test_integers_are_not_cast(tmp_path: Path) -> None:
    tensors = small().state_dict()
    tensors[f"{WQ}.weight"] = tensors[f"{WQ}.weight"].to(torch.int8)
    write(tmp_path / "x", tensors)
    refused(small(), tmp_path / "x", f"{WQ}.weight is int8; only floats", recipe="rowwise")


@pytest.mark.parametrize("options", ({"recipe": "rowwise"}, {"skip": ["*.wq"]}), ids=str)
def test_choices_that_the_file_has_made(path: Path, options: dict[str, Any]) -> None:
    refused(small(), path, "says which weights are FP8 already", "leave them out", **options)


@pytest.mark.parametrize("ignore", ["0.bias", None, [1]], ids=str)
def test_names_to_ignore_that_are_none(path: Path, ignore: Any) -> None:
    with pytest.raises(OptionError, match=r"ignore=.*; give a list of globs over names"):
        fp8compile.load(small(), path, ignore=ignore)


@pytest.mark.parametrize("skip", ["lm_head", None, [1]], ids=str)
def test_names_to_skip_that_are_none(tmp_path: Path, skip: Any) -> None:
    write(tmp_path / "x", small().state_dict())
    with pytest.raises(OptionError, match=r"option 'skip' is .*; give a list of globs over"):
        fp8compile.load(small(), tmp_path / "x", recipe="rowwise", skip=skip)


def test_what_is_no_module(path: Path) -> None:
    given: Any = small().state_dict()
    with pytest.raises(OptionError, match=r"load takes a model, an nn\.Module, and no Ordered"):
        fp8compile.load(given, path)


def test_a_weight_that_is_no_parameter(path: Path) -> None:
    model = small()
    parametrizations.weight_norm(model.layers[0].attention.wq)
    refused(model, path, f"missing: {WQ}.parametrizations.weight.original0", f"unexpected: {WQ}")


def test_a_recipe_that_weights_cannot_be_kept_in(path: Path) -> None:
    with pytest.raises(fp8compile.RecipeError, match="in which none can be kept"):
        fp8compile.load(small(), path, recipe="mx")


# --- buffers ------------------------------------------------------------------------------------


def test_buffers_that_no_checkpoint_has(path: Path) -> None:
    says = "no checkpoint has the buffer cos, which is non-persistent and on meta: give its values"
    refused(on_meta(), path, says, "buffers={'cos': tensor}")


def test_buffers_that_do_not_fit(path: Path) -> None:
    given = {
        "cos": torch.ones(2),
        "sin": torch.ones(64, 32, dtype=torch.int32),
        "tan": torch.ones(2),
    }
    says = ("cos is torch.float32 (2,)", "sin is torch.int32 (64, 32)", "tan is no such buffer")
    refused(on_meta(), path, *says, buffers=given)
