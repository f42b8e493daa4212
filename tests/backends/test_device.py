"""The constants of a device: shipped, assumed, or measured once and remembered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from fp8compile.backends import device as module
from fp8compile.backends import device_constants
from fp8compile.backends.json_file import add_entry, read_entries
from fp8compile.cost import H100, H200, Device

CUDA = torch.device("cuda", 0)
OTHER = Device("NVIDIA H20", 3e12, 2e-6, 140e12, 280e12, 78)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Pretend that there is a GPU of that name."""
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path / "new")
    module._measured.cache_clear()
    yield lambda name: monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    module._measured.cache_clear()


def test_without_an_fp8_gpu_an_h200_is_assumed_and_said_to_be() -> None:
    found = device_constants(torch.device("cpu"))
    assert "H200" in found.name and "for want of an FP8 GPU" in found.name
    assert replace(found, name=H200.name) == H200


@pytest.mark.parametrize(
    ("name", "constants"), [("NVIDIA H200", H200), ("NVIDIA H100 80GB HBM3", H100)]
)
def test_shipped(gpu: Callable[[str], None], name: str, constants: Device) -> None:
    gpu(name)
    assert module.constants_of(CUDA) is constants


def test_another_gpu_is_measured_once(
    gpu: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    gpu(OTHER.name)
    monkeypatch.setattr(module, "_measure", lambda name: calls.append(name) or OTHER)
    for _ in range(2):
        assert module.constants_of(CUDA) == OTHER
        module._measured.cache_clear()  # as in another process
    assert calls == [OTHER.name]
    assert read_entries(module._cache_file()) == {OTHER.name: asdict(OTHER)}


GOOD = asdict(OTHER)
BAD = {
    "another_shape": [1, 2],
    "nothing": {},
    "a_constant_too_few": {k: v for k, v in GOOD.items() if k != "sms"},
    "a_constant_too_many": GOOD | {"l2_bytes": 1},
    "a_text": GOOD | {"sms": "78"},
    "a_null": GOOD | {"sms": None},
    "a_zero": GOOD | {"copy_bandwidth": 0.0},
    "a_nan": GOOD | {"bf16_flops": float("nan")},
    "too_large": GOOD | {"fp8_flops": 10**400},
}


@pytest.mark.parametrize("entry", BAD.values(), ids=BAD)
def test_an_entry_that_cannot_be_right_is_measured_again(
    gpu: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, entry: object
) -> None:
    gpu(OTHER.name)
    add_entry(module._cache_file(), OTHER.name, entry)
    monkeypatch.setattr(module, "_measure", lambda name: OTHER)
    assert module.constants_of(CUDA) == OTHER
    assert read_entries(module._cache_file()) == {OTHER.name: GOOD}


def test_another_version_measures_again(
    gpu: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(OTHER.name)
    add_entry(module._cache_file(), OTHER.name, asdict(OTHER))
    monkeypatch.setattr(torch, "__version__", "9.9.0")
    monkeypatch.setattr(module, "_measure", lambda name: replace(OTHER, sms=1))
    assert module.constants_of(CUDA).sms == 1


def test_no_memory_to_measure_in(
    gpu: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(name: str) -> Device:
        raise torch.OutOfMemoryError

    gpu(OTHER.name)
    monkeypatch.setattr(module, "_measure", measure)
    assert module.constants_of(CUDA) is H200
    assert not module._cache_file().exists()


def test_entries_are_added_and_a_broken_file_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "entries.json"
    assert read_entries(file) == {}
    add_entry(file, "a", 1)
    assert add_entry(file, "b", None) == {"a": 1, "b": None} == read_entries(file)
    for content in (b"", b"{half", b"[1]", b"\xff\xfe", b"[" * 100_000):
        file.write_bytes(content)
        assert read_entries(file) == {}
    assert add_entry(file, "c", [2]) == {"c": [2]} == read_entries(file)
    assert [each.name for each in file.parent.iterdir()] == ["entries.json"]


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert add_entry(tmp_path / "file" / "entries.json", "a", 1) == {"a": 1}
