"""Finding the user's modules and naming the sites after them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fp8compile
from fp8compile.compile import compile_graph
from fp8compile.ir import Site
from fp8compile.modules import SiteNames, calling_module, owners_of
from fp8compile.observer import Observer
from fp8compile.options import Options
from tests.helpers import interpret
from tests.models import Llama

pytestmark = pytest.mark.filterwarnings("ignore:FP8 is emulated here")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield


class Asks(nn.Module):
    """A leaf that looks for the modules that are being called."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.found: Any = None

    def forward(self, parameter: Tensor) -> None:
        self.found = calling_module(parameter), owners_of([parameter])


def test_calling_module_is_the_outermost_that_holds_the_parameter() -> None:
    leaf = Asks()

    class Middle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.leaf = leaf

        def forward(self, parameter: Tensor) -> None:
            self.leaf(parameter)

    class Stranger(nn.Module):
        """Calls the others, but does not hold their parameters."""

        def forward(self, parameter: Tensor) -> None:
            root(parameter)

    root = nn.Sequential(Middle())
    Stranger()(leaf.weight)
    assert leaf.found == (root, [leaf])
    Stranger()(nn.Parameter(torch.ones(1)))
    assert leaf.found == (None, [])
    assert calling_module(leaf.weight) is None  # nothing is being called here


def test_owners_of_weights_of_several_models_that_nobody_calls() -> None:
    student, teacher = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Linear(8, 8)
    weights = [student[0].weight, student[1].weight, teacher.weight, nn.Parameter(torch.ones(1))]
    found = owners_of(weights)
    assert {id(owner) for owner in found} == {id(student[0]), id(student[1]), id(teacher)}
    assert owners_of([]) == []


def test_calling_module_looks_behind_a_compiled_model() -> None:
    leaf = Asks()
    torch.compile(nn.Sequential(leaf), backend="eager", disable=True)(leaf.weight)
    assert isinstance(leaf.found[0], nn.Sequential)


def sites_of(model: Any, *inputs: Any, **kwargs: Any) -> list[str]:
    rows = fp8compile.explain(model, *inputs, **kwargs).rows
    return list(dict.fromkeys(site for row in rows for site in row.sites or (row.fqn,)))


def test_names_are_those_of_named_modules() -> None:
    model = Llama(layers=1, width=32, heads=2, kv_heads=1, hidden=64, vocab=32)
    names = [n for n in sites_of(model, torch.randint(0, 32, (1, 16))) if not n.startswith("(")]
    modules = dict(model.named_modules())
    assert len(names) == 8 and all(isinstance(modules[name], nn.Linear) for name in names)
    assert names[0] == "layers.0.attention.wq" and names[-1] == "lm_head"


def test_names_in_a_module_that_is_called_inside_another() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(32, 32))

        def forward(self, x: Tensor) -> Tensor:
            rows.extend(fp8compile.explain(self.inner, x).rows)
            return x

    rows: list[Any] = []
    Outer()(torch.randn(16, 32))
    assert {row.fqn for row in rows} == {"0"}, "explain names sites as the model it is given does"


def test_names_of_bare_parameters() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(32, 64))
            self.experts = nn.ParameterList([torch.randn(64, 32) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.up @ self.experts[0] + x @ self.up @ self.experts[1]

    assert set(sites_of(Bare(), torch.randn(16, 32))) == {"up", "experts.0", "experts.1"}


@pytest.mark.filterwarnings("ignore:no GEMM of this graph")
def test_the_name_of_a_tied_weight_is_that_of_the_module_that_is_called() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(32, 64), nn.Linear(64, 32, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x))

    def wrapped(*args: Any) -> Tensor:  # as decorators write it: Dynamo knows no "self"
        return args[0].head(args[0].embed(args[1]))

    ids, options = torch.randint(0, 32, (2, 16)), {"skip": ["head"]}
    for forward in (Tied.forward, wrapped):
        model = type("Model", (Tied,), {"forward": forward})()
        assert sites_of(model, ids) == ["head"]
        rows = fp8compile.explain(model, ids, options=options).rows
        assert {row.reason for row in rows} == {"skipped by the user"}


class Computed(nn.Module):
    """Weights that are no parameters: one of a parametrization, a buffer, and none."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
        self.register_buffer("random", torch.randn(64, 64))

    def forward(this, x: Tensor) -> Tensor:  # which Dynamo's names would begin with
        y = this.norm(this.norm(x)) @ this.random
        return torch.relu(y @ (y.t() @ y))


class Broken(nn.Module):
    """Dynamo traces its layers one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Computed()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            torch._dynamo.graph_break()
            x = layer(x)
        return x


class Sites(Observer):
    """Notes the names of a compile, which explain shall have, too."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def on_sites(self, sites: Sequence[Site]) -> None:
        self.names += [site.fqn for site in sites]


@pytest.mark.parametrize("make", [Computed, lambda: nn.Sequential(Computed()), Broken])
def test_names_of_weights_that_are_no_parameters(make: Callable[[], nn.Module]) -> None:
    model, x, seen = make(), torch.randn(32, 64), Sites()

    def backend(gm: fx.GraphModule, inputs: list[Tensor]) -> Any:
        return compile_graph(gm, inputs, Options(), inner_compile=interpret, observer=seen)

    torch.compile(model, backend=backend)(x)
    modules = {id(module): name for name, module in model.named_modules()}
    (inner,) = (module for module in model.modules() if isinstance(module, Computed))
    at = f"{name}." if (name := modules[id(inner)]) else ""
    assert seen.names[:3] == [f"{at}norm", f"{at}norm", f"{at}random"]
    explained = sites_of(model, x)
    assert explained == list(dict.fromkeys(seen.names))
    skipped = fp8compile.explain(model, x, options={"skip": [f"{at}norm"]}).rows
    assert {row.decision for row in skipped if row.fqn == f"{at}norm"} == {"f32"}


def test_names_in_a_function() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.Sequential(nn.Linear(64, 32)))

    def function(x: Tensor) -> Tensor:
        return model(x)

    assert sites_of(function, torch.randn(16, 32)) == ["0", "1.0"]


def test_names_of_arguments() -> None:
    def function(x: Tensor, head: Tensor) -> Tensor:
        return F.linear(x, head)

    assert sites_of(function, torch.randn(16, 32), torch.randn(48, 32)) == ["head"]


class Takes(nn.Module):
    """Weights that are arguments, of every kind."""

    def forward(
        self, x: Tensor, first: Tensor, *rest: Tensor, named: Tensor, **more: Tensor
    ) -> Tensor:
        parts = [F.linear(x, w) for w in (first, *rest, named, *more.values())]
        return torch.cat(parts, 1)


def test_arguments_have_the_names_that_they_have_when_compiled() -> None:
    """`explain` and `profile` call the model through a function of their own."""
    x, model = torch.randn(16, 32), Takes()
    args = [torch.randn(48, 32) for _ in range(3)]
    kwargs = {"named": torch.randn(16, 32), "other": torch.randn(16, 32)}
    names = sites_of(model, x, *args, **kwargs)
    assert names == ["first", "rest.0", "rest.1", "named", "more.other"]
    found: list[str] = []

    class Names(Observer):
        def on_sites(self, sites: Any) -> None:
            found.extend(site.fqn for site in sites)

    def backend(gm: fx.GraphModule, examples: Any) -> Any:
        return compile_graph(gm, examples, Options(), inner_compile=interpret, observer=Names())

    torch.compile(model, backend=backend)(x, *args, **kwargs)
    assert found == names


def test_site_names_without_any_source() -> None:
    graph = fx.Graph()
    weight = graph.placeholder("w")
    call = graph.call_function(torch.matmul, (weight, weight))
    names = SiteNames(None, {})
    assert (names(call, weight), names(call, None)) == ("w", "matmul")
    call.meta["nn_module_stack"] = {"k": ("L['self']._modules['layers']._modules['0']", nn.Linear)}
    assert (names(call, weight), names(call, None)) == ("layers.0", "layers.0")
