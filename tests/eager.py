"""The backend against eager PyTorch: outputs and all gradients of one training step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fp8compile.compile import compile_graph
from fp8compile.options import parse_options
from fp8compile.report import Row
from tests.helpers import Rows, interpret
from tests.models import sqnr_db


def run(call: Callable[..., Any], model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    """The output of a call and the gradients of all that takes part in it, by name."""
    leaves = dict(model.named_parameters())
    leaves |= {f"input {i}": x for i, x in enumerate(inputs) if _requires_grad(x)}
    for leaf in leaves.values():
        leaf.grad = None
    out = call(*inputs)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out.float() * direction).sum().backward()
    found = {"output": out.detach()}
    return found | {n: x.grad.clone() for n, x in leaves.items() if x.grad is not None}


def _requires_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def assert_as_eager(
    model: nn.Module,
    *inputs: Any,
    fp8_gemms: int,
    chained: int = 1,
    options: Mapping[str, Any] | None = None,
) -> list[Row]:
    """Outputs and all gradients are those of eager up to FP8's noise; so many GEMMs are in FP8.

    ``chained``: of how many GEMMs, one behind the other, the output has the noise.
    """
    observer = Rows()

    def backend(gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        parsed = parse_options(options)
        return compile_graph(gm, examples, parsed, inner_compile=interpret, observer=observer)

    expected = run(model, model, inputs)
    actual = run(torch.compile(model, backend=backend), model, inputs)
    rows = observer.rows
    assert sum(row.is_fp8 for row in rows) == fp8_gemms, rows
    assert actual.keys() == expected.keys()
    deep = fp8_gemms > 3  # noise adds up from GEMM to GEMM
    for name, reference in expected.items():
        value = actual[name]
        assert (value.shape, value.dtype) == (reference.shape, reference.dtype), name
        output_gate = 25.0 - 10 * math.log10(chained)
        gate = output_gate if name == "output" else 18.0 if deep else 20.0
        assert sqnr_db(reference, value) >= gate, name
    if any(row.is_fp8 and row.gemm == "fprop" for row in rows):  # otherwise it is (nearly) exact
        assert sqnr_db(expected["output"], actual["output"]) < 60
    return rows


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()
