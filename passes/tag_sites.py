"""Find the matmul calls of a Dynamo graph and number them, so that their GEMMs can be told apart.

AOTAutograd copies ``meta["custom"]`` from a Dynamo node to every ATen node that it is traced into,
forward and backward. The number put there is how a backward GEMM finds its site again.
"""

from __future__ import annotations

import inspect
import operator
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from ..internals import is_static_input
from ..ir import DEQUANTIZE, SITE_TAG, Site, args_of, aten
from ..recipe import Recipe

Block = tuple[int, int]  # rows and elements of K, see Granularity
Outputs = frozenset[int]  # some of a graph's, by position
EINSUM_TAG = "fp8_einsum"  # beside SITE_TAG: the call is an einsum, which ATen makes a bmm of
ATTENTION_TAG = "fp8_attention"  # beside it, too: the call multiplies activations as well
LEFT_OUT_TAG = "fp8_left_out"  # instead of it: why the GEMMs of a call cannot be those of a site
TWO_ACTIVATIONS = "matmul of two activations"
_VECTOR = "a 1-D operand, as a sample in vmap is; give it a second dimension, such as x[None]"
_BATCH_OF_WEIGHTS = (
    "batched matmul with a parameter; call linear or matmul for each of its matrices"
)
OTHER_EINSUM = "einsum with a parameter, but no product of two matrices; write it as matmuls"
# The forms of torch and of aten: the latter is what an exported program calls.
_LINEAR = (F.linear, torch._C._nn.linear, aten.linear.default)
_MM = (torch.mm, torch.Tensor.mm, aten.mm.default)
_MATMUL = (
    torch.matmul,
    torch.linalg.matmul,
    operator.matmul,
    operator.imatmul,
    torch.Tensor.matmul,
    aten.matmul.default,
    aten.linalg_matmul.default,
    *_MM,
)
_ADDMM = (torch.addmm, torch.Tensor.addmm, aten.addmm.default)
_BMM = (torch.bmm, torch.Tensor.bmm, aten.bmm.default)
_BADDBMM = (torch.baddbmm, torch.Tensor.baddbmm, aten.baddbmm.default)
_EINSUM = (torch.einsum, aten.einsum.default)
_ATTENTION = F.multi_head_attention_forward
_METHODS = {"matmul": 0, "__matmul__": 0, "mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
# The bodies of these higher-order operators are traced into the surrounding graph.
_INLINED = ("tag_activation_checkpoint",)


def tag_sites(
    gm: fx.GraphModule,
    *,
    name_of: Callable[[fx.Node, fx.Node | None], str] | None = None,
    recipe_of: Callable[[str, Block | None], Recipe | None] | None = None,
) -> int:
    """Number the matmul calls with a matrix of weights; the sites go into ``gm.meta["fp8_sites"]``.

    Before:
        linear = linear(x, w)
    After:
        linear = linear(x, w)    # meta["custom"]["fp8_site"] = 0

    ``name_of(call, weight)`` gives a site its fully qualified name, from the call node and the
    placeholder its weight comes from (None if it comes from none). ``recipe_of(name, block)`` says
    which recipe the site has of its own, or None; ``block`` is that of a frozen weight's scales.

    Requires: a graph of torch-level calls, as Dynamo gives it to a backend.
    Ensures: sites are numbered in graph order; inside activation-checkpointed regions too. Those
        with the same input and recipe have the same leader; of these, those that an output of the
        graph has in common have the same grad_leader.
        A call of ``multi_head_attention_forward`` has a site for each of its projections. An einsum
        is a site if it sums over all that a parameter shares with its other operand.
    Leaves alone: matmuls of two batched operands (attention), 1-D operands, other einsums; those
        with a parameter get the reason as a tag. Sites with a reason: calls inside control flow
        (cond, while_loop, scan) and custom autograd functions; those of two activations, neither
        an input of the graph nor made of parameters alone.
    Numerics: exact.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    tagger = _Tagger(placeholders, name_of or _name, recipe_of or (lambda name, block: None))
    inputs = {node: _Input(node, _is_static(node)) for node in placeholders}
    tagger.tag(gm, inputs, None, _outputs_of(gm))
    gm.meta["fp8_sites"] = tagger.sites
    return len(tagger.sites)


@dataclass(frozen=True)
class _Input:
    """What is known of a graph's or a body's input.

    ``origin``: the graph input that it is derived from by single-input calls. ``is_static``:
    whether it is computed from parameters and buffers alone.
    """

    origin: fx.Node | None
    is_static: bool


class _Tagger:
    """Finds the sites of a graph and of the bodies in it."""

    def __init__(
        self,
        placeholders: list[fx.Node],
        name_of: Callable[[fx.Node, fx.Node | None], str],
        recipe_of: Callable[[str, Block | None], Recipe | None],
    ) -> None:
        self.sites: list[Site] = []
        self._placeholders = placeholders
        self._name_of = name_of
        self._recipe_of = recipe_of
        self._leaders: dict[Any, int] = {}
        self._grad_leaders: dict[int, dict[int, Outputs]] = {}  # leader -> those of its sites

    def tag(
        self,
        gm: fx.GraphModule,
        inputs: Mapping[fx.Node, _Input],
        reason: str | None,
        outputs: Mapping[fx.Node, Outputs],
    ) -> None:
        """Number the matmuls of a graph or body; ``reason``: why none of them can be FP8, or None.
        ``outputs``: those of the whole graph that are computed from a node.
        """
        static: dict[Any, bool] = {}
        for node in gm.graph.nodes:
            given = node.op == "placeholder"
            static[node] = (
                inputs[node].is_static if given else all(static[n] for n in node.all_input_nodes)
            )
            matmuls = _matmuls(node, inputs)
            if matmuls:
                _mark(node, {SITE_TAG: len(self.sites), **_kind(node)})
            elif (why_not := _left_out(node, inputs)) is not None:
                _mark(node, {LEFT_OUT_TAG: why_not})
            for position, operands in enumerate(matmuls):
                origins = [_origin(side, inputs) for side in operands]
                is_weight = [
                    origin is not None or static.get(side, False)
                    for side, origin in zip(operands, origins, strict=True)
                ]
                why = reason or (None if any(is_weight) else TWO_ACTIVATIONS)
                self.sites.append(self._site(node, position, operands, origins, why, outputs[node]))
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                self._tag_bodies(gm, node, inputs, static, reason, outputs[node])

    def _site(
        self,
        node: fx.Node,
        position: int,
        operands: Sequence[Any],
        origins: Sequence[fx.Node | None],
        reason: str | None,
        outputs: Outputs,
    ) -> Site:
        weight_first = _is_parameter(origins[0]) and not _is_parameter(origins[1])
        weight, shared = origins[not weight_first], operands[weight_first]
        index, fqn = len(self.sites), self._name_of(node, weight)
        recipe = self._recipe_of(fqn, _frozen_block(operands[not weight_first]))
        leader = self._leaders.setdefault((shared, recipe), index) if shared else index
        return Site(
            index=index,
            fqn=fqn,
            weight=self._placeholders.index(weight) if weight in self._placeholders else None,
            weight_first=weight_first,
            reason=reason,
            leader=leader,
            grad_leader=self._grad_leader(index, leader, outputs),
            position=position,
            recipe=recipe,
        )

    def _grad_leader(self, site: int, leader: int, outputs: Outputs) -> int:
        """The first of the sites with a leader that has an output in common with this one. Where no
        output is found, as behind what is written in place, any may be.
        """
        known = self._grad_leaders.setdefault(leader, {})
        alike = (i for i, theirs in known.items() if not (outputs and theirs) or outputs & theirs)
        found = next(alike, site)
        known[found] = known.get(found, frozenset()) | outputs
        return found

    def _tag_bodies(
        self,
        gm: fx.GraphModule,
        node: fx.Node,
        inputs: Mapping[fx.Node, _Input],
        static: Mapping[Any, bool],
        reason: str | None,
        outputs: Outputs,
    ) -> None:
        name = node.target.name()  # type: ignore[union-attr]
        inner_reason = reason or (None if name in _INLINED else f"inside {name}")
        for body, args in _bodies(gm, node, name):
            bound = {n: _Input(None, False) for n in body.graph.nodes if n.op == "placeholder"}
            # The operands come last, behind a predicate if there is one.
            for inner, arg in zip(reversed(bound), reversed(args), strict=False):
                bound[inner] = _Input(_origin(arg, inputs), static.get(arg, False))
            self.tag(body, bound, inner_reason, dict.fromkeys(body.graph.nodes, outputs))


def _outputs_of(gm: fx.GraphModule) -> dict[fx.Node, Outputs]:
    """The positions of the outputs that are computed from each node."""
    (last,) = gm.graph.find_nodes(op="output")
    own: dict[Any, set[int]] = defaultdict(set)
    for position, value in enumerate(torch.utils._pytree.tree_leaves(last.args)):
        own[value].add(position)
    found: dict[fx.Node, Outputs] = {}
    for node in reversed(gm.graph.nodes):
        found[node] = frozenset(own[node]).union(*(found[user] for user in node.users))
    return found


def _matmuls(node: fx.Node, inputs: Mapping[fx.Node, _Input]) -> list[tuple[Any, ...]]:
    """The operands of every matmul with one matrix that a call makes, in order."""
    if node.op == "call_function" and node.target is _ATTENTION:
        return _projections(node)
    found = _matmul_operands(node, inputs)
    return [] if found is None else [found]


def _projections(node: fx.Node) -> list[tuple[Any, ...]]:
    """Those of multi-head attention: one for each input that differs, then the output's."""
    call = inspect.signature(_ATTENTION).bind(*node.args, **node.kwargs)
    call.apply_defaults()
    arguments = call.arguments
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    if arguments["use_separate_proj_weight"]:
        weights = [arguments[f"{name}_proj_weight"] for name in "qkv"]
        projections = list(zip((query, key, value), weights, strict=True))
    else:
        # PyTorch multiplies an input with all its weights at once, but not if there is no batch: it
        # gives one to each of the three, and they are no longer the same tensor.
        batched = _dim(query) != 2
        inputs = [query] if batched and query is key is value else [query, key]
        inputs += [] if batched and key is value else [value]
        projections = [(each, arguments["in_proj_weight"]) for each in inputs]
    return [*projections, (None, arguments["out_proj_weight"])]


def _matmul_operands(node: fx.Node, inputs: Mapping[fx.Node, _Input]) -> tuple[Any, ...] | None:
    """The two operands of a matmul call, the 2-D one on the right if there is one; or None."""
    args = _operands(node)
    values = [_tensor(arg) for arg in args]
    if len(values) != 2 or values[0] is None or values[1] is None:
        return None
    if node.target in _EINSUM:
        # ATen orders the operands: find_gemms knows the weight by the parameter that it is.
        one_parameter = sum(_is_parameter(_origin(arg, inputs)) for arg in args) == 1
        return args if one_parameter and _is_matmul(_arg(node, 0, "equation")) else None
    dims = (values[0].dim(), values[1].dim())
    if dims[0] == 2 and dims[1] > 2:  # w @ x is folded into x^T @ w^T, all of x's rows at once
        return args[1], args[0]
    return args if dims[0] >= 2 and dims[1] == 2 else None


def _operands(node: fx.Node) -> tuple[Any, ...]:
    """What a call multiplies, two of most; nothing if it is no matmul."""
    if node.op == "call_function" and node.target in _LINEAR:
        return _arg(node, 0, "input"), _arg(node, 1, "weight")
    if node.op == "call_function" and node.target in (*_MATMUL, *_BMM):
        second = "mat2" if node.target in (*_MM, *_BMM) else "other"
        return _arg(node, 0, "input"), _arg(node, 1, second)
    if node.op == "call_function" and node.target in _ADDMM:
        return _arg(node, 1, "mat1"), _arg(node, 2, "mat2")
    if node.op == "call_function" and node.target in _BADDBMM:
        return _arg(node, 1, "batch1"), _arg(node, 2, "batch2")
    if node.op == "call_method" and node.target in _METHODS:
        return args_of(node)[_METHODS[str(node.target)] :][:2]
    if node.op == "call_function" and node.target in _EINSUM:
        return tuple(node.all_input_nodes)
    return ()


def _is_matmul(equation: Any) -> bool:
    """Whether an einsum of two operands sums over all that they share, and each has more: then ATen
    makes a matrix of either. ``...`` is shared where both have it.
    """
    if not isinstance(equation, str) or equation.count(",") != 1:
        return False
    operands, _, result = equation.replace(" ", "").replace("...", ".").partition("->")
    left, right = map(set, operands.split(","))
    shared = left & right
    return bool(shared and shared.isdisjoint({*result, "."}) and left - shared and right - shared)


def _left_out(node: fx.Node, inputs: Mapping[fx.Node, _Input]) -> str | None:
    """Why the GEMMs of a matmul call that is no site are not in FP8, if it can say more than their
    operators do.
    """
    operands = [arg for arg in _operands(node) if _tensor(arg) is not None]
    is_einsum = node.target in _EINSUM
    if not is_einsum and any(_dim(arg) == 1 for arg in operands):
        return _VECTOR
    if not any(_is_parameter(_origin(arg, inputs)) for arg in operands):
        return None
    return OTHER_EINSUM if is_einsum else _BATCH_OF_WEIGHTS


def _kind(node: fx.Node) -> dict[str, bool]:
    """The tag of a call whose batched matmuls are not those of a plain matmul."""
    if node.target is _ATTENTION:
        return {ATTENTION_TAG: True}
    return {EINSUM_TAG: True} if node.target in _EINSUM else {}


def _mark(node: fx.Node, tags: Mapping[str, Any]) -> None:
    node.meta["custom"] = {**node.meta.get("custom", {}), **tags}


def _tensor(arg: Any) -> torch.Tensor | None:
    """The example value of an argument that is a tensor."""
    value = isinstance(arg, fx.Node) and arg.meta.get("example_value", arg.meta.get("val"))
    return value if isinstance(value, torch.Tensor) else None


def _dim(arg: Any) -> int | None:
    value = _tensor(arg)
    return None if value is None else value.dim()


def _arg(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _origin(node: Any, inputs: Mapping[fx.Node, _Input]) -> fx.Node | None:
    """The graph input that a value is derived from by single-input calls (casts, views)."""
    while isinstance(node, fx.Node):
        if node.op == "placeholder":
            return inputs[node].origin
        if len(node.all_input_nodes) != 1 and node.target is not DEQUANTIZE:
            return None
        node = node.all_input_nodes[0]
    return None


def _frozen_block(node: Any) -> Block | None:
    """The elements that share a scale in the frozen weight that a value is a view of, if it is."""
    while isinstance(node, fx.Node) and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    if not isinstance(node, fx.Node) or node.target is not DEQUANTIZE:
        return None
    rows, columns = args_of(node)[2]
    return rows, columns


def _is_static(node: fx.Node) -> bool:
    return _is_parameter(node) or is_static_input(node)


def _is_parameter(node: fx.Node | None) -> bool:
    value = _tensor(node)
    return isinstance(value, torch.nn.Parameter) or getattr(value, "_is_param", False)


def _bodies(gm: fx.GraphModule, node: fx.Node, name: str) -> list[tuple[fx.GraphModule, list[Any]]]:
    """The subgraphs a higher-order call runs, each with the arguments it is given.

    The backward of a custom autograd function is given gradients and what its forward saved: none
    of the call's arguments.
    """
    bodies = []
    for arg in node.args:
        if isinstance(arg, fx.Node) and arg.op == "get_attr":
            body = getattr(gm, str(arg.target), None)
            if isinstance(body, fx.GraphModule):
                bodies.append(body)
    flat = [a for a in torch.utils._pytree.tree_leaves(list(node.args)) if isinstance(a, fx.Node)]
    values = [a for a in flat if a.op != "get_attr"]
    if name == "autograd_function_apply":
        return [(bodies[0], values), *((body, []) for body in bodies[1:])]
    return [(body, values) for body in bodies]


def _name(call: fx.Node, weight: fx.Node | None) -> str:
    return call.name if weight is None else weight.name
