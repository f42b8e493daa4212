"""Replace the FP8 nodes of a final graph by Triton kernel launches and cuBLASLt calls.

What a node does is described by the ``Launch`` that its kernel's file builds; here it becomes a
node that Inductor inlines. Amax tracking, a node of its own so far, moves into the casts.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import fx

from .. import ops
from ..internals import emit_kernel_launch, emit_materialized
from ..ir import (
    QUANTIZE,
    SCALED_MM,
    TRACK_AMAX,
    args_of,
    aten,
    emit,
    evaluate,
    quantize_output,
    value_key,
)
from .kernels.launch import Launch
from .kernels.quantize import quantize_launches
from .kernels.scaled_mm import scaled_mm_launch
from .kernels.update_scales import update_scales
from .tuning import CUBLASLT, GemmShape, choose_gemm

ops.update_scales.register_kernel("cuda", update_scales)  # one launch instead of a dozen

_SIZE_HINT = 8192  # for a symbolic dimension that no example gave a value


def lower_to_triton(gm: fx.GraphModule) -> dict[str, str]:
    """Lower every ``fp8::`` node, in place; returns the source of each kernel by its name."""
    lowering = _Lowering(gm)
    for node in list(gm.graph.nodes):
        if node.target is QUANTIZE:
            lowering.quantize(node)
        elif node.target is SCALED_MM:
            lowering.scaled_mm(node)
    # Not eliminate_dead_code: to it a launch, whose result nothing uses, is dead.
    for node in reversed(gm.graph.nodes):
        if not node.users and (node.target in (QUANTIZE, SCALED_MM) or _is_getitem_of_cast(node)):
            gm.graph.erase_node(node)
    return lowering.sources


def _is_getitem_of_cast(node: fx.Node) -> bool:
    return node.target is operator.getitem and args_of(node)[0].target is QUANTIZE


class _Lowering:
    """The state of lowering one graph."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.graph = gm.graph
        self.sources: dict[str, str] = {}
        self._tracked = self._take_tracking()  # amax getitem -> the state's amax tensor
        self._casts = 0
        self._materialized: set[fx.Node] = set()
        casts = [node for node in gm.graph.nodes if node.target is QUANTIZE]
        if casts:
            with self.graph.inserting_before(casts[0]):
                # One zero per cast, where current scaling collects its amax.
                x = args_of(casts[0])[0]
                self._current_amax = self._empty((len(casts),), torch.float32, x, 0.0)

    def _take_tracking(self) -> dict[fx.Node, fx.Node]:
        tracked: dict[fx.Node, fx.Node] = {}
        for node in list(self.graph.nodes):
            if node.target is TRACK_AMAX:
                amax, values, _ = args_of(node)
                tracked |= dict.fromkeys(values, amax)
                self.graph.erase_node(node)
        return tracked

    def quantize(self, node: fx.Node) -> None:
        """``fp8::quantize`` -> buffers and two launches that write them."""
        self._materialize(value_key(args_of(node)[0])[0])
        x, scale, slot, fmt = args_of(node)[:4]
        outputs = {name: quantize_output(node, name) for name in ("fp8", "fp8_t", "scale_inv")}
        amax_item = quantize_output(node, "amax")
        with self.graph.inserting_before(node):
            m, n = (self._size(x, dim) for dim in (0, 1))
            q = outputs["fp8"] and self._empty((m, n), fmt, x)
            q_t = outputs["fp8_t"] and self._empty((n, m), fmt, x)
            scale_inv = self._empty((1,), torch.float32, x)
            amax = self._tracked.get(amax_item) if amax_item is not None else None
            launches = quantize_launches(
                x,
                q,
                q_t,
                scale and self._element(scale, slot),
                0,
                self._element(self._current_amax, self._casts),
                0,
                scale_inv,
                amax and self._element(amax, slot),
                m=_proxy(m),
                n=_proxy(n),
                stride_m=_proxy(self._stride(x, 0)),
                stride_n=_proxy(self._stride(x, 1)),
                format=fmt,
            )
            for launch in launches:
                self._launch(launch)
        self._casts += 1
        for item, buffer in zip(outputs.values(), (q, q_t, scale_inv), strict=True):
            if item is not None and buffer is not None:
                item.replace_all_uses_with(buffer)

    def scaled_mm(self, node: fx.Node) -> None:
        """``fp8::scaled_mm`` -> our kernel or ``aten._scaled_mm``, whichever is faster here."""
        a, b, a_scale_inv, b_scale_inv, bias, out_dtype, fast_accum = args_of(node)
        shape = _gemm_shape(node)
        with self.graph.inserting_before(node):
            config = choose_gemm(shape, a.meta["val"].device.index or 0)
            if config is None:
                out = self._cublaslt(node)
            else:
                m, n, k = self._size(a, 0), self._size(b, 0), self._size(a, 1)
                out = self._empty((m, n), out_dtype, a)
                self._launch(
                    scaled_mm_launch(
                        a,
                        b,
                        out,
                        a_scale_inv,
                        b_scale_inv,
                        bias,
                        m=_proxy(m),
                        n=_proxy(n),
                        k=_proxy(k),
                        config=config,
                        fast_accum=fast_accum,
                        num_sms=_multiprocessors(a.meta["val"].device.index or 0),
                    )
                )
        node.replace_all_uses_with(out)

    def _cublaslt(self, node: fx.Node) -> fx.Node:
        a, b, a_scale_inv, b_scale_inv, bias, out_dtype, fast_accum = args_of(node)
        right = emit(self.graph, aten.permute.default, (b, [1, 0]), f"{b}_right")
        args = (a, right, a_scale_inv, b_scale_inv, bias, None, out_dtype, fast_accum)
        return emit(self.graph, aten._scaled_mm.default, args, f"{node.name}_lt", like=node)

    def _materialize(self, value: fx.Node) -> None:
        """Have a value that Inductor computes written once, for both launches that read it."""
        if value.op == "placeholder" or value in self._materialized:
            return
        with self.graph.inserting_after(value):
            strides = [self._stride(value, dim) for dim in range(value.meta["val"].dim())]
        after = next((s for s in reversed(strides) if isinstance(s, fx.Node)), value)
        with self.graph.inserting_after(after):
            written = emit_materialized(self.graph, value, strides)
        value.replace_all_uses_with(
            written, delete_user_cb=lambda user: user is not written and user not in strides
        )
        self._materialized |= {value, written}

    def _launch(self, launch: Launch) -> None:
        sizes = {name: _unwrap(size) for name, size in launch.sizes.items()}
        tensors = {k: v for k, v in launch.tensors.items() if v is not None}
        unused = {k: None for k, v in launch.tensors.items() if v is None}
        node = emit_kernel_launch(
            self.graph,
            _configured(launch.kernel, launch.num_warps, launch.num_stages),
            tensors=tensors,
            constants={**unused, **sizes, **launch.constants},
            grid=tuple(_unwrap(g) for g in launch.grid),
            descriptors=launch.descriptors,
        )
        for new in node.all_input_nodes:
            _evaluate_missing(new)
        self._keep_source(launch)

    def _keep_source(self, launch: Launch) -> None:
        constants = " ".join(f"{k}={v}" for k, v in launch.constants.items())
        source = f"# {constants} num_warps={launch.num_warps} num_stages={launch.num_stages}\n"
        source += inspect.getsource(launch.kernel.fn)
        if source not in self.sources.values():
            stem = launch.kernel.fn.__name__.strip("_")
            count = sum(name.startswith(stem) for name in self.sources)
            self.sources[f"{stem}_{count}"] = source

    def _empty(
        self, size: Sequence[Any], dtype: torch.dtype, like: fx.Node, fill: float | None = None
    ) -> fx.Node:
        device = like.meta["val"].device
        if fill is None:
            node = self.graph.call_function(aten.empty.memory_format, (list(size),))
        else:
            node = self.graph.call_function(aten.full.default, (list(size), fill))
        node.kwargs = {"dtype": dtype, "device": device, "pin_memory": False}
        node.meta["val"] = evaluate(node)
        return node

    def _element(self, flat: fx.Node, index: int) -> fx.Node:
        """A view of one element: Inductor compiles one kernel for all slots that way."""
        return emit(self.graph, aten.slice.Tensor, (flat, 0, index, index + 1), f"{flat}_{index}")

    def _size(self, tensor: fx.Node, dim: int) -> Any:
        size = tensor.meta["val"].shape[dim]
        if isinstance(size, int):
            return size
        return emit(self.graph, aten.sym_size.int, (tensor, dim), f"{tensor}_size_{dim}")

    def _stride(self, tensor: fx.Node, dim: int) -> Any:
        stride = tensor.meta["val"].stride()[dim]
        if isinstance(stride, int):
            return stride
        return emit(self.graph, aten.sym_stride.int, (tensor, dim), f"{tensor}_stride_{dim}")


def gemm_kernel_name(node: fx.Node) -> str:
    """What was, or will be, chosen for a scaled_mm node."""
    device = args_of(node)[0].meta["val"].device
    config = choose_gemm(_gemm_shape(node), device.index or 0)
    return CUBLASLT if config is None else f"triton {config}"


def _gemm_shape(node: fx.Node) -> GemmShape:
    a, b, _, _, bias, out_dtype, fast_accum = args_of(node)
    (m, k), n = a.meta["val"].shape, b.meta["val"].shape[0]
    return GemmShape(
        m=_hint(m),
        n=_hint(n),
        k=_hint(k),
        left=a.meta["val"].dtype,
        right=b.meta["val"].dtype,
        out=out_dtype,
        bias=None if bias is None else bias.meta["val"].dtype,
        fast_accum=bool(fast_accum),
    )


def _hint(size: int | torch.SymInt) -> int:
    if isinstance(size, torch.SymInt):
        return int(size.node.hint) if size.node.has_hint() else _SIZE_HINT
    return size


@functools.cache
def _configured(kernel: Any, num_warps: int, num_stages: int) -> Any:
    """The kernel with its launch options, in the only form that Inductor takes them in."""
    config = triton.Config({}, num_warps=num_warps, num_stages=num_stages)
    return triton.autotune(configs=[config], key=[])(kernel)


@functools.cache
def _multiprocessors(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def _proxy(size: Any) -> Any:
    """A symbolic size as something that arithmetic turns into graph nodes."""
    return fx.Proxy(size) if isinstance(size, fx.Node) else size


def _unwrap(size: Any) -> Any:
    return size.node if isinstance(size, fx.Proxy) else size


def _evaluate_missing(node: fx.Node) -> None:
    """Give the nodes that arithmetic on proxies has made their ``meta["val"]``."""
    if "val" not in node.meta:
        for arg in node.all_input_nodes:
            _evaluate_missing(arg)
        node.meta["val"] = evaluate(node)
