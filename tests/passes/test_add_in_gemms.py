"""add_in_gemms: which sums a GEMM makes, and that they are the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fp8compile.formats import Format
from fp8compile.ir import SCALED_MM, aten, gemm_info
from fp8compile.passes import add_in_gemms, grow_regions
from tests.passes.common import check_pass, lines_of, residual

BF16 = torch.bfloat16


def always(gemm: fx.Node) -> bool:
    return True


def scaled_mms(gm: fx.GraphModule) -> list[fx.Node]:
    return gm.graph.find_nodes(op="call_function", target=SCALED_MM)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_it_is_the_sum_rounded_once(bias: bool) -> None:
    gm = residual(bias=bias)
    shapes = [(2, 8, 64), (16, 32), (64, 32), *([(64,)] if bias else [])]
    inputs = [torch.randn(shape).bfloat16() for shape in shapes]

    def total() -> Tensor:
        gm.recompile()
        out: Tensor = gm(*inputs)[0]
        return out

    (gemm,) = scaled_mms(gm)
    info, before = gemm_info(gemm), total()
    gemm.update_arg(5, torch.float32)
    exact = total()
    gemm.update_arg(5, BF16)
    assert add_in_gemms(gm, always) == 1
    assert torch.equal(total(), exact.to(BF16)) and not torch.equal(before, exact.to(BF16))
    (gemm,) = scaled_mms(gm)
    assert gemm_info(gemm) is info is not None
    assert not gm.graph.find_nodes(op="call_function", target=aten.add.Tensor)


def test_only_where_it_pays() -> None:
    gm, asked = residual(), []
    before = lines_of(gm)
    assert add_in_gemms(gm, lambda gemm: bool(asked.append(gemm.name))) == 0
    assert (lines_of(gm), asked) == (before, ["mm_fp8"])


def read_by_a_gemm(x: Tensor, out: Tensor) -> list[Tensor]:
    total = out + x
    return [aten.mm(total[0], x[1].t()), total.exp()]


def returned(x: Tensor, out: Tensor) -> list[Tensor]:
    other = x.exp()
    return [out + other, other]


SUMS: dict[str, tuple[Callable[[Tensor, Tensor], object], int]] = {
    "the output first": (lambda x, out: out + x, 1),
    "read by a GEMM": (read_by_a_gemm, 1),
    "of what is returned": (returned, 1),
    "read once": (lambda x, out: (out + x).exp(), 0),
    "the output is read, too": (lambda x, out: [out + x, out.exp()], 0),
    "of itself": (lambda x, out: out + out, 0),
    "of a number": (lambda x, out: out + 1, 0),
    "with a factor": (lambda x, out: torch.add(x, out, alpha=2), 0),
    "of what a kernel computes": (lambda x, out: out + x.exp(), 0),
    "of another dtype": (lambda x, out: out + x.float(), 0),
    "of a row": (lambda x, out: out + x[0, :1], 0),
    "of another order in memory": (lambda x, out: out + x.view(2, 64, 8).transpose(1, 2), 0),
    "something between": (lambda x, out: [x + out.relu(), x], 0),
}


@pytest.mark.parametrize("name", SUMS)
def test_which_sums(name: str) -> None:
    combine, rewrites = SUMS[name]
    gm = residual(lambda x, out: combine(x, out))
    assert check_pass(gm, partial(add_in_gemms, pays=always)) == rewrites, lines_of(gm)


def two_gemms(a: Tensor, b: Tensor, c: Tensor, d: Tensor, one: Tensor) -> Tensor:
    first, second = (SCALED_MM(*pair, one, one, None, BF16, True) for pair in ((a, b), (c, d)))
    return first + second


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_of_two_gemms_the_second_adds_if_sizes_are_known(mode: str) -> None:
    shapes = [(16, 32), (64, 32), (16, 48), (64, 48)]
    operands = [torch.randn(shape).to(Format.E4M3.dtype) for shape in shapes]
    gm = make_fx(two_gemms, tracing_mode=mode)(*operands, torch.ones(1))
    first, second = scaled_mms(gm)
    args = second.args
    assert add_in_gemms(gm, always) == (mode == "fake")
    if mode == "fake":
        left, total = scaled_mms(gm)
        assert left is first and total.args == (*args, first.next)


def test_a_region_reads_the_sum_and_does_not_write_it() -> None:
    """Neither the sum nor a view of it, which both are there."""

    def combine(x: Tensor, out: Tensor) -> list[Tensor]:
        total = x + out
        rows = total.exp().view(16, 64)
        q = torch.ops.fp8.quantize(rows, None, 0, torch.float8_e4m3fn, True, False)
        return [q[0], q[2], torch.bmm(total, total.transpose(1, 2))]

    def outputs_of_region(pays: bool) -> list[str]:
        gm = residual(combine)
        assert add_in_gemms(gm, lambda gemm: pays) == pays
        grow_regions(gm)
        *_, region = (gm.get_submodule(n.target) for n in gm.graph.nodes if n.op == "call_module")
        assert isinstance(region, fx.GraphModule)
        return [str(node.target) for node in region.graph.output_node().args[0]]

    assert "aten.add.Tensor" in outputs_of_region(False)
    assert not {"aten.add.Tensor", "aten.reshape.default"} & {*outputs_of_region(True)}
