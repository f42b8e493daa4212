"""FP8 without a compiler: a module run in eager, with the operands of its matmuls cast and back.

Under ``FakeQuantized`` every matmul call that is a site becomes an autograd function that casts its
operands with ``fp8::quantize`` or ``fp8::quantize_blocks``, forward and backward, and multiplies
them with the reference bodies of the GEMMs. From the compiler it takes only the *plan*: which sites
are merged, and which slot of the scaling state each operand has; and the scales that static scaling
has derived. How an operand is cast has to be as the site's recipe says. What is computed from what,
the transpositions, the order of things, aliasing and in-place writes are eager PyTorch's. A
compiled graph has to agree with it up to the order of float32 sums, far below the noise of FP8.
(The zoo's simulation is simpler, and knows only weights that are parameters and scales of the
tensor itself.)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fp8compile.formats import Format
from fp8compile.ir import (
    ATTENTION_BACKWARD,
    QUANTIZE,
    SCALED_MMS,
    SITE_TAG,
    SLOTS_PER_SITE,
    Site,
    args_of,
    aten,
    gemms,
    takes_slot,
    value_key,
)
from fp8compile.passes.cast_attention import attention_calls
from fp8compile.recipe import Gemm, Granularity, Operand, Recipe, Scaling

_FACTOR = "fp8_factor"  # attribute of a product with a constant
_MULTIPLIES = ("mul", "__mul__", "__rmul__")
# Those of merged sites, which lie side by side, and the dimension that the GEMM sums over.
Operands = tuple[Operand, Sequence[Tensor], int]


@dataclass(frozen=True)
class Cast:
    """How an operand is cast: ``kept`` if its scale may be known, and its ``slot`` then. Or it is
    the output of a call of ``attention`` in FP8, by its number, and has the scale of that.
    """

    format: torch.dtype
    block: tuple[int, int]
    power_of_two: bool = False
    kept: bool = False
    slot: int | None = None
    attention: int | None = None

    @staticmethod
    def of(cast: fx.Node, attended: Sequence[fx.Node | None] = ()) -> Cast:
        """What a node of a graph does; ``attended``: the calls of attention that are in FP8."""
        tensorwise, e4m3 = Granularity.TENSOR.block, torch.float8_e4m3fn
        if cast in attended:
            return Cast(e4m3, tensorwise, attention=attended.index(cast))
        _, first, second, format, *_ = args_of(cast)
        scales = [None if call is None else args_of(call)[6] for call in attended]
        if isinstance(first, fx.Node) and first in scales:
            return Cast(format, tensorwise, attention=scales.index(first))
        if cast.target is not QUANTIZE:
            return Cast(format, tuple(first), second)
        kept = takes_slot(cast)
        return Cast(format, Granularity.TENSOR.block, kept=kept, slot=second if kept else None)

    @staticmethod
    def wanted(recipe: Recipe, operand: Operand) -> Cast:
        """What a recipe says, which knows nothing of slots."""
        format, block = recipe.format_of(operand).dtype, recipe.granularity_of(operand).block
        return Cast(format, block, recipe.power_of_two, recipe.scaling is not Scaling.CURRENT)


@dataclass(frozen=True)
class Attended:
    """A call of attention in FP8: the casts of query, key and value, and the scale of products,
    into which a constant times the query or key may have gone. ``slot``: where the scales of what
    its backward rounds lie, behind that of the output's gradient; None if that is not in FP8.
    """

    casts: tuple[Cast, ...]
    scale: float
    slot: int | None = None


@dataclass
class Plan:
    """What a joint graph does at its sites, after all passes.

    ``recipes``: that of each site, by the options. ``casts``: for each GEMM in FP8 those of
    its operands, by role. ``groups``: the sites that are computed together, by the first of them.
    ``batched``: the sites that AOTAutograd has traced as batched matmuls, as it does with an input
    that is not contiguous where no gradient is needed. ``observes``: whether the graph records
    amax, as one with a backward does for delayed scales. ``attention``: for each call of scaled dot
    product attention how it is in FP8, or None if it is not; empty if none was to be.
    """

    sites: Sequence[Site] = ()
    recipes: Sequence[Recipe] = ()
    observes: bool = False
    casts: dict[tuple[int, Gemm], dict[Operand, Cast]] = field(default_factory=dict)
    groups: dict[int, tuple[int, ...]] = field(default_factory=dict)
    batched: frozenset[int] = frozenset()
    attention: tuple[Attended | None, ...] = ()

    @staticmethod
    def of(
        gm: fx.GraphModule, sites: Sequence[Site], recipes: Sequence[Recipe], observes: bool
    ) -> Plan:
        """Read the plan off a graph, and check that casts are those of the recipes and roles."""
        batched = gm.graph.find_nodes(op="call_function", target=aten.bmm.default)
        tags = ((node.meta.get("custom") or {}).get(SITE_TAG) for node in batched)
        of_batched = frozenset(tag for tag in tags if tag is not None)
        attended = [None if why else call for call, why in attention_calls(gm)]
        attention = tuple(
            call
            and Attended(
                _casts_of_attention(call, sites, recipes),
                args_of(call)[-1],
                _slot_of_backward(gm, call, sites, recipes),
            )
            for call in attended
        )
        plan = Plan(sites, recipes, observes, batched=of_batched, attention=attention)
        allowed: dict[object, set[int]] = {}  # the slots that a value in a format may have
        used: list[tuple[object, int]] = []
        for node, info in gemms(gm):
            if node.target not in SCALED_MMS:
                continue
            roles: dict[Operand, Cast] = {}
            for operand, edge in zip(args_of(node)[:2], (info.left, info.right), strict=True):
                cast = roles[edge.operand] = Cast.of(args_of(operand)[0], attended)
                for site in info.sites:
                    wanted = Cast.wanted(recipes[site.index], edge.operand)
                    if cast.attention is not None:  # whose scale is not the recipe's
                        wanted = replace(wanted, kept=False, attention=cast.attention)
                    assert replace(cast, slot=None) == wanted, (node, edge.operand)
                if cast.slot is None:
                    continue
                key = (value_key(args_of(args_of(operand)[0])[0]), cast.format)
                slots = {site.slot(edge.operand) for site in info.sites}
                allowed[key] = allowed.get(key, set()) | slots
                used.append((key, cast.slot))
            plan.casts |= {(site.index, info.gemm): roles for site in info.sites}
            plan.groups[info.site.index] = tuple(site.index for site in info.sites)
        assert all(slot in allowed[key] for key, slot in used), "a cast has another value's slot"
        return plan

    def group_of(self, site: int) -> tuple[int, ...]:
        """The sites that are computed together with a site, in order; mostly only itself."""
        return next((group for group in self.groups.values() if site in group), (site,))


def _casts_of_attention(
    call: fx.Node, sites: Sequence[Site], recipes: Sequence[Recipe]
) -> tuple[Cast, ...]:
    """Those of the query, key and value, of which each slot is of a site with delayed scales."""
    casts = tuple(Cast.of(args_of(copy)[0]) for copy in args_of(call)[:3])
    slots = [cast.slot for cast in casts if cast.slot is not None]
    delayed = [s for s in sites if recipes[s.index].scaling is Scaling.DELAYED]
    assert {*slots} <= {site.attention_slot for site in delayed}, "a cast has another's slot"
    assert len({*slots}) == len(slots) or len({*call.args[:3]}) < 3, "two values share a slot"
    return casts


def _slot_of_backward(
    gm: fx.GraphModule, call: fx.Node, sites: Sequence[Site], recipes: Sequence[Recipe]
) -> int | None:
    """Of a site with delayed scales, which is no other attention's."""
    of_call = [
        node
        for node in gm.graph.find_nodes(op="call_function", target=ATTENTION_BACKWARD)
        if args_of(args_of(node)[4])[0] is call
    ]
    if not of_call:
        return None
    (node,) = of_call
    known, slot, *_ = args_of(args_of(args_of(node)[10])[0])
    cast = args_of(args_of(node)[0])[0]
    assert cast.args[1:3] == (known, slot - 1), "another scale of the output's gradient"
    owners = [s for s in sites if s.attention_slot + 2 == slot]
    assert [recipes[s.index].scaling for s in owners] == [Scaling.DELAYED], "another's slot"
    return slot


@dataclass
class _Call:
    """A matmul call: ``left[M, K] @ right[K, N]``, then ``+ bias``."""

    left: Tensor
    right: Tensor
    bias: Tensor | None = None


class FakeQuantized(TorchFunctionMode):
    """Run modules with their matmuls in emulated FP8, as a plan says.

    ``scale``: the scales that are kept, or None if there are none. Afterwards ``amax`` is what the
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
        self._attended = 0
        self._attention_scales: dict[int, Tensor] = {}  # of the outputs, by the number of the call

    def call(self, model: nn.Module, inputs: Sequence[Any]) -> Any:
        """What the model returns."""
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with _Recording(self._foreseen):
            functional_call(model, buffers, tuple(x.detach().clone() for x in inputs))
        with self:
            out = model(*inputs)
        assert len(self._calls) == len(self.plan.sites), "not as many sites as the compiler found"
        assert self._attended == len(self.plan.attention), "not as many calls of attention"
        return out

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is F.scaled_dot_product_attention and self.plan.attention:
            number, self._attended = self._attended, self._attended + 1
            if self.plan.attention[number] is not None:
                self.counts["attention in FP8"] += 1
                return _Attention.apply(self, number, *args, *(kwargs or {}).values())
        found = _site_of(func, args, kwargs or {})
        if found is None:
            out = func(*args, **(kwargs or {}))
            if getattr(func, "__name__", "") in _MULTIPLIES and not isinstance(args[1], Tensor):
                setattr(out, _FACTOR, float(args[1]))
            return out
        call, finish = found
        self._calls.append(call)
        return finish(self._output(len(self._calls) - 1, call))

    def without_factors(
        self, number: int, values: Sequence[Tensor], scale: float
    ) -> tuple[list[float], float]:
        """The constants that the query, key and value of a call were multiplied by and that the
        compiler has put into the scale of products; and that scale.
        """
        attended = self.plan.attention[number]
        assert attended is not None
        q, k = (getattr(value, _FACTOR, 1.0) for value in values[:2])
        for factors in ([1.0, 1.0], [q, k], [q, 1.0], [1.0, k]):
            if math.isclose(attended.scale, scale * math.prod(factors)):
                return [*factors, 1.0], attended.scale
        raise AssertionError(f"products are scaled by {attended.scale}, and should be by {scale}")

    def _output(self, site: int, call: _Call) -> Tensor:
        group = self.plan.group_of(site)
        if site == group[0]:
            calls = [call, *(self._foreseen[other] for other in group[1:])]
            flat = [each for c in calls for each in (c.right, c.bias)]
            outputs = _Multiply.apply(self, group, call.left, *flat)
            self._outputs.update(zip(group, outputs, strict=True))
        assert torch.equal(call.left, self._calls[group[0]].left), "merged, with different inputs"
        return self._outputs.pop(site)

    def multiply(self, gemm: Gemm, sites: Sequence[int], left: Operands, right: Operands) -> Tensor:
        """``left x right^T`` of K-major operands, cast if this GEMM is in FP8; unrounded."""
        casts = self.plan.casts.get((sites[0], gemm))
        self._check_precision(gemm, sites, [*left[1], *right[1]], casts is not None)
        a, b = (_k_major(*operands[1:]) for operands in (left, right))
        if casts is None:
            return _unrounded(a) @ _unrounded(b).t()
        how = [casts[role] for role, *_ in (left, right)]
        (a, a_inv), (b, b_inv) = (self._cast(*each) for each in zip((a, b), how, strict=True))
        args = (a, b, a_inv, b_inv, None, torch.float32)
        if how[0].block == Granularity.TENSOR.block:
            return torch.ops.fp8.scaled_mm(*args, False)
        return torch.ops.fp8.scaled_mm_blocks(*args, *(cast.block for cast in how), False)

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
        elif gemm in self.plan.recipes[sites[0]].high_precision:
            reason = "its recipe says so"
        elif 1 in sizes and not is_fp8:
            reason = "Inductor may have made a product and a sum of it"
        assert is_fp8 == (reason is None), f"{gemm} of sites {sites}: {is_fp8=}, {reason=}"

    def _cast(self, value: Tensor, cast: Cast) -> tuple[Tensor, Tensor]:
        """A K-major operand as FP8 holds it, and its scale_inv."""
        if cast.block != Granularity.TENSOR.block:
            how = (cast.block, cast.power_of_two, cast.format)
            q, _, scale_inv, _ = torch.ops.fp8.quantize_blocks(value, *how)
            return q, scale_inv
        q, scale_inv, _ = self._cast_tensor(value, cast)
        return q, scale_inv

    def _cast_tensor(self, value: Tensor, cast: Cast) -> tuple[Tensor, Tensor, Tensor]:
        """A matrix in FP8 with one scale, its scale_inv, and the scale."""
        scale, slot = (self.scale, cast.slot or 0) if cast.kept else (None, 0)
        if cast.attention is not None:
            scale = self._attention_scales[cast.attention]
        q, _, scale_inv, amax, used = torch.ops.fp8.quantize(value, scale, slot, cast.format)
        if self.plan.observes and cast.kept:
            self.amax[slot] = torch.maximum(self.amax[slot], amax[0])
        return q, scale_inv, used

    def gradients_of_attention(
        self, number: int, grad: Tensor, operands: Sequence[Any], how: Sequence[Any]
    ) -> list[Tensor]:
        """Those of the rows of query, key and value, from copies, sums and scale_inv of forward."""
        attended = self.plan.attention[number]
        assert attended is not None and attended.slot is not None and self.scale is not None
        slot, (*copies, out, sums, q_inv, k_inv, v_inv), head = attended.slot, operands, how[0]
        self.counts["backwards of attention in FP8"] += 1
        q, _, inverse, amax, _ = torch.ops.fp8.quantize(
            grad, self.scale, slot - 1, Format.E4M3.dtype
        )
        inverses = (inverse, q_inv, k_inv, v_inv)
        scales, of_products, *others = torch.ops.fp8.gradient_scales(
            self.scale, slot, *inverses, head, how[-1]
        )
        taken = (q, *copies, out, sums, *inverses, scales, of_products, *how[1:])
        *gradients, largest = torch.ops.fp8.attention_backward(*taken)
        held = self.amax[slot - 1 : slot + len(largest)]
        torch.maximum(held, torch.cat([amax, largest]), out=held)
        return [x.float() * inv for x, inv in zip(gradients, others, strict=True)]

    def cast_for_attention(self, number: int, values: Sequence[Tensor]) -> list[Tensor]:
        """The query, key and value of a call in FP8, their scale_inv, and the output's scale."""
        attended = self.plan.attention[number]
        assert attended is not None
        found = [self._cast_tensor(*each) for each in zip(values, attended.casts, strict=True)]
        self._attention_scales[number] = found[2][2]
        return [each[0] for each in found] + [each[1] for each in found] + [found[2][2]]


def _k_major(values: Sequence[Tensor], k_dim: int) -> Tensor:
    """Values side by side, turned so that a row runs along the dimension that is summed over."""
    joined = torch.cat(list(values), 1)
    return joined if k_dim == 1 else joined.t()


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
        operands = ((ctx.roles[0], [left], 1), (ctx.roles[1], rights, 0))
        product = mode.multiply(Gemm.FPROP, group, *operands)
        products = product.split([right.shape[1] for right in rights], 1)
        added = (p if b is None else p + b for p, b in zip(products, biases, strict=True))
        return tuple(value.to(left.dtype, copy=True) for value in added)  # may be written to

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
        given: list[Tensor] = [grads[i] for i in present]  # type: ignore[misc]
        if needs_left:
            others = (ctx.roles[1], [rights[i] for i in present], 1)
            product = mode.multiply(for_left, sites, (Operand.GRAD_OUTPUT, given, 1), others)
            results[0] = product.to(left.dtype)
        if any(needs[2 * i] for i in present):
            operands = ((ctx.roles[0], [left], 0), (Operand.GRAD_OUTPUT, given, 0))
            product = mode.multiply(for_right, sites, *operands)
            products = product.split([grad.shape[1] for grad in given], 1)
            for i, product in zip(present, products, strict=True):
                results[1 + 2 * i] = product.to(left.dtype)
        for i, grad in zip(present, given, strict=True):
            results[2 + 2 * i] = grad.sum(0)
        wanted = zip(results, ctx.needs_input_grad[2:], strict=True)
        return None, None, *(result if needed else None for result, needed in wanted)


class _Attention(torch.autograd.Function):
    """Attention of FP8 operands, whose output is FP8; with the backward of these."""

    @staticmethod
    def forward(
        ctx: Any,
        mode: FakeQuantized,
        number: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        is_causal: bool,
        scale: float | None = None,
    ) -> Tensor:
        (batch, heads, tokens, head), kv_heads = q.shape, k.shape[1]
        given = head**-0.5 if scale is None else scale
        ctx.factors, products = mode.without_factors(number, (q, k, v), given)
        ctx.how = (is_causal, products)
        q, k, v = (x / factor for x, factor in zip((q, k, v), ctx.factors, strict=True))
        rows = [x.transpose(1, 2).reshape(-1, x.shape[1] * head) for x in (q, k, v)]
        operands = mode.cast_for_attention(number, rows)
        copy, sums = torch.ops.fp8.attention(*operands, batch, heads, kv_heads, *ctx.how)
        out = (copy.float() * operands[5]).to(q.dtype).view(batch, tokens, heads, head)
        out = out.transpose(1, 2)
        ctx.mode, ctx.number, ctx.sizes = mode, number, (head, batch, heads, kv_heads)
        ctx.save_for_backward(
            *(
                (copy.float() * inverse)
                .to(x.dtype)
                .view(batch, -1, x.shape[1], head)
                .transpose(1, 2)
                for x, copy, inverse in zip((q, k, v), operands[:3], operands[3:6], strict=True)
            ),
            out,
            sums,
        )
        ctx.copies = (*operands[:3], copy, sums, *operands[3:6])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        is_causal, scale = ctx.how
        run = aten._scaled_dot_product_flash_attention_for_cpu_backward
        if ctx.mode.plan.attention[ctx.number].slot is None:
            grads = run(grad, *ctx.saved_tensors, 0.0, is_causal, scale=scale)
        else:
            rows = grad.transpose(1, 2).flatten(2).flatten(0, 1)
            how = (*ctx.sizes, *ctx.how)
            found = ctx.mode.gradients_of_attention(ctx.number, rows, ctx.copies, how)
            grads = [
                rows.to(x.dtype).view(x.shape[0], x.shape[2], x.shape[1], -1).transpose(1, 2)
                for rows, x in zip(found, ctx.saved_tensors[:3], strict=True)
            ]
        grads = (grad / factor for grad, factor in zip(grads, ctx.factors, strict=True))
        return None, None, *grads, None, None


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
        if not is_new:
            return out
        rounded = _Rounded.apply(out)
        if hasattr(out, _FACTOR):
            setattr(rounded, _FACTOR, getattr(out, _FACTOR))
        return rounded


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
