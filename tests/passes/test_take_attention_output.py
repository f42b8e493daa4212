"""take_attention_output: which GEMMs take attention's FP8 output as it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fp8compile.errors import PassError
from fp8compile.ir import ATTENTION, QUANTIZE, SCALED_MM, args_of, format_graph
from fp8compile.passes import plan_saved, take_attention_output
from fp8compile.verify import verify
from tests.helpers import compile_interpreted
from tests.models import sqnr_db
from tests.passes.common import check_pass, lines_of, projected
from tests.test_attention_state import OPTIONS, Attention

pytestmark = [
    pytest.mark.filterwarnings("ignore:FP8 is emulated here"),
    pytest.mark.usefixtures("fresh_dynamo"),
]


def casts_of_outputs(model: nn.Module, **options: object) -> tuple[list[fx.Node], list[fx.Node]]:
    """The GEMMs that take attention's FP8 output, and the casts with its scale."""
    found: list[fx.GraphModule] = []
    options = {"own_passes": {"share_casts": lambda gm: found.append(gm) or 0}, **options}
    x = torch.randn(2, 32, 64, requires_grad=True)
    compile_interpreted(model, {**OPTIONS, **options})(x)
    nodes = found[0].graph.nodes
    outputs = {n for n in nodes for a in n.args[:1] if getattr(a, "target", None) is ATTENTION}
    scales = {args_of(n)[6] for n in nodes if n.target is ATTENTION}
    return (
        [n for n in nodes if n.target is SCALED_MM and args_of(n)[0] in outputs],
        [n for n in nodes if n.target is QUANTIZE and args_of(n)[1] in scales],
    )


def test_the_copy_and_its_scale_are_taken() -> None:
    gm = projected()
    q, k, v = (torch.randn(2, 64, 4, 16).bfloat16().transpose(1, 2) for _ in range(3))
    inputs = (q, k, v, torch.randn(32, 64).bfloat16(), torch.zeros(4))
    gm.recompile()
    before = gm(*inputs)
    assert check_pass(gm, take_attention_output) == 1
    assert "y_q" not in lines_of(gm)
    gm.recompile()
    exact = F.scaled_dot_product_attention(*(x.float() for x in (q, k, v)), is_causal=True)
    exact = exact.transpose(1, 2).reshape(128, 64) @ inputs[3].float().t()
    assert sqnr_db(exact, gm(*inputs)) > sqnr_db(exact, before) > 20  # one rounding less


def test_forward_and_wgrad() -> None:
    gemms, casts = casts_of_outputs(Attention())
    assert len(gemms) == 1
    assert [cast.args[4:] for cast in casts] == [(False, True)]  # for wgrad, transposed
    torch._dynamo.reset()
    gemms, casts = casts_of_outputs(Attention(), recipe="current")
    assert (len(gemms), len(casts)) == (1, 1)


def test_what_is_planned_with_it_stays() -> None:
    """The scale that backward casts the output with is kept; v itself is not cast again for it."""
    found: list[str] = []

    def look(gm: fx.GraphModule) -> int:
        before = format_graph(gm)
        found.extend([before] if plan_saved(gm) == 0 and format_graph(gm) == before else [])
        return 0

    compiled = compile_interpreted(Attention(), {**OPTIONS, "own_passes": {"plan_saved": look}})
    compiled(torch.randn(2, 32, 64, requires_grad=True)).sum().backward()
    assert len(found) == 1


def test_what_more_is_computed_is_cast() -> None:
    class Gated(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.wo = nn.Sequential(nn.Tanh(), self.wo)  # type: ignore[assignment]

    class Swapped(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.wo = nn.Sequential(nn.Unflatten(-1, (4, 16)), Turn(), self.wo)  # type: ignore[assignment]

    for model in (Gated(), Swapped()):
        torch._dynamo.reset()
        assert casts_of_outputs(model) == ([], [])


class Turn(nn.Module):
    """The same elements in another order."""

    def forward(self, heads: Tensor) -> Tensor:
        return heads.transpose(-1, -2).flatten(-2)


@pytest.mark.parametrize("recipe", ["rowwise", "blockwise"])
def test_scales_of_its_own_are_found(recipe: str) -> None:
    assert casts_of_outputs(Attention(), recipe=recipe) == ([], [])


def test_wgrad_comes_to_the_same_codes() -> None:
    """A cast with the scale that the output has finds the codes again, through bfloat16."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes = codes[codes.float().isfinite()].repeat(64)[: 63 * 254].view(-1, 254)[:, :240]
    for scale in (0.3, 1.0, 448 / 3.7, 1e4):
        used = torch.tensor([scale])
        value = (codes.float() * used.reciprocal()).bfloat16()
        again = torch.ops.fp8.quantize(value, used, 0, torch.float8_e4m3fn, True, False)[0]
        assert torch.equal(again.float(), codes.float())


def test_no_other_scale_goes_with_it() -> None:
    gm = projected()
    take_attention_output(gm)
    (gemm,) = gm.graph.find_nodes(op="call_function", target=SCALED_MM)
    a, b, _, b_scale_inv, *others = args_of(gemm)
    gemm.args = (a, b, b_scale_inv, b_scale_inv, *others)
    with pytest.raises(PassError, match="attention_fp8 is used with w_scale_inv, not v's"):
        verify(gm)
