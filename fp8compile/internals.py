"""Every use of PyTorch's private API, each with the versions that need it.

The rest of the package sees graphs, callables and plain functions only.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import TracingContext, detect_fake_mode
from torch._higher_order_ops import triton_kernel_wrap
from torch._higher_order_ops.triton_kernel_wrap import (
    create_tma_stable_metadata,
    kernel_side_table,
    triton_kernel_wrapper_mutation,
)
from torch._inductor import dependencies, inductor_prims
from torch._inductor import ir as inductor_ir
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.compile_fx import (
    _recursive_post_grad_passes,
    compile_fx,
    compile_fx_inner,
    view_to_reshape,
)
from torch._inductor.custom_graph_pass import (
    CustomGraphPass,
    CustomPartitionerFn,
    get_hash_for_files,
)
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.lowering import fallback_handler, register_lowering
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._inductor.runtime.static_triton_launcher import StaticallyLaunchedTritonKernel
from torch._inductor.select_algorithm import extern_kernels
from torch._inductor.utils import BoxedBool
from torch._inductor.virtualized import V
from torch._logging import trace_structured
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._ordered_set import OrderedSet
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils._sympy.functions import FloorDiv as FloorDiv  # ``//`` in a symbolic size

WithoutSubclasses = torch._C.DisableTorchFunctionSubclass  # operators see plain tensors inside
Split = Callable[[fx.GraphModule, fx.GraphModule, int], None]
_LARGEST_SIZE = 2**62  # beyond it are the upper bounds that stand for none
_FORCE_STRIDE_ORDER = inductor_prims.force_stride_order


def clone_dynamo_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy that may be changed: Dynamo reads its own graph again after the backend returns.

    All versions: AOTAutograd finds out which inputs are parameters through ``_dynamo_source`` and
    ``_param_name_to_source``; without them CUDA graphs would copy every weight at every step.
    Only Dynamo reads ``grapharg``, in its own graph. It refers weakly to a parameter, which nothing
    may where ``torch.__future__.set_swap_module_params_on_conversion`` is on, and the copy lives as
    long as what is compiled from it.
    """
    graph, copies = fx.Graph(), {}  # type: ignore[var-annotated]
    graph.output(graph.graph_copy(gm.graph, copies))
    clone = fx.GraphModule(gm, graph)
    clone.meta = dict(gm.meta)
    for name in ("_param_name_to_source", "compile_subgraph_reason", "torchdynamo_force_dynamic"):
        if name in gm.__dict__:
            clone.__dict__[name] = gm.__dict__[name]
    for original, copy in copies.items():
        if hasattr(original, "_dynamo_source"):
            copy._dynamo_source = original._dynamo_source
        copy.meta.pop("grapharg", None)
    graph.output_node().meta = gm.graph.output_node().meta.copy()
    return clone


def module_of(graph: fx.Graph, class_name: str) -> fx.GraphModule:
    """A module of a graph whose Python text is written only if something asks for it, or runs it.

    All versions: no public name; the text of a region takes longer than all else in making it one.
    """
    return _LazyGraphModule({}, graph, class_name=class_name)


def copy_of(graph: fx.Graph) -> fx.Graph:
    """A copy of a final or joint graph, with each node's meta copied."""
    copy, nodes = fx.Graph(), {}  # type: ignore[var-annotated]
    copy.output(copy.graph_copy(graph, nodes))
    copy.output_node().meta = graph.output_node().meta.copy()
    return copy


def add_input(gm: fx.GraphModule, name: str, example: Tensor) -> fx.Node:
    """Append a graph input that AOTAutograd takes for a static one, like a parameter.

    All versions: the order of Dynamo's own inputs must stay; ``tensor_dict`` and
    ``_dynamo_source`` are what Dynamo would have put there.
    """
    last = [node for node in gm.graph.nodes if node.op == "placeholder"][-1]
    with gm.graph.inserting_after(last):
        node = gm.graph.placeholder(name)
    context = TracingContext.try_get()
    mode = detect_fake_mode() or (context and context.fake_mode)
    fake = mode.from_tensor(example, static_shapes=True) if mode else example
    node.meta["example_value"] = fake  # no "val": Inductor would take it for an exported graph's
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    node._dynamo_source = ConstantSource(name)
    return node


def boxed(run: Callable[..., Any]) -> Callable[[list[Any]], Any]:
    """A function that takes its arguments in one list, which it empties, so that they are freed.

    All versions: AOTAutograd calls what has ``_boxed_call`` like that, and warns of what has not.
    """

    def call(args: list[Any]) -> Any:
        values = list(args)
        args.clear()
        return run(*values)

    call._boxed_call = True  # type: ignore[attr-defined]
    return call


def is_static_input(node: fx.Node) -> bool:
    """Whether a Dynamo graph's input is the same at every call: a parameter or a buffer.

    All versions: Dynamo notes it in ``tensor_dict``.
    """
    return "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})


def is_traced() -> bool:
    """Whether someone follows the operators that run: Dynamo, export, or a mode such as make_fx's,
    functorch, or TorchScript.
    """
    return (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.jit.is_tracing()
    )


def are_aliases(x: Tensor, other: Tensor) -> bool:
    """Whether two tensors lie in the same memory."""
    return bool(torch._C._is_alias_of(x, other))  # type: ignore[attr-defined]


def source_name(node: fx.Node) -> str:
    """Where Dynamo got a graph input from, such as ``L['self']._modules['fc']``, or ""."""
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return name() if callable(name) else str(name)


def last_inputs(gm: fx.GraphModule, count: int) -> list[fx.Node]:
    """The last ``count`` inputs of the forward, behind which a joint graph has its tangents."""
    return inputs_of(gm)[-count:]


def inputs_of(gm: fx.GraphModule) -> list[fx.Node]:
    """The inputs of the forward, in the order of the Dynamo graph's."""
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    return [node for node in inputs if not is_tangent(node)]


def is_tangent(node: fx.Node) -> bool:
    """Whether a joint graph's input is a gradient that comes in from outside."""
    return node.op == "placeholder" and node.name.startswith("tangents_")


def is_primal(node: fx.Node) -> bool:
    """Whether a final graph's input is one of the model's: a parameter, mostly.

    All versions: AOTAutograd calls them ``primals_1`` in training, ``arg0_1`` in inference.
    """
    return node.op == "placeholder" and node.name.startswith(("primals_", "arg"))


def mutated_between_forward_and_backward(node: fx.Node) -> None:
    """Allow an input that is saved for backward to be written before backward runs.

    All versions: compiled autograd passes no tensor that is marked so to the backward. Without the
    mark one forward may follow one backward, and PyTorch refuses several forwards before the first.
    """
    if not torch._dynamo.config.compiled_autograd:
        node.meta["saved_tensor_with_no_vc_check"] = True


def compile_with_inductor(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    joint: Callable[[fx.GraphModule], None],
    lowered: Callable[[fx.GraphModule], None],
    key: str,
    patches: Mapping[str, Any],
    use_caches: bool = True,
    cache_code_only: bool = False,
    inner_compile: Callable[..., Any] | None = None,
    around: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda inner: inner,
    on_split: Split | None = None,
) -> Callable[..., Any]:
    """Compile with ``joint`` run on the joint (or inference) graph, ``lowered`` on the final ones.

    ``key`` must name everything the two depend on: it goes into Inductor's cache keys. With
    ``use_caches=False`` they run for certain, and nothing is kept; with ``cache_code_only``
    ``joint`` does. ``inner_compile`` replaces Inductor's code generation; ``around`` changes what
    it is called with, and what it returns, which ``cache_code_only`` has to go with.
    ``on_split`` is told of a forward, its backward, and how many of the forward's outputs come
    before those that it keeps for the backward.
    """
    hooks: dict[str, Any] = {
        "joint_custom_pre_pass": _GraphPass(joint, key),
        "custom_partitioner_fn": _Partitioner(key, on_split),
        "post_grad_custom_post_pass": _GraphPass(lowered, key),
    }
    config = {_STATIC_LAUNCH: True, **patches, **hooks}
    inner = around(inner_compile or _compile_fx_inner)
    if use_caches and not cache_code_only:
        return compile_fx(gm, list(inputs), inner_compile=inner, config_patches=config)
    if not use_caches:
        config |= {"fx_graph_cache": False, "fx_graph_remote_cache": False}
    with torch._functorch.config.patch(enable_autograd_cache=False):
        return compile_fx(gm, list(inputs), inner_compile=inner, config_patches=config)


@functools.wraps(compile_fx_inner)
def _compile_fx_inner(*args: Any, **kwargs: Any) -> Any:
    """Inductor's code generation, for the backward too, which is compiled when it first runs."""
    with _inductor_patched:
        return compile_fx_inner(*args, **kwargs)


def compile_aside(
    inner: Callable[..., Any],
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    settings: Mapping[str, Any],
) -> Any:
    """Compile a graph beside the one that AOTAutograd asked for with ``settings``: one that runs
    now and then, without CUDA graphs.

    All versions: ``cudagraphs`` is a box, which Inductor also writes to; and Inductor tells
    AOTAutograd the strides of a graph's outputs, once.
    """
    context = TracingContext.try_get()
    told = None if context is None else context.output_strides
    if context is not None:
        context.output_strides = None
    try:
        return inner(
            gm, inputs, **{**settings, "cudagraphs": BoxedBool(False), "static_input_idxs": ()}
        )
    finally:
        if context is not None:
            context.output_strides = told


def only_final_graphs(gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
    """An ``inner_compile`` that runs Inductor's passes on a final graph, and makes no code of it.

    2.11 to 2.15: Inductor does the same before it lowers a graph.
    """
    view_to_reshape(gm)
    with V.set_fake_mode(detect_fake_mode(inputs)):
        _recursive_post_grad_passes(gm, is_inference=bool(kwargs.get("is_inference")))
    return gm.forward


def backward_compiled_early() -> AbstractContextManager[Any]:
    """Have AOTAutograd compile backward graphs with their forward, not when they first run.

    2.11 to 2.15. It would otherwise do so for graphs with symbolic sizes only.
    """
    return torch._functorch.config.patch(force_non_lazy_backward_lowering=True)


class _Patches:
    """Replaces functions of Inductor while any thread compiles.

    The first that begins does, the last that ends undoes it: a backward may be compiled while
    another thread compiles a forward.
    """

    def __init__(self, *patches: Callable[[], AbstractContextManager[None]]) -> None:
        self._patches = patches
        self._lock = threading.Lock()
        self._compiling = 0
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._compiling == 0:
                for patch in self._patches:
                    self._undo.enter_context(patch())
            self._compiling += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._compiling -= 1
            if self._compiling == 0:
                self._undo.close()


_writes: dict[Any, frozenset[str]] = {}  # kernel -> the arguments that it writes


@contextlib.contextmanager
def _told_what_kernels_write() -> Iterator[None]:
    """Tell Inductor which arguments a kernel writes, if that was said when it was launched.

    2.11 to 2.15: to find out, it lowers the kernel to Triton's IR, about 0.1 s for every launch.
    """
    with contextlib.ExitStack() as stack:
        for name, answer in (
            ("identify_mutated_tensors", _as_names),  # to 2.11
            ("identify_accessed_tensors", _as_accesses),  # from 2.12
        ):
            if hasattr(triton_kernel_wrap, name):
                told = _telling(getattr(triton_kernel_wrap, name), answer)
                stack.enter_context(mock.patch.object(triton_kernel_wrap, name, told))
        yield


# Kernels are launched as Inductor's own are, in two thirds of the host's time.
_STATIC_LAUNCH = "static_launch_user_defined_triton_kernels"


@contextlib.contextmanager
def _static_launch() -> Iterator[None]:
    """Let the setting reach the processes that compile kernels, and spare tensor descriptors.

    2.11 to 2.15 forget to tell those processes; to 2.13, a kernel that takes a tensor descriptor,
    which this way of launching cannot pass, raises a KeyError instead of being launched as before.
    """
    pool, type_of = AsyncCompile.process_pool, StaticallyLaunchedTritonKernel.extract_type

    @functools.wraps(pool)
    def told() -> _Workers:
        return _Workers(pool())

    def known_type(self: Any, name: str) -> str:
        try:
            return str(type_of(self, name))
        except KeyError:
            raise NotImplementedError(f"an argument of type {name}") from None

    vars(told).update(cache_info=pool.cache_info, cache_clear=pool.cache_clear)
    with (
        mock.patch.object(AsyncCompile, "process_pool", staticmethod(told)),
        mock.patch.object(StaticallyLaunchedTritonKernel, "extract_type", known_type),
    ):
        yield


def inductor_option_type(name: str) -> type | None:
    """What the values of an Inductor option are instances of; None where several types are legal.

    All versions: as ``torch.compile(options=...)`` checks them.
    """
    found = torch._inductor.config.get_type(name)
    return found if isinstance(found, type) else None


@dataclass(frozen=True)
class _Workers:
    """Inductor's pool; adds the setting to those that each kernel is sent to it with."""

    pool: Any

    def submit(self, job: Callable[..., Any], *args: Any) -> Any:
        if args and isinstance(args[-1], dict) and "use_static_triton_launcher" in args[-1]:
            takes_descriptors = "tensordesc<" in str(args[0].args)  # its name and its source
            static = getattr(torch._inductor.config, _STATIC_LAUNCH) and not takes_descriptors
            args = (*args[:-1], {**args[-1], _STATIC_LAUNCH: static})
        return self.pool.submit(job, *args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pool, name)


_inductor_patched = _Patches(_told_what_kernels_write, _static_launch)


def _telling(analyse: Callable[..., Any], answer: Callable[..., Any]) -> Callable[..., Any]:
    def told(kernel: Any, kwargs: Mapping[str, Any], descriptors: Any) -> Any:
        writes = _writes.get(_function_of(kernel))
        if writes is None:
            return analyse(kernel, kwargs, descriptors)
        return answer([name for name in kwargs if name in writes], list(kwargs))

    return told


def _as_names(writes: list[str], arguments: list[str]) -> list[str]:
    return writes


def _as_accesses(writes: list[str], arguments: list[str]) -> Any:
    """Every argument may be read; nothing is fused behind the kernel."""
    reads, written = (
        OrderedSet(dependencies.StarDep(name) for name in names) for names in (arguments, writes)
    )
    accesses = dependencies.ReadWrites(reads=reads, writes=written, index_exprs=OrderedSet())
    return triton_kernel_wrap.TensorAccesses(accesses, can_fuse_epilogue=False)


def _function_of(kernel: Any) -> Any:
    """The kernel itself, which an Autotuner stands for."""
    function = getattr(kernel, "fn", None)
    return function if hasattr(function, "fn") else kernel


@functools.cache
def source_hash() -> str:
    """A hash over this package's own source: an edited pass must not meet cached code."""
    root = Path(__file__).resolve().parent
    folders = [(root / name).resolve() for name in ("", "passes", "backends")]
    files = sorted({str(file) for folder in folders for file in folder.rglob("*.py")})
    return get_hash_for_files(tuple(files)).hex()


class _GraphPass(CustomGraphPass):
    """Inductor's form of a pass: a callable on an fx.Graph, with a cache key."""

    def __init__(self, run: Callable[[fx.GraphModule], None], key: str) -> None:
        self._run = run
        self._key = key

    def __call__(self, graph: fx.Graph) -> None:
        gm = graph.owning_module
        assert gm is not None
        self._run(gm)

    def uuid(self) -> str:
        return self._key


class _Partitioner(CustomPartitionerFn):
    """Inductor's own min-cut partitioner; the passes have already marked what to keep."""

    def __init__(self, key: str, on_split: Split | None) -> None:
        self._key = key
        self._on_split = on_split

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        forward, backward = min_cut_rematerialization_partition(gm, joint_inputs, **kwargs)
        if self._on_split is not None:
            self._on_split(forward, backward, kwargs["num_fwd_outputs"])
        return forward, backward

    def uuid(self) -> str:
        return self._key


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Put a text into the structured trace of this compile, which tlparse shows (TORCH_TRACE).

    2.11 to 2.15: ``torch._logging`` is private. ``text`` is not called where nothing is traced.
    """
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=text,
    )


def cache_folder() -> Path:
    """Where Inductor keeps its caches; ours stand beside them. 2.11 to 2.15."""
    return Path(cache_dir()) / "fp8compile"


def stand_ins() -> Callable[[Tensor, torch.device], Tensor]:
    """A function that makes tensors like others, on a device, but without data.

    All versions: Dynamo traces fake tensors as if they had data. On "meta" it would trace other
    operators, such as attention from its parts.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def stand_in(like: Tensor, device: torch.device) -> Tensor:
        with mode:
            made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
        if isinstance(like, torch.nn.Parameter):
            return torch.nn.Parameter(made, requires_grad=like.requires_grad)
        return made.requires_grad_(like.requires_grad)

    return stand_in


def has_no_data(value: Any) -> bool:
    """Whether this is a meta or a fake tensor."""
    return isinstance(value, Tensor) and (value.is_meta or isinstance(value, FakeTensor))


def storage_of(value: Tensor) -> Any:
    """Equal for two tensors, fake ones too, only if they share memory."""
    return StorageWeakRef(value.untyped_storage())


def outside_tracing() -> AbstractContextManager[Any]:
    """Run on real tensors in the middle of a compile, as timing a kernel has to."""
    return unset_fake_temporarily()


def traced(fn: Callable[..., Any], values: Sequence[Any], fake_mode: Any) -> fx.Graph:
    """The operators of a function of fake tensors, as Inductor wants them.

    All versions: what is put into a final graph comes too late for Inductor's decompositions.
    """
    with fake_mode:
        gm = make_fx(fn, decomposition_table=select_decomp_table())(*values)
    return gm.graph


def emit_materialized(graph: fx.Graph, value: fx.Node, strides: Sequence[Any]) -> fx.Node:
    """The value, written to memory once, with its strides; at the graph's insertion point.

    All versions: Inductor fuses a pointwise value into each of its readers, and would write one
    copy per kernel launch that reads it.
    """
    node = graph.call_function(_FORCE_STRIDE_ORDER, (value, list(strides)))
    node.meta["val"] = value.meta["val"]
    return node


def emit_kernel_launch(
    graph: fx.Graph,
    kernel: Any,
    *,
    tensors: Mapping[str, fx.Node],
    constants: Mapping[str, Any],
    grid: tuple[Any, ...],
    descriptors: Mapping[str, Sequence[int]],
    writes: frozenset[str] | None = None,
) -> fx.Node:
    """A Triton kernel launch as a graph node, which Inductor inlines into its wrapper code.

    ``kernel``: a ``JITFunction`` or an ``Autotuner`` of one config. ``descriptors``: the block
    shapes of those ``tensors`` that the kernel takes as TMA descriptors. ``writes``: those that it
    writes; None leaves it to Inductor to find out.
    2.11 to 2.15: the operator and its side table are private.
    """
    if writes is not None:
        _writes[_function_of(kernel)] = writes
    metadata = {
        name: create_tma_stable_metadata(list(block)) for name, block in descriptors.items()
    }
    static = {k: v for k, v in constants.items() if not isinstance(v, fx.Node)}
    dynamic = {k: v for k, v in constants.items() if isinstance(v, fx.Node)}
    node = graph.call_function(
        triton_kernel_wrapper_mutation,
        (),
        {
            "kernel_idx": kernel_side_table.add_kernel(kernel),
            "constant_args_idx": kernel_side_table.add_constant_args(static),
            "grid": [grid],
            "tma_descriptor_metadata": metadata,
            "kwargs": {**tensors, **dynamic},
        },
    )
    node.meta["val"] = None
    return node


def call_from_wrapper(op: Any, function: Callable[..., None]) -> None:
    """Have Inductor's Python wrapper call a function for an operator that returns one tensor.

    ``function(*tensors, **numbers, out=out)``: numbers by their names in the operator's schema,
    dtypes and None left out, and ``out`` in the memory that Inductor has planned. All tensors are
    contiguous. Wrappers in C++ call the operator.
    2.11 to 2.15: lowerings and extern kernels are private. By way of PyTorch's dispatcher a Python
    function takes the host 10 us more, on a host where a GEMM of PyTorch's takes 15.
    """
    name = str(op).replace("::", "_").replace(".", "_")
    setattr(extern_kernels, name, function)

    def lower(*args: Any) -> Any:
        if V.graph.cpp_wrapper:
            return fallback_handler(op, add_to_fallback_set=False)(*args)
        contiguous = inductor_ir.ExternKernel.require_contiguous
        names = [argument.name for argument in op._schema.arguments]
        numbers = {k: v for k, v in zip(names, args, strict=True) if isinstance(v, int)}
        tensors = [contiguous(v) for v in args if isinstance(v, inductor_ir.TensorBox)]
        out = V.graph.current_node.meta["val"]
        size = inductor_ir.convert_shape_to_inductor(out.shape)
        layout = inductor_ir.FixedLayout(out.device, out.dtype, size)
        call = inductor_ir.ExternKernelOut(
            layout=layout,
            inputs=tensors,
            kwargs=numbers,
            python_kernel_name=f"extern_kernels.{name}",
            op_overload=op,
        )
        return inductor_ir.TensorBox.create(call)

    register_lowering(op, type_promotion_kind=None)(lower)


def current_stream(device_index: int) -> int:
    """The current stream's address. 2.11 to 2.15: torch.cuda.current_stream takes 5 us."""
    return torch._C._cuda_getCurrentRawStream(device_index)


def empty_bytes(count: int) -> Tensor:
    """Memory on the current device. 2.11 to 2.15: what compiled code takes its own from, in less
    than half the time of torch.empty.
    """
    made: Tensor = torch._C._dynamo.guards._empty_strided_cuda(  # type: ignore[attr-defined]
        (count,), (1,), torch.uint8
    )
    return made


def pause(us: float) -> None:
    """Have the current stream wait for so many microseconds or longer. 2.11 to 2.15: a count of
    clock cycles, of which there are at most 2 in a nanosecond.
    """
    torch.cuda._sleep(int(2000 * us))


def is_profiled() -> bool:
    """Whether torch.profiler records this thread. All versions: no public name."""
    return torch.autograd._profiler_enabled()


def stays_below(size: int | torch.SymInt, most: int) -> bool:
    """Whether a size that is at most ``most`` in the example always is.

    Of a symbolic one that nothing is known of, PyTorch is told so, as a guard: where it is larger,
    another graph is compiled. One that the user has given a range may not be told more.
    """
    if not isinstance(size, torch.SymInt):
        return size <= most
    largest = size.node.shape_env.bound_sympy(size.node.expr).upper
    if largest < _LARGEST_SIZE:
        return bool(largest <= most)
    return bool(size <= most)
