"""The files that emitted kernels live in."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fp8compile.backends import fused
from fp8compile.backends.fused import emit_once, load, region_key
from tests.backends.common import DEVICE, Case, only_region, quantize


def scaled(slot: int, width: int = 48, strided: bool = False) -> Case:
    """A layer's region; ``slot`` is what differs from layer to layer."""

    def fn(x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return quantize(x * 2, scale, slot)

    x = torch.randn(32, 2 * width, device=DEVICE)  # what is moved to a device becomes contiguous
    x = x[:, ::2] if strided else x[:, :width].contiguous()
    return only_region(fn, x=x, scale=torch.tensor([30.0, 0.5]))


def test_layers_that_look_alike_share_their_source() -> None:
    first, second = scaled(0), scaled(1)
    assert emit_once(first.region) is emit_once(second.region)
    for case in (first, second):  # and each takes its own scale
        want = case.oracle()
        assert all(torch.equal(got, want[name]) for name, got in case.run().items())


def test_regions_that_differ_in_sizes_or_strides_do_not_share() -> None:
    others = [scaled(0), scaled(0, width=64), scaled(0, strided=True)]
    assert len({region_key(case.region) for case in others}) == 3
    assert len({emit_once(case.region).text for case in others}) == 3


def test_the_file_is_kept_and_says_what_was_emitted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fused, "cache_folder", lambda: tmp_path)
    source = emit_once(scaled(0).region)
    module = load(source.text)
    (file,) = [path for path in (tmp_path / "kernels").iterdir() if path.is_file()]
    assert file.read_text() == source.text and module.__file__ == str(file)
    assert hasattr(module, source.name)
    assert load(source.text) is module


def test_a_file_that_was_deleted_is_written_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Inductor reads a kernel's source from its file, also in later compiles of the process."""
    text = emit_once(scaled(0).region).text
    for name in ("first", "second"):  # as when a cache folder is cleared, or another is chosen
        monkeypatch.setattr(fused, "cache_folder", lambda name=name: tmp_path / name)
        file = Path(str(load(text).__file__))
        assert file.is_relative_to(tmp_path / name) and file.read_text() == text
    file.unlink()
    load(text)
    assert file.read_text() == text


@pytest.mark.parametrize("content", [b"", b"half", b"SIZE = 8\n", b"\xff\xfe\x00"])
def test_a_file_that_says_anything_else_is_written_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes
) -> None:
    """Truncated, or not ours: neither it nor its bytecode is run."""
    text = f"SIZE = 7  # not {content!r}\n"
    monkeypatch.setattr(fused, "cache_folder", lambda: tmp_path)
    file = Path(str(load(text).__file__))
    fused._imported.cache_clear()  # as in another process
    file.write_bytes(content)
    assert load(text).SIZE == 7 and file.read_text() == text
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_without_a_folder_to_write_to_kernels_are_loaded_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "kernels").write_text("a file, where a folder should be")
    monkeypatch.setattr(fused, "cache_folder", lambda: tmp_path)
    case = scaled(0, width=80)
    want = case.oracle()
    assert all(torch.equal(got, want[name]) for name, got in case.run().items())
    text = emit_once(case.region).text
    file = Path(str(load(text).__file__))
    assert file.read_text() == text and not file.is_relative_to(tmp_path)


def test_a_folder_that_can_only_be_read_serves_what_it_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fused, "cache_folder", lambda: tmp_path)
    kept = load("SIZE = 7\n").__file__

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError

    monkeypatch.setattr(fused.tempfile, "NamedTemporaryFile", refuse)
    assert load("SIZE = 7\n").__file__ == kept
    with pytest.raises(PermissionError):  # nor is there another folder
        load("SIZE = 9\n")


def _load_in_a_process(arguments: tuple[str, Path]) -> int:
    text, folder = arguments
    fused.cache_folder = lambda: folder
    return int(load(text).SIZE)


def test_processes_may_write_the_same_file_at_once(tmp_path: Path) -> None:
    text = "# " + "x" * 1_000_000 + "\nSIZE = 7\n"
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.map(_load_in_a_process, [(text, tmp_path / "cache")] * 16, chunksize=1)
    assert found == [7] * 16
    files = [*(tmp_path / "cache" / "kernels").glob("*")]
    assert [file.suffix for file in files if file.is_file()] == [".py"]


def test_what_is_computed_from_more_has_smaller_tiles() -> None:
    def tile(fn: Callable[..., Tensor], **inputs: Tensor) -> fused.Tile:
        case = only_region(lambda **x: quantize(fn(**x), None, 0)[0], **inputs)
        return fused.tiles(case.region)[0]

    x, y = torch.randn(2, 64, 512, device=DEVICE).unbind()
    assert tile(lambda x: x.exp(), x=x).block_m == 32
    assert tile(lambda x, y: x.exp() * y, x=x, y=y).block_m == 16
    assert tile(lambda x, b: x.exp() + b, x=x, b=y[0]).block_m == 32


def test_a_row_that_is_waited_for_has_more_threads() -> None:
    def norm(x: Tensor, scale: Tensor) -> Tensor:
        return quantize(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1), scale, 0)[0]

    def warps(rows: int) -> int:
        x = torch.randn(rows, 4096, device=DEVICE)
        case = only_region(norm, x=x, scale=torch.tensor([1.0]))
        return fused.tiles(case.region)[0].num_warps

    assert (warps(16), warps(1024)) == (16, 4)
