"""Train and run an unmodified Hugging Face Llama in FP8.

    python examples/hf_llama.py

The model comes from `transformers` as it is; `torch.compile(model, backend="fp8")` is the only
line about FP8. No module is swapped, so the state_dict, the optimizer and `save_pretrained` see
the model that they know. A small model with random weights learns to count, then counts on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fp8compile.progress import progress

VOCAB, BATCH, TOKENS, STEPS = 64, 8, 32, 30
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def small_llama() -> LlamaForCausalLM:
    """Two query heads share a key head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(DEVICE)


def counting(generator: torch.Generator) -> Tensor:
    """Each row counts up from a random number, modulo VOCAB: `[BATCH, TOKENS]`."""
    starts = torch.randint(VOCAB, (BATCH, 1), generator=generator)
    return (starts + torch.arange(TOKENS)) % VOCAB


def train(model: LlamaForCausalLM, compiled: Callable[..., Any]) -> None:
    """The usual loop; the FP8 scales update themselves in `optimizer.step()`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    for step in progress(range(STEPS), "training"):
        tokens = counting(generator).to(DEVICE)
        loss = compiled(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0 or step == STEPS - 1:
            print(f"step {step:>3}  loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def generate(compiled: Callable[..., Any], prompt: Tensor, count: int) -> list[int]:
    """Predict the likeliest token `count` times, from a window as long as the prompt.

    `compiled.generate()` would run the uncompiled forward of the module inside, so this calls the
    compiled one. The window keeps its length, so it compiles once.
    """
    window, tokens = prompt, []
    for _ in progress(range(count), "predicting"):
        likeliest = compiled(input_ids=window).logits[:, -1:].argmax(-1)
        window = torch.cat([window[:, 1:], likeliest], dim=1)
        tokens.append(likeliest.item())
    return tokens


def main() -> None:
    model = small_llama()
    keys = list(model.state_dict())
    compiled = torch.compile(model, backend="fp8")

    train(model, compiled)
    print("state_dict keys unchanged:", list(model.state_dict()) == keys)

    model.eval()
    prompt = torch.tensor([[60, 61, 62, 63, 0, 1, 2, 3]], device=DEVICE)
    print("prompt   ", *prompt[0].tolist())
    print("continued", *generate(compiled, prompt, count=8))


if __name__ == "__main__":
    main()
