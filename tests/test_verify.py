"""The rules of the IR, and what it costs to check them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fp8compile import RECIPES, Format, Granularity, PassError, ir
from fp8compile.ir import CASTS, QUANTIZE, SCALED_MM, SCALED_MMS, TRACK_AMAX, emit, result_types
from fp8compile.passes import choose_formats, find_gemms, insert_casts
from fp8compile.verify import Verifier, verify
from tests.helpers import compile_interpreted, trace

pytestmark = pytest.mark.filterwarnings("ignore:FP8 is emulated here")

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def product(formats: tuple[torch.dtype, torch.dtype] = (E4M3, E4M3)) -> fx.GraphModule:
    """A product of two casts."""

    def fn(x: Tensor, w: Tensor) -> Tensor:
        a, _, a_inv, _, _ = torch.ops.fp8.quantize(x, None, 0, formats[0])
        b, _, b_inv, _, _ = torch.ops.fp8.quantize(w, None, 1, formats[1])
        return torch.ops.fp8.scaled_mm(a, b, a_inv, b_inv, None, torch.bfloat16, True)

    return trace(fn, x=torch.randn(16, 32), w=torch.randn(16, 32))


def gemm(gm: fx.GraphModule) -> fx.Node:
    (node,) = gm.graph.find_nodes(op="call_function", target=SCALED_MM)
    return node


def test_what_keeps_the_rules() -> None:
    verify(product())
    verify(product((E5M2, E4M3)))


def test_two_gradients_are_not_multiplied() -> None:
    with pytest.raises(PassError, match=r"verify failed at node %scaled_mm.*e5m2 x e5m2"):
        verify(product((E5M2, E5M2)))


def test_only_fp8_operators_take_fp8_tensors() -> None:
    gm = product()
    with gm.graph.inserting_before(gm.graph.output_node()):
        emit(gm.graph, torch.ops.aten.neg.default, (gemm(gm).args[0],), "neg")
    with pytest.raises(PassError, match=r"at node %neg.*only fp8 ops may"):
        verify(gm)


def test_an_operand_comes_from_a_cast() -> None:
    gm = product()
    x, a = gm.graph.find_nodes(op="placeholder")[0], gemm(gm).all_input_nodes[0]
    with gm.graph.inserting_before(gemm(gm)):
        gemm(gm).replace_input_with(a, emit(gm.graph, torch.ops.aten.neg.default, (x,), "neg"))
    with pytest.raises(PassError, match="operand neg is not an output of a cast"):
        verify(gm)


def test_an_operand_has_the_scale_of_its_own_cast() -> None:
    gm = product()
    a, b, a_inv, _, *rest = gemm(gm).args
    gemm(gm).args = (a, b, a_inv, a_inv, *rest)
    with pytest.raises(PassError, match="not its own"):
        verify(gm)


def test_amax_is_tracked_once_in_each_direction() -> None:
    gm = product()
    (cast, _) = gm.graph.find_nodes(op="call_function", target=QUANTIZE)
    with gm.graph.inserting_before(gm.graph.output_node()):
        for _ in range(2):
            gm.graph.call_function(TRACK_AMAX, (cast, [], []))
    with pytest.raises(PassError, match="amax is tracked twice"):
        verify(gm)


def test_a_node_whose_arguments_change_is_looked_at_again() -> None:
    gm, verifier = product(), Verifier()
    verifier.check(gm, "first")
    cast = gm.graph.find_nodes(op="call_function", target=QUANTIZE)[0]
    cast.args = (*cast.args[:3], E5M2)
    with pytest.raises(PassError, match=r"second failed .*meta\['val'\] is e4m3.*, not e5m2"):
        verifier.check(gm, "second")


def linear(**changed: Any) -> fx.GraphModule:
    """A GEMM before its operands are cast, of whose left operand something is changed."""
    gm = trace(lambda x, w: torch.mm(x, w.t()), x=torch.randn(16, 32), w=torch.randn(16, 32))
    find_gemms(gm)
    choose_formats(gm, recipe=RECIPES["current"])
    ((node, info),) = ir.gemms(gm)
    node.meta["fp8"] = replace(info, left=replace(info.left, **changed))
    return gm


def test_gemms_that_will_be_cast_can_be_multiplied() -> None:
    verify(linear())
    cases = (
        ({"format": "e4m3"}, r"the formats \('e4m3', .*give both an fp8compile.Format"),
        ({"format": None}, r"the formats \(None, .*give both an fp8compile.Format"),
        ({"granularity": Granularity.ROW}, "rowwise x tensorwise: .*, only .*1x128 x 128x128"),
    )
    for changed, message in cases:
        with pytest.raises(PassError, match=message):
            verify(linear(**changed))
    both = linear(format=Format.E5M2)
    ((node, info),) = ir.gemms(both)
    node.meta["fp8"] = replace(info, right=info.left)
    with pytest.raises(PassError, match="e5m2 x e5m2"):
        verify(both)
    node.meta["fp8"] = replace(info, right=info.left, reason="not in FP8")
    verify(both)


def test_a_gemm_that_is_cast_is_what_it_is_said_to_be() -> None:
    gm = linear()
    insert_casts(gm, recipe=RECIPES["current"])
    verify(gm)
    ((node, info),) = ir.gemms(gm)
    for changed, message in (
        (replace(info, reason="too precious"), "reason not to be, 'too precious'"),
        (replace(info, left=replace(info.left, format=Format.E5M2)), "cast to e4m3.* has e5m2"),
    ):
        node.meta["fp8"] = changed
        with pytest.raises(PassError, match=f"{message}.*before insert_casts"):
            verify(gm)


def test_what_a_pass_adds() -> None:
    gm = product()
    verifier, (x, _) = Verifier(gm), gm.graph.find_nodes(op="placeholder")
    with gm.graph.inserting_after(gemm(gm)):
        added = gm.graph.call_function(torch.ops.aten.neg.default, (gemm(gm),))
    with pytest.raises(PassError, match=r"no meta\['val'\]"):
        verifier.check(gm, "a pass")
    gm.graph.erase_node(added)
    with gm.graph.inserting_after(x):
        added = emit(gm.graph, torch.ops.aten.mul_.Tensor, (x, 2.0), "doubled")
    with pytest.raises(PassError, match=r"at node %doubled.*writes to a tensor"):
        verifier.check(gm, "a pass")
    Verifier(gm).check(gm, "who did not add it")
    gm.graph.erase_node(added)
    verifier.check(gm, "a pass")


def test_a_graph_takes_and_returns_what_it_did() -> None:
    gm = product()
    verifier, output = Verifier(gm), gm.graph.output_node()
    output.args = ((output.args[0], output.args[0]),)
    with pytest.raises(PassError, match="2 inputs and 1 outputs before, 2 inputs and 2 outputs"):
        verifier.check(gm, "a pass")


def test_what_evaluation_gives_is_what_the_operator_gives() -> None:
    for target in (*CASTS, *SCALED_MMS):
        assert target.namespace == "fp8"
    for node in product((E4M3, E5M2)).graph.find_nodes(op="call_function", target=QUANTIZE):
        want = ir._run(node)
        for made, value in zip(ir.evaluate(node), want, strict=True):
            assert (made.shape, made.stride()) == (value.shape, value.stride())
            assert (made.dtype, made.device) == (value.dtype, value.device)
        assert result_types(node) == [(tuple(v.shape), v.dtype) for v in want]


class Blocks(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x


def test_layers_that_look_alike_are_evaluated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def runs(count: int) -> int:
        torch._dynamo.reset()
        ir._types.clear()
        ran: Counter[bool] = Counter()

        def run(node: fx.Node) -> object:
            ran[node.target in (*CASTS, *SCALED_MMS)] += 1
            return original(node)

        original = ir._run
        with monkeypatch.context() as patch:
            patch.setattr(ir, "_run", run)
            compile_interpreted(Blocks(count))(torch.randn(32, 64, requires_grad=True))
        return ran[True]

    assert 0 < runs(2) == runs(6)
