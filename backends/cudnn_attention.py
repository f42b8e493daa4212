"""``fp8::attention`` by cuDNN: a plan for each shape, made by NVIDIA's frontend for Python.

PyTorch calls cuDNN for attention in bfloat16 and float16 only. The frontend
(nvidia-cudnn-frontend, https://docs.nvidia.com/deeplearning/cudnn/frontend/latest/operations/Attention.html)
takes the library that PyTorch has loaded.
"""

from __future__ import annotations

import functools
import importlib
import threading
from typing import Any

import torch
from torch import Tensor

from ..attention import SCHEMA, attention, fake
from ..cost import AttentionWork
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


@functools.cache
def _handle(device: torch.device) -> Any:
    cudnn = importlib.import_module("cudnn")
    with torch.cuda.device(device):
        return cudnn.create_handle()


class _Plan:
    """A graph of cuDNN's, built for attention of certain sizes."""

    def __init__(self, work: AttentionWork, scale: float, device: torch.device) -> None:
        cudnn = importlib.import_module("cudnn")
        self._cudnn, self._handle = cudnn, _handle(device)
        fp8, f32 = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
        self._graph = graph = cudnn.pygraph(
            io_data_type=fp8,
            intermediate_data_type=f32,
            compute_data_type=f32,
            handle=self._handle,
        )
        q, kv = (work.heads, work.queries), (work.kv_heads, work.keys)
        layouts = [_layout(work.batch, *sizes, work.head) for sizes in (q, kv, kv)]
        operands = [graph.tensor(**layout, data_type=fp8) for layout in layouts]
        names = ("descale_q", "descale_k", "descale_v", "scale_o", "descale_s", "scale_s")
        scales = {name: graph.tensor(dim=_ONE, stride=_ONE, data_type=f32) for name in names}
        out, sums, *largest = graph.sdpa_fp8(
            **dict(zip("qkv", operands, strict=True)),
            **scales,
            generate_stats=True,
            attn_scale=scale,
            use_causal_mask=work.is_causal,
        )
        _declare(out, **layouts[0], data_type=fp8)
        _declare(sums, **_layout(work.batch, *q, 1, by_token=False), data_type=f32)
        for each in largest:
            _declare(each, _ONE, _ONE, f32)
        try:
            graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        except cudnn.cudnnGraphNotSupportedError as error:
            raise OptionError(
                f"cuDNN {cudnn.backend_version()} has no FP8 for {work}; leave out option "
                "'attention', or choose 'high_precision'"
            ) from error
        self._workspace_bytes = max(1, graph.get_workspace_size())
        self._brought = (*operands, *list(scales.values())[:4], out, sums)
        self._numerators = (scales["descale_s"], scales["scale_s"])
        self._unread = largest

    def run(self, *brought: Tensor) -> None:
        """Launch it on the current stream: q, k, v, their scale_inv, out_scale, out and sums.

        Nothing is kept on the device from call to call: memory taken in the first, which may be
        the one before a CUDA graph is recorded, would lie in that graph's pool.
        """
        workspace = brought[0].new_empty(self._workspace_bytes, dtype=torch.uint8)
        scale = Format.E4M3.max
        both = torch.linspace(1 / scale, scale, 2, device=workspace.device)  # in one launch
        unread = torch.empty(len(self._unread), device=workspace.device)
        given = dict(zip(self._brought, brought, strict=True))
        given |= dict(zip(self._numerators, both.split(1), strict=True))
        given |= dict(zip(self._unread, unread.split(1), strict=True))
        with _lock:
            self._cudnn.set_stream(self._handle, current_stream(brought[0].get_device()))
            self._graph.execute(given, workspace, handle=self._handle)


def _layout(
    batch: int, heads: int, rows: int, head: int, *, by_token: bool = True
) -> dict[str, list[int]]:
    """``[batch, heads, rows, head]``, of which the heads of a token, or the rows of a head, lie
    beside each other.
    """
    of_head, of_row = (head, heads * head) if by_token else (rows * head, head)
    return {
        "dim": [batch, heads, rows, head],
        "stride": [heads * rows * head, of_head, of_row, 1],
    }


def _declare(result: Any, dim: list[int], stride: list[int], data_type: Any) -> None:
    """Have a result of the graph written to memory."""
    result.set_output(True).set_dim(dim).set_stride(stride).set_data_type(data_type)


@functools.cache
def _plan(work: AttentionWork, scale: float, device: torch.device) -> _Plan:
    with torch.cuda.device(device):
        return _Plan(work, scale, device)


def _run(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *scales, batch, heads, kv_heads, is_causal, scale = others
    queries, keys = q.shape[0] // batch, k.shape[0] // batch
    sizes = (batch, heads, kv_heads, queries, keys, q.shape[1] // heads)
    out, sums = fake(q, *others)
    plan = _plan(AttentionWork(*sizes, is_causal), scale, q.device)
    with torch.cuda.device_of(q):
        plan.run(q, k, v, *scales, out, sums)
    return out, sums


_NAME = "fp8::attention_cudnn"
torch.library.define(_NAME, SCHEMA, tags=torch.Tag.needs_exact_strides)
torch.library.impl(_NAME, "cuda", _run)
torch.library.impl(_NAME, "cpu", attention)
torch.library.register_fake(_NAME, fake)
ATTENTION_CUDNN = torch.ops.fp8.attention_cudnn.default
