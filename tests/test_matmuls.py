"""Every form of matmul, in every size and dtype: outputs and gradients against eager."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import fp8compile
from fp8compile import StrictError
from tests.eager import assert_as_eager, normal
from tests.helpers import compile_interpreted
from tests.models import MLP, sqnr_db

pytestmark = [
    pytest.mark.filterwarnings("ignore:FP8 is emulated here"),
    pytest.mark.usefixtures("fresh_dynamo"),
]


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


# --- the forms of a matmul ----------------------------------------------------------------------


def matmul_in_place(x: Tensor, weight: Tensor) -> Tensor:
    x @= weight
    return x


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
    "matmul_in_place": lambda: Weighted(matmul_in_place, 32, 32),
    "linalg_matmul": lambda: Weighted(torch.linalg.matmul, 32, 48),
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


@pytest.mark.parametrize("decomposed", [False, True], ids=["", "decomposed"])
@pytest.mark.parametrize("form", ["linear_bias", "matmul", "linalg_matmul", "mm", "addmm"])
def test_an_exported_program_names_its_sites_after_its_weights(form: str, decomposed: bool) -> None:
    x = normal(16, 32)
    program = torch.export.export(nn.Sequential(FORMS[form]()), (x,))
    model = (program.run_decompositions() if decomposed else program).module()
    rows = assert_as_eager(model, x, fp8_gemms=3)
    assert {row.fqn for row in rows} == {"0"}


# --- einsum -------------------------------------------------------------------------------------


class Einsum(nn.Module):
    """Multiplies its input with a weight by an equation."""

    def __init__(self, equation: str, *shape: int) -> None:
        super().__init__()
        self.equation, self.w = equation, nn.Parameter(torch.randn(shape) / 8)

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.w, x) if self.equation.startswith("W:") else (x, self.w)
        return torch.einsum(self.equation.removeprefix("W:"), first, second)


# equation, shape of the input, shape of the weight, M, N and K; "W:": the weight comes first
EINSUMS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    "matrix": ("bi,io->bo", (16, 32), (32, 48), (16, 48, 32)),
    "linear": ("bi,oi->bo", (16, 32), (48, 32), (16, 48, 32)),
    "square": ("bi,oi->bo", (32, 32), (32, 32), (32, 32, 32)),
    "to heads": ("bti,ihk->bthk", (4, 16, 32), (32, 4, 8), (64, 32, 32)),
    "to heads first": ("bti,hik->bhtk", (4, 16, 32), (4, 32, 16), (64, 64, 32)),
    "from heads": ("bhtk,hko->bto", (2, 4, 16, 8), (4, 8, 48), (32, 48, 32)),
    "channels": ("bchw,oc->bohw", (2, 32, 4, 4), (48, 32), (32, 48, 32)),
    "weight first": ("W:oi,bi->bo", (16, 32), (48, 32), (16, 48, 32)),
    "weight first, transposed": ("W:oi,bi->ob", (16, 32), (48, 32), (48, 16, 32)),
    "transposed": ("bi,oi->ob", (16, 32), (48, 32), (48, 16, 32)),
    "channels, weight first": ("W:oc,bchw->bohw", (2, 32, 4, 4), (48, 32), (48, 32, 32)),
    "ellipsis, no result": ("...i, io", (4, 16, 32), (32, 48), (64, 48, 32)),
}


@pytest.mark.parametrize("case", EINSUMS)
def test_einsum_with_a_weight(case: str) -> None:
    equation, x, weight, sizes = EINSUMS[case]
    options = {"strict": True}
    rows = assert_as_eager(Einsum(equation, *weight), normal(*x), fp8_gemms=3, options=options)
    fprop = next(row for row in rows if row.gemm == "fprop")
    assert (fprop.fqn, (fprop.m, fprop.n, fprop.k)) == ("w", sizes)


@pytest.mark.parametrize("case", ["to heads", "to heads first", "weight first"])
def test_einsum_with_an_unknown_number_of_tokens(case: str) -> None:
    equation, shape, weight, _ = EINSUMS[case]
    x = normal(*shape)
    torch._dynamo.mark_dynamic(x, x.dim() - 2)
    rows = assert_as_eager(Einsum(equation, *weight), x, fp8_gemms=3)
    assert any(isinstance(row.m, str) or isinstance(row.n, str) for row in rows)


def test_einsum_under_autocast() -> None:
    model, x = Einsum("bti,ihk->bthk", 32, 4, 8), normal(4, 16, 32)
    compiled = compile_interpreted(model, {"strict": True})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = compiled(x)
    assert out.dtype is torch.bfloat16 and 25 <= sqnr_db(model(x).detach(), out.detach()) < 60


def test_einsum_of_activations_stays_exact_and_is_accepted_by_strict() -> None:
    class Scores(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return torch.einsum("btk,bsk->bts", y, y.tanh()) + torch.einsum(
                "btk,sk->bts", y, y.sum(0)
            )

    rows = assert_as_eager(Scores(32, 32), normal(2, 16, 32), fp8_gemms=3, options={"strict": True})
    (other,) = (row for row in rows if not row.is_fp8)
    assert other.reason == "batched matmul of two activations"


# --- what is left out, and what to do about it --------------------------------------------------


class Cell(nn.LSTMCell):
    def __init__(self) -> None:
        super().__init__(32, 48)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


LEFT_OUT: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "einsum, a weight each": (
        lambda: Einsum("bti,tik->btk", 16, 32, 8),
        (4, 16, 32),
        "einsum with a parameter, but no product of two matrices; write it as matmuls",
    ),
    "einsum, a vector": (
        lambda: Einsum("bti,i->bt", 32),
        (4, 16, 32),
        "einsum with a parameter, but no product of two matrices; write it as matmuls",
    ),
    "bmm": (
        lambda: Weighted(torch.bmm, 4, 32, 48),
        (4, 16, 32),
        "batched matmul with a parameter; call linear or matmul for each of its matrices",
    ),
    "baddbmm": (
        lambda: Weighted(lambda x, w, b: torch.baddbmm(b, x, w), 4, 32, 48, bias=(4, 16, 48)),
        (4, 16, 32),
        "batched matmul with a parameter; call linear or matmul for each of its matrices",
    ),
    "matmul of a batch": (
        lambda: Weighted(torch.matmul, 4, 32, 48),
        (4, 16, 32),
        "batched matmul with a parameter; call linear or matmul for each of its matrices",
    ),
    "one sample": (lambda: nn.Linear(32, 48), (32,), "a 1-D operand"),
    "vmap": (
        lambda: Weighted(lambda x, w: torch.vmap(F.linear, (0, None))(x, w), 48, 32),
        (16, 32),
        r"a 1-D operand, as a sample in vmap is; give it a second dimension, such as x\[None\]",
    ),
    "LSTMCell": (
        Cell,
        (16, 32),
        "made by lstm_cell; call nn.Linear or F.linear, which can be FP8, as can matmul, @",
    ),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_a_parameter_that_is_left_out_has_a_reason_and_counts_under_strict(case: str) -> None:
    make, shape, reason = LEFT_OUT[case]
    with pytest.warns(UserWarning, match=f"no GEMM of this graph runs in FP8 .*{reason}"):
        compile_interpreted(make())(torch.randn(shape))
    torch._dynamo.reset()
    with pytest.raises((StrictError, BackendCompilerFailed), match=reason):
        compile_interpreted(make(), {"strict": True})(torch.randn(shape))


def test_input_without_gradient_has_no_dgrad() -> None:
    rows = assert_as_eager(nn.Linear(32, 48), torch.randn(16, 32), fp8_gemms=2)
    assert [row.gemm for row in rows] == ["fprop", "wgrad"]


def test_frozen_weight_has_no_wgrad() -> None:
    model = nn.Linear(32, 48).requires_grad_(False)
    rows = assert_as_eager(model, normal(16, 32), fp8_gemms=2)
    assert [row.gemm for row in rows] == ["fprop", "dgrad"]


# --- multi-head attention -----------------------------------------------------------------------


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


@pytest.mark.parametrize("inputs", [1, 2, 3])
def test_multi_head_attention_without_a_batch_multiplies_each_input_by_itself(inputs: int) -> None:
    model, options = CrossAttention(inputs), {"strict": True}
    rows = assert_as_eager(model, normal(16, 32), fp8_gemms=12, options=options, chained=CHAINED)
    assert [row.fqn for row in rows if row.gemm == "fprop"] == [
        *["attention.in_proj_weight"] * 3,
        "attention.out_proj",
    ]


@pytest.mark.parametrize("masked", [False, True])
def test_attention_that_returns_its_weights_is_accepted_by_strict(masked: bool) -> None:
    class Weights(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            mask = torch.ones(16, 16).triu(1).bool() if masked else None
            out, weights = super().forward(x, x, x, attn_mask=mask)
            return out + weights.sum(-1, keepdim=True)

    model, x = Weights(32, 2, batch_first=True), normal(2, 16, 32)
    options = {"strict": True}
    rows = assert_as_eager(model, x, fp8_gemms=6, options=options, chained=CHAINED)
    reasons = {row.reason for row in rows if not row.is_fp8}
    assert reasons == {"batched matmul of two activations"}


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


# --- dtypes and sizes ---------------------------------------------------------------------------


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
