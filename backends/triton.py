"""Replace the FP8 nodes of a final graph by Triton kernel launches and cuBLASLt calls.

What a node does is described by the ``Launch`` that its kernel's file builds; here it becomes a
node that Inductor inlines. Amax tracking, a node of its own so far, moves into the casts.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
from torch import fx

from .. import ops
from ..attention import gradient_scales
from ..errors import PassError
from ..internals import (
    FloorDiv,
    emit_kernel_launch,
    emit_materialized,
    is_primal,
)
from ..ir import (
    ATTENTION,
    ATTENTION_BACKWARD,
    DEQUANTIZE,
    GRADIENT_SCALES,
    RESHAPES,
    SCALED_MM,
    SCALED_MM_BLOCKS,
    SCALED_MMS,
    TRACK_AMAX,
    args_of,
    aten,
    emit,
    evaluate,
    fake_mode_of,
    size_expr,
)
from ..regions import is_aligned
from .block_gemms import inline, is_scaled_mm, lower_to_scaled_mm
from .bundle import NAME, bundle_launch, bundles, can_share, emit_bundle, prefix
from .cublaslt import SCALED_MM_CUBLASLT
from .cudnn_attention import ATTENTION_BACKWARD_CUDNN, ATTENTION_CUDNN
from .fused import emit_once, launches, partial_rows, tiles
from .gemm_choice import block_config, few_rows_config, gemm_shape
from .kernels.launch import Launch
from .kernels.scaled_mm import scaled_mm_launch
from .kernels.scaled_mm_blocks import scaled_mm_blocks_launch
from .kernels.scaled_mm_few_rows import (
    ONE_SCALE,
    FewRowsConfig,
    scaled_mm_few_rows_launch,
)
from .kernels.update_scales import update_scales
from .region import COPIES, Region
from .tuning import CublasltAlgorithm, choose_gemm
from .words import FILL, TRACK, fill_words, track_amax

torch.library.impl("fp8::update_scales", "cuda", update_scales)  # one launch instead of a dozen


def lower_to_triton(gm: fx.GraphModule) -> dict[str, str]:
    """Lower every region and ``fp8::scaled_mm``, in place; returns the kernels' source by name."""
    lowering = _Lowering(gm)
    bundled = lowering.bundle_weights()
    for node in list(gm.graph.nodes):
        if node.op == "call_module" and node not in bundled:
            lowering.region(node)
        elif node.target is SCALED_MM:
            lowering.scaled_mm(node)
        elif node.target is SCALED_MM_BLOCKS:
            lowering.scaled_mm_blocks(node)
        elif node.target is DEQUANTIZE:
            lowering.dequantize(node)
        elif node.target is ATTENTION:
            node.target = ATTENTION_CUDNN
        elif node.target is ATTENTION_BACKWARD:
            lowering.attention_backward(node)
        elif node.target is GRADIENT_SCALES:
            lowering.gradient_scales(node)
    lowering.words()
    # Not eliminate_dead_code: to it a launch, whose result nothing uses, is dead.
    for node in reversed(gm.graph.nodes):
        if not node.users and _is_replaceable(node):
            gm.graph.erase_node(node)
    gm.delete_all_unused_submodules()
    return lowering.sources


class _Lowering:
    """The state of lowering one graph."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.graph = gm.graph
        self.sources: dict[str, str] = {}
        self._tracked = self._take_tracking()  # amax getitem -> the state's amax tensor, and slot
        self._taken = 0  # of the words below
        self._scales: dict[fx.Node, dict[int, int]] = {}  # scaling state -> word -> slot
        self._amaxes: dict[fx.Node, dict[int, int]] = {}
        self._materialized: set[fx.Node] = set()
        self._regions = regions_of(gm)
        if self._regions:
            first = next(iter(self._regions))
            with self.graph.inserting_before(first):
                like = first.all_input_nodes[0]
                words = sum(region.word_count for region in self._regions.values())
                self._words = self._empty((words,), torch.float32, like)

    def _take_tracking(self) -> dict[fx.Node, tuple[fx.Node, int]]:
        tracked: dict[fx.Node, tuple[fx.Node, int]] = {}
        for node in list(self.graph.nodes):
            if node.target is TRACK_AMAX:
                amax, values, slots = args_of(node)
                tracked |= {value: (amax, slot) for value, slot in zip(values, slots, strict=True)}
                self.graph.erase_node(node)
        return tracked

    # --- regions -----------------------------------------------------------------------------

    def region(self, call: fx.Node) -> None:
        """A call of a region -> buffers and the launches that write them."""
        region = self._regions[call]
        source = emit_once(region)
        tile = tiles(region)[0]
        for value in (*_read(call, region), *_scales(call, region)):
            self._materialize(stored(value))
        outer, items = _outer(call, region), self._items(call, region)
        with self.graph.inserting_before(call):
            m, n = (self._extent(size, call) for size in (region.space.m, region.space.n))
            first = self._taken
            tensors = self._tensors(call, region, outer, items)
            if region.word_count:
                tensors["words"] = self._slice(self._words, first, self._taken)
            if region.sums:
                rows = _unwrap(partial_rows(region, _proxy(m), tile))
                tensors["partial"] = self._empty((rows, n), torch.float32, outer[region.inputs[0]])
            for i, total in enumerate(region.sums):
                tensors[f"sum_{i}"] = self._buffer(total, call)
            if region.sums_apart:
                rows = _unwrap(_proxy(m) * source.totals)
                tensors["totals"] = self._empty((rows,), torch.float32, outer[region.inputs[0]])
            sizes = {str(symbol): self._extent(symbol, call) for symbol in source.symbols}
            for launch in launches(
                region, source, tensors, sizes, m=_proxy(m), n=_proxy(n), tile=tile
            ):
                self._launch(launch)
            self._replace_outputs(region, items, tensors)
        self._keep_source(source.name, source.text)

    def bundle_weights(self) -> set[fx.Node]:
        """Casts of weights that are small -> a launch for several; returns their calls."""
        done: set[fx.Node] = set()
        for bundle in weight_bundles(self._regions):
            self._bundle(list(bundle), list(bundle.values()))
            done.update(bundle)
        return done

    def _bundle(self, calls: Sequence[fx.Node], regions: Sequence[Region]) -> None:
        bundle = emit_bundle(regions)
        tensors: dict[str, Any] = {}
        with self.graph.inserting_before(calls[0]):
            first = self._taken
            for index, (call, region) in enumerate(zip(calls, regions, strict=True)):
                items = self._items(call, region)
                own = self._tensors(call, region, _outer(call, region), items)
                tensors |= {f"{prefix(index)}{name}": tensor for name, tensor in own.items()}
                self._replace_outputs(region, items, own)
            tensors["words"] = self._slice(self._words, first, self._taken)
            self._launch(bundle_launch(bundle, tensors))
        self._keep_source(NAME, bundle.text)

    def _tensors(
        self,
        call: fx.Node,
        region: Region,
        outer: dict[fx.Node, fx.Node],
        items: dict[fx.Node, fx.Node],
    ) -> dict[str, Any]:
        """What a region reads and writes, by the names of its kernel's arguments, without sums and
        words; and views of the numbers that others read, by theirs.
        """
        tensors: dict[str, Any] = {node.name: outer[node] for node in region.inputs}
        tensors |= self._numbers(region, outer, items)
        if region.searched:
            size = self._extent(region.found_size, call)
            zero = 0 if region.scales_rows else None  # what several programs add to
            tensors["found"] = self._empty((size,), torch.int32, call.all_input_nodes[0], zero)
        for i, cast in enumerate(region.casts):
            for output in COPIES:
                if output in cast.outputs:
                    tensors[f"{output}_{i}"] = self._buffer(cast.outputs[output], call)
            if cast.is_given:
                scale = outer[args_of(cast.node)[1]]
                tensors[f"scale_{i}"] = self._slice(scale, cast.slot, cast.slot + 1)
        for i, block in enumerate(region.blocks):
            for output, node in block.outputs.items():
                tensors[f"block_{output}_{i}"] = self._buffer(node, call)
        for i, group in enumerate(region.groups):
            tensors[f"q_{i}"] = self._buffer(group.outputs["q"], call)
            tensors[f"group_scale_inv_{i}"] = self._buffer(group.outputs["scale_inv"], call)
        for i, value in enumerate(region.values):
            tensors[f"value_{i}"] = self._buffer(value, call)
        return tensors

    def _numbers(
        self, region: Region, outer: dict[fx.Node, fx.Node], items: dict[fx.Node, fx.Node]
    ) -> dict[str, fx.Node]:
        """Take a region's part of the words; returns views of those numbers that others read."""
        at = {name: self._taken + word for name, word in region.numbers.items()}
        self._taken += region.word_count
        read: dict[str, fx.Node] = {}
        for i, cast in enumerate(region.casts):
            if cast.is_delayed and not cast.is_given:
                slots = self._scales.setdefault(outer[args_of(cast.node)[1]], {})
                slots[at[f"scale_{i}"]] = cast.slot
            item = items.get(cast.outputs["amax"]) if "amax" in cast.outputs else None
            if item in self._tracked:
                amax, slot = self._tracked[item]
                self._amaxes.setdefault(amax, {})[at[f"amax_{i}"]] = slot
            read |= {f"{output}_{i}": node for output, node in cast.outputs.items()}
        read |= {f"found_scale_{i}": scale for i, scale in enumerate(region.scales)}
        views = {
            name: self._slice(self._words, at[name], at[name] + 1)
            for name, node in read.items()
            if name in at and node in items and items[node].users
        }
        self._materialized.update(views.values())
        return views

    def _in_words(self, number: fx.Node) -> tuple[fx.Node, int]:
        """The words and a number's place there, which spare the host a view; or the number."""
        if number.target is aten.slice.Tensor and args_of(number)[0] is self._words:
            return self._words, int(args_of(number)[2])
        return number, 0

    def words(self) -> None:
        """Fill the words before all regions, and track the amax behind them."""
        if not self._taken:
            return
        with self.graph.inserting_after(self._words):
            launch, source = fill_words(self._words, self._taken, list(self._scales.items()))
            self._launch(launch)
        self._keep_source(FILL, source)
        if self._amaxes:
            with self.graph.inserting_before(self.graph.output_node()):
                launch, source = track_amax(self._words, list(self._amaxes.items()))
                self._launch(launch)
            self._keep_source(TRACK, source)

    def _items(self, call: fx.Node, region: Region) -> dict[fx.Node, fx.Node]:
        """The nodes of this graph that stand for what the region's graph returns."""
        returned = args_of(region.gm.graph.output_node())[0]
        return {returned[args_of(item)[1]]: item for item in call.users}

    def _buffer(self, value: fx.Node, call: fx.Node) -> fx.Node:
        """An empty tensor for one of a region's outputs."""
        shape = [self._extent(size_expr(size), call) for size in value.meta["val"].shape]
        return self._empty(shape, value.meta["val"].dtype, call.all_input_nodes[0])

    def _replace_outputs(
        self, region: Region, items: dict[fx.Node, fx.Node], tensors: dict[str, Any]
    ) -> None:
        for i, cast in enumerate(region.casts):
            for output, node in cast.outputs.items():
                if node in items and items[node].users:
                    items[node].replace_all_uses_with(tensors[f"{output}_{i}"])
        for i, block in enumerate(region.blocks):
            for output, node in block.outputs.items():
                if node in items:
                    items[node].replace_all_uses_with(tensors[f"block_{output}_{i}"])
        for i, group in enumerate(region.groups):
            for output, name in (("q", f"q_{i}"), ("scale_inv", f"group_scale_inv_{i}")):
                if group.outputs[output] in items:
                    items[group.outputs[output]].replace_all_uses_with(tensors[name])
        for i, value in enumerate(region.values):
            if value in items:
                items[value].replace_all_uses_with(tensors[f"value_{i}"])
        for i, scale in enumerate(region.scales):
            if scale in items and items[scale].users:
                items[scale].replace_all_uses_with(tensors[f"found_scale_{i}"])
        for i, node in enumerate(region.sums):
            if node in items:
                items[node].replace_all_uses_with(tensors[f"sum_{i}"])

    def _extent(self, expr: Any, before: fx.Node) -> Any:
        """A size as a number, or as a node of the graph that can be used ``before`` another."""
        if expr.is_number:
            return int(expr)
        for node in self.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt) and node.op == "placeholder":
                if size_expr(value) == expr:
                    return node
            elif isinstance(value, torch.Tensor) and value.dtype != torch.bool:
                for dim, size in enumerate(value.shape):
                    if size_expr(size) == expr and node < before:
                        return self._size(node, dim)
        if isinstance(expr, FloorDiv):
            value, divisor = (_proxy(self._extent(part, before)) for part in expr.args)
            return _unwrap(value // divisor)
        if expr.is_Mul or expr.is_Add:
            parts = [_proxy(self._extent(part, before)) for part in expr.args]
            combine = operator.mul if expr.is_Mul else operator.add
            return _unwrap(functools.reduce(combine, parts))
        raise PassError("lower", f"no tensor of the graph has the size {expr}", before)

    def scaled_mm(self, node: fx.Node) -> None:
        """``fp8::scaled_mm`` -> cuBLASLt or our kernel, whichever is fastest here."""
        shape, device = gemm_shape(node), args_of(node)[0].meta["val"].device.index or 0
        choice = choose_gemm(shape, device)
        if choice is None and shape.adds:
            self.scaled_mm(self._without_addend(node))
            return
        if choice is None:
            out = self._scaled_mm(node)
        elif isinstance(choice, CublasltAlgorithm):
            a, b, a_scale_inv, b_scale_inv, bias, out_dtype, fast_accum = args_of(node)[:7]
            addend = next(iter(args_of(node)[7:]), None)
            numbers, at = zip(*map(self._in_words, (a_scale_inv, b_scale_inv)), strict=True)
            args = (a, b, *numbers, bias, addend, out_dtype, fast_accum, choice.index, *at)
            with self.graph.inserting_before(node):
                out = emit(self.graph, SCALED_MM_CUBLASLT, args, f"{node.name}_lt", like=node)
        elif isinstance(choice, FewRowsConfig):
            out = self._few_rows(node, choice, ONE_SCALE)
        else:
            launch = functools.partial(
                scaled_mm_launch,
                config=choice,
                fast_accum=args_of(node)[-1],
                aligned=shape.aligned,
                num_sms=_multiprocessors(device),
            )
            out = self._own_gemm(node, launch, "scaled_mm")
        node.replace_all_uses_with(out)

    def scaled_mm_blocks(self, node: fx.Node) -> None:
        """``fp8::scaled_mm_blocks`` -> ``aten._scaled_mm`` where it can, else our kernels; which
        for few rows are faster.
        """
        few_rows = few_rows_config(node)
        if few_rows is None and is_scaled_mm(node):
            node.replace_all_uses_with(lower_to_scaled_mm(node))
            return
        for value in args_of(node)[:4]:
            self._materialize(value)
        if few_rows is not None:
            node.replace_all_uses_with(self._few_rows(node, few_rows, args_of(node)[6:8]))
            return
        launch = functools.partial(
            scaled_mm_blocks_launch,
            blocks=args_of(node)[6:8],
            config=block_config(node),
            fast_accum=args_of(node)[-1],
            aligned=is_aligned(size_expr(args_of(node)[1].meta["val"].shape[0])),
        )
        node.replace_all_uses_with(self._own_gemm(node, launch, "scaled_mm_blocks"))

    def dequantize(self, node: fx.Node) -> None:
        """``fp8::dequantize`` -> PyTorch's operators, which Inductor fuses into what reads it."""
        q, scale_inv, block, dtype = args_of(node)
        fn = functools.partial(ops.dequantized, block=block, dtype=dtype)
        (out,) = inline(node, fn, q, scale_inv)
        node.replace_all_uses_with(out)
        self.graph.erase_node(node)

    def gradient_scales(self, node: fx.Node) -> None:
        """``fp8::gradient_scales`` -> PyTorch's operators, of which Inductor makes one kernel."""
        known, slot, *inverses, head, scale = args_of(node)
        how = {"slot": slot, "head": head, "scale": scale}
        results = inline(node, functools.partial(_gradient_scales, **how), known, *inverses)
        for item in list(node.users):
            item.replace_all_uses_with(results[args_of(item)[1]])
            self.graph.erase_node(item)
        self.graph.erase_node(node)

    def attention_backward(self, node: fx.Node) -> None:
        """``fp8::attention_backward`` -> cuDNN's, which records the amax by itself."""
        tracked = [item for item in node.users if item in self._tracked]
        amax, slot = self._tracked[tracked[0]] if tracked else (None, 0)
        with self.graph.inserting_before(node):
            args = (*args_of(node), amax, slot)
            new = emit(self.graph, ATTENTION_BACKWARD_CUDNN, args, f"{node.name}_cudnn", like=node)
        for item in tracked:
            self.graph.erase_node(item)
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)

    def _without_addend(self, node: fx.Node) -> fx.Node:
        """Add apart from a scaled_mm, which is returned."""
        *args, addend = args_of(node)
        with self.graph.inserting_before(node):
            product = emit(self.graph, SCALED_MM, tuple(args), f"{node.name}_product", like=node)
            total = emit(self.graph, aten.add.Tensor, (product, addend), f"{node.name}_sum")
        node.replace_all_uses_with(total)
        return product

    def _few_rows(
        self, node: fx.Node, config: FewRowsConfig, blocks: Sequence[Sequence[int]]
    ) -> fx.Node:
        launch = functools.partial(
            scaled_mm_few_rows_launch,
            blocks=blocks,
            config=config,
            fast_accum=args_of(node)[-1],
        )
        return self._own_gemm(node, launch, "scaled_mm_few_rows")

    def _own_gemm(self, node: fx.Node, launch_of: Callable[..., Launch], stem: str) -> fx.Node:
        """Launch a kernel of ours for a GEMM; returns its output."""
        a, b, a_scale_inv, b_scale_inv, bias, out_dtype = args_of(node)[:6]
        with self.graph.inserting_before(node):
            m, n, k = self._size(a, 0), self._size(b, 0), self._size(a, 1)
            out = self._empty((m, n), out_dtype, a)
            operands = (a, b, out, a_scale_inv, b_scale_inv, bias)
            launch = launch_of(*operands, m=_proxy(m), n=_proxy(n), k=_proxy(k))
            self._launch(launch)
        self._keep_source(stem, _configured_source(launch))
        return out

    def _scaled_mm(self, node: fx.Node) -> fx.Node:
        """``aten._scaled_mm``: cuBLASLt's first algorithm."""
        a, b, a_scale_inv, b_scale_inv, bias, out_dtype, fast_accum = args_of(node)
        with self.graph.inserting_before(node):
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
            writes=launch.writes,
        )
        for new in node.all_input_nodes:
            _evaluate_missing(new)

    def _keep_source(self, stem: str, source: str) -> None:
        if source not in self.sources.values():
            count = sum(name.startswith(stem) for name in self.sources)
            self.sources[f"{stem}_{count}"] = source

    def _empty(
        self, size: Sequence[Any], dtype: torch.dtype, like: fx.Node, fill: float | None = None
    ) -> fx.Node:
        device = like.meta["val"].device
        for extent in size:
            if isinstance(extent, fx.Node):
                _evaluate_missing(extent)
        if fill is None:
            node = self.graph.call_function(aten.empty.memory_format, (list(size),))
        else:
            node = self.graph.call_function(aten.full.default, (list(size), fill))
        node.kwargs = {"dtype": dtype, "device": device, "pin_memory": False}
        sizes = [extent.meta["val"] if isinstance(extent, fx.Node) else extent for extent in size]
        with fake_mode_of(self.graph):
            node.meta["val"] = torch.empty(sizes, dtype=dtype, device=device)
        return node

    def _slice(self, flat: fx.Node, first: int, end: int) -> fx.Node:
        """Some elements of a vector. What ``evaluate`` takes a millisecond for, and there are
        dozens in every layer, ``as_strided`` does in a fifth.
        """
        args, name = (flat, 0, first, end), f"{flat}_{first}"
        node = self.graph.create_node("call_function", aten.slice.Tensor, args, name=name)
        with fake_mode_of(self.graph):
            node.meta["val"] = flat.meta["val"].as_strided((end - first,), (1,), first)
        return node

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


def regions_of(gm: fx.GraphModule) -> dict[fx.Node, Region]:
    """The regions of a graph after grow_regions, by their calls, in order."""
    calls = [node for node in gm.graph.nodes if node.op == "call_module"]
    return {call: Region.of(_submodule(gm, call)) for call in calls}


def weight_bundles(regions: Mapping[fx.Node, Region]) -> list[dict[fx.Node, Region]]:
    """The casts of weights that share a launch, by their calls."""
    calls = {
        region: call
        for call, region in regions.items()
        if can_share(region) and all(is_primal(node) for node in _read(call, region))
    }
    return [{calls[r]: r for r in bundle} for bundle in bundles(calls) if len(bundle) > 1]


def _gradient_scales(
    known: torch.Tensor,
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    slot: int,
    head: int,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    return gradient_scales(known, slot, grad_out, q, k, v, head, scale)


def _is_replaceable(node: fx.Node) -> bool:
    """Whether a node is one that lowering replaces, or arithmetic on sizes."""
    if node.op == "call_module" or node.target in SCALED_MMS:
        return True
    return node.op == "call_function" and node.target in vars(operator).values()


def _outer(call: fx.Node, region: Region) -> dict[fx.Node, fx.Node]:
    """The nodes of the graph that a region's inputs stand for."""
    return dict(zip(region.gm.graph.find_nodes(op="placeholder"), args_of(call), strict=True))


def _scales(call: fx.Node, region: Region) -> list[fx.Node]:
    outer = _outer(call, region)
    return [outer[args_of(cast.node)[1]] for cast in region.casts if cast.is_delayed]


def _read(call: fx.Node, region: Region) -> list[fx.Node]:
    outer = _outer(call, region)
    return [outer[node] for node in region.inputs]


def stored(value: fx.Node) -> fx.Node:
    """What must be in memory for a kernel to read a value: of a view, what it is a view of."""
    while value.target in (*RESHAPES, aten.expand.default):
        value = args_of(value)[0]
    return value


def _submodule(gm: fx.GraphModule, call: fx.Node) -> fx.GraphModule:
    module = gm.get_submodule(str(call.target))
    assert isinstance(module, fx.GraphModule)
    return module


def _configured_source(launch: Launch) -> str:
    """A kernel's source, below a line with what it is compiled with."""
    constants = " ".join(f"{k}={v}" for k, v in launch.constants.items())
    head = f"# {constants} num_warps={launch.num_warps} num_stages={launch.num_stages}\n"
    return head + inspect.getsource(launch.kernel.fn)


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
