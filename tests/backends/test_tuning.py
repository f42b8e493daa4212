"""The choice of what multiplies a shape: timed once, remembered, and never taken on trust."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fp8compile.backends import tuning
from fp8compile.backends.json_file import add_entry, read_entries
from fp8compile.backends.kernels.scaled_mm_few_rows import FEW_ROWS, FewRowsConfig
from fp8compile.backends.tuning import Choice, GemmShape, choices, choose_gemm

E4M3 = torch.float8_e4m3fn
ALIGNED = GemmShape(1024, 512, 256, E4M3, E4M3, torch.bfloat16, None, fast_accum=True)
UNALIGNED = replace(ALIGNED, n=500, aligned=False)  # nothing that cuBLASLt could do
FEW = replace(ALIGNED, m=16)
GOOD = asdict(choices(UNALIGNED)[0])


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[GemmShape]]:
    """Pretend that there is a GPU, on which the last choice is fastest; what it has timed."""
    shapes: list[GemmShape] = []

    def time_choices(shape: GemmShape, device: torch.device) -> dict[Choice, float]:
        shapes.append(shape)
        return {choice: 10.0 - i for i, choice in enumerate(choices(shape))}

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H20")
    monkeypatch.setattr(tuning, "cache_folder", lambda: tmp_path / "new")
    monkeypatch.setattr(tuning, "time_choices", time_choices)
    choose_gemm.cache_clear()
    yield shapes
    choose_gemm.cache_clear()


def in_another_process(shape: GemmShape) -> Choice:
    choose_gemm.cache_clear()
    return choose_gemm(shape, 0)


@pytest.mark.parametrize("shape", [ALIGNED, UNALIGNED, FEW], ids=str)
def test_a_shape_is_timed_once(timed: list[GemmShape], shape: GemmShape) -> None:
    assert in_another_process(shape) == in_another_process(shape) == choices(shape)[-1]
    assert timed == [shape]


def test_few_rows_have_a_kernel_of_their_own() -> None:
    assert [type(choice) for choice in choices(FEW)] == [type(None), FewRowsConfig]
    assert [type(choice) for choice in choices(replace(UNALIGNED, m=FEW_ROWS))] == [FewRowsConfig]
    assert FewRowsConfig not in map(type, choices(replace(FEW, m=FEW_ROWS + 1)))


def test_few_rows_are_timed_with_matrices_that_are_not_in_l2(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = 50 * 2**20
    properties = SimpleNamespace(L2_cache_size=cache)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    for n, k in ((768, 768), (4096, 4096), (28672, 4096), (128256, 4096)):
        copies = tuning._copies(replace(FEW, n=n, k=k), torch.device("cuda", 0))
        assert 2 * cache <= copies * n * k < 2 * cache + n * k or copies == 1
    assert tuning._copies(ALIGNED, torch.device("cuda", 0)) == 1
    # Of small ones no more than can be timed: a head of one output would take a million.
    for n, k in ((1, 64), (64, 16), (2, 768)):
        assert tuning._copies(replace(FEW, n=n, k=k), torch.device("cuda", 0)) <= 256


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operator makes."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.nbytes = max(self.nbytes, out.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("dtype", [E4M3, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("rows", [1, 48, 6000])
def test_operands_are_random_and_take_little_more_than_their_own_memory(
    dtype: torch.dtype, rows: int
) -> None:
    with Largest() as largest:
        operand = tuning._operand(rows, 1040, dtype, torch.device("cpu"))
    assert (operand.dtype, operand.shape, operand.is_contiguous()) == (dtype, (rows, 1040), True)
    assert largest.nbytes <= max(4 * tuning._SAMPLE, rows * 1040 + tuning._SAMPLE)
    values = operand.float()
    assert abs(values.mean()) < 0.15
    assert abs(values.std() - 1) < 0.15


@pytest.mark.parametrize("shape", [ALIGNED, UNALIGNED, FEW], ids=str)
def test_the_best_guess_is_taken_for_once_where_no_memory_is_left(
    timed: list[GemmShape],
    shape: GemmShape,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(shape: GemmShape, device: torch.device) -> dict[Choice, float]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(tuning, "time_choices", full)
        assert in_another_process(shape) == choices(shape)[0]
    assert f"no memory left to time {shape}; taking " in caplog.text
    assert in_another_process(shape) == choices(shape)[-1]
    assert timed == [shape]


def test_cublaslt_is_remembered_and_preferred_within_the_noise(
    timed: list[GemmShape], monkeypatch: pytest.MonkeyPatch
) -> None:
    def near(shape: GemmShape, device: torch.device) -> dict[Choice, float]:
        timed.append(shape)
        return {choice: 10.0 if choice is None else 9.95 for choice in choices(shape)}

    monkeypatch.setattr(tuning, "time_choices", near)
    assert in_another_process(ALIGNED) is in_another_process(ALIGNED) is None
    assert timed == [ALIGNED]


BAD: dict[str, Any] = {
    "cublaslt_which_cannot": None,
    "a_text": "fast",
    "nothing": {},
    "a_field_too_few": {k: v for k, v in GOOD.items() if k != "num_warps"},
    "a_field_too_many": GOOD | {"persistent": True},
    "what_is_not_timed_any_more": GOOD | {"num_stages": 9},
    "null": GOOD | {"block_m": None},
}


@pytest.mark.parametrize("entry", BAD.values(), ids=BAD)
def test_an_entry_that_would_not_be_timed_today_is_timed_again(
    timed: list[GemmShape], entry: Any
) -> None:
    file = tuning._cache_file(0)
    add_entry(file, str(UNALIGNED), entry)
    assert in_another_process(UNALIGNED) == choices(UNALIGNED)[-1]
    assert timed == [UNALIGNED]
    assert read_entries(file) == {str(UNALIGNED): asdict(choices(UNALIGNED)[-1])}


@pytest.mark.parametrize("package", [torch, tuning.triton], ids=["torch", "triton"])
def test_another_version_times_again(
    timed: list[GemmShape], monkeypatch: pytest.MonkeyPatch, package: Any
) -> None:
    in_another_process(ALIGNED)
    monkeypatch.setattr(package, "__version__", "9.9.0")
    in_another_process(ALIGNED)
    assert timed == [ALIGNED, ALIGNED]


@pytest.mark.parametrize("content", ["", "{half", "[1, 2]"])
def test_a_broken_file_is_replaced(timed: list[GemmShape], content: str) -> None:
    in_another_process(ALIGNED)
    tuning._cache_file(0).write_text(content)
    for _ in range(2):
        in_another_process(ALIGNED)
    assert timed == [ALIGNED, ALIGNED]


def test_without_a_folder_to_write_to_each_process_times(
    timed: list[GemmShape], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tuning, "cache_folder", lambda: tmp_path / "file")
    assert in_another_process(ALIGNED) == in_another_process(ALIGNED) == choices(ALIGNED)[-1]
    assert timed == [ALIGNED, ALIGNED]
