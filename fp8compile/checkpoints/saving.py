"""Write a frozen model as a checkpoint that other servers read."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import checked_model
from ..errors import CheckpointError
from ..frozen import is_frozen
from ..named_state import state_dict
from ..pretrained import is_pretrained
from .reading import CONFIG, GENERATION, SCALES
from .scales import input_scales, to_json
from .schemes import quantization_config
from .writing import new_folder, write_json, write_tensors


def save_pretrained(
    model: nn.Module, path: str | os.PathLike[str], *, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write a frozen model to a folder, in the format of compressed-tensors (float-quantized).

    vLLM, and ``from_pretrained`` of transformers with compressed-tensors installed, read it, and so
    does ``load``, to the same bits. Weights that ``freeze`` left alone are listed as ``ignore`` and
    are in their own precision; tied ones are written once. With rowwise weights the others quantize
    inputs per token, with blockwise ones per 128 of its elements, and with tensorwise ones by the
    scale that calibration or training has left, if any (``input_scale``), else by that of the
    tensor. Weight scales are float32: transformers rounds them to the model's dtype.

    Args:
        model: any module, compiled or not, after ``freeze``. Of a ``PreTrainedModel`` the
            configuration is written, too; a tokenizer is for its own ``save_pretrained``.
        path: a folder, made if need be. An earlier checkpoint in it is replaced once the new one
            is whole, and stays if anything fails; other files stay.
        max_shard_bytes: about the size of a file; larger checkpoints have several, and an index.

    Raises CheckpointError for a model that is not frozen or has no data, or a path that is a file.
    """
    if not isinstance(max_shard_bytes, int | float) or not max_shard_bytes >= 1:
        raise CheckpointError(
            f"max_shard_bytes is {max_shard_bytes!r}; it must be at least 1, a number of bytes "
            "such as 5 * 10**9"
        )
    model = checked_model(model, "save_pretrained")
    tensors, scales = _tensors(model), input_scales(model)
    config = _config(model) | {"quantization_config": quantization_config(model, scales)}
    state = state_dict(model)
    with new_folder(Path(path)) as folder:
        named = {f"{name}.input_scale".lstrip("."): scale for name, scale in scales.items()}
        write_tensors(folder, tensors | named, max_shard_bytes)
        write_json(folder / CONFIG, config)
        if state:
            write_json(folder / SCALES, to_json(state))
        generation: Any = getattr(model, "generation_config", None)
        if is_pretrained(model) and generation is not None:
            generation.to_json_file(folder / GENERATION)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """What ``state_dict`` has, tied tensors under their first name only."""
    if not any(is_frozen(module) for module in model.modules()):
        raise CheckpointError(
            f"no weight of this {type(model).__name__} is FP8; call fp8compile.freeze(model) "
            "first, which returns why it leaves a module as it is"
        )
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{name} is a {type(tensor).__name__}, and safetensors holds nothing but tensors; "
                "save it by yourself, and let state_dict leave it out"
            )
        if tensor.is_meta:
            raise CheckpointError(f"{name} has no data, being on meta; load the model first")
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def _config(model: Any) -> dict[str, Any]:
    if not is_pretrained(model):
        return {}
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = _dtype(model)
    found: dict[str, Any] = json.loads(config.to_json_string())
    return found


def _dtype(model: nn.Module) -> torch.dtype:
    """In which the model computes where nothing is FP8."""
    return next(m.weight_dtype for m in model.modules() if is_frozen(m))
