"""Buffers that no checkpoint has: non-persistent ones of a model that was built on meta."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..pretrained import is_pretrained


def rebuilt_buffers(
    model: nn.Module, given: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Values for the non-persistent buffers on meta, by name, and what is wrong.

    They are those ``given``, or what the ``_init_weights`` of a transformers model makes of them
    (from 5.0 on it computes, say, the frequencies of rotary embeddings). Changes nothing.
    """
    wanted = _on_meta(model)
    problems = [f"buffers: {name} is no such buffer" for name in given if name not in wanted]
    found: dict[str, Tensor] = {}
    for name, buffer in wanted.items():
        value = given.get(name)
        if value is None:
            value = _initial(model, name)
        if value is None:
            problems.append(
                f"no checkpoint has the buffer {name}, which is non-persistent and on meta: give "
                f"its values, load(..., buffers={{{name!r}: tensor}})"
            )
        elif value.shape != buffer.shape or value.dtype != buffer.dtype or value.is_meta:
            problems.append(
                f"buffers: {name} is {value.dtype} {tuple(value.shape)} on {value.device}, and "
                f"should be {buffer.dtype} {tuple(buffer.shape)}, with data"
            )
        else:
            found[name] = value
    return found, problems


def _on_meta(model: nn.Module) -> dict[str, Tensor]:
    persistent = model.state_dict(keep_vars=True)
    buffers = model.named_buffers(remove_duplicate=False)
    return {name: b for name, b in buffers if b.is_meta and name not in persistent}


def _initial(model: nn.Module, name: str) -> Tensor | None:
    """What transformers initializes a buffer to; None if it does not."""
    owner, _, key = name.rpartition(".")
    parents = ["", *(owner[:i] for i, c in enumerate(f"{owner}.") if c == ".")]
    modules: list[Any] = [model.get_submodule(parent) for parent in parents]
    known = [module for module in modules if is_pretrained(module)]
    if not known:
        return None
    twin = copy.deepcopy(modules[-1]).to_empty(device="cpu", recurse=False)
    buffer: Tensor = twin._buffers[key]
    if buffer.dtype is torch.bool:
        return None
    unset = torch.nan if buffer.is_floating_point() else torch.iinfo(buffer.dtype).min
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        buffer.fill_(unset)
        known[-1]._init_weights(twin)
    value: Tensor = twin._buffers[key]
    is_unset = value.isnan() if value.is_floating_point() else value == unset
    return None if is_unset.any() else value
