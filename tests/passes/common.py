"""Graphs that several pass tests start from, and the checks every pass gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fp8compile import RECIPES, Granularity
from fp8compile.frozen import quantize_weight
from fp8compile.ir import DEQUANTIZE, format_graph
from fp8compile.passes import StateNodes, joint_passes, run_passes
from fp8compile.passes.pipeline import Pass, pass_name
from fp8compile.verify import verify
from tests.helpers import Joint, trace, trace_joint

aten = torch.ops.aten


class Linear(nn.Module):
    """A linear layer that says ``w`` where nn.Linear says ``weight``."""

    def __init__(self, out_features: int = 64, in_features: int = 32) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(out_features, in_features, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w)


class Pair(nn.Module):
    """Two linear layers on one input, called ``w1`` and ``w2``; what is done with their outputs."""

    def __init__(
        self, combine: Callable[[Tensor, Tensor], object] | None = None, width: int = 48
    ) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(64, 32, dtype=torch.bfloat16))
        self.w2 = nn.Parameter(torch.randn(width, 32, dtype=torch.bfloat16))
        self.combine = combine or (lambda a, b: torch.cat([a.tanh(), b.sigmoid()], -1))

    def forward(self, x: Tensor) -> object:
        return self.combine(F.linear(x, self.w1), F.linear(x, self.w2))


def pair_joint(
    model: nn.Module | None = None, tokens: int = 16, requires_grad: bool = True
) -> Joint:
    """The joint graph of a Pair."""
    x = torch.randn(tokens, 32, dtype=torch.bfloat16, requires_grad=requires_grad)
    return trace_joint(model or Pair(), x)


def linear_joint(tokens: int = 16, recipe: str = "delayed") -> Joint:
    """The joint graph of one linear layer: fprop, wgrad and dgrad."""
    x = torch.randn(tokens, 32, dtype=torch.bfloat16, requires_grad=True)
    return trace_joint(Linear(), x, options={"recipe": recipe})


def fprop(n: int = 64, k: int = 32, dtype: torch.dtype = torch.bfloat16) -> fx.GraphModule:
    """``x @ w.T`` alone, without tags: what a user traces by hand."""

    def fn(x: Tensor, w: Tensor) -> Tensor:
        return aten.mm(x, aten.permute(w, [1, 0]))

    return trace(fn, x=torch.randn(16, k).to(dtype), w=torch.randn(n, k).to(dtype))


def attended(**kwargs: Any) -> fx.GraphModule:
    """Attention alone, called ``sdpa``; the heads of a token lie beside each other."""
    call = aten._scaled_dot_product_flash_attention_for_cpu.default

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return call(q, k, v, 0.0, True, **kwargs)[0]

    tokens = (torch.randn(2, 64, 4, 16, dtype=torch.bfloat16) for _ in range(3))
    q, k, v = (value.transpose(1, 2) for value in tokens)
    gm = trace(fn, q=q, k=k, v=v)
    gm.graph.find_nodes(op="call_function", target=call)[0]._rename("sdpa")
    gm.recompile()
    return gm


def projected(recipe: str = "delayed") -> fx.GraphModule:
    """FP8 attention whose output, called ``y``, a GEMM with the weight ``w`` takes, in the graph
    before ``take_attention_output``.
    """
    call = aten._scaled_dot_product_flash_attention_for_cpu.default

    def fn(q: Tensor, k: Tensor, v: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        out = call(q, k, v, 0.0, True)[0]
        y = aten.view(aten.permute(out, [0, 2, 1, 3]), [128, 64])
        return aten.mm(y, aten.permute(w, [1, 0]))

    tokens = (torch.randn(2, 64, 4, 16, dtype=torch.bfloat16) for _ in range(3))
    q, k, v = (value.transpose(1, 2) for value in tokens)
    w = torch.randn(32, 64, dtype=torch.bfloat16)
    gm = trace(fn, q=q, k=k, v=v, w=w, scale=torch.ones(4))
    gm.graph.find_nodes(op="call_function", target=aten.view.default)[0]._rename("y")
    gm.recompile()
    state = StateNodes(gm.graph.find_nodes(op="placeholder")[4])
    given = {"recipe": RECIPES[recipe], "state": state, "decline_slower": False}
    for run in joint_passes(**given, training=False, attention_in_fp8=True):
        if pass_name(run) == "take_attention_output":
            return gm
        run(gm)
    raise AssertionError("the pass is not there")


def frozen_fprop(
    recipe: str = "rowwise", widths: tuple[int, ...] = (64,), k: int = 32
) -> fx.GraphModule:
    """``x @ w.T`` of one or several frozen weights, in the graph before ``take_frozen_weights``.

    They are frozen per row, called ``w1`` and so on where there are several, and cast as ``recipe``
    says.
    """
    names = ["w"] if len(widths) == 1 else [f"w{i + 1}" for i in range(len(widths))]
    inputs = {"x": torch.randn(16, k).bfloat16()}
    for name, width in zip(names, widths, strict=True):
        weight = torch.randn(width, k).bfloat16()
        q, scale = quantize_weight(weight, Granularity.ROW)
        inputs |= {f"{name}_frozen": q, f"{name}_scale": scale}

    def fn(x: Tensor, *weights: Tensor) -> list[Tensor]:
        pairs = zip(weights[::2], weights[1::2], strict=True)
        args = ([1, 0], torch.bfloat16)
        found = [torch.ops.fp8.dequantize.default(q, scale, *args) for q, scale in pairs]
        return [aten.neg(aten.mm(x, aten.permute(w, [1, 0]))) for w in found]

    gm = trace(fn, **inputs)
    dequantized = gm.graph.find_nodes(op="call_function", target=DEQUANTIZE)
    for node, name in zip(dequantized, names, strict=True):
        node._rename(name)
    for run in joint_passes(recipe=RECIPES[recipe], training=False):
        if pass_name(run) == "take_frozen_weights":
            break
        run(gm)
    return gm


def negated_linear() -> fx.GraphModule:
    """The final graph of ``-x @ w.T`` with a scaling state."""

    def fn(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        return aten.mm(aten.neg(x), aten.permute(w, [1, 0]))

    bf16 = torch.bfloat16
    gm = trace(
        fn, x=torch.randn(16, 32).to(bf16), w=torch.randn(64, 32).to(bf16), scale=torch.ones(3)
    )
    scale = gm.graph.find_nodes(op="placeholder")[2]
    state = StateNodes(scale, scale, scale)
    run_passes(gm, joint_passes(recipe=RECIPES["delayed"], state=state, training=False))
    return gm


def residual(
    combine: Callable[[Tensor, Tensor], object] | None = None, bias: bool = False
) -> fx.GraphModule:
    """The final graph of a linear layer's output ``[2, 8, 64]`` that is added to ``x``, which is
    called ``add`` and read twice; ``combine``: or what is done with x and the output.
    """

    def added(x: Tensor, output: Tensor) -> list[Tensor]:
        total = x + output
        return [total, total.exp()]

    def fn(x: Tensor, y: Tensor, w: Tensor, *b: Tensor) -> object:
        right = aten.permute(w, [1, 0])
        output = aten.addmm(*b, y, right) if b else aten.mm(y, right)
        return (combine or added)(x, aten.view(output, [2, 8, 64]))

    shapes = {"x": (2, 8, 64), "y": (16, 32), "w": (64, 32), **({"b": (64,)} if bias else {})}
    gm = trace(fn, **{name: torch.randn(shape).bfloat16() for name, shape in shapes.items()})
    run_passes(gm, joint_passes(recipe=RECIPES["current"], training=False))
    return gm


class Query(nn.Module):
    """Attention of one head of 128, of which the query is a linear's output, called ``sdpa``."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(128, 32, dtype=torch.bfloat16))

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = F.linear(x, self.w).view(1, 128, 1, 128).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def query_joint(recipe: str = "delayed") -> Joint:
    x = torch.randn(1, 128, 32, dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn(1, 1, 128, 128, dtype=torch.bfloat16) for _ in range(2))
    joint = trace_joint(Query(), x, k, v, options={"recipe": recipe})
    call = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    (backward,) = joint.gm.graph.find_nodes(op="call_function", target=call)
    backward._rename("backward")
    backward.args[0]._rename("grad")  # type: ignore[union-attr]
    return joint


def before(
    name: str, joint: Joint | None = None, recipe: str = "delayed", **settings: bool
) -> tuple[fx.GraphModule, Pass]:
    """A graph with all passes run that come before ``name``, and that pass."""
    joint = joint or linear_joint()
    passes = joint_passes(
        **settings,
        recipe=RECIPES[recipe],
        sites=joint.sites,
        state=joint.state,
        statistics_of=weights_of(joint.gm) if recipe == "static" else None,
    )
    for run in passes:
        if pass_name(run) == name:
            return joint.gm, run
        run(joint.gm)
    raise AssertionError(f"no pass {name}; there are {[pass_name(p) for p in passes]}")


def weights_of(gm: fx.GraphModule) -> dict[fx.Node, int]:
    """The inputs that are called after parameters, with their positions."""
    inputs = enumerate(gm.graph.find_nodes(op="placeholder"))
    return {node: i for i, node in inputs if node.name.startswith("w")}


def lines_of(gm: fx.GraphModule, *names: str) -> str:
    """The text of the graph, or only of some of its nodes, without the padding of its columns."""
    lines = [" ".join(line.split()) for line in format_graph(gm).splitlines()]
    return "\n".join(line for line in lines if not names or line.split(" :")[0] in names)


def check_pass(gm: fx.GraphModule, run: Callable[[fx.GraphModule], int]) -> int:
    """Run a pass: the graph stays valid, outputs keep their types, a second run does nothing."""
    types = _output_types(gm)
    rewrites = run(gm)
    verify(gm)
    assert _output_types(gm) == types
    text = format_graph(gm)
    assert run(gm) == 0, "not idempotent"
    assert format_graph(gm) == text
    return rewrites


def _output_types(gm: fx.GraphModule) -> list[object]:
    outputs = gm.graph.output_node().args[0]
    nodes = outputs if isinstance(outputs, list | tuple) else (outputs,)
    values = [node.meta["val"] for node in nodes if isinstance(node, fx.Node)]  # type: ignore[union-attr]
    return [(value.dtype, tuple(value.shape)) for value in values]
