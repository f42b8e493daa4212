"""choose_scaling: current where it is next to free, delayed elsewhere."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fp8compile
from fp8compile import RECIPES, Gemm, OptionError, Scaling
from fp8compile.cost import H200
from fp8compile.ir import QUANTIZE, args_of, gemms
from fp8compile.options import parse_options
from fp8compile.passes import choose_formats, choose_scaling, find_gemms, merge_gemms
from fp8compile.passes.choose_scaling import CHEAP
from tests.helpers import compile_interpreted, trace_joint
from tests.passes.common import before, check_pass, lines_of

DELAYED = RECIPES["delayed"]
MODULE = sys.modules["fp8compile.passes.choose_scaling"]  # the package has the function
FREE_READS = replace(H200, copy_bandwidth=1e21, launch_seconds=0.0)
SLOW_READS = replace(H200, copy_bandwidth=1e6)


@pytest.fixture(autouse=True)
def compile_anew() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def chosen(gm: Any) -> dict[str, tuple[Scaling | None, Scaling | None]]:
    return {str(i.gemm): (i.left.scaling, i.right.scaling) for _, i in gemms(gm)}


@pytest.mark.parametrize(
    ("device", "want"), [(FREE_READS, Scaling.CURRENT), (SLOW_READS, Scaling.DELAYED)]
)
def test_current_where_reading_once_more_is_free(device: Any, want: Scaling) -> None:
    gm, run = before("insert_casts")
    assert check_pass(gm, partial(choose_scaling, recipe=DELAYED, device=device)) == 3
    assert set(chosen(gm).values()) == {(want, want)}
    run(gm)
    casts = gm.graph.find_nodes(op="call_function", target=QUANTIZE)
    assert casts and {args_of(cast)[1] is None for cast in casts} == {want is Scaling.CURRENT}


class FeedForward(nn.Module):
    """A norm, gate and up, SwiGLU, down: of Llama-3-8B."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(4096, 14336, bias=False) for _ in range(2))
        self.down = nn.Linear(14336, 4096, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.rms_norm(x, (4096,))
        return self.down(F.silu(self.gate(x)) * self.up(x))


def feed_forward() -> Any:
    with torch.device("meta"):
        model = FeedForward().bfloat16()
        joint = trace_joint(model, torch.randn(16384, 4096, dtype=torch.bfloat16))
    find_gemms(joint.gm, sites=joint.sites)
    merge_gemms(joint.gm)
    choose_formats(joint.gm, recipe=DELAYED)
    return joint.gm


def test_the_width_of_a_values_gemms_decides() -> None:
    """Two wide GEMMs take the norm's output; what only a cast writes is better not read again."""
    gm = feed_forward()
    choose_scaling(gm, recipe=DELAYED, device=H200)
    found = {
        (info.name, str(edge.operand)): (str(edge.scaling), round(edge.costs, 3))
        for _, info in gemms(gm)
        for edge in (info.left, info.right)
    }
    scalings = {key: scaling for key, (scaling, _) in found.items()}
    assert scalings == {
        ("{gate,up}", "input"): "current",
        ("{gate,up}", "weight"): "delayed",
        ("{gate,up}", "grad_output"): "delayed",
        ("down", "input"): "delayed",
        ("down", "weight"): "current",
        ("down", "grad_output"): "current",
    }
    assert found["{gate,up}", "input"][1] < CHEAP < found["down", "input"][1]


def test_what_current_scaling_costs_is_the_time_of_one_more_read() -> None:
    """Of a weight, beside its two GEMMs; backward takes the scale that forward has found."""
    gm = feed_forward()
    choose_scaling(gm, recipe=DELAYED, device=H200)
    (info,) = (i for _, i in gemms(gm) if i.name == "down" and i.gemm is Gemm.FPROP)
    read = 2 * 4096 * 14336 / 0.85 / H200.copy_bandwidth + H200.launch_seconds
    gemm = 2 * 16384 * 4096 * 14336 / H200.fp8_flops + H200.launch_seconds
    assert info.right.costs == pytest.approx(read / (2 * gemm), rel=0.05)  # GEMMs take whole waves


def test_other_recipes_are_left_alone() -> None:
    gm, _ = before("insert_casts", recipe="current")
    run = partial(choose_scaling, recipe=RECIPES["current"], device=FREE_READS)
    assert check_pass(gm, run) == 0
    assert set(chosen(gm).values()) == {(None, None)}


def test_the_text_of_a_graph_says_it() -> None:
    gm, _ = before("insert_casts")
    choose_scaling(gm, recipe=DELAYED, device=FREE_READS)
    assert "w fprop = input e4m3:current x weight^T e4m3:current" in lines_of(gm)


# --- the option ---------------------------------------------------------------------------------


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(96, 160), nn.GELU(), nn.Linear(160, 96))


def trained(options: dict[str, Any], steps: int = 3) -> list[Tensor]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(64, 96)
    compiled = compile_interpreted(model, options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        compiled(x).square().mean().backward()
        optimizer.step()
    return [*model.parameters(), *fp8compile.state_dict(model).values()]


@pytest.mark.parametrize(("cheap", "same"), [(float("inf"), "current"), (-1.0, "delayed")])
def test_the_ends_are_the_two_recipes(
    cheap: float, same: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "CHEAP", cheap)
    got, want = trained({"scaling": "auto"}), trained({"recipe": same})
    parameters = len([*mlp().parameters()])
    assert all(map(torch.equal, got[:parameters], want[:parameters]))
    if same == "delayed":
        assert all(map(torch.equal, got, want))
    else:
        assert all(not value.any() for value in got[parameters:])  # nothing is kept


def test_both_in_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each operand's scale is found as its edge says; only delayed ones are kept."""
    model, x = mlp(), torch.randn(64, 96)
    explanation = fp8compile.explain(model, x, options={"scaling": "auto"})
    costs = [
        float(part.rstrip("%").split()[-1]) / 100
        for row in explanation.rows
        for part in row.scaling.split(", ")
    ]
    middle = sorted(costs)[len(costs) // 2]
    monkeypatch.setattr(MODULE, "CHEAP", middle)
    *_, first, _, last, _ = trained({"scaling": "auto"})
    kept = torch.cat([first, last]) > 0
    assert kept.any() and not kept.all()


def test_explain_says_what_current_scaling_would_cost() -> None:
    model, x = mlp(), torch.randn(64, 96)
    fprop = fp8compile.explain(model, x, options={"scaling": "auto"}).rows[0]
    assert fprop.formats == "e4m3:delayed x e4m3:delayed"  # launches are all that counts here
    assert fprop.scaling.startswith("current scaling costs: input +")
    assert fp8compile.explain(model, x).rows[0].scaling == ""


def test_only_delayed_recipes_leave_a_choice() -> None:
    with pytest.raises(OptionError, match=r"'current' is current\. Choose recipe 'delayed'"):
        parse_options({"recipe": "current", "scaling": "auto"})
    assert parse_options({"recipe": "current", "scaling": "auto", "overrides": {"0": "delayed"}})
