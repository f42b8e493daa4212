"""The models of the zoo: real architectures with random weights, at sizes that run in seconds.

``ZOO`` has a builder for each name; it returns the model and the keyword arguments of its forward.
An encoder and a decoder have as many layers each; the convolutional nets have one size.
Every size that an architecture lets one choose is divisible by 16, so that FP8 is really used, and
nothing is random: no dropout, one seed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from .timm_import import import_timm

WIDTH, FF, HEADS, VOCAB = 64, 128, 4, 96
BATCH, TOKENS = 2, 32

Built = tuple[nn.Module, dict[str, Any]]
Builder = Callable[[int], Built]  # takes the number of layers

# What decoders of the Llama family, and most others, call their sizes.
_SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": FF,
    "num_attention_heads": HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 2 * TOKENS,
}
_GROUPED = {**_SIZES, "num_key_value_heads": HEADS // 2}
_DECODER = {"use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _ids(tokens: int = TOKENS) -> Tensor:
    return torch.randint(3, VOCAB, (BATCH, tokens))


def _pixels(size: int) -> Tensor:
    return torch.randn(BATCH, 3, size, size)


# --- decoders -----------------------------------------------------------------------------------


def llama(layers: int) -> Built:
    config = hf.LlamaConfig(**_GROUPED, **_DECODER, num_hidden_layers=layers)
    return hf.LlamaForCausalLM(config), {"input_ids": _ids()}


def llama_inputs_embeds(layers: int) -> Built:
    """The input is a float tensor that takes a gradient, and only some tokens are attended to."""
    model, _ = llama(layers)
    mask = torch.ones(BATCH, TOKENS, dtype=torch.int64)
    mask[0, -TOKENS // 4 :] = 0
    embeds = torch.randn(BATCH, TOKENS, WIDTH).requires_grad_()
    return model, {"inputs_embeds": embeds, "attention_mask": mask}


def mistral(layers: int) -> Built:
    """Attention over a sliding window."""
    config = hf.MistralConfig(
        **_GROUPED, **_DECODER, num_hidden_layers=layers, sliding_window=TOKENS // 2, head_dim=16
    )
    return hf.MistralForCausalLM(config), {"input_ids": _ids()}


def qwen3(layers: int) -> Built:
    """Norms on queries and keys."""
    config = hf.Qwen3Config(**_GROUPED, num_hidden_layers=layers, **_DECODER, head_dim=32)
    return hf.Qwen3ForCausalLM(config), {"input_ids": _ids()}


def gemma(layers: int) -> Built:
    """The embedding is the head's weight, and is scaled."""
    config = hf.GemmaConfig(**_GROUPED, num_hidden_layers=layers, **_DECODER, head_dim=32)
    return hf.GemmaForCausalLM(config), {"input_ids": _ids()}


def phi(layers: int) -> Built:
    """Attention and MLP are parallel, rotary embeddings are partial."""
    config = hf.PhiConfig(**_SIZES, **_DECODER, num_hidden_layers=layers)
    return hf.PhiForCausalLM(config), {"input_ids": _ids()}


def gpt2(layers: int) -> Built:
    """Conv1D: weights stored as [in, out]; the embedding is the head's weight."""
    config = hf.GPT2Config(
        **_DECODER,
        n_embd=WIDTH,
        n_layer=layers,
        n_head=HEADS,
        n_positions=TOKENS,
        vocab_size=VOCAB,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return hf.GPT2LMHeadModel(config), {"input_ids": _ids()}


def gpt_neox(layers: int) -> Built:
    """Attention and MLP are parallel; query, key and value are one projection."""
    config = hf.GPTNeoXConfig(**_SIZES, **_DECODER, num_hidden_layers=layers)
    return hf.GPTNeoXForCausalLM(config), {"input_ids": _ids()}


def opt(layers: int) -> Built:
    sizes = {key: value for key, value in _SIZES.items() if key != "intermediate_size"}
    config = hf.OPTConfig(
        **sizes,
        num_hidden_layers=layers,
        **_DECODER,
        ffn_dim=FF,
        word_embed_proj_dim=WIDTH,
        dropout=0.0,
    )
    return hf.OPTForCausalLM(config), {"input_ids": _ids()}


def bloom(layers: int) -> Built:
    """ALiBi; the attention is a baddbmm and a bmm."""
    config = hf.BloomConfig(
        **_DECODER, hidden_size=WIDTH, n_layer=layers, n_head=HEADS, vocab_size=VOCAB
    )
    return hf.BloomForCausalLM(config), {"input_ids": _ids()}


def falcon(layers: int) -> Built:
    """All queries share one key and one value, made by the same projection."""
    config = hf.FalconConfig(
        **_DECODER,
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        vocab_size=VOCAB,
        ffn_hidden_size=FF,
    )
    return hf.FalconForCausalLM(config), {"input_ids": _ids()}


def mamba(layers: int) -> Built:
    """A state space model: the time steps are a loop, unrolled in the graph."""
    config = hf.MambaConfig(
        **_DECODER,
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        vocab_size=VOCAB,
        state_size=16,
        time_step_rank=16,
    )
    return hf.MambaForCausalLM(config), {"input_ids": _ids(8)}


def mixtral(layers: int) -> Built:
    """Mixture of experts: a router picks two of four experts for each token."""
    config = hf.MixtralConfig(
        **_GROUPED, num_hidden_layers=layers, **_DECODER, num_local_experts=4, num_experts_per_tok=2
    )
    return hf.MixtralForCausalLM(config), {"input_ids": _ids()}


def qwen3_moe(layers: int) -> Built:
    """Mixture of experts; each is called in a loop, for its own tokens: Dynamo breaks the graph.

    One layer: of several, one graph would serve them all, under the names of the first.
    """
    config = hf.Qwen3MoeConfig(
        **_GROUPED,
        **_DECODER,
        num_hidden_layers=1,
        moe_intermediate_size=WIDTH,
        num_experts=4,
        num_experts_per_tok=2,
        head_dim=16,
        experts_implementation="eager",
    )
    return hf.Qwen3MoeForCausalLM(config), {"input_ids": _ids()}


# --- encoders -----------------------------------------------------------------------------------


def bert(layers: int) -> Built:
    config = hf.BertConfig(**_SIZES, num_hidden_layers=layers, **_NO_DROPOUT)
    return hf.BertForMaskedLM(config), {"input_ids": _ids()}


def roberta(layers: int) -> Built:
    sizes = {**_SIZES, "max_position_embeddings": 2 * TOKENS + 2}
    config = hf.RobertaConfig(**sizes, num_hidden_layers=layers, **_NO_DROPOUT, pad_token_id=1)
    mask = torch.ones(BATCH, TOKENS, dtype=torch.int64)
    mask[0, -TOKENS // 4 :] = 0
    return hf.RobertaForMaskedLM(config), {"input_ids": _ids(), "attention_mask": mask}


def deberta_v2(layers: int) -> Built:
    """Content and positions attend to each other, through bmm."""
    config = hf.DebertaV2Config(
        **_SIZES,
        num_hidden_layers=layers,
        **_NO_DROPOUT,
        relative_attention=True,
        position_buckets=16,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type="p2c|c2p",
        pooler_dropout=0.0,
    )
    return hf.DebertaV2ForMaskedLM(config), {"input_ids": _ids()}


def electra(layers: int) -> Built:
    """A discriminator: its last layer has one output per token."""
    config = hf.ElectraConfig(**_SIZES, num_hidden_layers=layers, **_NO_DROPOUT, embedding_size=32)
    return hf.ElectraForPreTraining(config), {"input_ids": _ids()}


# --- encoder and decoder ------------------------------------------------------------------------


def t5(layers: int) -> Built:
    """Relative position biases; one embedding for encoder, decoder and head; no attention scale."""
    config = hf.T5Config(
        use_cache=False,
        d_model=WIDTH,
        d_ff=FF,
        d_kv=WIDTH // HEADS,
        num_layers=layers,
        num_heads=HEADS,
        vocab_size=VOCAB,
        dropout_rate=0.0,
    )
    return hf.T5ForConditionalGeneration(config), {
        "input_ids": _ids(),
        "decoder_input_ids": _ids(16),
    }


def bart(layers: int) -> Built:
    """One embedding for encoder, decoder and head; cross attention."""
    config = hf.BartConfig(
        **_DECODER,
        d_model=WIDTH,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=FF,
        decoder_ffn_dim=FF,
        vocab_size=VOCAB,
        max_position_embeddings=2 * TOKENS,
        dropout=0.0,
    )
    return hf.BartForConditionalGeneration(config), {
        "input_ids": _ids(),
        "decoder_input_ids": _ids(16),
    }


def whisper(layers: int) -> Built:
    """Convolutions make tokens of a spectrogram."""
    config = hf.WhisperConfig(
        **_DECODER,
        d_model=WIDTH,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=FF,
        decoder_ffn_dim=FF,
        vocab_size=VOCAB,
        num_mel_bins=16,
        max_source_positions=TOKENS,
        max_target_positions=TOKENS,
        dropout=0.0,
    )
    return hf.WhisperForConditionalGeneration(config), {
        "input_features": torch.randn(BATCH, 16, 2 * TOKENS),
        "decoder_input_ids": _ids(16),
    }


# --- images -------------------------------------------------------------------------------------


def vit(layers: int) -> Built:
    """16 patches and a class token: 34 rows in all, which 16 does not divide."""
    sizes = {k: v for k, v in _SIZES.items() if k not in ("vocab_size", "max_position_embeddings")}
    config = hf.ViTConfig(
        **sizes, num_hidden_layers=layers, **_NO_DROPOUT, image_size=32, patch_size=8, num_labels=16
    )
    return hf.ViTForImageClassification(config), {"pixel_values": _pixels(32)}


def swin(layers: int) -> Built:
    """Attention in shifted windows, with relative position biases; patches are merged."""
    config = hf.SwinConfig(
        image_size=32,
        patch_size=2,
        embed_dim=32,
        depths=[layers, layers],
        num_heads=[2, 4],
        window_size=4,
        num_labels=16,
        drop_path_rate=0.0,
    )
    return hf.SwinForImageClassification(config), {"pixel_values": _pixels(32)}


def clip(layers: int) -> Built:
    """A text and an image encoder; the output is their similarity."""
    sizes = {**_SIZES, "num_hidden_layers": layers}
    text = {**sizes, "max_position_embeddings": TOKENS, "pad_token_id": 0, "eos_token_id": 2}
    sizes = {k: v for k, v in sizes.items() if k not in ("vocab_size", "max_position_embeddings")}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    config = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    return hf.CLIPModel(config), {"input_ids": _ids(), "pixel_values": _pixels(32)}


def resnet(layers: int) -> Built:
    """Convolutions, and a linear layer for two rows."""
    return import_timm().create_model("test_resnet", num_classes=16), {"x": _pixels(64)}


def convnext(layers: int) -> Built:
    """Depthwise convolutions, and linear layers whose input is a permuted image."""
    sizes = {"depths": 4 * (layers,), "dims": (32, 32, 64, 64)}
    model = import_timm().create_model("convnext_tiny", num_classes=16, **sizes)
    return model, {"x": _pixels(64)}


def efficientnet(layers: int) -> Built:
    """Convolutions, many of them 1 x 1."""
    return import_timm().create_model("test_efficientnet", num_classes=16), {"x": _pixels(64)}


ZOO: dict[str, Builder] = {
    "Llama": llama,
    "Llama, inputs_embeds": llama_inputs_embeds,
    "Llama, dynamic shapes": llama,
    "Mistral": mistral,
    "Qwen3": qwen3,
    "Gemma": gemma,
    "Phi": phi,
    "GPT-2": gpt2,
    "GPT-NeoX": gpt_neox,
    "OPT": opt,
    "BLOOM": bloom,
    "Falcon": falcon,
    "Mamba": mamba,
    "Mixtral": mixtral,
    "Qwen3-MoE": qwen3_moe,
    "BERT": bert,
    "RoBERTa": roberta,
    "DeBERTa-v2": deberta_v2,
    "ELECTRA": electra,
    "T5": t5,
    "BART": bart,
    "Whisper": whisper,
    "ViT": vit,
    "Swin": swin,
    "CLIP": clip,
    "ResNet": resnet,
    "ConvNeXt": convnext,
    "EfficientNet": efficientnet,
}


DYNAMIC = ("Llama, dynamic shapes",)  # compiled with dynamic=True: sizes are symbols in the graph
TIMM = ("ResNet", "ConvNeXt", "EfficientNet")  # these come from timm, the others from transformers


def build(name: str, layers: int = 2) -> Built:
    """The model of that name, in training mode, and the arguments of its forward."""
    torch.manual_seed(0)
    model, inputs = ZOO[name](layers)
    _let_every_parameter_matter(model)
    return model.train(), inputs


@torch.no_grad()
def _let_every_parameter_matter(model: nn.Module) -> None:
    """Give parameters the size that PyTorch's own modules give them.

    Most configurations ask for weights so small that a residual stream hardly notices its layers.
    Biases and norms' weights, which are all 0 or all 1, differ from each other afterwards.
    """
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if isinstance(module, nn.Embedding):
                parameter.normal_()
            elif parameter.dim() in (2, 3):
                parameter.normal_(std=(3 * max(parameter.shape[-2:])) ** -0.5)
            elif parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
