"""The choice of what multiplies a shape: timed once, remembered, and never taken on trust."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fp8compile.backends import cublaslt, tuning
from fp8compile.backends.cublaslt import CublasltError
from fp8compile.backends.json_file import add_entry, read_entries
from fp8compile.backends.kernels.scaled_mm import TileConfig
from fp8compile.backends.kernels.scaled_mm_few_rows import FEW_ROWS, FewRowsConfig
from fp8compile.backends.tuning import (
    Choice,
    CublasltAlgorithm,
    GemmShape,
    choices,
    choose_gemm,
    multiply,
)

E4M3 = torch.float8_e4m3fn
ALIGNED = GemmShape(1024, 512, 256, E4M3, E4M3, torch.bfloat16, None, fast_accum=True)
UNALIGNED = replace(ALIGNED, n=500, aligned=False)  # nothing that cuBLASLt could do
FEW = replace(ALIGNED, m=16)
GOOD = asdict(choices(UNALIGNED)[0])


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[GemmShape]]:
    """Pretend that there is a GPU, on which the last choice is fastest; what it has timed. A
    PyTorch that is built for one could ask cuBLASLt, and would find none.
    """
    shapes: list[GemmShape] = []

    def time_choices(shape: GemmShape, device: torch.device) -> dict[Choice, float]:
        shapes.append(shape)
        return {choice: 10.0 - i for i, choice in enumerate(choices(shape))}

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H20")
    monkeypatch.setattr(tuning, "cache_folder", lambda: tmp_path / "new")
    monkeypatch.setattr(tuning, "time_choices", time_choices)
    monkeypatch.setattr(cublaslt, "listed", lambda gemm, device_index: 0)
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
    few = [type(None), CublasltAlgorithm, FewRowsConfig]
    assert [type(choice) for choice in choices(FEW)] == few
    assert [type(choice) for choice in choices(replace(UNALIGNED, m=FEW_ROWS))] == [FewRowsConfig]
    assert FewRowsConfig not in map(type, choices(replace(FEW, m=FEW_ROWS + 1)))


def test_algorithms_of_cublaslt_are_for_known_sizes_that_it_supports() -> None:
    """An index into what cuBLASLt lists is another algorithm for other sizes."""
    algorithms = [CublasltAlgorithm(index) for index in range(8)]
    assert choices(ALIGNED)[:-1] == [None, *algorithms]
    assert isinstance(choices(ALIGNED)[-1], TileConfig)
    symbolic = replace(ALIGNED, fixed=False)
    assert choices(symbolic) == [None, choices(ALIGNED)[-1]]
    assert str(symbolic) == f"{ALIGNED} symbolic"
    assert not set(algorithms) & set(choices(UNALIGNED))


def test_a_matrix_is_added_by_cublaslt_or_not_by_the_gemm() -> None:
    sums = replace(ALIGNED, adds=True)
    assert choices(sums) == [None, *(CublasltAlgorithm(index) for index in range(8))]
    assert str(sums) == f"{ALIGNED} plus matrix"
    for shape in (UNALIGNED, FEW, replace(ALIGNED, fixed=False)):
        assert choices(replace(shape, adds=True)) == [None]


def test_a_log_tells_the_sums_apart(
    timed: list[GemmShape], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither of the two, of which one adds, is called like the other."""
    monkeypatch.setattr(cublaslt, "listed", lambda gemm, device_index: 8)
    with caplog.at_level("DEBUG", logger=tuning.log.name):
        assert choose_gemm(replace(ALIGNED, adds=True), 0) == CublasltAlgorithm(7)
    assert "plus matrix: {'apart': '10.0 us', 'cublaslt': '9.0 us', 'cublaslt #1'" in caplog.text


def test_what_has_no_other_choice_is_not_timed(timed: list[GemmShape]) -> None:
    assert choose_gemm(replace(UNALIGNED, adds=True), 0) is None
    assert choose_gemm(replace(ALIGNED, adds=True), 0) is None  # none is listed
    assert not timed


def test_only_what_cublaslt_lists_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def listed(gemm: cublaslt.Gemm, device_index: int) -> int:
        asked.append((gemm, device_index))
        return 3

    monkeypatch.setattr(cublaslt, "listed", listed)
    first, second, third = map(CublasltAlgorithm, range(3))
    assert tuning.offered_choices(ALIGNED, 1) == [first, second, third, choices(ALIGNED)[-1]]
    assert tuning.offered_choices(UNALIGNED, 1) == choices(UNALIGNED)
    sizes, dtypes = (1024, 512, 256), (E4M3, E4M3, torch.bfloat16)
    assert asked == [(cublaslt.Gemm(*sizes, *dtypes, False, True), 1)]
    assert tuning.offered_choices(FEW, 1) == [first, choices(FEW)[-1]]
    sums = replace(ALIGNED, adds=True)
    assert tuning.offered_choices(sums, 1) == [None, first, second, third]


def test_where_cublaslt_lists_nothing_pytorchs_operator_is_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cublaslt, "listed", lambda gemm, device_index: 0)
    assert tuning.offered_choices(ALIGNED, 0) == [None, choices(ALIGNED)[-1]]
    assert tuning.offered_choices(FEW, 0) == [None, choices(FEW)[-1]]


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_every_choice_multiplies(bias: bool) -> None:
    """``_scaled_mm`` and our kernels have tests of their own; here, that each is called right."""
    shape = replace(ALIGNED, m=32, n=48, k=64, bias=torch.bfloat16 if bias else None)
    a, b = torch.randn(32, 64).to(E4M3), torch.randn(48, 64).to(E4M3)
    a_scale_inv, b_scale_inv = torch.tensor([0.5]), torch.tensor([0.25])
    added = torch.randn(48).bfloat16() if bias else None
    want = a.float() @ b.float().t() * 0.125 + (0 if added is None else added)
    few = replace(shape, m=16)
    for choice in (*choices(shape)[-2:], choices(few)[-1]):
        out = multiply(choice, shape, a, b, a_scale_inv, b_scale_inv, added)
        torch.testing.assert_close(out.float(), want, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("as_graph", [False, True], ids=["queued", "as graph"])
def test_what_took_too_long_once_is_not_timed_again(
    monkeypatch: pytest.MonkeyPatch, as_graph: bool
) -> None:
    took = [10.0, 11.9, 12.1, 10.0]  # microseconds of a launch
    estimated, measured = Counter[int](), Counter[int]()
    pauses: list[float] = []

    def microseconds(run: Callable[[], int], launches: int) -> float:
        (measured if pauses else estimated)[run()] += 1
        # Longer than what the host takes for a batch of launches that it cannot make any faster.
        assert pauses in ([], [1.5 * tuning._BATCH_US])
        assert launches == (int(tuning._BATCH_US / took[run()]) if pauses else tuning._WARMUP)
        pauses.clear()
        return took[run()]

    monkeypatch.setattr(tuning, "_microseconds", microseconds)
    monkeypatch.setattr(tuning, "_captured", lambda run: run)
    monkeypatch.setattr(tuning, "pause", pauses.append)
    choices = [CublasltAlgorithm(index) for index in range(4)]
    runs: dict[Choice, Any] = {choice: partial(int, choice.index) for choice in choices}
    times = tuning._fastest(runs, "autotuning", as_graph=as_graph)
    assert [times[choice] for choice in choices] == took
    assert estimated == dict.fromkeys(range(4), 1)
    assert measured == dict.fromkeys(range(4), tuning._ROUNDS) | {2: 1}


def test_an_algorithm_that_does_not_run_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> None:
        raise CublasltError("cublasLtMatmul", 15)

    monkeypatch.setattr(tuning, "_microseconds", lambda run, launches: 10.0)
    monkeypatch.setattr(tuning, "pause", lambda us: None)
    runs: dict[Choice, Any] = {None: lambda: None, CublasltAlgorithm(1): refused}
    assert tuning._fastest(runs, "autotuning", as_graph=False) == {None: 10.0}


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


@pytest.mark.parametrize("first", [None, CublasltAlgorithm(0)], ids=["pytorch", "cublaslt"])
def test_the_first_of_cublaslt_is_remembered_and_preferred_within_the_noise(
    timed: list[GemmShape], monkeypatch: pytest.MonkeyPatch, first: Choice
) -> None:
    def near(shape: GemmShape, device: torch.device) -> dict[Choice, float]:
        timed.append(shape)
        return {
            choice: 10.0 if choice == first else 9.95 for choice in [first, *choices(shape)[2:]]
        }

    monkeypatch.setattr(tuning, "time_choices", near)
    monkeypatch.setattr(cublaslt, "listed", lambda gemm, index: 0 if first is None else 8)
    assert in_another_process(ALIGNED) == in_another_process(ALIGNED) == first
    assert timed == [ALIGNED]


def test_pytorchs_operator_is_not_taken_from_a_file_where_cublaslt_lists_it(
    timed: list[GemmShape], monkeypatch: pytest.MonkeyPatch
) -> None:
    add_entry(tuning._cache_file(0), str(ALIGNED), None)
    assert in_another_process(ALIGNED) is None
    monkeypatch.setattr(cublaslt, "listed", lambda gemm, index: 1)
    assert in_another_process(ALIGNED) == choices(ALIGNED)[-1]
    assert timed == [ALIGNED]


BAD: dict[str, Any] = {
    "cublaslt_which_cannot": None,
    "an_algorithm_of_cublaslt_which_cannot": {"index": 1},
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
