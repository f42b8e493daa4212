"""The numerics gates: signal to quantization noise against the model in its own precision."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fp8compile
from fp8compile import Gemm, Recipe, ops  # noqa: F401  (ops registers the fp8:: operators)
from tests.helpers import compile_interpreted
from tests.models import Llama, sqnr_db

OUTPUT_DB, GRADIENT_DB, MEDIAN_DB, GEMM_DB = 26.0, 18.0, 20.0, 25.0
pytestmark = pytest.mark.filterwarnings("ignore:FP8 is emulated here")


def step(call: Callable[..., Tensor], model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """The output and every parameter's gradient of one training step."""
    model.zero_grad()
    logits = call(ids)
    F.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return {"output": logits.detach(), **gradients}


def assert_gates(expected: dict[str, Tensor], actual: dict[str, Tensor]) -> float:
    quality = {name: sqnr_db(expected[name], actual[name]) for name in expected}
    output = quality.pop("output")
    assert output >= OUTPUT_DB
    assert {name: db for name, db in quality.items() if db < GRADIENT_DB} == {}
    assert statistics.median(quality.values()) >= MEDIAN_DB
    return output


def test_llama_gates_on_the_first_step_and_the_tenth() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, ids = Llama(), torch.randint(0, 256, (4, 64))
    expected = step(model, model, ids)
    compiled = compile_interpreted(model)
    first = step(compiled, model, ids)
    output = assert_gates(expected, first)
    for _ in range(8):
        fp8compile.update_scales(model)
        with_delayed_scales = step(compiled, model, ids)
    fp8compile.update_scales(model)
    tenth = step(compiled, model, ids)
    assert abs(assert_gates(expected, tenth) - output) <= 0.5
    assert not torch.equal(first["output"], expected["output"])
    # The data stays the same, and so must the scales: the history's maximum is the step's amax.
    assert torch.equal(with_delayed_scales["output"], tenth["output"])


def test_llama_gates_with_attention_in_fp8() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, ids = Llama(), torch.randint(0, 256, (4, 64))
    options = {"attention": "fp8", "decline_slower": False}
    expected, actual = (
        step(model, model, ids),
        step(compile_interpreted(model, options), model, ids),
    )
    output = assert_gates(expected, actual)
    torch._dynamo.reset()
    without = step(compile_interpreted(model), model, ids)["output"]
    assert 0 < sqnr_db(expected["output"], without) - output < 0.5


def test_llama_gates_with_attention_in_fp8_in_both_directions() -> None:
    """At the first step, whose scales are guessed, and at the third."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Llama(heads=2, kv_heads=1, max_tokens=128)
    ids = torch.randint(0, 256, (4, 128))
    expected = step(model, model, ids)
    compiled = compile_interpreted(model, {"attention": "fp8_both", "decline_slower": False})
    for _ in range(3):
        assert_gates(expected, step(compiled, model, ids))
        fp8compile.update_scales(model)


def test_small_llama_with_the_current_recipe() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, ids = Llama(layers=1), torch.randint(0, 256, (4, 64))
    compiled = compile_interpreted(model, {"recipe": "current"})
    assert_gates(step(model, model, ids), step(compiled, model, ids))
    assert fp8compile.state_dict(model) == {}


def test_small_llama_with_e4m3_only() -> None:
    """Gradients of a third bit of mantissa: the worst is at least 2 dB better."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, ids = Llama(layers=1), torch.randint(0, 256, (4, 64))
    expected = step(model, model, ids)
    worst = {}
    for name in ("delayed", "e4m3_only"):
        actual = step(compile_interpreted(model, {"recipe": name}), model, ids)
        assert_gates(expected, actual)
        worst[name] = min(sqnr_db(expected[key], actual[key]) for key in expected)
    assert worst["e4m3_only"] >= worst["delayed"] + 2


@pytest.mark.parametrize("kept", [Gemm.FPROP, Gemm.DGRAD, Gemm.WGRAD], ids=str)
def test_a_gemm_role_in_high_precision_has_no_noise(kept: Gemm) -> None:
    """One layer, whose gradient is given: each result is that of a single GEMM."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    linear, x = nn.Linear(64, 32, bias=False), torch.randn(48, 64, requires_grad=True)
    options = {"recipe": Recipe("careful", high_precision=(kept,)), "strict": True}
    output = compile_interpreted(linear, options)(x)
    direction = torch.randn(48, 32)
    x_grad, weight_grad = torch.autograd.grad(output, (x, linear.weight), direction)
    quality = {
        Gemm.FPROP: sqnr_db(linear(x).detach(), output.detach()),
        Gemm.DGRAD: sqnr_db(direction @ linear.weight.detach(), x_grad),
        Gemm.WGRAD: sqnr_db(direction.t() @ x.detach(), weight_grad),
    }
    assert {gemm for gemm, db in quality.items() if db > 100} == {kept}
    assert min(quality.values()) > 20


@pytest.mark.parametrize("distribution", ["normal", "uniform", "outliers"])
def test_one_e4m3_gemm(distribution: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(256, 512, generator=generator) for _ in range(2))
    if distribution == "uniform":
        x = torch.rand(256, 512, generator=generator)
    elif distribution == "outliers":
        x[:, 7] *= 50  # one hot channel, as language models have
    operands = [torch.ops.fp8.quantize(t, None, 0, torch.float8_e4m3fn) for t in (x, w)]
    (a, _, a_inv, *_), (b, _, b_inv, *_) = operands
    out = torch.ops.fp8.scaled_mm(a, b, a_inv, b_inv, None, torch.float32, True)
    assert sqnr_db(x @ w.t(), out) >= GEMM_DB


@pytest.mark.parametrize("magnitude", [1e-12, 1e-4, 1.0, 1e4, 1e12])
def test_quality_does_not_depend_on_the_magnitude(magnitude: float) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = nn.Linear(64, 64, bias=False)
    x = torch.randn(32, 64) * magnitude
    assert sqnr_db(model(x).detach(), compile_interpreted(model)(x).detach()) >= GEMM_DB


class TwoHeads(nn.Module):
    """A trunk with two heads that take its output; their losses are no business of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(32, 64)
        self.a, self.b = (
            nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, n)) for n in (32, 16)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.trunk(x).tanh()
        return self.a(y), self.b(y)


@pytest.mark.parametrize("recipe", ["delayed", "current", "static", "e4m3_only", "blockwise"])
@pytest.mark.parametrize("factor", [1e-9, 1e9])
def test_losses_of_several_outputs_may_be_of_any_sizes(recipe: str, factor: float) -> None:
    """Gradients of different outputs share no scale, though their heads take one input."""
    torch.manual_seed(0)
    model, x = TwoHeads(), torch.randn(64, 32)

    def gradients(call: Callable[[Tensor], tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        model.zero_grad()
        a, b = call(x)
        (a.square().mean() + factor * b.square().mean()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    expected, compiled = gradients(model), compile_interpreted(model, {"recipe": recipe})
    for _ in range(2):  # the second time with scales that are kept
        actual = gradients(compiled)
        fp8compile.update_scales(model)
        quality = {name: sqnr_db(expected[name], actual[name]) for name in expected}
        assert all(db > GRADIENT_DB for db in quality.values()), quality
