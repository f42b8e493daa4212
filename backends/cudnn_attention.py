"""``fp8::attention`` and its backward by cuDNN: plans, made by NVIDIA's frontend for Python.

PyTorch calls cuDNN for attention in bfloat16 and float16 only. The frontend
(nvidia-cudnn-frontend, https://docs.nvidia.com/deeplearning/cudnn/frontend/latest/operations/Attention.html)
takes the library that PyTorch has loaded.
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..attention import (
    BACKWARD_SCHEMA,
    SCHEMA,
    attention,
    attention_backward,
    fake,
    fake_backward,
)
from ..cost import AttentionWork
from ..errors import OptionError
from ..formats import Format
from ..internals import current_stream

_PACKAGE = "nvidia-cudnn-frontend"
_NUMBER = {"dim": [1] * 4, "stride": [1] * 4}  # cuDNN has four dimensions for everything
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
    """A graph of cuDNN's, built for attention of certain sizes; or for its backward."""

    def __init__(
        self, work: AttentionWork, scale: float, device: torch.device, *, backward: bool
    ) -> None:
        cudnn = importlib.import_module("cudnn")
        self._cudnn, self._handle = cudnn, _handle(device)
        self._types = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
        self._graph = cudnn.pygraph(
            io_data_type=self._types[0],
            intermediate_data_type=self._types[1],
            compute_data_type=self._types[1],
            handle=self._handle,
        )
        # Of the query, whose are the output's, too; of key and value; and of the softmax's sums.
        self._q = _layout(work.batch, work.heads, work.queries, work.head)
        self._kv = _layout(work.batch, work.kv_heads, work.keys, work.head)
        self._sums = _layout(work.batch, work.heads, work.queries, 1, by_token=False)
        how = {"attn_scale": scale, "use_causal_mask": work.is_causal}
        # What a call brings, in its order; and the numbers that are written and nobody reads.
        self._brought, self._unread = (self._backward if backward else self._forward)(how)
        try:
            self._graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        except cudnn.cudnnGraphNotSupportedError as error:
            raise OptionError(
                f"cuDNN {cudnn.backend_version()} has no FP8 for {work}"
                f"{' in backward' if backward else ''}; leave out option 'attention', or choose "
                "'high_precision'"
            ) from error
        self._workspace_bytes = max(1, self._graph.get_workspace_size())

    def _forward(self, how: dict[str, Any]) -> tuple[list[Any], list[Any]]:
        operands = [self._copy(layout) for layout in (self._q, self._kv, self._kv)]
        names = ("descale_q", "descale_k", "descale_v", "scale_o")
        scales = {name: self._number() for name in names}
        out, sums, *unread = self._graph.sdpa_fp8(
            **dict(zip("qkv", operands, strict=True)),
            **scales,
            **self._numerators(),
            **how,
            generate_stats=True,
        )
        self._declare(out, self._q, self._types[0])
        self._declare(sums, self._sums, self._types[1])
        for each in unread:
            self._declare(each, _NUMBER, self._types[1])
        return [*operands, *scales.values(), out, sums], unread

    def _backward(self, how: dict[str, Any]) -> tuple[list[Any], list[Any]]:
        layouts = (self._q, self._kv, self._kv)
        grad_out, q, k, v, out = (self._copy(each) for each in (self._q, *layouts, self._q))
        sums = self._graph.tensor(**self._sums, data_type=self._types[1])
        inverses = {f"descale_{name}": self._number() for name in ("dO", "q", "k", "v", "o", "dP")}
        scales = {f"scale_{name}": self._number() for name in ("dP", "dQ", "dK", "dV")}
        *gradients, of_q, of_k, of_v, of_products = self._graph.sdpa_fp8_backward(
            **{"q": q, "k": k, "v": v, "o": out, "dO": grad_out, "stats": sums},
            **inverses,
            **scales,
            **self._numerators(),
            **how,
        )
        for gradient, layout in zip(gradients, layouts, strict=True):
            self._declare(gradient, layout, self._types[0])
        amax = [of_products, of_q, of_k, of_v]
        for each in amax:
            self._declare(each, _NUMBER, self._types[1])
        taken = [grad_out, q, k, v, out, sums, *inverses.values(), *scales.values()]
        return [*taken, *gradients, *amax], []

    def _copy(self, layout: dict[str, list[int]]) -> Any:
        return self._graph.tensor(**layout, data_type=self._types[0])

    def _number(self) -> Any:
        return self._graph.tensor(**_NUMBER, data_type=self._types[1])

    def _numerators(self) -> dict[str, Any]:
        """The scale of numerators, and its inverse, the same at every call."""
        self._same = {name: self._number() for name in ("descale_s", "scale_s")}
        return self._same

    def _declare(self, result: Any, layout: dict[str, list[int]], data_type: Any) -> None:
        """Have a result of the graph written to memory."""
        result.set_output(True).set_dim(layout["dim"]).set_stride(layout["stride"])
        result.set_data_type(data_type)

    def run(self, *brought: Tensor) -> None:
        """Launch it on the current stream.

        Nothing is kept on the device from call to call: memory taken in the first, which may be
        the one before a CUDA graph is recorded, would lie in that graph's pool.
        """
        workspace = brought[0].new_empty(self._workspace_bytes, dtype=torch.uint8)
        scale = Format.E4M3.max
        both = torch.linspace(1 / scale, scale, 2, device=workspace.device)  # in one launch
        unread = torch.empty(max(1, len(self._unread)), device=workspace.device)
        given = dict(zip(self._brought, brought, strict=True))
        given |= dict(zip(self._same.values(), both.split(1), strict=True))
        given |= dict(zip(self._unread, unread.split(1), strict=False))
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


@functools.cache
def _plan(work: AttentionWork, scale: float, device: torch.device, backward: bool) -> _Plan:
    with torch.cuda.device(device):
        return _Plan(work, scale, device, backward=backward)


def _planned(q: Tensor, k: Tensor, how: Sequence[Any], *, backward: bool) -> _Plan:
    batch, heads, kv_heads, is_causal, scale = how
    queries, keys = q.shape[0] // batch, k.shape[0] // batch
    sizes = (batch, heads, kv_heads, queries, keys, q.shape[1] // heads)
    return _plan(AttentionWork(*sizes, is_causal), scale, q.device, backward)


def _run(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    scales, how = others[:4], others[4:]
    out, sums = fake(q, *others)
    plan = _planned(q, k, how, backward=False)
    with torch.cuda.device_of(q):
        plan.run(q, k, v, *scales, out, sums)
    return out, sums


def _run_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    operands, inverses, scales = args[:6], args[6:10], args[10]
    products_inverse, *how, amax, slot = args[11:]
    _, q, k, *_ = operands
    *gradients, found = fake_backward(*args)
    plan = _planned(q, k, how, backward=True)
    with torch.cuda.device_of(q):
        out_inverse = inverses[-1]  # v's
        plan.run(
            *operands,
            *inverses,
            out_inverse,
            products_inverse,
            *scales.split(1),
            *gradients,
            *found.split(1),
        )
        _track(amax, slot, found)
    return gradients[0], gradients[1], gradients[2]


def _track(amax: Tensor | None, slot: int, found: Tensor) -> None:
    if amax is not None:
        part = amax[slot : slot + len(found)]
        torch.maximum(part, found, out=part)


def _reference_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *given, amax, slot = args
    *gradients, found = attention_backward(*given)
    _track(amax, slot, found)
    return gradients[0], gradients[1], gradients[2]


_NAME = "fp8::attention_cudnn"
torch.library.define(_NAME, SCHEMA, tags=torch.Tag.needs_exact_strides)
torch.library.impl(_NAME, "cuda", _run)
torch.library.impl(_NAME, "cpu", attention)
torch.library.register_fake(_NAME, fake)
ATTENTION_CUDNN = torch.ops.fp8.attention_cudnn.default

# Records the amax of what it rounds in ``amax``, if given, at four slots from ``slot`` on.
_BACKWARD_NAME = "fp8::attention_backward_cudnn"
_BACKWARD_SCHEMA = (
    BACKWARD_SCHEMA.partition(") ->")[0]
    + ", Tensor(a!)? amax, int slot) -> (Tensor, Tensor, Tensor)"
)
torch.library.define(_BACKWARD_NAME, _BACKWARD_SCHEMA, tags=torch.Tag.needs_exact_strides)
torch.library.impl(_BACKWARD_NAME, "cuda", _run_backward)
torch.library.impl(_BACKWARD_NAME, "cpu", _reference_backward)
torch.library.register_fake(_BACKWARD_NAME, lambda *args: fake_backward(*args)[:-1])
ATTENTION_BACKWARD_CUDNN = torch.ops.fp8.attention_backward_cudnn.default
