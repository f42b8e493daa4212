"""A checkpoint folder, written whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError
from .reading import CONFIG, GENERATION, INDEX, SCALES, WEIGHTS

# What belongs to an earlier checkpoint; all else in its folder, such as a tokenizer, stays.
REPLACED = ("*.safetensors", "*.safetensors.index.json", CONFIG, GENERATION, SCALES)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside ``path``, which takes its place when the block ends.

    If the block fails, the new folder is removed and ``path`` is as it was. Files of ``path`` that
    are no part of a checkpoint are taken over. Two renames replace an earlier folder; a machine
    that stops between them has both, whole, under names that begin with a dot.
    """
    path = path.resolve()
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is a file; give a folder to save to")
    if Path.cwd().is_relative_to(path):
        raise CheckpointError(f"{path} holds the current folder; give a folder of its own")
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new-{secrets.token_hex(4)}")
    new.mkdir()
    try:
        yield new
        if path.exists():
            ignored = shutil.ignore_patterns(*REPLACED)
            shutil.copytree(path, new, True, ignored, copy_function=_link, dirs_exist_ok=True)
        _to_disk(*new.iterdir(), new)
        _put(new, path)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    _to_disk(path.parent)


def _put(new: Path, path: Path) -> None:
    if not path.exists():
        new.rename(path)
        return
    old = new.with_name(new.name.replace(".new-", ".old-"))
    path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # not every file system can
        shutil.copy2(source, target)


def _to_disk(*paths: Path) -> None:
    """Wait until files, or the names in folders, are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object to a JSON file."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], max_bytes: int) -> None:
    """Write tensors to safetensors files of about ``max_bytes`` at most, and an index if there are
    several. One file at a time lies in memory, besides the tensors themselves.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    files = {_file(i, len(shards)): names for i, names in enumerate(shards)}
    for file, names in files.items():
        save_file({n: _copy(tensors[n]) for n in names}, folder / file, metadata={"format": "pt"})
    if len(files) > 1:
        where = {name: file for file, names in files.items() for name in names}
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _file(index: int, count: int) -> str:
    if count == 1:
        return WEIGHTS
    return f"model-{index + 1:05}-of-{count:05}.safetensors"


def _copy(tensor: Tensor) -> Tensor:
    """In memory of its own: weights that lie side by side in one are written all the same."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
