"""Generate text with a Hugging Face Llama: bf16 against FP8, in tokens per second and in memory.

    python examples/serve_llama.py                                   # small; learns to count first
    python examples/serve_llama.py --width 4096 --layers 32          # random weights, on a GPU
    python examples/serve_llama.py --model path/or/name              # weights of your own

`fp8compile.freeze(model)` leaves the weights in FP8 only; `torch.compile(..., backend="fp8")`
compiles the forward that `generate` calls, for the prompt and for each token behind it, with a
static cache and, on a GPU, CUDA graphs. Where FP8 is emulated, only memory and results are
compared.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, StaticCache

import fp8compile
from fp8compile.progress import progress

VOCAB = 64  # of the model that counts
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EMULATED = DEVICE == "cpu" or torch.cuda.get_device_capability() < (9, 0)


@dataclass(frozen=True)
class Served:
    """What a precision gave: the parameters' bytes, seconds, and the tokens, `[batch, tokens]`."""

    name: str
    bytes: int
    prefill: float
    decode: float  # per token of each sequence
    tokens: Tensor


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    model, prompt = _model_and_prompt(args)
    found = [serve("bf16", model, prompt, args.new_tokens, fp8=False)]
    left = fp8compile.freeze(model, args.recipe, skip=args.skip)
    found.append(serve(f"FP8 {args.recipe}", model, prompt, args.new_tokens, fp8=True))
    for name, reason in left.items():
        print(f"in bf16: {name}: {reason}")
    _print(found, prompt)
    if not args.model and not _counts(args):
        print("Random weights give logits close to each other: any error soon decides for others.")


def serve(name: str, model: Any, prompt: Tensor, new_tokens: int, *, fp8: bool) -> Served:
    """Generate with the model's forward compiled; the second time counts."""
    torch._dynamo.reset()
    forward = model.forward
    if not EMULATED:
        backend = "fp8" if fp8 else "inductor"
        model.forward = torch.compile(forward, backend=backend, mode="reduce-overhead")
    elif fp8:  # there are no times to compare, and eager computes the same in bf16
        model.forward = torch.compile(forward, backend="fp8")
    cache = _cache(model, prompt.shape[0], prompt.shape[1] + new_tokens)
    seconds: dict[int, float] = {}
    try:
        for count in progress([1, new_tokens] * 2, f"{name}: compiling, then generating"):
            start = time.perf_counter()
            tokens = _generate(model, prompt, count, cache)
            seconds[count] = time.perf_counter() - start
    finally:
        model.forward = forward
    decode = (seconds[new_tokens] - seconds[1]) / (new_tokens - 1)
    size = sum(p.nbytes for p in model.parameters())
    return Served(name, size, seconds[1], decode, tokens[:, prompt.shape[1] :].cpu())


def _cache(model: Any, batch: int, tokens: int) -> StaticCache:
    """For that many sequences and tokens, in memory that the compiled forward does not own: made by
    its first call instead, it would be overwritten by the next replay of that CUDA graph.
    """
    config = model.config
    cache = StaticCache(config=config, max_cache_len=tokens)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache.early_initialization(
        batch, config.num_key_value_heads, head_dim, model.dtype, model.device
    )
    return cache


@torch.no_grad()
def _generate(model: Any, prompt: Tensor, count: int, cache: StaticCache) -> Tensor:
    """The prompt and the likeliest tokens behind it."""
    cache.reset()
    tokens: Tensor = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        min_new_tokens=count,
        max_new_tokens=count,
        do_sample=False,
        disable_compile=True,  # what it would compile is compiled
        pad_token_id=0,
    )
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return tokens


def _model_and_prompt(args: argparse.Namespace) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    else:
        with torch.device(DEVICE):
            model = LlamaForCausalLM(_config(args)).bfloat16()
    model = model.to(DEVICE)
    if _counts(args):
        _learn_to_count(model)
        starts = torch.arange(args.batch)[:, None] * 7
        prompt = (starts + torch.arange(args.prompt)) % VOCAB
    else:
        prompt = torch.randint(model.config.vocab_size, (args.batch, args.prompt))
    return model.eval(), prompt.to(DEVICE)


def _counts(args: argparse.Namespace) -> bool:
    """Whether the model is small enough to learn something first."""
    return not args.model and args.width <= 256


def _config(args: argparse.Namespace) -> LlamaConfig:
    """Llama-3's proportions."""
    head = 128 if args.width >= 1024 else 32
    return LlamaConfig(
        vocab_size=VOCAB if _counts(args) else 128_256,
        hidden_size=args.width,
        intermediate_size=7 * args.width // 2,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // head,
        num_key_value_heads=max(args.width // head // 4, 1),
        max_position_embeddings=max(8192, args.prompt + args.new_tokens),
    )


def _learn_to_count(model: LlamaForCausalLM, steps: int = 60) -> None:
    """Modulo VOCAB, so that one can see whether what is generated is right."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in progress(range(steps), "learning to count"):
        starts = torch.randint(VOCAB, (8, 1), device=DEVICE)
        tokens = (starts + torch.arange(48, device=DEVICE)) % VOCAB
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _print(found: Sequence[Served], prompt: Tensor) -> None:
    times = () if EMULATED else ("prefill ms", "decode ms", "tokens/s")
    table, batch = Table("", "MB", *times, "the first sequence goes on with"), prompt.shape[0]
    for each in found:
        shown = " ".join(map(str, each.tokens[0, :12].tolist()))
        row = [
            f"{1e3 * each.prefill:.1f}",
            f"{1e3 * each.decode:.2f}",
            f"{batch / each.decode:.0f}",
        ]
        table.add_row(each.name, f"{each.bytes / 1e6:.4g}", *row[: len(times)], f"{shown} ...")
    Console().print(table)
    same = (found[0].tokens == found[1].tokens).all(1).sum().item()
    print(f"prompt {prompt[0, -6:].tolist()}; the same tokens in {same} of {batch} sequences")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a folder or a name that transformers knows")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=16, help="tokens")
    parser.add_argument("--new-tokens", type=int, default=32, help="at least 2")
    parser.add_argument("--recipe", default="rowwise")
    parser.add_argument("--skip", nargs="*", default=[], help="names to leave in bf16")
    return parser


if __name__ == "__main__":
    main()
