"""Models and checkpoints that these tests share."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import fp8compile
from tests.helpers import compile_interpreted
from tests.models import Llama

RECIPES = ("rowwise", "delayed", "blockwise")
BLOCK = 128


def small(width: int = 128, hidden: int = 256, vocab: int = 64) -> Llama:
    """One layer of a Llama in bfloat16, with a head that is tied to nothing."""
    return Llama(layers=1, width=width, heads=4, kv_heads=2, hidden=hidden, vocab=vocab).bfloat16()


def on_meta(make: Any = small) -> Any:
    with torch.device("meta"):
        return make()


def frozen(recipe: str = "rowwise", skip: Sequence[str] = ("lm_head",)) -> Llama:
    model = small().eval()
    fp8compile.freeze(model, recipe, skip=skip)
    return model


def saved(path: Path, recipe: str = "rowwise") -> Llama:
    model = frozen(recipe)
    fp8compile.save_pretrained(model, path)
    return model


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """The non-persistent ones, which no checkpoint has."""
    held = model.state_dict()
    return {name: buffer for name, buffer in model.named_buffers() if name not in held}


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    flat = tensor.detach().cpu().contiguous().flatten()
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes()


def bits_of(model: nn.Module) -> dict[str, Any]:
    """Everything a model holds, with what says whether it is frozen."""
    tensors = {**model.state_dict(), **dict(model.named_buffers())}
    kinds = {f"class of {name}": type(m).__name__ for name, m in model.named_modules()}
    return kinds | {n: ("meta",) if t.is_meta else bits(t) for n, t in tensors.items()}


def served(model: nn.Module, *inputs: Any, inductor: bool = False, **options: Any) -> Tensor:
    """Of a compiled call, with Inductor's code or without; on a CPU FP8 is emulated bit by bit."""
    torch._dynamo.reset()
    if inductor:
        compiled: Any = torch.compile(model, backend="fp8", options=options)
    else:
        compiled = compile_interpreted(model, options)
    with torch.no_grad():
        out: Tensor = compiled(*inputs)
    return out


def tensors_in(path: Path) -> dict[str, Tensor]:
    """All that is in the safetensors files of a folder."""
    found: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    return found


def write(path: Path, tensors: Mapping[str, Tensor], quantization: Any = None) -> None:
    """A checkpoint as others write them."""
    path.mkdir(exist_ok=True)
    save_file({n: t.detach().clone() for n, t in tensors.items()}, path / "model.safetensors")
    config = {} if quantization is None else {"quantization_config": quantization}
    (path / "config.json").write_text(json.dumps(config))


def config_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "config.json").read_text())
    return found


@contextmanager
def edited(path: Path) -> Iterator[dict[str, Tensor]]:
    """The tensors of a checkpoint of one file, written back when the block ends."""
    tensors = tensors_in(path)
    yield tensors
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
