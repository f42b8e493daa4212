"""The backend as a user meets it: how it is found, forms of a model, errors, Inductor's code."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fp8compile
from tests.eager import assert_as_eager, normal, run
from tests.helpers import compile_interpreted
from tests.models import MLP, sqnr_db

DTYPES = [torch.float32, torch.bfloat16]
pytestmark = [
    pytest.mark.filterwarnings("ignore:FP8 is emulated here"),
    pytest.mark.usefixtures("fresh_dynamo"),
]


# --- discovery and import -----------------------------------------------------------------------


def in_fresh_process(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_backend_is_found_without_importing_the_package() -> None:
    code = (
        "import sys, torch\n"
        "print('fp8' in torch._dynamo.list_backends(), 'fp8compile' in sys.modules)"
    )
    assert in_fresh_process(code) == "True False"


def test_import_loads_neither_compiler_nor_triton_nor_cuda() -> None:
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import fp8compile\n"
        "heavy = ('torch._inductor', 'torch._dynamo', 'triton')\n"
        "print([name for name in heavy if name in set(sys.modules) - before],"
        " torch.cuda.is_initialized())"
    )
    assert in_fresh_process(code) == "[] False"


def test_all_public_names_exist() -> None:
    assert all(getattr(fp8compile, name) is not None for name in fp8compile.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        fp8compile.nonsense  # noqa: B018


# --- the forms of a model -----------------------------------------------------------------------


class TiedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.lm_head = nn.Linear(32, 64, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(torch.tanh(self.embed(ids)))


def test_tied_weight_is_named_after_the_module_that_multiplies() -> None:
    ids = torch.randint(0, 64, (2, 16))
    rows = assert_as_eager(TiedModel(), ids, fp8_gemms=3)
    assert {row.fqn for row in rows} == {"lm_head"}


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.fc(x)))


def test_module_used_twice() -> None:
    assert_as_eager(Twice(), normal(16, 32), fp8_gemms=6)


def test_two_results_of_equal_gemms_do_not_share_memory() -> None:
    """The partitioner takes equal GEMMs for one, unless their results are returned."""
    fc = nn.Linear(64, 64, bias=False)

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return fc(x), fc(x.unflatten(-2, (-1, 2)))

    first, second = compile_interpreted(function)(torch.randn(2, 32, 64))
    kept = first.detach().clone()
    second.detach().zero_()
    assert torch.equal(first, kept)


def test_module_used_twice_keeps_two_scales() -> None:
    model = Twice()
    compiled = compile_interpreted(model)
    run(compiled, model, (normal(16, 32),))
    fp8compile.update_scales(model)
    state = fp8compile.state_dict(model)
    assert set(state) == {
        f"fc.weight{use}.{entry}" for use in ("", "#1") for entry in ("scale", "amax_history")
    }
    assert state["fc.weight.scale"][0] != state["fc.weight#1.scale"][0]  # inputs differ
    assert state["fc.weight.scale"][1] == state["fc.weight#1.scale"][1]  # the weight is the same


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = MLP(32, 64), MLP(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.first, x, use_reentrant=False)
        return checkpoint(self.second, x, use_reentrant=False)


class CheckpointedTwiceOver(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Checkpointed()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation_checkpointing(dtype: torch.dtype) -> None:
    model = Checkpointed().to(dtype)
    rows = assert_as_eager(model, normal(16, 32, dtype=dtype), fp8_gemms=12)
    names = {f"{block}.{fc}" for block in ("first", "second") for fc in ("{gate,up}", "down")}
    assert {row.fqn for row in rows} == names


def test_nested_activation_checkpointing() -> None:
    assert_as_eager(CheckpointedTwiceOver(), normal(16, 32), fp8_gemms=12)


class Broken(nn.Module):
    """Two graphs with a break between them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(32, 48)
        self.fc2 = nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.fc1(x))
        torch._dynamo.graph_break()
        return self.fc2(x)


def test_graph_break() -> None:
    rows = assert_as_eager(Broken(), normal(16, 32), fp8_gemms=6)
    assert [row.fqn for row in rows] == ["fc1"] * 3 + ["fc2"] * 3


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MLP(32, 64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Tanh(torch.autograd.Function):
    """A function of the user's own; its backward takes more than its forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = torch.tanh(x)
        ctx.save_for_backward(x, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        x, out = ctx.saved_tensors
        return grads[0] * (1 - out * out) + 0 * x


class OwnLinear(torch.autograd.Function):
    """A matmul in a function of the user's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grads[0] @ weight, grads[0].t() @ x


class Custom(nn.Module):
    """An autograd function between two linear layers, with a weight if it takes one."""

    def __init__(self, function: type[torch.autograd.Function], with_weight: bool) -> None:
        super().__init__()
        self.function = function
        self.first, self.last = nn.Linear(32, 48), nn.Linear(48, 32)
        self.weight = nn.Parameter(torch.randn(48, 48) / 8) if with_weight else None

    def forward(self, x: Tensor) -> Tensor:
        args = () if self.weight is None else (self.weight,)
        return self.last(self.function.apply(self.first(x), *args))


def test_an_autograd_function_between_two_sites() -> None:
    assert_as_eager(Custom(Tanh, with_weight=False), normal(16, 32), fp8_gemms=6)


def test_a_matmul_inside_an_autograd_function_has_a_reason() -> None:
    rows = assert_as_eager(Custom(OwnLinear, with_weight=True), normal(16, 32), fp8_gemms=6)
    reasons = [row.reason for row in rows if not row.is_fp8]
    assert reasons == 3 * ["inside autograd_function_apply"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_submodules_compiled_one_by_one_have_states_of_their_own() -> None:
    model = Blocks()
    inputs = (normal(16, 32),)
    expected = run(model, model, inputs)
    for layer in model.layers:
        layer.compile(backend="fp8", options={"inductor": {"fx_graph_cache": False}})
    actual = run(model, model, inputs)
    for name, reference in expected.items():
        assert sqnr_db(reference, actual[name]) >= 18, name
    assert sqnr_db(expected["output"], actual["output"]) < 60
    fp8compile.update_scales(model)
    state = fp8compile.state_dict(model)
    scales = [state[f"layers.{i}.down.weight.scale"] for i in range(3)]
    assert all((scale > 0).all() for scale in scales)
    assert len({tuple(scale.tolist()) for scale in scales}) == 3


def test_function_instead_of_module() -> None:
    weight = (torch.randn(48, 32) / 8).requires_grad_()

    def function(x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, weight))

    x = normal(16, 32)
    rows = fp8compile.explain(function, x).rows
    assert [row.gemm for row in rows if row.is_fp8] == ["fprop", "dgrad", "wgrad"]
    expected = torch.autograd.grad(function(x).sum(), (x, weight))
    out = compile_interpreted(function)(x)
    assert sqnr_db(function(x).detach(), out.detach()) >= 25
    actual = torch.autograd.grad(out.sum(), (x, weight))
    assert all(sqnr_db(e, a) >= 20 for e, a in zip(expected, actual, strict=True))


def test_weight_given_as_an_argument() -> None:
    x, weight = normal(16, 32), normal(48, 32)
    out = compile_interpreted(F.linear)(x, weight)
    assert 25 <= sqnr_db((x @ weight.t()).detach(), out.detach()) < 60


def test_a_product_of_activations_is_no_site_and_one_with_a_computed_weight_is() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 32)
            self.scale = nn.Parameter(torch.rand(32, 32))
            self.register_buffer("mask", torch.ones(32, 32).tril())

        def forward(self, x: Tensor) -> Tensor:
            h = self.fc(x)
            scores = h @ (h + x).t()
            return F.linear(h, self.scale * self.mask) + scores @ h / 1000

    rows = assert_as_eager(Products(), normal(16, 32), fp8_gemms=6, chained=2)
    left = [row for row in rows if not row.is_fp8]
    assert len(left) == 6 and {row.reason for row in left} == {"matmul of two activations"}
    torch._dynamo.reset()
    compile_interpreted(Products(), {"strict": True})(normal(16, 32))


def test_no_grad_and_inference_mode() -> None:
    model, x = MLP(), torch.randn(16, 64)
    expected = model(x).detach()
    for context in (torch.no_grad, torch.inference_mode):
        torch._dynamo.reset()
        with context():
            out = compile_interpreted(model)(x)
        assert 25 <= sqnr_db(expected, out) < 60


def test_dropout_between_two_sites() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.5), nn.Linear(32, 32))
    compiled, x = compile_interpreted(model), torch.randn(64, 32)
    assert not torch.equal(compiled(x), compiled(x))  # fresh numbers each time
    model.eval()
    assert 25 <= sqnr_db(model(x).detach(), compiled(x).detach()) < 60


# --- values that are not finite -----------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["delayed", "current"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_bad_input_stays_visible(bad: float, recipe: str) -> None:
    model = nn.Linear(32, 48)
    compiled = compile_interpreted(model, {"recipe": recipe})
    x = torch.randn(16, 32)
    compiled(x)
    x[3, 5] = bad
    expected, out = model(x), compiled(x)
    assert torch.equal(~out.isfinite(), ~expected.isfinite())
    clean = torch.arange(16) != 3
    assert sqnr_db(expected[clean].detach(), out[clean].detach()) >= 25


# --- same exceptions as eager -------------------------------------------------------------------

WRONG: dict[str, Callable[[], tuple[Callable[..., Any], tuple[Tensor, ...]]]] = {
    "inner_size": lambda: (nn.Linear(32, 48), (torch.randn(16, 33),)),
    "float64_input": lambda: (nn.Linear(32, 48), (torch.randn(16, 32).double(),)),
    "bfloat16_input": lambda: (nn.Linear(32, 48), (torch.randn(16, 32).bfloat16(),)),
    "integer_input": lambda: (nn.Linear(32, 48), (torch.ones(16, 32, dtype=torch.int64),)),
    "mm_of_3d": lambda: (torch.mm, (torch.randn(2, 16, 32), torch.randn(32, 48))),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.filterwarnings("ignore:no GEMM of this graph")
def test_wrong_call_raises_as_it_does_without_fp8(case: str) -> None:
    function, args = WRONG[case]()
    with pytest.raises(RuntimeError):
        function(*args)
    with pytest.raises(RuntimeError) as expected:
        torch.compile(function, backend="aot_eager")(*args)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError) as actual:
        compile_interpreted(function)(*args)
    assert type(actual.value) is type(expected.value)
    assert str(actual.value).splitlines()[0] == str(expected.value).splitlines()[0]


# --- with Inductor's own code generation --------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_inductor_code_computes_what_the_graph_says() -> None:
    model = MLP(32, 64, bias=True)
    twin = copy.deepcopy(model)
    inputs = (normal(16, 32),)
    interpreted = run(compile_interpreted(twin), twin, inputs)
    torch._dynamo.reset()
    generated = run(torch.compile(model, backend="fp8"), model, inputs)
    for name, reference in interpreted.items():
        assert sqnr_db(reference, generated[name]) >= 35, name  # rounding of fused pointwise ops


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_inductor_training_reduces_the_loss() -> None:
    model = MLP(32, 64)
    compiled = torch.compile(model, backend="fp8")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, target = torch.randn(32, 32), torch.randn(32, 32)
    losses = []
    for _ in range(20):
        loss = F.mse_loss(compiled(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]
