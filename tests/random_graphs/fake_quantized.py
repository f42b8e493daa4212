"""FP8 without a compiler: a module run in eager, with the operands of its matmuls cast and back.

Under ``FakeQuantized`` every matmul call that is a site becomes an autograd function that casts its
operands with ``fp8::quantize``, forward and backward, and multiplies them in float32. From the
compiler it takes only the *plan*: which sites are merged, which slot of the scaling state and which
format each operand has. What is computed from what, the transpositions, the order of things,
aliasing and in-place writes are eager PyTorch's. A compiled graph has to agree with it up to the
order of float32 sums, far below the noise of FP8. (The zoo's simulation is simpler, and knows only
weights that are parameters and scales of the tensor itself.)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from fp8compile.formats import Format
from fp8compile.ir import (
    SCALED_MM,
    SITE_TAG,
    SLOTS_PER_SITE,
    Site,
    args_of,
    aten,
    gemms,
    value_key,
)
from fp8compile.recipe import Gemm, Operand

Slot = tuple[int, torch.dtype]  # where the amax goes, and the format
Operands = tuple[Operand, Sequence[Tensor]]  # those of merged sites, which share a scale


@dataclass
class Plan:
    """What a joint graph does at its sites, after all passes.

    ``casts``: for each GEMM in FP8 the slot and format of its operands, by role. ``groups``: the
    sites that are computed together, by the first of them. ``batched``: the sites that AOTAutograd
    has traced as batched matmuls, as it does with an input that is not contiguous where no
    gradient is needed. ``training``: whether the graph has a backward, and thus records amax.
    """

    sites: Sequence[Site] = ()
    training: bool = False
    casts: dict[tuple[int, Gemm], dict[Operand, Slot]] = field(default_factory=dict)
    groups: dict[int, tuple[int, ...]] = field(default_factory=dict)
    batched: frozenset[int] = frozenset()

    @staticmethod
    def of(gm: fx.GraphModule, sites: Sequence[Site], training: bool) -> Plan:
        """Read the plan off a graph, and check that formats and slots are those of the roles."""
        batched = gm.graph.find_nodes(op="call_function", target=aten.bmm.default)
        tags = ((node.meta.get("custom") or {}).get(SITE_TAG) for node in batched)
        plan = Plan(sites, training, batched=frozenset(tag for tag in tags if tag is not None))
        allowed: dict[object, set[int]] = {}  # the slots that a value in a format may have
        used: list[tuple[object, int]] = []
        for node, info in gemms(gm):
            if node.target is not SCALED_MM:
                continue
            roles: dict[Operand, Slot] = {}
            for operand, edge in zip(args_of(node)[:2], (info.left, info.right), strict=True):
                value, _, slot, format, *_ = args_of(args_of(operand)[0])
                is_gradient = edge.operand is Operand.GRAD_OUTPUT
                assert format is (Format.E5M2 if is_gradient else Format.E4M3).dtype, node
                roles[edge.operand] = (slot, format)
                key = (value_key(value), format)
                slots = {site.slot(edge.operand) for site in info.sites}
                allowed[key] = allowed.get(key, set()) | slots
                used.append((key, slot))
            plan.casts |= {(site.index, info.gemm): roles for site in info.sites}
            plan.groups[info.site.index] = tuple(site.index for site in info.sites)
        assert all(slot in allowed[key] for key, slot in used), "a cast has another value's slot"
        return plan

    def group_of(self, site: int) -> tuple[int, ...]:
        """The sites that are computed together with a site, in order; mostly only itself."""
        return next((group for group in self.groups.values() if site in group), (site,))


@dataclass
class _Call:
    """A matmul call: ``left[M, K] @ right[K, N]``, then ``+ bias``."""

    left: Tensor
    right: Tensor
    bias: Tensor | None = None


class FakeQuantized(TorchFunctionMode):
    """Run modules with their matmuls in emulated FP8, as a plan says.

    ``scale``: the delayed scales, or None for current scaling. Afterwards ``amax`` is what the
    scaling state has to hold, and ``counts`` how many GEMMs there were.
    """

    def __init__(self, plan: Plan, scale: Tensor | None) -> None:
        super().__init__()
        self.plan, self.scale = plan, scale
        self.amax = torch.zeros(SLOTS_PER_SITE * len(plan.sites))
        self.counts: Counter[str] = Counter()
        self._calls: list[_Call] = []
        self._foreseen: list[_Call] = []  # merged sites need weights of calls that are to come
        self._outputs: dict[int, Tensor] = {}

    def call(self, model: nn.Module, inputs: Sequence[Any]) -> Any:
        """What the model returns."""
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with _Recording(self._foreseen):
            functional_call(model, buffers, tuple(x.detach().clone() for x in inputs))
        with self:
            out = model(*inputs)
        assert len(self._calls) == len(self.plan.sites), "not as many sites as the compiler found"
        return out

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = _site_of(func, args, kwargs or {})
        if found is None:
            return func(*args, **(kwargs or {}))
        call, finish = found
        self._calls.append(call)
        return finish(self._output(len(self._calls) - 1, call))

    def _output(self, site: int, call: _Call) -> Tensor:
        group = self.plan.group_of(site)
        if site == group[0]:
            calls = [call, *(self._foreseen[other] for other in group[1:])]
            flat = [each for c in calls for each in (c.right, c.bias)]
            outputs = _Multiply.apply(self, group, call.left, *flat)
            self._outputs.update(zip(group, outputs, strict=True))
        assert torch.equal(call.left, self._calls[group[0]].left), "merged, with different inputs"
        return self._outputs.pop(site)

    def multiply(
        self,
        gemm: Gemm,
        sites: Sequence[int],
        left: Operands,
        right: Operands,
        combine: Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]],
    ) -> list[Tensor]:
        """``combine`` of the operands, cast if this GEMM is in FP8; rounded by nobody yet."""
        slots = self.plan.casts.get((sites[0], gemm))
        self._check_precision(gemm, sites, [*left[1], *right[1]], slots is not None)
        if slots is None:
            return combine([_unrounded(x) for x in left[1]], [_unrounded(x) for x in right[1]])
        lefts, left_inv = self._cast(left[1], slots[left[0]])
        rights, right_inv = self._cast(right[1], slots[right[0]])
        return [product * (left_inv * right_inv) for product in combine(lefts, rights)]

    def _check_precision(
        self, gemm: Gemm, sites: Sequence[int], values: Sequence[Tensor], is_fp8: bool
    ) -> None:
        """Raise AssertionError for a GEMM that should be in FP8 and is not, or the reverse."""
        self.counts["in FP8" if is_fp8 else "in high precision"] += len(sites)
        self.counts["merged"] += len(sites) if len(sites) > 1 else 0
        reason = self.plan.sites[sites[0]].reason
        sizes = {size for value in values for size in value.shape}
        if 0 in sizes:
            reason = "a size is 0"
        elif sites[0] in self.plan.batched:
            reason = "traced as a batched matmul"
        elif 1 in sizes and not is_fp8:
            reason = "Inductor may have made a product and a sum of it"
        assert is_fp8 == (reason is None), f"{gemm} of sites {sites}: {is_fp8=}, {reason=}"

    def _cast(self, values: Sequence[Tensor], slot: Slot) -> tuple[list[Tensor], Tensor]:
        """Values as FP8 holds them, in float32 and still scaled, and the scale_inv of all."""
        index, format = slot
        flat = torch.cat([value.flatten() for value in values]).unsqueeze(0)
        q, _, scale_inv, amax = torch.ops.fp8.quantize(flat, self.scale, index, format)
        if self.plan.training:
            self.amax[index] = torch.maximum(self.amax[index], amax[0])
        parts = q[0, : flat.numel()].float().split([value.numel() for value in values])
        return [p.view(v.shape) for p, v in zip(parts, values, strict=True)], scale_inv


def _unrounded(value: Tensor) -> Tensor:
    """A matmul of bfloat16 sums, and adds its bias, in float32."""
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value


class _Multiply(torch.autograd.Function):
    """The matmuls of one site, or of those that are merged: one left operand, several right."""

    @staticmethod
    def forward(ctx: Any, mode: FakeQuantized, group: tuple[int, ...], *tensors: Any) -> Any:
        left, rights, biases = tensors[0], tensors[1::2], tensors[2::2]
        ctx.mode, ctx.group = mode, group
        ctx.save_for_backward(left, *rights)
        ctx.set_materialize_grads(False)
        ctx.roles = (Operand.INPUT, Operand.WEIGHT)
        if mode.plan.sites[group[0]].weight_first:
            ctx.roles = (Operand.WEIGHT, Operand.INPUT)
        products = mode.multiply(
            Gemm.FPROP,
            group,
            (ctx.roles[0], [left]),
            (ctx.roles[1], rights),
            lambda lefts, rights: [lefts[0] @ right for right in rights],
        )
        added = (p if b is None else p + b for p, b in zip(products, biases, strict=True))
        return tuple(value.to(left.dtype) for value in added)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        mode, (left, *rights) = ctx.mode, ctx.saved_tensors
        for_left, for_right = Gemm.DGRAD, Gemm.WGRAD
        if ctx.roles[1] is Operand.INPUT:
            for_left, for_right = for_right, for_left
        needs_left, *needs = ctx.needs_input_grad[2:]
        results: list[Tensor | None] = [None] * (1 + len(needs))
        present = [i for i, grad in enumerate(grads) if grad is not None]
        if not present:
            return None, None, *results
        sites = [ctx.group[i] for i in present]
        given: Operands = (Operand.GRAD_OUTPUT, [grads[i] for i in present])  # type: ignore[misc]
        if needs_left:
            (total,) = mode.multiply(
                for_left,
                sites,
                given,
                (ctx.roles[1], [rights[i] for i in present]),
                lambda gs, ws: [sum(g @ w.t() for g, w in zip(gs, ws, strict=True))],
            )
            results[0] = total.to(left.dtype)
        if any(needs[2 * i] for i in present):
            products = mode.multiply(
                for_right,
                sites,
                given,
                (ctx.roles[0], [left]),
                lambda gs, xs: [xs[0].t() @ g for g in gs],
            )
            for i, product in zip(present, products, strict=True):
                results[1 + 2 * i] = product.to(left.dtype)
        for i, grad in zip(present, given[1], strict=True):
            results[2 + 2 * i] = grad.sum(0)
        wanted = zip(results, ctx.needs_input_grad[2:], strict=True)
        return None, None, *(result if needed else None for result, needed in wanted)


class _Recording(TorchFunctionMode):
    """Note what every site multiplies."""

    def __init__(self, calls: list[_Call]) -> None:
        super().__init__()
        self._calls = calls

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = _site_of(func, args, kwargs or {})
        if found is not None:
            self._calls.append(found[0])
        return func(*args, **(kwargs or {}))


def _site_of(
    func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[_Call, Callable[[Tensor], Tensor]] | None:
    """The matmul that a call is, and what is done with its ``[M, N]`` result; or None.

    A site has a right operand of two dimensions and a left one of two or more.
    """
    name = getattr(func, "__name__", "")
    bias = None
    if name == "linear":
        x, weight, *rest = (*args, *kwargs.values())
        right, bias = weight.t(), rest[0] if rest else None
    elif name in ("matmul", "__matmul__", "mm"):
        x, right = args
    elif name == "addmm":
        bias, x, right = args
    else:
        return None
    if x.dim() < 2 or right.dim() != 2:
        return None
    if bias is not None and bias.dim() != 1:
        return _Call(x, right), lambda out: out + bias
    shape = (*x.shape[:-1], right.shape[1])
    rows = math.prod(x.shape[:-1])
    return _Call(x.reshape(rows, x.shape[-1]), right, bias), lambda out: out.view(shape)


class WithRoundingErrors(FakeQuantized):
    """The same, with every value and gradient off by a rounding error of its dtype.

    It shows how far apart two correct results can be: where values cancel, or lie between two FP8
    numbers, a rounding error has consequences.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = super().__torch_function__(func, types, args, kwargs)
        if not isinstance(out, Tensor) or not out.is_floating_point() or out.numel() == 0:
            return out
        memory = [x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)]
        is_new = memory and out.untyped_storage().data_ptr() not in memory
        return _Rounded.apply(out) if is_new else out


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return _off_by_rounding(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _off_by_rounding(grad)


def _off_by_rounding(value: Tensor) -> Tensor:
    noise = (torch.rand(value.shape) - 0.5) * torch.finfo(value.dtype).eps
    return (value.float() * (1 + noise)).to(value.dtype)
