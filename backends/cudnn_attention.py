"""``fp8::attention`` by cuDNN: a plan for each shape, made by NVIDIA's frontend for Python.

PyTorch calls cuDNN for attention in bfloat16 and float16 only. The frontend
(nvidia-cudnn-frontend, https://docs.nvidia.com/deeplearning/cudnn/frontend/latest/operations/Attention.html)
takes the library that PyTorch has loaded.
"""

from __future__ import annotations

import functools
import importlib
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention import attention
from ..errors import OptionError
from ..formats import Format
from ..internals import current_stream

_PACKAGE = "nvidia-cudnn-frontend"
_ONE = [1, 1, 1, 1]  # cuDNN has four dimensions for everything
_lock = threading.Lock()  # a handle has one stream at a time


def why_not() -> str | None:
    """What is missing for FP8 attention, or None."""
    try:
        importlib.import_module("cudnn")
    except ImportError as error:
        return f"the package {_PACKAGE} ({error}): pip install {_PACKAGE}"
    return None


class Shape(NamedTuple):
    """What a plan depends on; see ``fp8::attention``."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head: int
    is_causal: bool
    scale: float


@functools.cache
def _handle(device_index: int) -> Any:
    cudnn = importlib.import_module("cudnn")
    with torch.cuda.device(device_index):
        return cudnn.create_handle()


class _Plan:
    """A graph of cuDNN's, built for a shape."""

    def __init__(self, shape: Shape, device_index: int) -> None:
        cudnn = importlib.import_module("cudnn")
        self._cudnn, self._handle = cudnn, _handle(device_index)
        fp8, f32 = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
        self._graph = graph = cudnn.pygraph(
            io_data_type=fp8,
            intermediate_data_type=f32,
            compute_data_type=f32,
            handle=self._handle,
        )
        q, kv = (shape.heads, shape.queries), (shape.kv_heads, shape.keys)
        operands = [self._by_head(shape, *sizes) for sizes in (q, kv, kv)]
        names = ("descale_q", "descale_k", "descale_v", "scale_o", "descale_s", "scale_s")
        scales = {name: graph.tensor(dim=_ONE, stride=_ONE, data_type=f32) for name in names}
        out, sums, *largest = graph.sdpa_fp8(
            **dict(zip("qkv", operands, strict=True)),
            **scales,
            generate_stats=True,
            attn_scale=shape.scale,
            use_causal_mask=shape.is_causal,
        )
        dim, stride = self._layout(shape, *q)
        out.set_output(True).set_dim(dim).set_stride(stride).set_data_type(fp8)
        dim = [shape.batch, *q, 1]
        stride = [shape.heads * shape.queries, shape.queries, 1, 1]
        sums.set_output(True).set_dim(dim).set_stride(stride).set_data_type(f32)
        for each in largest:
            each.set_output(True).set_dim(_ONE).set_stride(_ONE).set_data_type(f32)
        try:
            graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        except cudnn.cudnnGraphNotSupportedError as error:
            raise OptionError(
                f"cuDNN {cudnn.backend_version()} has no FP8 attention for {shape}; leave out "
                "option 'attention', or choose 'high_precision'"
            ) from error
        self._workspace_bytes = max(1, graph.get_workspace_size())
        # The same at every call: the scale of numerators, and where it writes what nobody reads.
        known = (scales["descale_s"], scales["scale_s"], *largest)
        values = [1 / Format.E4M3.max, Format.E4M3.max, 0.0, 0.0]
        same = torch.tensor(values, device=torch.device("cuda", device_index))
        self._same = dict(zip(known, same.split(1), strict=True))
        self._brought = (*operands, *list(scales.values())[:4], out, sums)

    def _layout(self, shape: Shape, heads: int, rows: int) -> tuple[list[int], list[int]]:
        """The sizes and strides of ``[batch * rows, heads * D]``, as cuDNN counts dimensions."""
        width = heads * shape.head
        return [shape.batch, heads, rows, shape.head], [rows * width, shape.head, width, 1]

    def _by_head(self, shape: Shape, heads: int, rows: int) -> Any:
        dim, stride = self._layout(shape, heads, rows)
        return self._graph.tensor(dim=dim, stride=stride, data_type=self._cudnn.data_type.FP8_E4M3)

    def run(self, *brought: Tensor) -> None:
        """Launch it on the current stream: q, k, v, their scale_inv, out_scale, out and sums."""
        workspace = brought[0].new_empty(self._workspace_bytes, dtype=torch.uint8)
        given = dict(zip(self._brought, brought, strict=True)) | self._same
        with _lock:
            self._cudnn.set_stream(self._handle, current_stream(brought[0].get_device()))
            self._graph.execute(given, workspace, handle=self._handle)


@functools.cache
def _plan(shape: Shape, device_index: int) -> _Plan:
    with torch.cuda.device(device_index):
        return _Plan(shape, device_index)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale_inv: Tensor,
    k_scale_inv: Tensor,
    v_scale_inv: Tensor,
    out_scale: Tensor,
    batch: int,
    heads: int,
    kv_heads: int,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    queries, keys = q.shape[0] // batch, k.shape[0] // batch
    sizes = (batch, heads, kv_heads, queries, keys, q.shape[1] // heads)
    out = torch.empty_like(q)
    sums = q.new_empty((batch, heads, queries), dtype=torch.float32)
    plan = _plan(Shape(*sizes, is_causal, scale), q.get_device())
    with torch.cuda.device_of(q):
        plan.run(q, k, v, q_scale_inv, k_scale_inv, v_scale_inv, out_scale, out, sums)
    return out, sums


_NAME = "fp8::attention_cudnn"
_SCHEMA = torch.library.infer_schema(_run, mutates_args=())
torch.library.define(_NAME, _SCHEMA, tags=torch.Tag.needs_exact_strides)
torch.library.impl(_NAME, "cuda", _run)
torch.library.impl(_NAME, "cpu", attention)
torch.library.register_fake(_NAME, lambda *args: torch.ops.fp8.attention(*args))
ATTENTION_CUDNN = torch.ops.fp8.attention_cudnn.default
