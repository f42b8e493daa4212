"""A GEMM by any of the algorithms that cuBLASLt lists for it, not only by the first.

``aten._scaled_mm`` takes the first algorithm that cuBLASLt's heuristic names. It names up to eight,
and the fastest takes 0.93 times as long as the first, 0.80 at best (36 GEMMs of four models, H200).
PyTorch cannot be asked for another one, so this calls the library that PyTorch has loaded. Numbers
of attributes and types are those of cublasLt.h, which stay as they are from one version to the next
(https://docs.nvidia.com/cuda/cublas/#cublaslt-datatypes-reference).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function
from triton.runtime.build import compile_module_from_src

from ..internals import call_from_wrapper, current_stream, empty_bytes, is_profiled
from ..ops import ALIGNMENT, scaled_mm

log = logging.getLogger(__name__)

MOST_ALGORITHMS = 8
_LABEL = "fp8_scaled_mm_cublaslt"
_NOT_PROFILED = contextlib.nullcontext()
_WORKSPACE = 32 * 2**20  # bytes that an algorithm may use: what PyTorch allows on Hopper

# cudaDataType_t, by PyTorch's dtype
_TYPES = {
    torch.float32: 0,
    torch.float16: 2,
    torch.bfloat16: 14,
    torch.float8_e4m3fn: 28,
    torch.float8_e5m2: 29,
}
_COMPUTE_32F, _SCALE_32F, _OP_T, _EPILOGUE_BIAS, _NOT_SUPPORTED = 68, 0, 1, 4, 15
# cublasLtMatmulDescAttributes_t
_TRANSA, _EPILOGUE, _BIAS, _A_SCALE, _B_SCALE, _FAST_ACCUM, _BIAS_TYPE = 3, 7, 8, 17, 18, 25, 26
# cublasLtMatmulPreferenceAttributes_t
_MAX_WORKSPACE, _REDUCTION_SCHEMES, _MIN_ALIGNMENTS = 1, 3, (5, 6, 7, 8)
# Partial sums of a split K in float32: neither rounded to the output's type nor added up in the
# order in which they happen to come.
_REDUCTION_COMPUTE_TYPE = 2


class CublasltError(RuntimeError):
    """A function of cuBLASLt returned a status that is no success."""

    def __init__(self, function: str, status: int) -> None:
        super().__init__(f"{function} returned status {status} (a cublasStatus_t)")
        self.status = status


class Gemm(NamedTuple):
    """What the algorithms depend on: ``[m, k] @ [n, k].T``, all sizes known."""

    m: int
    n: int
    k: int
    left: torch.dtype
    right: torch.dtype
    out: torch.dtype
    has_bias: bool
    fast_accum: bool


class _Algorithm(ctypes.Structure):
    _fields_ = [("data", ctypes.c_uint64 * 8)]


class _Launch(ctypes.Structure):
    """``Launch`` of launch_gemm.c: what stays the same from one call to the next."""

    _fields_ = [
        ("set_attribute", ctypes.c_void_p),
        ("matmul", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("handle", "desc", "a", "b", "out")),
        ("workspace_bytes", ctypes.c_size_t),
        ("algorithm", _Algorithm),
    ]


class _HeuristicResult(ctypes.Structure):
    _fields_ = [
        ("algorithm", _Algorithm),
        ("workspace_bytes", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


def version() -> int | None:
    """cuBLASLt's version, such as 130100; None where PyTorch has loaded none."""
    library = _library()
    return None if library is None else int(library.cublasLtGetVersion())


def listed(gemm: Gemm, device_index: int) -> int:
    """How many algorithms cuBLASLt lists for a GEMM; 0 without cuBLASLt."""
    return 0 if _library() is None else len(_plan(gemm, device_index).algorithms)


# How the functions are called. A pointer is an address, a handle, or ctypes.byref of a value. All
# arguments must be here: ctypes passes others as 32 bits of a 64-bit slot. cublasLtMatmul is called
# from C.
_PTR, _INT, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cublasLtCreate": (_PTR,),
    "cublasLtMatmulDescCreate": (_PTR, _INT, _INT),
    "cublasLtMatmulDescSetAttribute": (_PTR, _INT, _PTR, _SIZE),
    "cublasLtMatrixLayoutCreate": (_PTR, _INT, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64),
    "cublasLtMatmulPreferenceCreate": (_PTR,),
    "cublasLtMatmulPreferenceSetAttribute": (_PTR, _INT, _PTR, _SIZE),
    "cublasLtMatmulPreferenceDestroy": (_PTR,),
    "cublasLtMatmulAlgoGetHeuristic": (*[_PTR] * 7, _INT, _PTR, _PTR),
}


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The cuBLASLt that PyTorch has loaded: the loader finds it by its name, wherever it is."""
    if torch.version.cuda is None:
        return None
    name = f"libcublasLt.so.{torch.version.cuda.split('.')[0]}"
    try:
        library = ctypes.CDLL(name)
        _launcher()
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        log.warning("GEMMs take cuBLASLt's first algorithm, for others cannot be asked: %s", error)
        return None
    library.cublasLtGetVersion.restype = _SIZE
    for function, arguments in _SIGNATURES.items():
        getattr(library, function).argtypes = arguments
    return library


@functools.cache
def _launcher() -> Callable[..., int]:
    """``launch`` of launch_gemm.c, built once with the compiler that Triton needs, too.

    Raises RuntimeError without a compiler, and subprocess.CalledProcessError if it fails.
    """
    source = Path(__file__).resolve().parent / "launch_gemm.c"
    launch: Callable[..., int] = compile_module_from_src(source.read_text(), source.stem).launch
    return launch


def _call(function: str, *args: Any) -> None:
    status = getattr(_library(), function)(*args)
    if status:
        raise CublasltError(function, status)


@functools.cache
def _handle(device_index: int) -> ctypes.c_void_p:
    """One handle per device, which lives as long as the process."""
    handle = ctypes.c_void_p()
    with torch.cuda.device(device_index):
        _call("cublasLtCreate", ctypes.byref(handle))
    return handle


class _Plan:
    """The descriptors of a GEMM, and its algorithms, the heuristic's first choice first.

    cuBLAS is column-major: it sees the transposed output, ``b @ a.T``, so b is its A.
    """

    def __init__(self, gemm: Gemm, device_index: int) -> None:
        library = _library()
        assert library is not None
        self._handle, self._device_index = _handle(device_index), device_index
        self.label = f"{_LABEL} {gemm.m}x{gemm.n}x{gemm.k}"
        self._desc = ctypes.c_void_p()
        _call("cublasLtMatmulDescCreate", ctypes.byref(self._desc), _COMPUTE_32F, _SCALE_32F)
        self._set(_TRANSA, ctypes.c_int32(_OP_T))
        self._set(_FAST_ACCUM, ctypes.c_int8(gemm.fast_accum))
        if gemm.has_bias:
            self._set(_EPILOGUE, ctypes.c_int32(_EPILOGUE_BIAS))
            self._set(_BIAS_TYPE, ctypes.c_int32(_TYPES[gemm.out]))
        # Of tensors that each call brings. The heuristic wants them set: any address will do.
        for attribute in (_A_SCALE, _B_SCALE, *([_BIAS] if gemm.has_bias else [])):
            self._set(attribute, ctypes.c_uint64(ALIGNMENT))
        self._lock = threading.Lock()  # what is set for a call must still be set when it launches
        self._b = _layout(gemm.right, gemm.k, gemm.n)
        self._a = _layout(gemm.left, gemm.k, gemm.m)
        self._out = _layout(gemm.out, gemm.n, gemm.m)
        self.algorithms = self._listed()
        functions = library.cublasLtMatmulDescSetAttribute, library.cublasLtMatmul
        same = *map(_address, functions), self._handle, self._desc, self._a, self._b, self._out
        self._launches = [
            _Launch(*same, result.workspace_bytes, result.algorithm) for result in self.algorithms
        ]
        self._algorithms = [(ctypes.addressof(x), x.workspace_bytes) for x in self._launches]
        self._launch = _launcher()

    def _set(self, attribute: int, value: Any) -> None:
        arguments = (self._desc, attribute, ctypes.byref(value), ctypes.sizeof(value))
        _call("cublasLtMatmulDescSetAttribute", *arguments)

    def _listed(self) -> list[_HeuristicResult]:
        preference = ctypes.c_void_p()
        _call("cublasLtMatmulPreferenceCreate", ctypes.byref(preference))
        wanted = {
            _MAX_WORKSPACE: ctypes.c_uint64(_WORKSPACE),
            _REDUCTION_SCHEMES: ctypes.c_uint32(_REDUCTION_COMPUTE_TYPE),
            **{attribute: ctypes.c_uint32(ALIGNMENT) for attribute in _MIN_ALIGNMENTS},
        }
        for attribute, value in wanted.items():
            arguments = (preference, attribute, ctypes.byref(value), ctypes.sizeof(value))
            _call("cublasLtMatmulPreferenceSetAttribute", *arguments)
        results, found = (_HeuristicResult * MOST_ALGORITHMS)(), ctypes.c_int()
        layouts = self._b, self._a, self._out, self._out
        try:
            _call(
                "cublasLtMatmulAlgoGetHeuristic",
                *(self._handle, self._desc, *layouts, preference),
                *(MOST_ALGORITHMS, ctypes.byref(results), ctypes.byref(found)),
            )
        except CublasltError as error:
            if error.status != _NOT_SUPPORTED:
                raise
        finally:
            _call("cublasLtMatmulPreferenceDestroy", preference)
        return [result for result in results[: found.value] if result.state == 0]

    def run(
        self,
        algorithm: int,
        a: Tensor,
        b: Tensor,
        a_scale_inv: Tensor,
        b_scale_inv: Tensor,
        bias: Tensor | None,
        addend: Tensor | None,
        out: Tensor,
        a_at: int = 0,
        b_at: int = 0,
    ) -> None:
        """Launch it on the current stream; ``a_at``, ``b_at``: which elements the scales are."""
        address, size = self._algorithms[algorithm]
        workspace = empty_bytes(size) if size else None
        with self._lock:
            status = self._launch(
                *(address, a_at, b_at, current_stream(self._device_index)),
                *(a, b, out, a_scale_inv, b_scale_inv, bias, addend, workspace),
            )
        if status:
            raise CublasltError("cublasLtMatmul", status)


def _address(function: Any) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value


@functools.cache
def _plan(gemm: Gemm, device_index: int) -> _Plan:
    with torch.cuda.device(device_index):
        return _Plan(gemm, device_index)


def _layout(dtype: torch.dtype, rows: int, columns: int) -> ctypes.c_void_p:
    layout = ctypes.c_void_p()
    sizes = ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(rows)
    _call("cublasLtMatrixLayoutCreate", ctypes.byref(layout), _TYPES[dtype], *sizes)
    return layout


# --- what compiled graphs call --------------------------------------------------------------------


def launch(
    a: Tensor,
    b: Tensor,
    a_scale_inv: Tensor,
    b_scale_inv: Tensor,
    *added: Tensor,
    fast_accum: bool,
    algorithm: int,
    a_at: int = 0,
    b_at: int = 0,
    out: Tensor,
) -> None:
    """Write a GEMM into ``out``, on the current stream; a profile shows it with its sizes.

    ``a, b, a_scale_inv, b_scale_inv, fast_accum``: as for ``fp8::scaled_mm``, which a CPU runs; the
    two scales are elements ``a_at`` and ``b_at`` of vectors. ``added``: the bias, a vector, and the
    addend, a matrix, if there are any. All are contiguous and on the current device, N is a
    multiple of 16, and what is added is of ``out``'s dtype. ``algorithm``: the index into those
    that cuBLASLt lists; ``aten._scaled_mm`` takes the first.
    Raises IndexError if fewer are listed, CublasltError if cuBLASLt refuses.
    """
    bias = addend = None
    for tensor in added:
        if tensor.dim() == 1:
            bias = tensor
        else:
            addend = tensor
    device_index = a.get_device()
    if device_index < 0:
        scales = a_scale_inv[a_at : a_at + 1], b_scale_inv[b_at : b_at + 1]
        out.copy_(scaled_mm(a, b, *scales, bias, out.dtype, fast_accum, addend))
        return
    how = a.dtype, b.dtype, out.dtype, bias is not None, fast_accum
    plan = _plan_of(a.shape, b.shape, how, device_index)
    with record_function(plan.label) if is_profiled() else _NOT_PROFILED:
        plan.run(algorithm, a, b, a_scale_inv, b_scale_inv, bias, addend, out, a_at, b_at)


@functools.cache
def _plan_of(a: tuple[int, int], b: tuple[int, int], how: Any, device_index: int) -> _Plan:
    """The plan for operands of these sizes: one look-up at every launch."""
    return _plan(Gemm(a[0], b[0], a[1], *how), device_index)


def sizes_of(label: str) -> tuple[int, int, int] | None:
    """M, N and K of what a profile shows of a ``launch``; None for what is not one."""
    name, _, sizes = label.partition(" ")
    if name != _LABEL:
        return None
    m, n, k = map(int, sizes.split("x"))
    return m, n, k


def _multiplied(
    a: Tensor,
    b: Tensor,
    a_scale_inv: Tensor,
    b_scale_inv: Tensor,
    bias: Tensor | None,
    addend: Tensor | None,
    out_dtype: torch.dtype,
    fast_accum: bool,
    algorithm: int,
    a_at: int = 0,
    b_at: int = 0,
) -> Tensor:
    out = a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)
    operands = (a.contiguous(), b.contiguous(), a_scale_inv, b_scale_inv)
    added = (tensor.contiguous() for tensor in (bias, addend) if tensor is not None)
    with torch.cuda.device_of(a):
        launch(
            *operands,
            *added,
            fast_accum=fast_accum,
            algorithm=algorithm,
            a_at=a_at,
            b_at=b_at,
            out=out,
        )
    return out


def _fake(a: Tensor, b: Tensor, *others: Any) -> Tensor:
    _, _, _, _, out_dtype, *_ = others
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


# The same as an operator, for graphs.
_NAME = "fp8::scaled_mm_cublaslt"
torch.library.define(
    _NAME,
    "(Tensor a, Tensor b, Tensor a_scale_inv, Tensor b_scale_inv, Tensor? bias,"
    " Tensor? addend, ScalarType out_dtype, bool fast_accum, int algorithm,"
    " int a_at=0, int b_at=0) -> Tensor",
    tags=torch.Tag.needs_exact_strides,
)
torch.library.impl(_NAME, ("cuda", "cpu"), _multiplied)
torch.library.register_fake(_NAME, _fake)
SCALED_MM_CUBLASLT = torch.ops.fp8.scaled_mm_cublaslt.default
call_from_wrapper(SCALED_MM_CUBLASLT, launch)
