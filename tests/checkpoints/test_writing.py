"""A checkpoint is written whole or not at all, and what cannot be written is said."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fp8compile
from fp8compile import CheckpointError, OptionError
from fp8compile.checkpoints import writing
from tests.checkpoints.common import bits_of, frozen, on_meta, saved, small


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def failing_after(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    left = [calls]

    def call(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise OSError("no space left on device")
        return function(*args, **kwargs)

    return call


# What is called, and how often before it fails.
FAILURES: dict[str, tuple[Any, str, int]] = {
    "a first file": (writing, "save_file", 0),
    "a later file": (writing, "save_file", 2),
    "the index": (writing, "write_json", 0),
    "waiting for the disk": (os, "fsync", 1),
    "taking the old folder away": (Path, "rename", 0),
    "putting the new one there": (Path, "rename", 1),
}


@pytest.mark.parametrize("what", FAILURES)
def test_a_failure_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    saved(tmp_path / "fp8")
    (tmp_path / "fp8" / "tokenizer.json").write_text("{}")
    before = content(tmp_path)
    model = frozen("blockwise")
    owner, name, calls = FAILURES[what]
    function = getattr(owner, name)
    failing = failing_after(calls, function)
    if what == "putting the new one there":  # and the one that brings the old folder back works
        failing = only_call(calls, function)
    monkeypatch.setattr(owner, name, failing)
    with pytest.raises(OSError, match="no space left"):
        fp8compile.save_pretrained(model, tmp_path / "fp8", max_shard_bytes=50_000)
    monkeypatch.undo()
    assert content(tmp_path) == before


def only_call(number: int, function: Callable[..., Any]) -> Callable[..., Any]:
    seen = [-1]

    def call(*args: Any, **kwargs: Any) -> Any:
        seen[0] += 1
        if seen[0] == number:
            raise OSError("no space left on device")
        return function(*args, **kwargs)

    return call


def test_a_failure_leaves_no_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "save_file", failing_after(0, writing.save_file))
    with pytest.raises(OSError):
        fp8compile.save_pretrained(frozen(), tmp_path / "fp8")
    assert not [*tmp_path.iterdir()]


def test_an_earlier_checkpoint_is_replaced_and_other_files_stay(tmp_path: Path) -> None:
    folder = tmp_path / "fp8"
    fp8compile.save_pretrained(frozen(), folder, max_shard_bytes=50_000)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    (folder / "more").mkdir()
    (folder / "more" / "notes.txt").write_text("kept")
    model, other = saved(folder, "blockwise"), small().eval()
    assert content(folder).keys() == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        os.path.join("more", "notes.txt"),
    }
    assert [path.name for path in tmp_path.iterdir()] == ["fp8"]
    fp8compile.load(other, folder)
    assert bits_of(other) == bits_of(model)


def test_folders_are_made(tmp_path: Path) -> None:
    saved(tmp_path / "some" / "where")
    assert content(tmp_path / "some" / "where").keys() == {"config.json", "model.safetensors"}


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    saved(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "config.json").exists()


class Extra(nn.Linear):
    def get_extra_state(self) -> str:
        return "no tensor"


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (small, "no weight of this Llama is FP8; call fp8compile.freeze.* which returns why"),
        (lambda: on_meta(frozen), "has no data, being on meta"),
        (lambda: frozen_extra(), "_extra_state is a str"),
    ],
    ids=["not frozen", "on meta", "no tensors"],
)
def test_models_that_cannot_be_saved(
    tmp_path: Path, model: Callable[[], nn.Module], says: str
) -> None:
    with pytest.raises(CheckpointError, match=says):
        fp8compile.save_pretrained(model(), tmp_path / "fp8")
    assert not [*tmp_path.iterdir()]


def frozen_extra() -> nn.Module:
    model = nn.Sequential(Extra(16, 16))
    fp8compile.freeze(model)
    return model


def test_a_path_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(CheckpointError, match="x is a file; give a folder"):
        fp8compile.save_pretrained(frozen(), tmp_path / "x")
    assert (tmp_path / "x").read_text() == "mine"


def test_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be taken away from under the process."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="holds the current folder"):
        fp8compile.save_pretrained(frozen(), ".")


@pytest.mark.parametrize("size", [0, "5GB", None])
def test_a_size_that_is_none(tmp_path: Path, size: Any) -> None:
    with pytest.raises(CheckpointError, match=f"max_shard_bytes is {size!r}; it must be at least"):
        fp8compile.save_pretrained(frozen(), tmp_path / "fp8", max_shard_bytes=size)


def test_what_is_no_module(tmp_path: Path) -> None:
    given: Any = frozen().state_dict()
    with pytest.raises(OptionError, match=r"save_pretrained takes a model, .* and no Ordered"):
        fp8compile.save_pretrained(given, tmp_path / "fp8")


def test_saving_changes_nothing(tmp_path: Path) -> None:
    model = frozen()
    before = bits_of(model)
    fp8compile.save_pretrained(model, tmp_path / "fp8")
    assert bits_of(model) == before and not torch.is_inference_mode_enabled()
