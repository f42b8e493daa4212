"""Errors: what they say when a pass fails, and where they point to."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed

import fp8compile
from fp8compile import Fp8CompileError, PassError
from fp8compile.errors import source_line
from fp8compile.ir import QUANTIZE, SCALED_MM
from fp8compile.passes import run_passes
from tests.helpers import compile_interpreted, trace

pytestmark = pytest.mark.filterwarnings("ignore:FP8 is emulated here")
pipeline = importlib.import_module("fp8compile.passes.pipeline")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 48)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x))  # the user's line


def pass_error(model: nn.Module) -> PassError:
    """The error a user meets when this model is compiled."""
    with pytest.raises((PassError, BackendCompilerFailed)) as raised:
        compile_interpreted(model)(torch.randn(16, 32))
    error = getattr(raised.value, "inner_exception", raised.value)
    assert isinstance(error, PassError)
    assert str(error) in str(raised.value)
    return error


def test_all_errors_have_one_base() -> None:
    names = [name for name in fp8compile.__all__ if name.endswith("Error")]
    assert len(names) == 6
    assert all(issubclass(getattr(fp8compile, name), Fp8CompileError) for name in names)


def test_an_exception_inside_a_pass_names_pass_node_and_source_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    edges = importlib.import_module("fp8compile.passes.choose_formats")

    def fail(node: fx.Node) -> Any:
        raise KeyError("lost")

    monkeypatch.setattr(edges, "gemm_info", fail)
    text = str(pass_error(Model()))
    assert "pass choose_formats failed" in text and "KeyError: 'lost'" in text
    assert "addmm" in text, "names the node"
    assert "test_errors.py" in text and "self.fc(x)" in text, "names the user's source line"


def test_a_pass_error_names_pass_node_and_source_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(gm: fx.GraphModule) -> int:
        node = next(n for n in gm.graph.nodes if n.target is SCALED_MM)
        raise PassError("broken", "no reason", node)

    monkeypatch.setattr(pipeline, "share_casts", broken)
    error = pass_error(Model())
    text = str(error)
    assert text.startswith("pass broken failed at node %addmm_fp8")
    assert "no reason" in text and error.pass_name == "broken" and error.node is not None
    assert "test_errors.py" in text and "self.fc(x)" in text


def test_a_pass_that_breaks_a_rule_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def swap_scales(gm: fx.GraphModule) -> int:
        for node in gm.graph.nodes:
            if node.target is SCALED_MM:
                a, b, a_inv, b_inv, *rest = node.args
                node.args = (a, b, b_inv, a_inv, *rest)
        return 1

    monkeypatch.setattr(pipeline, "share_casts", swap_scales)
    text = str(pass_error(Model()))
    assert "pass swap_scales failed at node" in text and "not its own" in text


def test_a_pass_that_lies_about_a_type_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def mistype(gm: fx.GraphModule) -> int:
        for node in gm.graph.nodes:
            if node.target is QUANTIZE:
                node.args = (*node.args[:3], torch.float8_e5m2)
        return 1

    monkeypatch.setattr(pipeline, "share_casts", mistype)
    assert "meta['val'] is" in str(pass_error(Model()))


def test_run_passes_leaves_our_own_errors_as_they_are() -> None:
    gm = trace(lambda x: x + 1, x=torch.ones(2))

    def stop(gm: fx.GraphModule) -> int:
        raise fp8compile.StrictError("stop")

    with pytest.raises(fp8compile.StrictError, match=r"^stop$"):
        run_passes(gm, [stop])


def node_with(**meta: Any) -> fx.Node:
    node = fx.Graph().placeholder("x")
    node.meta.update(meta)
    return node


def test_source_line() -> None:
    trace_text = (
        '  File "a.py", line 1, in f\n    outer()\n  File "b.py", line 7, in g\n    x @ w\n'
    )
    assert source_line(node_with(stack_trace=trace_text)) == 'File "b.py", line 7, in g: x @ w'
    marked = trace_text + "    ~~^~~\n"
    assert source_line(node_with(stack_trace=marked)) == 'File "b.py", line 7, in g: x @ w'
    assert source_line(node_with(stack_trace="only")) == "only"
    stack = {"a": ("L['self'].a", nn.Linear), "b": ("L['self'].a.b", nn.Linear)}
    assert source_line(node_with(nn_module_stack=stack)) == "L['self'].a.b"
    assert source_line(node_with()) == ""
