"""What the passes know about a graph: sites, GEMMs, edges; and how to print it.

A *site* is one matmul call in the user's model. ``find_gemms`` puts a ``GemmInfo`` into
``node.meta["fp8"]`` of every GEMM that belongs to one, and the later passes refine it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import networkx as nx
import sympy
import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from . import attention, ops  # noqa: F401  (register the fp8:: operators)
from .errors import PassError
from .formats import Format
from .recipe import Gemm, Granularity, Operand, Recipe, Scaling

aten = torch.ops.aten
QUANTIZE = torch.ops.fp8.quantize.default
QUANTIZE_BLOCKS = torch.ops.fp8.quantize_blocks.default
SCALED_MM = torch.ops.fp8.scaled_mm.default
SCALED_MM_BLOCKS = torch.ops.fp8.scaled_mm_blocks.default
TRACK_AMAX = torch.ops.fp8.track_amax.default
FIND_SCALE = torch.ops.fp8.find_scale.default
QUANTIZE_GROUPS = torch.ops.fp8.quantize_groups.default
DEQUANTIZE_GROUPS = torch.ops.fp8.dequantize_groups.default
DEQUANTIZE = torch.ops.fp8.dequantize.default
CAT_ROWS = torch.ops.fp8.cat_rows.default
ATTENTION = torch.ops.fp8.attention.default
ATTENTION_BACKWARD = torch.ops.fp8.attention_backward.default
GRADIENT_SCALES = torch.ops.fp8.gradient_scales.default

SITE_TAG = "fp8_site"  # key in meta["custom"], which AOTAutograd carries to the backward nodes
# One for each operand; one for the site's output as attention takes it in FP8; and those of the
# gradients of an attention whose query is computed from that output: of its own output, and of what
# it computes from that.
SLOT_NAMES = (
    *map(str, Operand),
    "attention",
    "attention_grad_output",
    *(f"attention_grad_{name}" for name in attention.GRADIENTS),
)
# Four float32 at a time keep the slots of every site equally aligned, so that one compiled kernel
# serves all layers.
SLOTS_PER_SITE = -(-len(SLOT_NAMES) // 4) * 4
ATTENTION_SLOT = SLOT_NAMES.index("attention")
QUANTIZE_OUTPUTS = ("fp8", "fp8_t", "scale_inv", "amax", "scale_used")
# The casts, with the names of their outputs. Their first argument is the value, the last two say
# which copies are written, and those between are how.
CASTS: dict[Any, tuple[str, ...]] = {
    QUANTIZE: QUANTIZE_OUTPUTS,
    QUANTIZE_BLOCKS: ("fp8", "fp8_t", "scale_inv", "scale_inv_t"),
}
SCALED_MMS = (SCALED_MM, SCALED_MM_BLOCKS)


@dataclass(frozen=True)
class Site:
    """One matmul call in the user's model.

    ``fqn``: the module it is called in, or the name of its weight. ``weight``: the position of
    its weight among the graph's inputs, or None. ``weight_first``: whether the weight is the
    left operand. ``reason``: why it stays in high precision whatever its shapes, or None.
    ``leader``: the first site that takes the same input, by its index. They share its scaling
    state, so that it fits graphs that merge their GEMMs and graphs that do not. ``grad_leader``:
    the first of those that a common output of the graph is computed from; the others' gradients
    are of other losses, and scaled on their own. ``position``: which matmul of its call it is, for
    a call that makes several, such as multi-head attention. ``recipe``: its own, or None for that
    of the whole graph; the same as its leader's.
    """

    index: int
    fqn: str
    weight: int | None = None
    weight_first: bool = False
    reason: str | None = None
    leader: int | None = None
    grad_leader: int | None = None
    position: int = 0
    recipe: Recipe | None = None

    @property
    def call(self) -> int:
        """The index of the first site of its call, which is what the nodes are tagged with."""
        return self.index - self.position

    def slot(self, operand: Operand) -> int:
        """Where this site's scaling state for an operand lies in the graph's flat tensors."""
        return SLOTS_PER_SITE * self.leader_of(operand) + operand.value

    @property
    def attention_slot(self) -> int:
        """Where the scaling state of its output lies that attention takes in FP8; behind it those
        of attention's gradients.
        """
        return SLOTS_PER_SITE * self.index + ATTENTION_SLOT

    def leader_of(self, operand: Operand) -> int:
        """The index of the site whose scaling state for an operand is used."""
        leader = self.grad_leader if operand is Operand.GRAD_OUTPUT else self.leader
        return self.index if leader is None else leader


@dataclass(frozen=True)
class Edge:
    """A GEMM operand: its role, whether the GEMM takes its base transposed, and how it is cast.

    ``scaling``: where it was chosen for this edge, or None for that of the recipe. ``costs``: what
    current scaling adds to the time of the GEMMs that take the value, as a share, if it was chosen.
    """

    operand: Operand
    transposed: bool
    format: Format | None = None
    granularity: Granularity = Granularity.TENSOR
    scaling: Scaling | None = None
    costs: float = 0.0

    @property
    def cast(self) -> str:
        """How it is cast, as text: ``e4m3``, ``e4m3:1x128`` where that is not tensorwise, or
        ``e4m3:current`` where the scaling was chosen.
        """
        fine = self.granularity is not Granularity.TENSOR
        return (
            f"{self.format or ''}"
            + (f":{self.granularity}" if fine else "")
            + (f":{self.scaling}" if self.scaling else "")
        )


@dataclass(frozen=True)
class GemmInfo:
    """What is known of a GEMM ``[m, k] @ [k, n]``.

    ``reason``: why it is not FP8, or None. ``merged``: the other sites it computes.
    """

    site: Site
    gemm: Gemm
    left: Edge
    right: Edge
    m: sympy.Expr
    n: sympy.Expr
    k: sympy.Expr
    dtype: torch.dtype
    reason: str | None = None
    merged: tuple[Site, ...] = ()

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every site it computes, in order."""
        return (self.site, *self.merged)

    @property
    def name(self) -> str:
        """The name of its site, or of several as one: ``layers.0.attention.{q,k,v}``."""
        return _in_braces([site.fqn for site in self.sites])

    @property
    def is_fp8(self) -> bool:
        return self.reason is None

    @property
    def flops(self) -> sympy.Expr:
        """Multiplications and additions, as an expression in the symbolic sizes."""
        return 2 * self.m * self.n * self.k

    def bytes(self, operand_itemsize: int) -> sympy.Expr:
        """Bytes moved when each operand is read once and the output is written once."""
        read = (self.m * self.k + self.k * self.n) * operand_itemsize
        return read + self.m * self.n * self.dtype.itemsize


def _in_braces(names: Sequence[str]) -> str:
    """Dotted names as one, with braces around what differs."""
    paths = [name.split(".") for name in dict.fromkeys(names)]
    if len(paths) == 1:
        return names[0]
    head = _shared([path[:-1] for path in paths])
    tail = _shared([path[:head:-1] for path in paths])
    middle = ",".join(".".join(path[head : len(path) - tail]) for path in paths)
    return ".".join([*paths[0][:head], f"{{{middle}}}", *paths[0][len(paths[0]) - tail :]])


def _shared(paths: Sequence[Sequence[str]]) -> int:
    """How many parts all paths have in common at their start."""
    columns = zip(*paths, strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def gemm_info(node: fx.Node) -> GemmInfo | None:
    """The GemmInfo of a node, or None."""
    return node.meta.get("fp8")


def gemms(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, GemmInfo]]:
    """Every GEMM that ``find_gemms`` marked, in graph order."""
    for node in gm.graph.nodes:
        info = gemm_info(node)
        if info is not None:
            yield node, info


def args_of(node: fx.Node) -> tuple[Any, ...]:
    """A node's arguments, without the union of everything that an argument could be."""
    return node.args


def operands(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The left and right operand of an ``mm`` or ``addmm``."""
    left, right = args_of(node)[-2:]
    return left, right


def base_of(node: fx.Node) -> tuple[fx.Node, bool]:
    """The value behind 2-D transposes, and whether their number is odd."""
    transposed = False
    while node.target is aten.t.default or (
        node.target is aten.permute.default and list(args_of(node)[1]) == [1, 0]
    ):
        node, transposed = args_of(node)[0], not transposed
    return node, transposed


RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
VIEWS = (*RESHAPES, aten.permute.default, aten.t.default, aten.transpose.int)


def value_key(node: fx.Node) -> tuple[fx.Node, str]:
    """Equal for two reshapes of one value to one shape: they hold the same matrix."""
    shape = str(tuple(node.meta["val"].shape))
    while node.target in RESHAPES:
        node = args_of(node)[0]
    return node, shape


_MULTIPLIES = (aten.mul.Tensor, aten.mul.Scalar)
_DIVIDES = (aten.div.Tensor, aten.div.Scalar)


def constant_factor(node: fx.Node) -> tuple[fx.Node, float] | None:
    """``(x, c)`` of a node that is ``x * c`` or ``x / (1 / c)``, with a constant c > 0; else None.

    A constant is a number, or a number that a tensor without dimensions is filled with.
    """
    if node.target not in (*_MULTIPLIES, *_DIVIDES) or node.kwargs or len(node.args) != 2:
        return None
    value, factor = args_of(node)
    if node.target in _MULTIPLIES and _number(value) is not None:
        value, factor = factor, value
    number = _number(factor)
    if number is None or not isinstance(value, fx.Node) or not 0 < number < math.inf:
        return None
    kept = {"shape", "dtype"}  # which a constant of another type, or more dimensions, would change
    if any(getattr(value.meta["val"], key) != getattr(node.meta["val"], key) for key in kept):
        return None
    if not node.meta["val"].is_floating_point():
        return None
    return value, number if node.target in _MULTIPLIES else 1 / number


def _number(value: Any) -> float | None:
    if isinstance(value, fx.Node) and value.target is aten.full.default:
        shape, value = args_of(value)[:2]
        value = None if shape else value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else None


def is_cast(node: fx.Node) -> bool:
    """Whether it casts a GEMM's operand, see CASTS."""
    return node.target in CASTS


def takes_slot(cast: fx.Node) -> bool:
    """Whether a cast takes its scale from the scaling state, instead of finding it, or of taking
    the one that was found in forward (which is one number; the state has several for each site).
    """
    scale = args_of(cast)[1] if cast.target is QUANTIZE else None
    return scale is not None and scale.meta["val"].numel() > 1


def quantize_output(node: fx.Node, output: str) -> fx.Node | None:
    """The getitem node for an output of a cast, or None if nothing takes it."""
    index = CASTS[node.target].index(output)
    return next((user for user in node.users if user.args[1] == index), None)


def scale_of(copy: str, cast: fx.Node) -> str:
    """The name of the output that holds the scale_inv of one of a cast's copies."""
    own = cast.target is QUANTIZE_BLOCKS and copy == "fp8_t"
    return "scale_inv_t" if own else "scale_inv"


def is_given_in_fp8(node: Any) -> bool:
    """Whether it was in FP8 before the graph ran: what forward has cast for backward, or frozen
    weights, several of which may be put together.
    """
    return isinstance(node, fx.Node) and (node.op == "placeholder" or node.target is CAT_ROWS)


def edge_graph(gm: fx.GraphModule) -> nx.MultiDiGraph:
    """The FP8 edges of a graph: base value -> GEMM, with ``edge`` (an Edge) and ``site``."""
    graph = nx.MultiDiGraph()
    for node, info in gemms(gm):
        if not info.is_fp8 or node.target in SCALED_MMS:
            continue
        for value, edge in zip(operands(node), (info.left, info.right), strict=True):
            graph.add_edge(base_of(value)[0], node, edge=edge, site=info.site)
    return graph


def is_backward(node: fx.Node) -> bool:
    """Whether AOTAutograd traced this node as part of the backward."""
    return "backward" in str(node.meta.get("partitioner_tag", ""))


def size_expr(size: int | torch.SymInt) -> sympy.Expr:
    """A tensor dimension as a sympy expression."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def size_hint(size: int | torch.SymInt) -> int | None:
    """A tensor dimension as a number: its value in the traced call where it is symbolic."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint) if size.node.has_hint() else None
    return size


def fake_mode_of(graph: fx.Graph) -> Any:
    """The fake tensor mode the graph's ``meta["val"]`` live in."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and hasattr(value, "fake_mode"):
            return value.fake_mode
    raise PassError("emit", "the graph has no fake tensors in meta['val']; trace it with make_fx")


def emit(
    graph: fx.Graph, target: Any, args: tuple[Any, ...], name: str, like: fx.Node | None = None
) -> fx.Node:
    """Insert a call at the graph's insertion point, with ``meta["val"]`` evaluated.

    ``like`` is the node whose provenance (source line, module path, direction) it inherits.
    """
    node = graph.create_node("call_function", target, args, name=name)
    if like is not None:
        stacks = ("stack_trace", "nn_module_stack", "fwd_nn_module_stack")
        inherited = (*stacks, "partitioner_tag", "custom", "seq_nr")
        node.meta.update({key: like.meta[key] for key in inherited if key in like.meta})
    node.meta["val"] = evaluate(node)
    return node


Type = tuple[tuple[Any, ...], torch.dtype]  # the shape and dtype of a tensor


def evaluate(node: fx.Node) -> Any:
    """Re-run a node on its arguments' fake tensors."""
    key = _alike(node)
    if key is None:
        return _run(node)
    device = node.all_input_nodes[0].meta["val"].device
    types = result_types(node)
    with fake_mode_of(node.graph):
        made = tuple(torch.empty(shape, dtype=dtype, device=device) for shape, dtype in types)
    return made if node.target in CASTS else made[0]


def result_types(node: fx.Node) -> list[Type]:
    """What a node's arguments say that its results are.

    Casts and the GEMMs that take them are run once for all that look alike, as layers mostly do:
    PyTorch takes a millisecond to find its way to a custom operator's three lines.
    """
    key = _alike(node)
    if key is None or key not in _types:
        results = _run(node)
        held = results if isinstance(results, list | tuple) else (results,)
        types: list[Type] = [(tuple(value.shape), value.dtype) for value in held]
        if key is None:
            return types
        _types[key] = types
    return _types[key]


_types: dict[Any, list[Type]] = {}


def _run(node: fx.Node) -> Any:
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    with fake_mode_of(node.graph):
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _alike(node: fx.Node) -> Any:
    """Equal for two nodes only if their results have the same types; None where that is not known:
    sizes are symbolic, or results may share memory with arguments.
    """
    if node.target not in (*CASTS, *SCALED_MMS):
        return None
    shapes = [arg.meta["val"].shape for arg in node.all_input_nodes]
    if not all(isinstance(size, int) for shape in shapes for size in shape):
        return None
    args = list(node.args)
    if node.target is QUANTIZE:
        args[2] = None  # the slot, which says nothing of the results
    look = fx.node.map_arg(tuple(args), lambda n: (n.meta["val"].shape, n.meta["val"].dtype))
    return node.target, look


# --- text ---------------------------------------------------------------------------------------

_DTYPES = {
    torch.float8_e4m3fn: "e4m3",
    torch.float8_e5m2: "e5m2",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float32: "f32",
    torch.float64: "f64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "bool",
}


def format_value(value: Any) -> str:
    """A value's type as short text, such as ``bf16[16, 64]``."""
    if isinstance(value, torch.Tensor):
        return format_type(value.shape, value.dtype)
    if isinstance(value, list | tuple) and value:
        return f"({', '.join(format_value(v) for v in value)})"
    return "none" if value is None or value == () else type(value).__name__


def format_type(shape: Iterable[Any], dtype: torch.dtype) -> str:
    """A tensor's type as short text."""
    name = _DTYPES.get(dtype, str(dtype).removeprefix("torch."))
    return f"{name}[{', '.join(map(str, shape))}]"


def format_graph(gm: fx.GraphModule) -> str:
    """The graph as text: one line a node, ``name : type = op(args)  # remark``, columns aligned."""
    nodes = [node for node in gm.graph.nodes if node.op != "output"]
    types = [format_value(node.meta.get("val")) for node in nodes]
    name_width = max((len(node.name) for node in nodes), default=0)
    type_width = max((len(kind) for kind in types), default=0)
    lines = []
    for node, kind in zip(nodes, types, strict=True):
        call = "" if node.op == "placeholder" else f" = {_format_call(node)}"
        line = f"{node.name:<{name_width}} : {kind:<{type_width}}{call}".rstrip()
        remark = _remark(node)
        lines.append(f"{line}  # {remark}" if remark else line)
    lines.append(f"return {format_args(gm.graph.output_node().args[0])}")
    return "\n".join(lines)


def _remark(node: fx.Node) -> str:
    """What the passes have decided about a node."""
    info = gemm_info(node)
    if "amax" in node.meta:
        return f"amax = {node.meta['amax'].evalf(3)}"
    if info is None:
        return "saved" if node.meta.get("recompute") is CheckpointPolicy.MUST_SAVE else ""
    if info.reason is not None:
        return f"{info.name} {info.gemm}, not in FP8: {info.reason}"
    left, right = (
        f"{edge.operand}{'^T' if edge.transposed else ''} {edge.cast}".rstrip()
        for edge in (info.left, info.right)
    )
    return f"{info.name} {info.gemm} = {left} x {right}"


def _format_call(node: fx.Node) -> str:
    if node.op == "placeholder":
        return ""
    if node.op == "get_attr":
        return f"self.{node.target}"
    if node.target is operator.getitem:
        return f"{node.args[0]}[{node.args[1]}]"
    kwargs = [f"{key}={format_args(value)}" for key, value in node.kwargs.items()]
    return f"{op_name(node.target)}({', '.join([format_args(a) for a in node.args] + kwargs)})"


def op_name(target: Any) -> str:
    """``aten.mm`` for ``torch.ops.aten.mm.default``."""
    if isinstance(target, torch._ops.OpOverload):
        overload = "" if target._overloadname == "default" else f".{target._overloadname}"
        return f"{target.namespace}.{target._opname}{overload}"
    return getattr(target, "__name__", str(target))


def format_args(arg: Any) -> str:
    """An argument as text: node names, short dtypes, nested sequences."""
    if isinstance(arg, list | tuple):
        inner = ", ".join(format_args(a) for a in arg)
        return f"[{inner}]" if isinstance(arg, list) else f"({inner})"
    if isinstance(arg, torch.dtype):
        return _DTYPES.get(arg, str(arg))
    return str(arg)
