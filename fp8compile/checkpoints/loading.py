"""Read a checkpoint into a model, whose weights become FP8."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..arguments import checked_model
from ..errors import CheckpointError, OptionError
from ..frozen import frozen_granularity, is_frozen, quantize_weight, set_frozen
from ..named_state import load_state_dict
from ..pretrained import guard_saving
from ..recipe import Granularity, Recipe, get_recipe
from .buffers import rebuilt_buffers
from .planning import Plan, Skip, Weight, make_plan, misfit
from .reading import CONFIG, Checkpoint
from .scales import for_all_uses
from .schemes import scheme_of


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    recipe: str | Recipe | None = None,
    skip: Skip = (),
    device: torch.device | str | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    ignore: Sequence[str] = (),
) -> dict[str, str]:
    """Read a checkpoint into a model, and freeze what is FP8 in it; changes the model.

    It reads what ``save_pretrained``, llm-compressor and others write as compressed-tensors
    (``float-quantized``, 8 bits), and FP8 weights in blocks of 128x128 with ``weight_scale_inv``,
    as those of DeepSeek-V3. Given a ``recipe``, it reads a checkpoint in high precision, and casts
    each weight as ``freeze`` does.

    A model that was built on meta (``with torch.device("meta")``) is filled tensor by tensor, with
    never more in memory than the model in FP8, one layer, and the float32 numbers of its cast.
    Non-persistent buffers are in no checkpoint: transformers (from 5.0 on) is asked to rebuild its
    own, others go into ``buffers``. A model that has data keeps it until all is read. Floats are
    cast to the model's dtype.

    Args:
        model: with the names and shapes of the checkpoint. Weights are found under any name that
            tied ones have.
        path: a folder with ``model.safetensors``, or an index of several, and ``config.json``.
        recipe: for a checkpoint in high precision, see ``freeze``.
        skip: with a recipe, names of modules that stay in high precision, see ``freeze``.
        device: where goes what lies on meta (default: the CPU); the rest stays where it is.
        buffers: values of non-persistent buffers on meta, by name.
        ignore: names of tensors, with wildcards, that the model does not need.

    Returns the names of the ``nn.Linear`` that are in high precision, each with the reason. To let
    them stay so in compiled calls, as other servers do, give them as the option ``skip``.

    Raises CheckpointError, and changes nothing, for a checkpoint that is not whole, has another
    format, or does not fit: it lists what is missing, unexpected, or of the wrong shape or dtype.
    """
    model = checked_model(model, "load")
    if not isinstance(ignore, list | tuple | set) or not all(isinstance(g, str) for g in ignore):
        raise OptionError(
            f"ignore={ignore!r}; give a list of globs over names of tensors, such as ['*.rotary.*']"
        )
    with Checkpoint(Path(path)) as checkpoint, torch.inference_mode(False), torch.no_grad():
        scheme = scheme_of(checkpoint.config)
        cast_to = None if recipe is None else frozen_granularity(get_recipe(recipe))
        config = checkpoint.path / CONFIG
        if scheme is None and cast_to is None:
            raise CheckpointError(
                f"{config} speaks of no quantization; to cast weights to FP8 as they are read, "
                "give a recipe: load(model, path, recipe='rowwise')"
            )
        if scheme is not None and (cast_to is not None or skip):
            raise CheckpointError(
                f"{config} says which weights are FP8 already, and how; recipe and skip are for a "
                "checkpoint in high precision: leave them out"
            )
        plan = make_plan(model, checkpoint, scheme, cast_to, skip, ignore)
        rebuilt, problems = rebuilt_buffers(model, buffers or {})
        if problems:
            raise misfit(checkpoint, model, problems)
        _fill(model, checkpoint, plan, rebuilt, torch.device(device or "cpu"))
    return plan.left


def _fill(
    model: nn.Module,
    checkpoint: Checkpoint,
    plan: Plan,
    rebuilt: Mapping[str, Tensor],
    device: torch.device,
) -> None:
    """Read all, then change the model, which cannot fail."""
    own = model.state_dict(keep_vars=True)
    weights = {
        name: _weight(model.get_submodule(name), checkpoint, weight, device)
        for name, weight in plan.weights.items()
    }
    tensors = {
        stored: checkpoint.read(stored, _place(own[names[0]], device), own[names[0]].dtype)
        for stored, names in plan.tensors.items()
    }
    for name, (q, scale, granularity, dtype) in weights.items():
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear)
        set_frozen(module, q, scale, granularity, dtype)
    for stored, names in plan.tensors.items():
        _put(model, names, own[names[0]], tensors[stored])
    for name, buffer in rebuilt.items():
        _assign(model, name, buffer.to(device))
    guard_saving(model, is_frozen)
    if plan.state:
        load_state_dict(model, plan.state)
        if plan.is_from_scales:
            for_all_uses(model)


def _weight(
    module: nn.Module, checkpoint: Checkpoint, weight: Weight, device: torch.device
) -> tuple[Tensor, Tensor, Granularity, torch.dtype]:
    """What ``set_frozen`` takes."""
    old = module._parameters["weight"]
    assert old is not None
    dtype = module.weight_dtype if is_frozen(module) else old.dtype
    place = _place(old, device)
    if weight.scale is not None:
        scale = weight.scale.to(place)
        return checkpoint.read(weight.stored, place), scale, weight.granularity, dtype
    found = checkpoint.read(weight.stored, place, dtype)
    return *quantize_weight(found, weight.granularity), weight.granularity, dtype


def _place(tensor: Tensor, device: torch.device) -> torch.device:
    return device if tensor.is_meta else tensor.device


def _put(model: nn.Module, names: Sequence[str], old: Tensor, new: Tensor) -> None:
    """Give a tensor, under all its names, new values: in place, if it has some."""
    if not old.is_meta:
        # Nothing else may write to a tensor that was made in inference mode.
        with torch.inference_mode(old.is_inference()), torch.no_grad():
            old.copy_(new)
        return
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    for name in names:
        _assign(model, name, new)


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    held = module._parameters if key in module._parameters else module._buffers
    held[key] = tensor  # type: ignore[assignment]
