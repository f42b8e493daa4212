"""cast_attention: which calls multiply FP8 in forward, and what backward takes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import fp8compile
from fp8compile.cost import H200
from fp8compile.ir import ATTENTION, QUANTIZE, args_of, is_backward
from fp8compile.passes import cast_attention
from fp8compile.passes.cast_attention import attention_calls, why_not_fp8
from tests.helpers import compile_interpreted, trace
from tests.models import sqnr_db
from tests.passes.common import attended, check_pass

aten = torch.ops.aten
FP8 = {"attention": "fp8", "decline_slower": False}
CPU, FLASH, EFFICIENT, CUDNN = (
    getattr(aten, f"_scaled_dot_product_{kind}").default
    for kind in (
        "flash_attention_for_cpu",
        "flash_attention",
        "efficient_attention",
        "cudnn_attention",
    )
)


class Attention(nn.Module):
    """Multi-head attention with as many kv heads as asked for."""

    def __init__(self, kv_heads: int = 4, head: int = 16, **kwargs: Any) -> None:
        super().__init__()
        self.kv_heads, self.head, self.kwargs = kv_heads, head, {"is_causal": True, **kwargs}
        self.qkv = nn.Linear(64, head * (4 + 2 * kv_heads))
        self.o = nn.Linear(4 * head, 64)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, self.head)).transpose(1, 2)
        q, k, v = heads.split([4, self.kv_heads, self.kv_heads], 1)
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **self.kwargs)
        return self.o(y.transpose(1, 2).flatten(2))


def ran(model: nn.Module, *inputs: Tensor, **options: Any) -> dict[str, Tensor]:
    """The output and all gradients of one step with these options, or of the model itself."""
    model = copy.deepcopy(model)
    torch._dynamo.reset()
    run = compile_interpreted(model, {**FP8, **options}) if options else model
    x = inputs[0].clone().requires_grad_()
    out = run(x, *inputs[1:])
    out.square().sum().backward()
    return {"out": out, "x": x.grad, **{name: p.grad for name, p in model.named_parameters()}}


def test_the_copies_and_their_scales() -> None:
    gm = attended(scale=0.5)
    assert check_pass(gm, cast_attention) == 1
    gm.recompile()
    (call,) = gm.graph.find_nodes(op="call_function", target=ATTENTION)
    casts = [node for node in gm.graph.nodes if node.target is QUANTIZE]
    assert [cast.args[1:] for cast in casts] == [(None, 0, torch.float8_e4m3fn, True, False)] * 3
    outputs = [(arg.args if isinstance(arg, fx.Node) else arg) for arg in args_of(call)]
    copies, inverses = ([(cast, index) for cast in casts] for index in (0, 2))
    assert outputs == [*copies, *inverses, (casts[2], 4), 2, 4, 4, True, 0.5]
    assert attention_calls(gm) == [(call, "")]
    q, k, v = (torch.randn(2, 64, 4, 16).bfloat16().transpose(1, 2) for _ in range(3))
    assert 22 < sqnr_db(attended(scale=0.5)(q, k, v), gm(q, k, v)) < 30


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["", "gqa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_is_as_in_high_precision_but_for_the_rounding(
    kv_heads: int, dtype: torch.dtype
) -> None:
    model, x = Attention(kv_heads).to(dtype), torch.randn(2, 32, 64, dtype=dtype)
    plain = ran(model, x)
    without, attention = ran(model, x, attention="high_precision"), ran(model, x, attention="fp8")
    for name, value in plain.items():
        assert sqnr_db(value, attention[name]) > sqnr_db(value, without[name]) - 6, name
    assert not torch.equal(without["out"], attention["out"])


def kept_in_16_bits(attention: str) -> int:
    """How many values of a step with 96 tokens and 64 features are kept in bfloat16."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    torch._dynamo.reset()
    compiled = compile_interpreted(Attention().bfloat16(), {**FP8, "attention": attention})
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compiled(torch.randn(2, 48, 64, dtype=torch.bfloat16, requires_grad=True))
    return sum(t.dtype is torch.bfloat16 and t.numel() == 96 * 64 for t in saved)


def test_fp8_copies_are_kept_in_place_of_values() -> None:
    """Of query, key, value and output."""
    assert (kept_in_16_bits("fp8"), kept_in_16_bits("high_precision")) == (0, 4)


def test_backward_takes_what_forward_multiplied() -> None:
    """Of large products the rounding is large, too: with others the softmax that backward computes
    again, from forward's sums, would not add up to 1, and gradients grow by it.
    """
    model, x = Attention(), torch.randn(2, 32, 64)
    with torch.no_grad():
        model.qkv.weight[:128] *= 8  # of query and key
    plain = ran(model, x)
    fp8 = ran(model, x, attention="fp8")
    for name, value in plain.items():
        ratio = fp8[name].norm() / value.norm()
        assert 0.9 < ratio < 1.1, name


def test_a_factor_of_the_query_becomes_the_scale() -> None:
    class Scaled(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q = self.qkv(x).unflatten(-1, (-1, 16)).transpose(1, 2)[:, :4] * 0.125
            return F.scaled_dot_product_attention(q, q.flip(2), q.sin(), scale=1.0).transpose(1, 2)

    found: list[fx.GraphModule] = []
    options = {**FP8, "own_passes": {"cast_attention": lambda gm: found.append(gm) or 0}}
    compile_interpreted(Scaled(), options)(torch.randn(2, 32, 64))
    (call,) = (node for node in found[0].graph.nodes if node.target is ATTENTION)
    assert args_of(call)[-1] == 1.0  # what else reads the product keeps it


def test_a_checkpointed_region_is_computed_again() -> None:
    class Checkpointed(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False) + x

    model, x = Checkpointed(), torch.randn(2, 32, 64)
    found: list[fx.GraphModule] = []
    options = {"own_passes": {"plan_saved": lambda gm: found.append(gm) or 0}}
    got = ran(model, x, **options)
    (call,) = (n for n in found[0].graph.nodes if n.target is ATTENTION and not is_backward(n))
    assert call.meta["recompute"] is CheckpointPolicy.PREFER_RECOMPUTE
    for name, value in ran(model, x).items():
        assert sqnr_db(value, got[name]) > 15, name


def test_a_region_that_keeps_attention_keeps_its_fp8_output() -> None:
    """And the sums; what is made of these is computed again."""
    contexts = partial(create_selective_checkpoint_contexts, [CPU])

    class Selective(Attention):
        def forward(self, x: Tensor) -> Tensor:
            run = super().forward
            return checkpoint(run, x, use_reentrant=False, context_fn=contexts) + x

    found: list[fx.GraphModule] = []
    options = {"own_passes": {"plan_saved": lambda gm: found.append(gm) or 0}}
    model, x = Selective(), torch.randn(2, 32, 64)
    got = ran(model, x, **options)
    forward = [n for n in found[0].graph.nodes if not is_backward(n)]
    (call,) = (n for n in forward if n.target is ATTENTION)
    kept = {n for n in forward if n.meta.get("recompute") is CheckpointPolicy.MUST_SAVE}
    assert {call, *call.users} <= kept and len(call.users) == 2
    assert not any(n.meta["val"].dtype is torch.float32 for n in kept - {call, *call.users})
    for name, value in ran(model, x).items():
        assert sqnr_db(value, got[name]) > 15, name


KINDS: dict[str, Callable[..., Any]] = {
    "flash": lambda q, k, v: FLASH(q, k, v, 0.0, True),
    "efficient": lambda q, k, v: EFFICIENT(q, k, v, None, True, 0.0, True),
    "cudnn": lambda q, k, v: CUDNN(q, k, v, None, True, 0.0, True),
}


def backward_of(kind: str, grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Any:
    results = KINDS[kind](q, k, v)
    given = (grad, q, k, v)
    if kind == "efficient":
        out, sums, seed, offset = results
        run = aten._scaled_dot_product_efficient_attention_backward
        return run(*given, None, out, sums, seed, offset, 0.0, [True, True, True, False], True)[:3]
    out, sums, *lengths, seed, offset, _ = results
    if kind == "flash":
        run = aten._scaled_dot_product_flash_attention_backward
        return run(*given, out, sums, *lengths, 0.0, True, seed, offset)
    run = aten._scaled_dot_product_cudnn_attention_backward
    return run(*given, out, sums, seed, offset, None, *lengths, 0.0, True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_attention_of_gpus(kind: str) -> None:
    """Their backwards take what stands for sums and, for no dropout, for seeds."""
    values = {name: torch.randn(2, 4, 64, 16, dtype=torch.bfloat16) for name in ("q", "k", "v")}
    gm = trace(partial(backward_of, kind), grad=values["q"], **values)
    (before,) = (n for n in gm.graph.nodes if n.target in (FLASH, EFFICIENT, CUDNN))
    sums = next(item for item in before.users if item.args[1] == 1).meta["val"]
    assert check_pass(gm, cast_attention) == 1
    (backward,) = (n for n in gm.graph.nodes if "attention_backward" in str(n.target))
    taken = [arg.meta["val"] for arg in backward.all_input_nodes]
    assert any(t.shape == sums.shape and t.dtype == sums.dtype for t in taken)
    assert all(isinstance(t, torch.Tensor) for t in taken)


class Masked(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.kwargs = {"attn_mask": mask}
        return super().forward(x)


def why_not(**sizes: Any) -> str | None:
    """The reason for a call of the CPU's attention with other sizes than usual."""
    given = {"queries": 32, "keys": 32, "head": 16, "causal": False, "dtype": torch.float32} | sizes
    q, k, v = (
        torch.randn(1, 2, given[tokens], given["head"], dtype=given["dtype"])
        for tokens in ("queries", "keys", "keys")
    )
    gm = trace(lambda q, k, v: CPU(q, k, v, 0.0, given["causal"])[0], q=q, k=k, v=v)
    (call,) = (node for node in gm.graph.nodes if node.target is CPU)
    return why_not_fp8(call)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({}, None),
        ({"head": 128}, None),
        ({"head": 144}, "heads have 144 elements"),
        ({"head": 24}, "heads have 24 elements"),
        ({"keys": 48}, None),
        ({"keys": 48, "causal": True}, "causal, with 32 queries and 48 keys"),
        ({"queries": 0}, "empty"),
        ({"queries": 1}, "FP8 would not be faster for one query"),
        ({"dtype": torch.float64}, "float64"),
        ({"dtype": torch.float16}, None),
    ],
    ids=str,
)
def test_what_has_a_form_in_fp8(sizes: dict[str, Any], reason: str | None) -> None:
    found = why_not(**sizes)
    assert found is None if reason is None else reason in str(found)


def test_what_stays_in_high_precision_is_said() -> None:
    model, x = Masked(), torch.randn(2, 32, 64)
    with pytest.warns(UserWarning, match="attention stays in high precision: it has a mask"):
        compile_interpreted(model, FP8)(x, torch.zeros(32, 32))
    with pytest.raises(BackendCompilerFailed, match=r"StrictError(.|\n)*1 x .*: it has a mask"):
        compile_interpreted(model, {**FP8, "strict": True})(x, torch.zeros(32, 32))
    with pytest.warns(UserWarning, match="symbolic"):
        compile_interpreted(Attention(), FP8, dynamic=True)(x)


def test_short_sequences_are_declined_in_silence(recwarn: pytest.WarningsRecorder) -> None:
    model, x = Attention(), torch.randn(2, 32, 64)
    found = fp8compile.explain(model, x, options={"attention": "fp8", "decline_slower": "H200"})
    assert "FP8 would not be faster" in str(found)
    assert not any("attention" in str(warning.message) for warning in recwarn)
    gm = attended()
    assert cast_attention(gm, device=H200) == 0
    ((_, reason),) = attention_calls(gm)
    assert reason.startswith("FP8 would not be faster: ")


def test_explain_says_what_runs_in_fp8() -> None:
    text = str(fp8compile.explain(Attention(), torch.randn(2, 32, 64), options=FP8))
    assert "(other: 1 x fp8.attention)" in text and "FP8 in forward" in text
