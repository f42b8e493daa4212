"""One region alone: random data for it, what it must compute, and the same for Inductor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor, fx
from torch._inductor import metrics

from fp8compile.backends.fused import run_region
from fp8compile.backends.region import Region
from fp8compile.ir import DEQUANTIZE_GROUPS, QUANTIZE, QUANTIZE_GROUPS, args_of
from fp8compile.ops import GROUP

HALVES = (torch.bfloat16, torch.float16)
SCALE = 60.0  # of every cast: the largest random values come near the end of E4M3's range
MAX_DIFFERING = 1e-4  # of the codes: float32 sums in another order round some the other way


# ---- its data and its results --------------------------------------------------------------------
def random_inputs(region: Region, device: torch.device) -> dict[str, Tensor]:
    """By name, in the order of the region's arguments; the scales are known."""
    scales = {args_of(cast.node)[1] for cast in region.casts}
    inputs = {}
    for node in region.gm.graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        tensor = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        inputs[node.name] = tensor.fill_(SCALE) if node in scales else fill_randomly(tensor)
    return inputs


def fill_randomly(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.random_(0, 2)
    values = torch.randn(tensor.shape, device=tensor.device)
    # What is kept in float32 is, in a model, one over a root mean square, or the like.
    return tensor.copy_(values.abs() + 0.5 if tensor.dtype == torch.float32 else values)


class InFloat32(fx.Interpreter):
    """Runs a region's graph without the roundings in between, which no fused kernel makes."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        wide = {name: widened(arg) for name, arg in kwargs.items()}
        return super().call_function(target, tuple(map(widened, args)), wide)


def widened(arg: Any) -> Any:
    """float32 for what would be rounded: 16 bits wide, be it a type or a tensor."""
    if isinstance(arg, Tensor):
        return arg.float() if arg.dtype in HALVES else arg
    return torch.float32 if arg in HALVES else arg


def in_float32(gm: fx.GraphModule, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a region returns, by the names of the nodes that it returns."""
    names = [node.name for node in args_of(gm.graph.output_node())[0]]
    results = InFloat32(gm).run(*map(widened, inputs.values()))
    return dict(zip(names, results, strict=True))


def differing(got: Tensor, want: Tensor) -> float:
    """The share of FP8 codes that differ; ValueError or AssertionError beyond rounding errors."""
    if want.dtype.itemsize > 1:
        near_zero = 1e-5 * want.abs().max().item()  # there, what cancels out decides
        torch.testing.assert_close(got.float(), want.float(), rtol=2**-8, atol=near_zero)
        return 0.0
    share = (got.view(torch.uint8) != want.view(torch.uint8)).count_nonzero().item() / want.numel()
    if got.dtype != want.dtype or share > max(MAX_DIFFERING, 2 / want.numel()):
        raise ValueError(f"{share:.2%} of the FP8 codes differ from those computed in float32")
    return share


def check(region: Region, inputs: dict[str, Tensor]) -> float | None:
    """The largest share of codes in which any result differs; None where kernels cannot run."""
    want = in_float32(region.gm, inputs)
    in_aten = in_float32(with_casts_in_aten(region.gm), inputs)
    for name, value in want.items():
        differing(in_aten[name], value)
    if not (next(iter(inputs.values())).is_cuda or triton.knobs.runtime.interpret):
        return None
    got = run_region(region.gm, inputs)
    return max(differing(got[name], value) for name, value in want.items())


# ---- the same for Inductor -----------------------------------------------------------------------
def with_casts_in_aten(gm: fx.GraphModule) -> fx.GraphModule:
    """A region's graph as a model would have it that casts to FP8 without this repository."""
    gm = copied(gm)
    for node in gm.graph.nodes:
        node.target = IN_ATEN.get(node.target, node.target)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def cast_in_aten(
    x: Tensor,
    scale: Tensor,
    slot: int,
    format: torch.dtype,
    row_major: bool = True,
    transposed: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """fp8::quantize with a known scale; what nobody takes is not computed."""
    limit = torch.finfo(format).max
    f, used = x.float(), scale[slot]
    q = (f * used).clamp(-limit, limit).to(format)
    q_t = q.t().contiguous() if transposed else None
    return q, q_t, used.reciprocal().reshape(1), f.abs().amax().reshape(1)


def group_cast_in_aten(x: Tensor) -> tuple[Tensor, Tensor]:
    f = x.float().unflatten(-1, (-1, GROUP))
    amax = f.abs().amax(-1, keepdim=True)
    scale = torch.full_like(amax, torch.finfo(torch.float8_e4m3fn).max) / amax
    return (f * scale).to(torch.float8_e4m3fn).flatten(-2), scale.reciprocal().squeeze(-1)


def group_cast_back_in_aten(q: Tensor, scale_inv: Tensor, dtype: torch.dtype) -> Tensor:
    return (q.float().unflatten(-1, (-1, GROUP)) * scale_inv.unsqueeze(-1)).flatten(-2).to(dtype)


IN_ATEN: dict[Any, Callable[..., Any]] = {
    QUANTIZE: cast_in_aten,
    QUANTIZE_GROUPS: group_cast_in_aten,
    DEQUANTIZE_GROUPS: group_cast_back_in_aten,
}


def compile_with_inductor(
    gm: fx.GraphModule, inputs: dict[str, Tensor]
) -> tuple[Callable[..., Any], int]:
    """The compiled region, and of how many kernels it consists."""
    metrics.reset()
    compiled = torch.compile(with_casts_in_aten(gm), dynamic=False)
    compiled(*inputs.values())
    return compiled, int(metrics.generated_kernel_count)


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return fx.GraphModule(gm, graph)
