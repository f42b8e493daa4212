"""The backend as a user meets it: every form of matmul, outputs and gradients against eager."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import fp8compile
from fp8compile.compile import compile_graph
from fp8compile.options import parse_options
from fp8compile.report import Row
from tests.helpers import compile_interpreted, interpret
from tests.models import MLP, sqnr_db

DTYPES = [torch.float32, torch.bfloat16]
pytestmark = pytest.mark.filterwarnings("ignore:FP8 is emulated here")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield


# --- comparison with eager ----------------------------------------------------------------------


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
    rows: list[Row] = []

    def backend(gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        parsed = parse_options(options)
        return compile_graph(gm, examples, parsed, inner_compile=interpret, on_joint=rows.extend)

    expected = run(model, model, inputs)
    actual = run(torch.compile(model, backend=backend), model, inputs)
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


class Weighted(nn.Module):
    """A weight, optionally a bias, and a function of them and the input."""

    def __init__(
        self,
        function: Callable[..., Tensor],
        *shape: int,
        bias: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(shape) / 8)
        self.bias = None if bias is None else nn.Parameter(torch.randn(bias))

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return self.function(x, self.weight)
        return self.function(x, self.weight, self.bias)


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


# --- the forms of a matmul ----------------------------------------------------------------------

FORMS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(32, 48, bias=False),
    "linear_bias": lambda: nn.Linear(32, 48),
    "functional_linear": lambda: Weighted(F.linear, 48, 32, bias=(48,)),
    "mm": lambda: Weighted(torch.mm, 32, 48),
    "method_mm": lambda: Weighted(lambda x, w: x.mm(w), 32, 48),
    "matmul": lambda: Weighted(torch.matmul, 32, 48),
    "matmul_operator": lambda: Weighted(lambda x, w: x @ w, 32, 48),
    "matmul_transposed": lambda: Weighted(lambda x, w: x @ w.t(), 48, 32),
    "method_matmul": lambda: Weighted(lambda x, w: x.matmul(w), 32, 48),
    "unbound_matmul": lambda: Weighted(lambda x, w: torch.Tensor.matmul(x, w), 32, 48),
    "keyword_matmul": lambda: Weighted(lambda x, w: torch.matmul(input=x, other=w), 32, 48),
    "addmm": lambda: Weighted(lambda x, w, b: torch.addmm(b, x, w), 32, 48, bias=(48,)),
    "addmm_2d_bias": lambda: Weighted(lambda x, w, b: torch.addmm(b, x, w), 32, 48, bias=(16, 48)),
    "method_addmm": lambda: Weighted(lambda x, w, b: b.addmm(x, w), 32, 48, bias=(1, 48)),
    "weight_left": lambda: Weighted(lambda x, w: w @ x, 48, 16),
}


@pytest.mark.parametrize("form", FORMS)
def test_matmul_form(form: str) -> None:
    assert_as_eager(FORMS[form](), normal(16, 32), fp8_gemms=3)


@pytest.mark.parametrize("form", ["linear_bias", "matmul", "addmm_2d_bias", "weight_left"])
def test_matmul_form_in_bfloat16(form: str) -> None:
    model = FORMS[form]().bfloat16()
    assert_as_eager(model, normal(16, 32, dtype=torch.bfloat16), fp8_gemms=3)


@pytest.mark.parametrize("shape", [(4, 32, 16), (2, 3, 32, 16)], ids=str)
def test_a_weight_on_the_left_of_a_batch(shape: tuple[int, ...]) -> None:
    rows = assert_as_eager(Weighted(lambda x, w: w @ x, 48, 32), normal(*shape), fp8_gemms=3)
    rows_of_x = math.prod(shape) // 32
    assert (rows[0].fqn, rows[0].m, rows[0].n, rows[0].k) == ("weight", rows_of_x, 48, 32)


@pytest.mark.parametrize("shape", [(4, 16, 32), (2, 3, 16, 32)], ids=str)
@pytest.mark.parametrize("form", ["linear_bias", "matmul_operator", "method_matmul"])
def test_more_input_dimensions(form: str, shape: tuple[int, ...]) -> None:
    assert_as_eager(FORMS[form](), normal(*shape), fp8_gemms=3)


@pytest.mark.parametrize("kind", ["transposed", "strided", "expanded"])
def test_input_that_is_not_contiguous(kind: str) -> None:
    views = {
        "transposed": lambda: torch.randn(32, 16).t(),
        "strided": lambda: torch.randn(16, 64)[:, ::2],
        "expanded": lambda: torch.randn(1, 32).expand(16, 32),
    }
    assert_as_eager(nn.Linear(32, 48), views[kind](), fp8_gemms=2)


def test_huggingface_conv1d() -> None:
    utils = pytest.importorskip("transformers.pytorch_utils")
    conv = utils.Conv1D(48, 32)
    nn.init.normal_(conv.bias)
    rows = assert_as_eager(nn.Sequential(conv), normal(4, 16, 32), fp8_gemms=3)
    assert {row.fqn for row in rows} == {"0"}


def test_input_without_gradient_has_no_dgrad() -> None:
    rows = assert_as_eager(nn.Linear(32, 48), torch.randn(16, 32), fp8_gemms=2)
    assert [row.gemm for row in rows] == ["fprop", "wgrad"]


def test_frozen_weight_has_no_wgrad() -> None:
    model = nn.Linear(32, 48).requires_grad_(False)
    rows = assert_as_eager(model, normal(16, 32), fp8_gemms=2)
    assert [row.gemm for row in rows] == ["fprop", "dgrad"]


# --- the forms of a model -----------------------------------------------------------------------


class CrossAttention(nn.Module):
    """Multi-head attention with so many different inputs."""

    def __init__(self, inputs: int, **kwargs: Any) -> None:
        super().__init__()
        self.inputs = inputs
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        others = [torch.tanh(x), torch.sin(x)]
        key, value = {1: (x, x), 2: others[:1] * 2, 3: others}[self.inputs]
        return self.attention(x, key, value, need_weights=False)[0]


ATTENTION: dict[str, tuple[int, dict[str, Any]]] = {
    "self": (1, {}),
    "key is value": (2, {}),
    "all differ": (3, {}),
    "without bias": (3, {"bias": False}),
    "more keys": (3, {"add_bias_kv": True, "add_zero_attn": True}),
}
CHAINED = 3  # the scores, the projection of the values, that of the output


@pytest.mark.parametrize("kind", ATTENTION)
def test_multi_head_attention(kind: str) -> None:
    inputs, options = ATTENTION[kind]
    model, x = CrossAttention(inputs, **options), normal(2, 16, 32)
    rows = assert_as_eager(model, x, fp8_gemms=3 * (inputs + 1), chained=CHAINED)
    names = {row.fqn for row in rows if row.is_fp8}
    assert names == {"attention.in_proj_weight", "attention.out_proj"}


def test_separate_weights_of_multi_head_attention_are_three_sites() -> None:
    attention = CrossAttention(3, kdim=32, vdim=32).attention
    attention._qkv_same_embed_dim = False  # what other sizes of key and value would make it
    for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        attention.register_parameter(name, nn.Parameter(torch.randn(32, 32) / 6))
    model = CrossAttention(3)
    model.attention = attention
    rows = assert_as_eager(model, normal(2, 16, 32), fp8_gemms=12, chained=CHAINED)
    names = {f"attention.{name}_proj_weight" for name in "qkv"} | {"attention.out_proj"}
    assert {row.fqn for row in rows if row.is_fp8} == names


def test_transformer_encoder_layer_in_training_and_inference() -> None:
    model = nn.TransformerEncoderLayer(32, 2, 64, 0.0, "gelu", batch_first=True)
    assert_as_eager(model, normal(2, 16, 32), fp8_gemms=12)
    model.eval()
    with torch.no_grad():
        with pytest.warns(UserWarning, match="fast path for inference is one operator"):
            compile_interpreted(model)(torch.randn(2, 16, 32))
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            torch._dynamo.reset()
            out = compile_interpreted(model)(x := torch.randn(2, 16, 32))
            assert 25 <= sqnr_db(model(x), out) < 60
        finally:
            torch.backends.mha.set_fastpath_enabled(True)


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


# --- dtypes -------------------------------------------------------------------------------------


def test_autocast() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    class Autocast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.body(x)

    assert_as_eager(Autocast(), normal(16, 32), fp8_gemms=6)


def test_autocast_around_the_call() -> None:
    model, x = nn.Linear(32, 64), normal(16, 32)
    compiled = compile_interpreted(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, out = model(x), compiled(x)
    assert out.dtype is torch.bfloat16
    assert 25 <= sqnr_db(expected.detach(), out.detach()) < 60
    out.float().sum().backward()
    assert model.weight.grad is not None and model.weight.grad.dtype is torch.float32


def test_float16() -> None:
    assert_as_eager(nn.Linear(32, 48).half(), normal(16, 32, dtype=torch.float16), fp8_gemms=3)


EXACT: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], torch.dtype, str]] = {
    "float64": (lambda: nn.Linear(32, 48).double(), (16, 32), torch.float64, "dtype float64"),
    "complex": (
        lambda: nn.Linear(32, 48, dtype=torch.complex64),
        (16, 32),
        torch.complex64,
        "complex64",
    ),
}


@pytest.mark.parametrize("case", EXACT)
@pytest.mark.filterwarnings("ignore:no GEMM of this graph")
def test_left_alone_forward_is_exact_and_has_a_reason(case: str) -> None:
    make, shape, dtype, reason = EXACT[case]
    model, x = make(), torch.randn(shape, dtype=dtype)
    rows = fp8compile.explain(model, x).rows
    fprop = next(row for row in rows if row.gemm == "fprop")
    assert not fprop.is_fp8 and reason in fprop.reason
    out = compile_interpreted(model)(x)
    torch.testing.assert_close(out, model(x))
    assert out.dtype is dtype


@pytest.mark.parametrize(
    ("tokens", "features", "out"),
    [(16, 17, 48), (16, 32, 10), (37, 32, 48), (37, 17, 10)],
)
def test_sizes_that_are_no_multiple_of_16(tokens: int, features: int, out: int) -> None:
    assert_as_eager(nn.Linear(features, out), normal(tokens, features), fp8_gemms=3)


@pytest.mark.parametrize("tokens", [(2, 37), (37,)], ids=str)
def test_unknown_token_counts_are_merged_and_in_fp8_like_known_ones(tokens: tuple[int]) -> None:
    model, x = MLP(32, 64), normal(*tokens, 32)
    torch._dynamo.mark_dynamic(x, len(tokens) - 1)
    rows = assert_as_eager(model, x, fp8_gemms=6)
    assert {row.fqn for row in rows} == {"{gate,up}", "down"}
    assert any(isinstance(row.m, str) for row in rows), "nothing was dynamic"


@pytest.mark.filterwarnings("ignore:no GEMM of this graph")
def test_integer_matmul_is_exact() -> None:
    left, right = torch.randint(-9, 9, (16, 32)), torch.randint(-9, 9, (32, 48))
    out = compile_interpreted(torch.mm)(left, right)
    assert out.dtype is torch.int64 and torch.equal(out, left @ right)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_small_batches(batch: int) -> None:
    model, x = nn.Linear(32, 48), torch.randn(batch, 32)
    out = compile_interpreted(model)(x)
    assert sqnr_db(model(x).detach(), out.detach()) >= 25
    fprop = [row for row in fp8compile.explain(model, x).rows if row.gemm == "fprop"]
    assert len(fprop) == 1, "nothing is skipped in silence"
    assert fprop[0].is_fp8 or fprop[0].reason


@pytest.mark.filterwarnings("ignore:no GEMM of this graph")
def test_empty_batch() -> None:
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32))
    compiled = compile_interpreted(model)
    out = compiled(torch.randn(0, 32))
    assert out.shape == (0, 32)
    out.sum().backward()
    assert all(torch.count_nonzero(p.grad) == 0 for p in model.parameters())
    x = torch.randn(16, 32)  # the same compiled model still takes a full batch
    assert sqnr_db(model(x).detach(), compiled(x).detach()) >= 25


def test_full_batch_then_empty_batch_with_dynamic_shapes() -> None:
    model = nn.Linear(32, 48)
    compiled = compile_interpreted(model, dynamic=True)
    compiled(torch.randn(16, 32)).sum().backward()
    fp8compile.update_scales(model)
    before = fp8compile.state_dict(model)["weight.scale"]
    compiled(torch.randn(0, 32)).sum().backward()
    fp8compile.update_scales(model)
    after = fp8compile.state_dict(model)["weight.scale"]
    assert torch.equal(before, after) and after.isfinite().all()


@pytest.mark.filterwarnings("ignore:no GEMM of this graph")
def test_one_dimensional_input() -> None:
    model, x = nn.Linear(32, 48), normal(32)
    out = compile_interpreted(model)(x)
    assert out.shape == (48,) and sqnr_db(model(x).detach(), out.detach()) >= 25
    assert all(row.is_fp8 or row.reason for row in fp8compile.explain(model, x).rows)


def test_mixed_dtypes_in_one_model() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low = nn.Linear(32, 48).bfloat16()
            self.high = nn.Linear(48, 32)
            self.wide = nn.Linear(32, 32).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.wide(self.high(self.low(x.bfloat16()).float()).double())

    rows = assert_as_eager(Mixed(), normal(16, 32), fp8_gemms=6)
    left = [row for row in rows if not row.is_fp8]
    assert {row.fqn for row in left} == {"wide"}
    assert all("float64" in row.reason for row in left)


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
