"""Errors: what they say when a pass fails, and where they point to."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed

import fp8compile
from fp8compile import Fp8CompileError, OptionError, PassError
from fp8compile.errors import own_errors, source_line
from fp8compile.internals import is_tangent
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
    assert len(names) == 9
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


# --- on_error="fallback" ------------------------------------------------------------------------


def fail(gm: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
    gm.graph.find_nodes(op="placeholder")[0].name = "half rewritten"
    raise KeyError("lost")


@pytest.mark.parametrize("inductor", [False, True], ids=["interpreted", "inductor"])
def test_a_graph_whose_rewrite_failed_stays_in_its_own_precision(
    inductor: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "share_casts", fail)
    model, x = Model(), torch.randn(16, 32)
    options = {"on_error": "fallback"}
    compiled = (
        torch.compile(model, backend="fp8", options=options)
        if inductor
        else compile_interpreted(model, options)
    )
    with pytest.warns(UserWarning, match="the graph stays in its own precision") as warned:
        out = compiled(x)
    (text,) = [str(w.message) for w in warned if "on_error" in str(w.message)]
    assert text.startswith("pass fail failed") and "KeyError: 'lost'" in text
    torch.testing.assert_close(out, model(x))
    (gradient,) = torch.autograd.grad(out.sum(), [model.fc.weight])
    (expected,) = torch.autograd.grad(model(x).sum(), [model.fc.weight])
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_graph_whose_kernels_could_not_be_written_runs_the_reference(
    direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("fp8compile.compile")
    lower = module.lower

    def fail_in_one(gm: fx.GraphModule, kernels: str) -> Any:
        is_backward = any(is_tangent(node) for node in gm.graph.nodes)
        return fail(gm) if is_backward is (direction == "backward") else lower(gm, kernels)

    model, x = Model(), torch.randn(16, 32)
    plain = compile_interpreted(model)(x)
    (expected,) = torch.autograd.grad(plain.sum(), [model.fc.weight])
    monkeypatch.setattr(module, "lower", fail_in_one)
    torch._dynamo.reset()
    options = {"on_error": "fallback", "inductor": {"fx_graph_cache": False}}
    compiled = torch.compile(copy.deepcopy(model), backend="fp8", options=options)
    with pytest.warns(UserWarning, match=rf"pass lowering \({direction}\) failed") as warned:
        out = compiled(x)
        (gradient,) = torch.autograd.grad(out.sum(), [compiled.fc.weight])
    assert sum("on_error='fallback'" in str(w.message) for w in warned) == 1
    torch.testing.assert_close(out, plain)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3)


def test_options_that_are_wrong_are_errors_all_the_same() -> None:
    compiled = compile_interpreted(Model(), {"on_error": "fallback", "strict": True, "skip": ["x"]})
    with pytest.raises(BackendCompilerFailed, match="matches nothing"):
        compiled(torch.randn(16, 32))


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


LOOKS: dict[str, Callable[[nn.Module, Tensor, dict[str, Any], Path], object]] = {
    "explain": lambda model, x, options, _: fp8compile.explain(model, x, options=options),
    "view": lambda model, x, options, folder: fp8compile.view(
        model, x, options=options, path=folder / "graph.html"
    ),
    "profile": lambda model, x, options, _: fp8compile.profile(model, [x], options=options),
    "calibrate": lambda model, x, options, _: fp8compile.calibrate(model, [x], options=options),
    "measure": lambda model, x, options, _: fp8compile.Monitor(model, options=options).measure(x),
}


@pytest.mark.parametrize("name", LOOKS)
def test_who_looks_raises_our_errors_as_they_are(name: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="skip='nope' matches nothing"):
        LOOKS[name](Model(), torch.randn(16, 32), {"skip": ["nope"]}, tmp_path)


def test_who_looks_leaves_errors_of_others_alone() -> None:
    with pytest.raises(BackendCompilerFailed, match="not ours"), own_errors():
        raise BackendCompilerFailed(Model, ValueError("not ours"), None)


TAKE_A_MODULE = {
    "freeze": fp8compile.freeze,
    "unfreeze": fp8compile.unfreeze,
    "state_dict": fp8compile.state_dict,
    "load_state_dict": lambda model: fp8compile.load_state_dict(model, {}),
    "events": fp8compile.events,
    "update_scales": fp8compile.update_scales,
    "refresh": fp8compile.refresh,
    "Monitor": fp8compile.Monitor,
    "calibrate": lambda model: fp8compile.calibrate(model, [torch.ones(1)]),
}


@pytest.mark.parametrize("name", TAKE_A_MODULE)
def test_what_is_no_model_is_refused(name: str) -> None:
    for wrong in (3, torch.relu):
        with pytest.raises(OptionError, match=rf"^{name} takes a model, an nn.Module, and no "):
            TAKE_A_MODULE[name](wrong)  # type: ignore[operator]


def test_what_cannot_be_called_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"^explain takes a model or a function, and no int"):
        fp8compile.explain(3, torch.ones(1))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"^profile takes a model or a function, and no int"):
        fp8compile.profile(3, [torch.ones(1)])  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"^view takes a model or a function, and no int"):
        fp8compile.view(3, torch.ones(1), path=tmp_path / "x.html")  # type: ignore[arg-type]
