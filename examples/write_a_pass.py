"""Write a pass of one's own, test it on a graph, and compile with it.

    python examples/write_a_pass.py

The gradient of a weight adds up over all tokens, and an optimizer sees nothing else. Where that of
some layers matters most, this pass has it computed in high precision, while their forward and the
gradients that flow on stay in FP8.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import fp8compile
from fp8compile import Gemm
from fp8compile.ir import format_graph, gemms
from fp8compile.passes import choose_precision, find_gemms
from fp8compile.progress import progress
from fp8compile.verify import verify

WHY = "its weight's gradient matters"


# ---- the pass ------------------------------------------------------------------------------------
def precise_wgrad(gm: fx.GraphModule, *, sites: tuple[str, ...] = ("head",)) -> int:
    """Keep the wgrad of some sites in high precision.

    Before:
        mm : bf16[64, 32] = aten.mm(permute, x)  # head wgrad = grad_output^T x input
    After:
        mm : bf16[64, 32] = aten.mm(permute, x)  # head wgrad, not in FP8: its weight's gradient ...

    Requires: choose_precision.
    Leaves alone: other sites; GEMMs that have a reason already.
    """
    rewrites = 0
    for node, info in list(gemms(gm)):
        if info.is_fp8 and info.gemm is Gemm.WGRAD and info.site.fqn in sites:
            node.meta["fp8"] = replace(info, reason=WHY)
            rewrites += 1
    return rewrites


# ---- its test, on a graph without a compiler -----------------------------------------------------
def traced() -> fx.GraphModule:
    """A GEMM as it is traced by hand: `x @ w.T`."""

    def fn(x: Tensor, w: Tensor) -> Tensor:
        return torch.ops.aten.mm(x, torch.ops.aten.permute(w, [1, 0]))

    bf16 = torch.bfloat16
    return make_fx(fn, tracing_mode="fake")(
        torch.randn(16, 32, dtype=bf16), torch.randn(64, 32, dtype=bf16)
    )


def test_precise_wgrad() -> None:
    gm = traced()
    find_gemms(gm)
    choose_precision(gm)
    ((node, info),) = gemms(gm)
    run = partial(precise_wgrad, sites=(info.site.fqn,))
    assert run(gm) == 0, "this is an fprop"
    node.meta["fp8"] = replace(info, gemm=Gemm.WGRAD)
    assert precise_wgrad(gm, sites=("another",)) == 0
    assert run(gm) == 1
    assert run(gm) == 0, "a second run has nothing to do"
    assert f"wgrad, not in FP8: {WHY}" in format_graph(gm)
    verify(gm)


# ---- compiled with it ----------------------------------------------------------------------------
class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(64, 96)
        self.head = nn.Linear(96, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu())


def gradients_db(model: nn.Module, x: Tensor, grad_output: Tensor, **options: object) -> str:
    """SQNR of the gradients of the weights, against those in the model's own precision."""
    found = []
    calls = model, torch.compile(model, backend="fp8", options=options)
    for call in progress(calls, "running it in both precisions"):
        model.zero_grad()
        call(x).backward(grad_output)
        found.append({k: p.grad.clone() for k, p in model.named_parameters() if p.dim() > 1})
    want, got = found
    torch._dynamo.reset()
    db = {k: 20 * torch.log10(want[k].norm() / (want[k] - got[k]).norm()) for k in want}
    return ", ".join(f"{name} {value:.1f} dB" for name, value in db.items())


def main() -> None:
    test_precise_wgrad()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Classifier().to(device)
    x, grad_output = (torch.randn(256, size, device=device) for size in (64, 32))
    everything = {"decline_slower": False}  # on a GPU layers this small would stay in float32
    ours = {"own_passes": {"choose_precision": precise_wgrad}, **everything}
    for row in fp8compile.explain(model, x, options=ours).rows:
        print(f"{row.fqn:<5} {row.gemm:<6} {row.formats or row.decision:<12} {row.reason}")
    print("gradients without the pass:", gradients_db(model, x, grad_output, **everything))
    print("gradients with the pass:   ", gradients_db(model, x, grad_output, **ours))


if __name__ == "__main__":
    main()
