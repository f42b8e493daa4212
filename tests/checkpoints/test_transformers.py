"""transformers, with compressed-tensors, loads what save_pretrained writes, and means the same."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fp8compile
from fp8compile import CheckpointError, FrozenError
from fp8compile.frozen import linears
from tests.checkpoints.common import RECIPES, bits, bits_of, on_meta, served, tensors_in
from tests.models import sqnr_db

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:FP8 is emulated here")
TOKENS = torch.arange(48).reshape(2, 24)


def llama(tied: bool = False) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=256,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config).eval()


def saved(path: Path, recipe: str, dtype: torch.dtype = torch.float32, tied: bool = False) -> Any:
    model = llama(tied).to(dtype)
    fp8compile.freeze(model, recipe, skip=("lm_head",))
    fp8compile.save_pretrained(model, path)
    return model


def loaded(path: Path, **options: Any) -> Any:
    """By transformers, which must have found all it needs."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, output_loading_info=True, **options
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def read_back(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def test_transformers_writes_no_frozen_model(tmp_path: Path) -> None:
    """It would write FP8 weights as if they were all that there is to a weight."""
    model, other = llama(), llama()
    fp8compile.freeze(model)
    for frozen in (model, model.model, copy.deepcopy(model), read_back(model)):
        with pytest.raises(FrozenError, match=r"call fp8compile.save_pretrained\(model, path\)"):
            frozen.save_pretrained(tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
    other.save_pretrained(tmp_path / "other")
    fp8compile.save_pretrained(model, tmp_path / "fp8")
    fp8compile.load(other, tmp_path / "fp8")
    with pytest.raises(FrozenError):
        other.save_pretrained(tmp_path / "other")
    fp8compile.unfreeze(model)
    model.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model(TOKENS).logits
    return out


@contextmanager
def inputs_in_high_precision(model: nn.Module) -> Iterator[None]:
    """compressed-tensors quantizes the inputs of every module unless it is told not to."""
    model(TOKENS[:1])  # only now are the weights what they shall be
    for module in model.modules():
        module.quantization_enabled = False
    yield


@pytest.mark.parametrize("tied", (False, True), ids=("untied", "tied"))
@pytest.mark.parametrize("recipe", RECIPES)
def test_float32_logits_are_the_same_bits(tmp_path: Path, recipe: str, tied: bool) -> None:
    """The scales are float32, so that dequantized weights are those of our own."""
    model = saved(tmp_path / "fp8", recipe, tied=tied)
    theirs = loaded(tmp_path / "fp8")
    assert theirs.dtype is torch.float32 and type(theirs) is type(model)
    with inputs_in_high_precision(theirs):
        assert bits(logits(theirs)) == bits(logits(model))


@pytest.mark.parametrize("recipe", RECIPES)
def test_bfloat16_weights_differ_by_the_rounding_of_scales(tmp_path: Path, recipe: str) -> None:
    """transformers rounds scales to the dtype of the model, and then rounds the product again: each
    by half a unit in the last of 8 bits at most. Ours is rounded once.
    """
    model = saved(tmp_path / "fp8", recipe, torch.bfloat16)
    theirs = loaded(tmp_path / "fp8")
    assert theirs.dtype is torch.bfloat16
    theirs(TOKENS[:1])
    for name, module in linears(model):
        own, other = module.weight.float(), theirs.get_submodule(name).weight.float()
        assert ((own - other).abs() <= 3 * 2.0**-8 / (1 - 2.0**-8) * own.abs()).all(), name
    scales = {n: t for n, t in tensors_in(tmp_path / "fp8").items() if n.endswith("weight_scale")}
    assert scales and {scale.dtype for scale in scales.values()} == {torch.float32}


@pytest.mark.parametrize("recipe", RECIPES)
def test_their_fp8_is_ours(tmp_path: Path, recipe: str) -> None:
    """Inputs are quantized in theirs as in compiled calls: by token, tensor or group. Both lose as
    much, and the two are closer to each other than to what was not quantized at all.
    """
    torch.manual_seed(0)
    exact = logits(llama())
    torch.manual_seed(0)
    model = saved(tmp_path / "fp8", recipe)
    ours = served(lambda tokens: model(tokens).logits, TOKENS, skip=["lm_head"])
    theirs = logits(loaded(tmp_path / "fp8"))
    lost = sqnr_db(exact, ours)
    assert abs(sqnr_db(exact, theirs) - lost) < 1
    assert sqnr_db(ours, theirs) > lost + 6


def test_static_inputs(tmp_path: Path) -> None:
    """What clips in compiled calls clips in theirs."""
    model = llama().bfloat16().float()
    fp8compile.freeze(model, "delayed", skip=("lm_head",))
    state = {}
    for name, _ in linears(model):
        scale = torch.tensor([0.0 if name == "lm_head" else 448.0, 0.0, 0.0])  # values up to 1
        state |= {f"{name}.weight.scale": scale, f"{name}.weight.amax_history": torch.zeros(16, 3)}
    fp8compile.load_state_dict(model, state)
    fp8compile.save_pretrained(model, tmp_path / "fp8")
    ours = served(lambda tokens: model(tokens).logits, TOKENS, skip=["lm_head"])
    theirs = logits(loaded(tmp_path / "fp8"))
    assert sqnr_db(logits(model), ours) < 20  # norms give values above 1
    assert sqnr_db(ours, theirs) > 25


def test_a_model_on_meta_gets_its_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of rotary embeddings, which no checkpoint has; random numbers go on as before."""
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("transformers rebuilds them from 5.0 on")
    model, other = saved(tmp_path / "fp8", "rowwise"), on_meta(llama)
    assert other.model.rotary_emb.inv_freq.is_meta
    initialize = other.model._init_weights

    def drawing(module: nn.Module) -> None:
        torch.rand(1)
        initialize(module)

    monkeypatch.setattr(other.model, "_init_weights", drawing)
    state = torch.get_rng_state()
    fp8compile.load(other, tmp_path / "fp8")
    assert torch.equal(torch.get_rng_state(), state)
    assert bits_of(other) == bits_of(model)
    assert bits(logits(other)) == bits(logits(model))


def test_buffers_that_transformers_does_not_know(tmp_path: Path) -> None:
    model = saved(tmp_path / "fp8", "rowwise")
    other = on_meta(llama)
    for name, dtype in (("bias", torch.float32), ("ids", torch.int64), ("mask", torch.bool)):
        buffer = torch.empty(4, dtype=dtype, device="meta")
        other.model.register_buffer(name, buffer, persistent=False)
    with pytest.raises(CheckpointError) as caught:
        fp8compile.load(other, tmp_path / "fp8")
    for name in ("model.bias", "model.ids", "model.mask"):
        assert f"no checkpoint has the buffer {name}" in str(caught.value)
    assert "rotary" not in str(caught.value)
    given = {"model.bias": torch.ones(4), "model.ids": torch.ones(4, dtype=torch.int64)}
    fp8compile.load(
        other, tmp_path / "fp8", buffers={**given, "model.mask": torch.ones(4, dtype=torch.bool)}
    )
    assert bits(logits(other)) == bits(logits(model))
    assert other.model.ids.tolist() == [1, 1, 1, 1]


def test_names_that_transformers_ignores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "fp8", "rowwise")
    other = llama()
    del other.model.norm
    with pytest.raises(CheckpointError, match=r"unexpected: model\.norm\.weight"):
        fp8compile.load(other, tmp_path / "fp8")
    monkeypatch.setattr(other, "_keys_to_ignore_on_load_unexpected", [r"norm\.weight$"])
    fp8compile.load(other, tmp_path / "fp8")


def test_a_checkpoint_of_theirs_in_high_precision(tmp_path: Path) -> None:
    model, other = llama(tied=True).bfloat16(), on_meta(lambda: llama(tied=True).bfloat16())
    model.save_pretrained(tmp_path / "bf16", max_shard_size="200KB")
    assert len([*(tmp_path / "bf16").glob("*.safetensors")]) > 1
    tied = "its weight is also model.embed_tokens.weight"
    given = dict(model.named_buffers())
    assert fp8compile.load(other, tmp_path / "bf16", recipe="rowwise", buffers=given) == {
        "lm_head": tied
    }
    assert other.lm_head.weight is other.model.embed_tokens.weight
    fp8compile.freeze(model)
    assert bits(logits(other)) == bits(logits(model))


def test_tensors_that_transformers_puts_together_as_it_reads(tmp_path: Path) -> None:
    """It calls them otherwise in the file, and only there experts are apart."""
    config = transformers.MixtralConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        vocab_size=32,
    )
    model = transformers.MixtralForCausalLM(config)
    model.save_pretrained(tmp_path / "apart")
    with pytest.raises(CheckpointError, match=r"if so, call from_pretrained, and freeze the model"):
        fp8compile.load(model, tmp_path / "apart", recipe="rowwise")


def test_what_goes_with_the_weights(tmp_path: Path) -> None:
    model = llama()
    model.generation_config.max_new_tokens = 7
    fp8compile.freeze(model)
    fp8compile.save_pretrained(model, tmp_path / "fp8")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "fp8")
    assert config.architectures == ["LlamaForCausalLM"] and config.hidden_size == 128
    assert "quantization_config" not in model.config.to_dict()
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "fp8")
    assert generation.max_new_tokens == 7
