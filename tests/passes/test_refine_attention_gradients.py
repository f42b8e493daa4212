"""refine_attention_gradients: whose gradients attention's backward has in E4M3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import fp8compile
from fp8compile import RECIPES, Format, Operand, Recipe
from fp8compile.passes import refine_attention_gradients, tag_sites
from tests.helpers import compile_interpreted
from tests.models import Llama

pytestmark = pytest.mark.filterwarnings("ignore:FP8 is emulated here")
HEAD = 32


class Attention(nn.Module):
    """Of two heads; what else is made of ``q``, ``k`` and ``v`` comes from ``more``."""

    def __init__(self, more: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        for name in ("q", "k", "v", "o"):
            self.add_module(name, nn.Linear(64, 64, bias=False))
        self.norm = nn.RMSNorm(HEAD)
        self.more = more

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for part in self.parts())
        cos = torch.cos(torch.arange(x.shape[1]).float())[:, None]
        q, k = self.norm(q), self.norm(k) * cos - k.flip(-1) * cos
        y = F.scaled_dot_product_attention(q, key=k, value=v, is_causal=True)
        y = self.o(y.transpose(1, 2).flatten(2))
        return y if self.more is None else y + self.more(self, x, q, k, v)

    def parts(self) -> tuple[nn.Module, ...]:
        return self.get_submodule("q"), self.get_submodule("k"), self.get_submodule("v")


class Fused(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 192, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).view(*x.shape[:2], 3, -1, HEAD).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*heads.unbind())
        return self.o(y.transpose(1, 2).reshape(x.shape))


class Checkpointed(Attention):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return result


def refined(model: nn.Module, recipe: Recipe = RECIPES["delayed"]) -> set[str]:
    """The sites that the pass refines, by name; its return value must be their number."""
    torch._dynamo.reset()
    found: set[str] = set()

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        tag_sites(gm)
        count = refine_attention_gradients(gm, recipe=recipe)
        chosen = [site for site in gm.meta["fp8_sites"] if site.recipe is not None]
        assert count == len(chosen)
        for site in chosen:
            assert site.recipe.format_of(Operand.GRAD_OUTPUT) is Format.E4M3
            assert site.recipe.scaling is recipe.scaling
            found.add(site.fqn.split("modules_")[1].split("_")[0])
        return gm.forward

    torch.compile(model, backend=backend)(torch.randn(2, 8, 64))
    return found


@pytest.mark.parametrize("model", [Attention(), Checkpointed()], ids=lambda m: type(m).__name__)
def test_refines_what_computes_query_key_and_value(model: nn.Module) -> None:
    assert refined(model) == {"q", "k", "v"}
    for other in ("e4m3_only", "current"):
        assert refined(model, RECIPES[other]) == set()


def test_refines_a_fused_projection() -> None:
    assert refined(Fused()) == {"qkv"}


OTHER_USES: dict[str, tuple[Callable[..., Tensor], set[str]]] = {
    "added": (lambda self, x, q, k, v: v.transpose(1, 2).flatten(2), set()),
    "same input": (lambda self, x, q, k, v: F.linear(x, self.o.weight), set()),
    "same weight": (lambda self, x, q, k, v: F.linear(x.sin(), self.q.weight), {"q", "k", "v"}),
    "multiplied": (lambda self, x, q, k, v: self.o(k.transpose(1, 2).flatten(2)), set()),
}


@pytest.mark.parametrize("use", OTHER_USES)
def test_leaves_alone_what_others_take_or_share_a_cast_with(use: str) -> None:
    more, expected = OTHER_USES[use]
    assert refined(Attention(more)) == expected


@pytest.mark.parametrize(
    "options, e4m3",
    [
        ({"attention": "fp8_both"}, {"wq", "wk", "wv"}),
        ({"attention": "fp8_both", "overrides": {"*wk*": "delayed"}}, {"wq", "wv"}),
        ({"attention": "fp8"}, set()),
    ],
    ids=["both", "own recipe", "forward"],
)
def test_gradients_are_cast_to_what_is_said(options: dict[str, Any], e4m3: set[str]) -> None:
    model = Llama(layers=1, width=256, heads=2, kv_heads=1, hidden=256, max_tokens=128)
    ids = torch.randint(0, 256, (1, 128))
    rows = fp8compile.explain(model, ids, options={**options, "decline_slower": False}).rows
    dgrads = [row for row in rows if row.gemm == "dgrad" and row.is_fp8]
    found = {name for row in dgrads if row.formats == "e4m3 x e4m3" for name in row.sites}
    assert {name.split(".")[-1] for name in found} == e4m3
    assert len(dgrads) > len(found) > 0 or not e4m3


def test_scales_are_kept_for_the_range_of_the_format() -> None:
    torch.manual_seed(0)
    model = Llama(layers=1, width=256, heads=2, kv_heads=1, hidden=256, max_tokens=128)
    ids = torch.randint(0, 256, (1, 128))
    options = {"attention": "fp8_both", "decline_slower": False}
    logits = compile_interpreted(model, options)(ids)
    F.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten()).backward()
    fp8compile.update_scales(model)
    saved, slot = fp8compile.state_dict(model), Operand.GRAD_OUTPUT.value
    for name, largest in {"attention.wq": Format.E4M3.max, "attention.wo": Format.E5M2.max}.items():
        scale, history = (
            saved[f"layers.0.{name}.weight.{what}"] for what in ("scale", "amax_history")
        )
        assert largest / 2 < scale[slot] * history[:, slot].max() <= 1.01 * largest
