"""A checkpoint folder, read one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, GENERATION = "config.json", "generation_config.json"
SCALES = "fp8compile_scales.json"  # ours
# By the names that the format has for them.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. ``dtype``: None if PyTorch has none for it."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None


class Checkpoint:
    """The safetensors files of a folder, opened, and its ``config.json``; a context manager.

    ``tensors``: every tensor by name. Raises CheckpointError for a folder that is not whole.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise CheckpointError(
                f"{path} is no folder; give the one that save_pretrained wrote, or a downloaded "
                f"one that has {WEIGHTS} or {INDEX}"
            )
        self.path = path
        self.config: Mapping[str, Any] = read_json(path / CONFIG) or {}
        self._files: dict[str, Any] = {}
        self._closing = ExitStack()
        try:
            self.tensors = self._tensors()
        except BaseException:
            self._closing.close()
            raise

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._files.clear()
        self._closing.close()

    def read(
        self, name: str, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """A tensor in memory of its own: what safetensors gives is a view of the mapped file."""
        return self._files[self.tensors[name].file].get_tensor(name).to(device, dtype, copy=True)

    def _tensors(self) -> dict[str, Stored]:
        index = None if (self.path / WEIGHTS).exists() else read_json(self.path / INDEX)
        if index is None:
            return self._open(WEIGHTS)
        where = index.get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(f, str) for f in where.values()):
            raise CheckpointError(
                f"{self.path / INDEX} has no weight_map from names of tensors to files"
            )
        found: dict[str, Stored] = {}
        for file in sorted(set(where.values())):
            found |= self._open(file)
        absent = sorted(name for name in where if name not in found)
        if absent:
            raise CheckpointError(
                f"{self.path / INDEX} speaks of tensors that its files do not have, {len(absent)} "
                f"of them, such as {absent[0]} in {where[absent[0]]}; download or save it again"
            )
        return found

    def _open(self, file: str) -> dict[str, Stored]:
        path = self.path / file
        if not path.is_file():
            others = sorted(
                p.name for p in self.path.iterdir() if p.suffix in (".bin", ".pt", ".pth")
            )
            instead = f", and of {others[0]} nothing is read" if others else ""
            raise CheckpointError(
                f"{path} is missing{instead}; download or save the checkpoint again, as safetensors"
            )
        try:
            opened = self._closing.enter_context(safe_open(path, "pt"))
            found = {name: _stored(file, opened.get_slice(name)) for name in opened.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise CheckpointError(
                f"{path} is no whole safetensors file ({error}); download or save it again"
            ) from error
        self._files[file] = opened
        return found


def _stored(file: str, tensor: Any) -> Stored:
    return Stored(file, tuple(tensor.get_shape()), _DTYPES.get(tensor.get_dtype()))


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no such file. CheckpointError for another."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON ({error}); download or save it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, not an object")
    return found
