"""The way to cuBLASLt: with its functions replaced, and on a GPU."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from fp8compile.backends import cublaslt, gemm_choice, triton, tuning
from fp8compile.backends.cublaslt import CublasltError, Gemm
from fp8compile.backends.tuning import CublasltAlgorithm, GemmShape, choices
from fp8compile.ops import scaled_mm
from tests.models import MLP, Residual, sqnr_db

OP = torch.ops.fp8.scaled_mm_cublaslt.default
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
GEMM = Gemm(32, 48, 64, E5M2, E4M3, torch.bfloat16, True, True)
STREAM = 77
CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


ADDRESS, INT, SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
SET = ctypes.CFUNCTYPE(INT, ADDRESS, INT, ADDRESS, SIZE)
MATMUL = ctypes.CFUNCTYPE(INT, *[ADDRESS] * 14, SIZE, ADDRESS)


class Library:
    """Answers like cuBLASLt, and notes what it is asked. Handles are numbers."""

    def __init__(self) -> None:
        self.set: dict[int, list[tuple[int, int]]] = {}  # of each descriptor: attribute, value
        self.layouts: dict[int, tuple[int, int, int, int]] = {}
        self.preferences: dict[int, int] = {}
        self.matmuls: list[tuple[Any, ...]] = []
        self.setting = self.status = self.listing = 0
        self._handles = iter(range(1, 1000))
        for name, signature in cublaslt._SIGNATURES.items():
            if hasattr(self, name):
                setattr(self, name, self._counting(getattr(self, name), len(signature)))
        # Those that C calls.
        self.cublasLtMatmulDescSetAttribute = SET(self._set)
        self.cublasLtMatmul = MATMUL(self._matmul)

    @staticmethod
    def _counting(function: Callable[..., int], count: int) -> Callable[..., int]:
        def call(*args: Any) -> int:
            assert len(args) == count
            return function(*args)

        return call

    def _new(self, pointer: Any) -> int:
        pointer._obj.value = next(self._handles)
        return int(pointer._obj.value)

    def _set(self, desc: int, attribute: int, at: int, size: int) -> int:
        value = int.from_bytes(ctypes.string_at(at, size), "little", signed=True)
        self.set[desc].append((attribute, value))
        return self.setting

    def _matmul(self, *args: Any) -> int:
        alpha, beta = (ctypes.c_float.from_address(args[i]).value for i in (2, 7))
        algorithm = ctypes.c_uint64.from_address(args[12]).value
        self.matmuls.append(
            (*args[:2], alpha, *args[3:7], beta, *args[8:12], algorithm, *args[13:])
        )
        return self.status

    def cublasLtGetVersion(self) -> int:
        return 130100

    def cublasLtCreate(self, handle: Any) -> int:
        self._new(handle)
        return 0

    def cublasLtMatmulDescCreate(self, desc: Any, compute: int, scale: int) -> int:
        assert (compute, scale) == (68, 0)  # both float32
        self.set[self._new(desc)] = []
        return 0

    def cublasLtMatrixLayoutCreate(
        self, layout: Any, dtype: int, rows: Any, columns: Any, ld: Any
    ) -> int:
        self.layouts[self._new(layout)] = (dtype, rows.value, columns.value, ld.value)
        return 0

    def cublasLtMatmulPreferenceCreate(self, preference: Any) -> int:
        self._new(preference)
        return 0

    def cublasLtMatmulPreferenceSetAttribute(
        self, p: Any, attribute: int, v: Any, size: int
    ) -> int:
        assert size == ctypes.sizeof(v._obj)
        self.preferences[attribute] = v._obj.value
        return 0

    def cublasLtMatmulPreferenceDestroy(self, preference: Any) -> int:
        return 0

    def cublasLtMatmulAlgoGetHeuristic(self, *args: Any) -> int:
        *_, most, results, found = args
        assert most == 8
        for index in range(4):
            result = results._obj[index]
            result.algorithm.data[0] = 100 + index
            result.workspace_bytes = 16 * index
            result.state = 14 if index == 1 else 0  # the second cannot run
        found._obj.value = 4 if self.listing == 0 else 0
        return self.listing


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    fake = Library()
    monkeypatch.setattr(cublaslt, "_library", lambda: fake)
    monkeypatch.setattr(cublaslt, "current_stream", lambda device_index: STREAM)
    monkeypatch.setattr(cublaslt, "empty_bytes", lambda n: torch.empty(n, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "device", lambda index: torch.device("cpu"))
    caches = (cublaslt._plan_of, cublaslt._plan, cublaslt._handle)
    for cache in caches:
        cache.cache_clear()
    yield fake
    for cache in caches:
        cache.cache_clear()


def operands(gemm: Gemm = GEMM) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    a = torch.randn(gemm.m, gemm.k).to(gemm.left)
    b = torch.randn(gemm.n, gemm.k).to(gemm.right)
    bias = torch.randn(gemm.n).to(gemm.out) if gemm.has_bias else None
    return a, b, torch.tensor([0.5]), torch.tensor([0.25]), bias


def addend_of(gemm: Gemm = GEMM) -> Tensor:
    return torch.randn(gemm.m, gemm.n).to(gemm.out)


def run(
    gemm: Gemm,
    algorithm: int,
    *args: Tensor | None,
    addend: Tensor | None = None,
    at: tuple[int, ...] = (),
) -> Tensor:
    out = torch.empty(gemm.m, gemm.n, dtype=gemm.out)
    cublaslt._plan(gemm, 0).run(algorithm, *args, addend, out, *at)
    return out


def test_cublaslt_gets_the_transposed_gemm(library: Library) -> None:
    args = a, b, a_scale_inv, b_scale_inv, bias = operands()
    out = run(GEMM, 2, *args)
    (call,) = library.matmuls
    handle, desc, alpha, b_ptr, b_layout, a_ptr, a_layout, beta = call[:8]
    c_ptr, c_layout, d_ptr, d_layout, algorithm, workspace, workspace_bytes, stream = call[8:]
    assert (handle, alpha, beta, stream) == (cublaslt._handle(0).value, 1, 0, STREAM)
    assert (b_ptr, a_ptr) == (b.data_ptr(), a.data_ptr())
    assert c_ptr == d_ptr == out.data_ptr()
    # dtype, rows, columns and the distance of columns, as cuBLAS counts them
    assert library.layouts[b_layout] == (28, 64, 48, 64)
    assert library.layouts[a_layout] == (29, 64, 32, 64)
    assert c_layout == d_layout and library.layouts[d_layout] == (14, 48, 32, 48)
    # Index 2 of those that can run is the fourth of the list.
    assert (algorithm, workspace_bytes) == (103, 48) and workspace
    now = dict(library.set[desc])  # later values win
    assert bias is not None
    pointers = {17: b_scale_inv.data_ptr(), 18: a_scale_inv.data_ptr(), 8: bias.data_ptr()}
    assert now == {3: 1, 25: 1, 7: 4, 26: 14} | pointers


def test_cublaslt_adds_a_matrix_that_lies_as_the_output_does(library: Library) -> None:
    addend = addend_of()
    out = run(GEMM, 0, *operands(), addend=addend)
    (call,) = library.matmuls
    beta, c_ptr, c_layout, d_ptr, d_layout = call[7:12]
    assert (beta, c_ptr, d_ptr) == (1, addend.data_ptr(), out.data_ptr())
    assert c_layout == d_layout


def test_each_call_brings_its_own_tensors(library: Library) -> None:
    gemm = GEMM._replace(has_bias=False, fast_accum=False)
    descs = set()
    for _ in range(2):
        args = _, b, a_scale_inv, b_scale_inv, _ = operands(gemm)
        run(gemm, 0, *args)
        desc, b_ptr, workspace = (library.matmuls[-1][index] for index in (1, 3, 13))
        descs.add(desc)
        assert (b_ptr, workspace) == (b.data_ptr(), None)
        now = dict(library.set[desc])
        assert now == {3: 1, 25: 0, 17: b_scale_inv.data_ptr(), 18: a_scale_inv.data_ptr()}
    assert len(descs) == 1  # made once per GEMM


def test_scales_may_be_elements_of_vectors(library: Library) -> None:
    """To which no call makes a view."""
    args = _, _, a_scale_inv, b_scale_inv, _ = operands()
    run(GEMM, 0, *args, at=(5, 2))
    (desc,) = (call[1] for call in library.matmuls)
    now = dict(library.set[desc])
    assert now[18] == a_scale_inv.data_ptr() + 20
    assert now[17] == b_scale_inv.data_ptr() + 8


def test_algorithms_must_do_with_what_a_call_gives(library: Library) -> None:
    """Operands of 16 bytes' alignment, 32 MiB, and partial sums in float32."""
    assert cublaslt.listed(GEMM, 0) == 3
    assert library.preferences == {1: 2**25, 3: 2} | dict.fromkeys((5, 6, 7, 8), 16)


def test_what_is_not_listed_or_fails_raises(library: Library) -> None:
    with pytest.raises(IndexError):
        run(GEMM, 3, *operands())
    library.status = 15
    with pytest.raises(CublasltError, match=r"^cublasLtMatmul returned status 15"):
        run(GEMM, 0, *operands())
    library.setting, done = 7, len(library.matmuls)
    with pytest.raises(CublasltError, match="returned status 7"):
        run(GEMM, 0, *operands())
    assert len(library.matmuls) == done


def test_for_what_is_not_supported_nothing_is_listed(library: Library) -> None:
    library.listing = 15
    assert cublaslt.listed(GEMM, 0) == 0
    library.listing = 7  # an invalid value: a mistake of ours
    with pytest.raises(CublasltError, match="cublasLtMatmulAlgoGetHeuristic returned status 7"):
        cublaslt.listed(GEMM._replace(m=64), 0)


def test_threads_take_turns(library: Library) -> None:
    """Each GEMM is launched with the scales that were set for it."""
    gemm = GEMM._replace(has_bias=False)
    cublaslt._plan(gemm, 0)  # threads that all come first would make one each
    calls = [operands(gemm) for _ in range(64)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda args: run(gemm, 0, *args), calls))
    (desc,) = {call[1] for call in library.matmuls}
    values = library.set[desc][-2 * len(calls) :]
    scales_of = {call[3].data_ptr(): call[2].data_ptr() for call in calls}
    for (first, b_scale_inv), (second, a_scale_inv) in zip(values[::2], values[1::2], strict=True):
        assert (first, second) == (17, 18) and scales_of[b_scale_inv] == a_scale_inv


def test_a_profile_names_the_sizes(library: Library) -> None:
    label = cublaslt._plan(GEMM, 0).label
    assert cublaslt.sizes_of(label) == (32, 48, 64)
    for other in ("aten::_scaled_mm", "fp8_cast", "fp8_scaled_mm", ""):
        assert cublaslt.sizes_of(other) is None


def test_without_cublaslt_none_is_listed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cublaslt._library.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert (cublaslt.version(), cublaslt.listed(GEMM, 0)) == (None, 0)
    assert not caplog.text
    cublaslt._library.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "99.0")
    assert (cublaslt.version(), cublaslt.listed(GEMM, 0)) == (None, 0)
    assert "GEMMs take cuBLASLt's first algorithm" in caplog.text
    assert caplog.text.count("libcublasLt.so.99") == 1
    cublaslt._library.cache_clear()


WITH_AND_WITHOUT_BIAS = pytest.mark.parametrize(
    "gemm", [GEMM, GEMM._replace(has_bias=False)], ids=["bias", ""]
)


WITH_AND_WITHOUT_ADDEND = pytest.mark.parametrize("adds", [False, True], ids=["", "addend"])


@WITH_AND_WITHOUT_BIAS
@WITH_AND_WITHOUT_ADDEND
def test_on_a_cpu_it_is_scaled_mm(gemm: Gemm, adds: bool) -> None:
    args, how = operands(gemm), (gemm.out, gemm.fast_accum)
    addend = addend_of(gemm) if adds else None
    product = scaled_mm(*args, *how)
    out = OP(*args, addend, *how, 5)
    assert torch.equal(out, scaled_mm(*args, *how, addend))
    assert torch.equal(out, product) != adds
    # Its test of the schema multiplies FP8, which a CPU cannot.
    torch.library.opcheck(OP, (*args, addend, *how, 5), test_utils=CHECKS)


@WITH_AND_WITHOUT_BIAS
@WITH_AND_WITHOUT_ADDEND
@pytest.mark.parametrize("cpp_wrapper", [False, True], ids=["", "cpp_wrapper"])
def test_inductors_wrapper_calls_it_directly(gemm: Gemm, adds: bool, cpp_wrapper: bool) -> None:
    """Without PyTorch's dispatcher, where that wrapper is Python, and into Inductor's memory."""

    def fn(a: Tensor, b: Tensor, scales: Tensor, *others: Tensor | None) -> Tensor:
        return OP(a, b, scales, scales, *others, gemm.out, gemm.fast_accum, 5, 3, 1) * 2

    args, addend = operands(gemm), addend_of(gemm) if adds else None
    a, b, a_scale_inv, b_scale_inv, bias = args
    scales = torch.cat([torch.zeros(1), b_scale_inv, torch.zeros(1), a_scale_inv])
    compiled = torch.compile(fn, options={"cpp_wrapper": cpp_wrapper})
    with torch.no_grad():
        out, (code, *_) = run_and_get_code(compiled, a, b, scales, bias, addend)
    assert torch.equal(out, scaled_mm(*args, gemm.out, gemm.fast_accum, addend) * 2)
    call = "extern_kernels.fp8_scaled_mm_cublaslt_default("
    (line,) = [line for line in code.splitlines() if call in line] or [""]
    assert bool(line) != cpp_wrapper
    assert cpp_wrapper or "fast_accum=True, algorithm=5, a_at=3, b_at=1, out=" in line
    assert "reinterpret_tensor" not in line


# --- on a GPU -------------------------------------------------------------------------------------

BF16, F32 = torch.bfloat16, torch.float32
GEMMS = (
    Gemm(512, 256, 384, E4M3, E4M3, BF16, False, True),
    Gemm(4096, 2048, 1024, E5M2, E4M3, BF16, False, True),
    Gemm(77, 48, 80, E4M3, E4M3, BF16, True, True),
    Gemm(1, 1024, 4096, E4M3, E4M3, torch.float16, True, True),
    Gemm(300, 256, 512, E5M2, E4M3, F32, False, False),
    Gemm(256, 256, 16384, E5M2, E4M3, BF16, False, True),  # K is worth splitting
)


def on_gpu(gemm: Gemm) -> list[Tensor | None]:
    return [None if tensor is None else tensor.cuda() for tensor in operands(gemm)]


@pytest.mark.gpu
@pytest.mark.parametrize("gemm", GEMMS, ids=lambda gemm: "x".join(map(str, gemm[:3])))
def test_every_algorithm_multiplies(gemm: Gemm) -> None:
    args, addend = on_gpu(gemm), addend_of(gemm).cuda()
    product = scaled_mm(*args, F32, gemm.fast_accum)
    count = cublaslt.listed(gemm, torch.cuda.current_device())
    assert 1 <= count <= cublaslt.MOST_ALGORITHMS
    for algorithm in range(count):
        how = (gemm.out, gemm.fast_accum, algorithm)
        out = OP(*args, None, *how)
        assert (out.shape, out.dtype) == ((gemm.m, gemm.n), gemm.out)
        assert sqnr_db(product, out) > (60 if gemm.out == F32 else 45)
        assert torch.equal(out, OP(*args, None, *how))
        total = OP(*args, addend, *how)
        assert sqnr_db(product + addend, total) > (60 if gemm.out == F32 else 45)


@pytest.mark.gpu
def test_it_is_what_pytorch_computes() -> None:
    """The first algorithm is PyTorch's, and one that does not split K adds up in the same order."""
    a, b, a_scale_inv, b_scale_inv, _ = on_gpu(GEMMS[1])
    want = torch._scaled_mm(a, b.t(), a_scale_inv, b_scale_inv, out_dtype=BF16, use_fast_accum=True)
    count = cublaslt.listed(GEMMS[1], torch.cuda.current_device())
    assert count > 1
    for algorithm in range(count):
        out = OP(a, b, a_scale_inv, b_scale_inv, None, None, BF16, True, algorithm)
        assert torch.equal(out, want)


@pytest.mark.gpu
def test_threads_share_the_descriptors_of_a_gemm() -> None:
    """Forward and backward run in two threads; each must get its own scales."""
    a, b, one, _, _ = on_gpu(GEMMS[0])
    product = OP(a, b, one, one, None, None, BF16, True, 0)

    def multiply(power: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream()):
            scale_inv = one * 2.0**power
            return all(
                torch.equal(
                    OP(a, b, scale_inv, one, None, None, BF16, True, 1), product * 2.0**power
                )
                for _ in range(200)
            )

    torch.cuda.synchronize()
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(multiply, range(8)))


@pytest.mark.gpu
def test_a_cuda_graph_replays_it() -> None:
    gemm = GEMMS[-1]
    a, b, a_scale_inv, b_scale_inv, _ = on_gpu(gemm)
    count = cublaslt.listed(gemm, torch.cuda.current_device())
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        args = (a, b, a_scale_inv, b_scale_inv, None, None, BF16, True)
        outs = [OP(*args, algorithm) for algorithm in range(count)]
    a_scale_inv.mul_(4)
    graph.replay()
    want = scaled_mm(a, b, a_scale_inv, b_scale_inv, None, F32, True)
    assert all(sqnr_db(want, out) > 45 for out in outs)


@pytest.mark.gpu
def test_a_profile_shows_it() -> None:
    args = (*on_gpu(GEMMS[0]), None, BF16, True, 1)
    OP(*args)
    with torch.profiler.profile() as profiler:
        OP(*args)
        torch.cuda.synchronize()
    events = {event.key: event for event in profiler.key_averages()}
    (label,) = (key for key in events if cublaslt.sizes_of(key))
    assert cublaslt.sizes_of(label) == GEMMS[0][:3]
    assert events[label].device_time_total > 0


@pytest.mark.gpu
def test_operands_may_be_on_another_gpu() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    args = [None if tensor is None else tensor.to("cuda:1") for tensor in operands(GEMMS[0])]
    assert torch.cuda.current_device() == 0
    assert sqnr_db(scaled_mm(*args, F32, True), OP(*args, None, BF16, True, 1)) > 45


def choose_always(
    monkeypatch: pytest.MonkeyPatch,
    choice: CublasltAlgorithm | None,
    *,
    sums: CublasltAlgorithm | None,
) -> None:
    """Have every GEMM multiplied by a choice, and every sum made by another."""
    for module in (triton, gemm_choice):
        monkeypatch.setattr(
            module, "choose_gemm", lambda shape, device: sums if shape.adds else choice
        )


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_with_other_algorithms(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MLP(256, 512, bias=True).to("cuda", BF16)
    x = torch.randn(1024, 256, device="cuda", dtype=BF16, requires_grad=True)
    options = {"decline_slower": False}
    if mode == "reduce-overhead":
        options["inductor"] = {"triton.cudagraphs": True}
    found = []
    for algorithm in (0, 1, 2):
        choice = CublasltAlgorithm(algorithm) if algorithm else None
        choose_always(monkeypatch, choice, sums=None)
        torch._dynamo.reset()
        with torch._inductor.utils.fresh_cache():
            alike = copy.deepcopy(model)
            compiled = torch.compile(alike, backend="fp8", options=options)
            for _ in range(4):
                torch.compiler.cudagraph_mark_step_begin()
                out = compiled(x)
                out.square().sum().backward()
                tensors = [out, x.grad, *(p.grad for p in alike.parameters())]
                got = [tensor.detach().clone() for tensor in tensors]
                x.grad = None
                alike.zero_grad()
        found.append(got)
    for got in found[1:]:
        for want, value in zip(found[0], got, strict=True):
            assert sqnr_db(want, value) > 40


@pytest.mark.gpu
def test_what_is_timed_are_the_algorithms_that_are_listed() -> None:
    shape = GemmShape(8192, 4096, 1024, E4M3, E4M3, BF16, None, fast_accum=True)
    times = tuning.time_choices(shape, torch.device("cuda", torch.cuda.current_device()))
    algorithms = [choice for choice in times if isinstance(choice, CublasltAlgorithm)]
    listed = cublaslt.listed(shape.gemm, torch.cuda.current_device())
    assert [choice.index for choice in algorithms] == list(range(listed))
    assert times.keys() == {*algorithms, choices(shape)[-1]}
    assert tuning.choose_gemm(shape, torch.cuda.current_device()) in times


@pytest.mark.gpu
def test_sums_are_timed_beside_the_product_and_a_kernel_that_adds() -> None:
    device = torch.cuda.current_device()
    shape = GemmShape(8192, 4096, 1024, E4M3, E4M3, BF16, None, fast_accum=True, adds=True)
    times = tuning.time_choices(shape, torch.device("cuda", device))
    listed = cublaslt.listed(shape.gemm, device)
    assert times.keys() == {None, *map(CublasltAlgorithm, range(listed))}
    product = tuning.time_choices(replace(shape, adds=False), torch.device("cuda", device))
    assert times[None] > 1.02 * min(product.values())


@pytest.mark.gpu
def test_compiled_with_sums_in_gemms(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Residual().to("cuda", BF16)
    x = torch.randn(1024, 64, device="cuda", dtype=BF16, requires_grad=True)
    added: list[Tensor | None] = []
    run = cublaslt._Plan.run

    def recorded(plan: Any, *args: Any) -> None:
        added.append(args[-2])
        run(plan, *args)

    monkeypatch.setattr(cublaslt._Plan, "run", recorded)
    found = []
    for sums in (None, CublasltAlgorithm(0)):
        choose_always(monkeypatch, None, sums=sums)
        torch._dynamo.reset()
        with torch._inductor.utils.fresh_cache():
            compiled = torch.compile(model, backend="fp8", options={"decline_slower": False})
            out = compiled(x)
            out.square().sum().backward()
        tensors = [out, x.grad, *(p.grad for p in model.parameters())]
        found.append([tensor.detach().clone() for tensor in tensors])
        x.grad = None
        model.zero_grad()
        torch.cuda.synchronize()
        assert sum(tensor is not None for tensor in added) == (0 if sums is None else 2)
    for want, value in zip(*found, strict=True):
        assert sqnr_db(want, value) > 20  # codes of FP8 that follow are rounded otherwise
