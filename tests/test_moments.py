"""The rules of moments against Monte Carlo: derived and measured mean and variance."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vjp

from fp8compile.moments import Statistics, analyse, elements, evaluator
from tests.helpers import trace_final

Function = Callable[..., Any]


def normal(*shape: int, mean: float = 0.0, deviation: float = 1.0) -> Tensor:
    return torch.randn(shape) * deviation + mean


def derived(fn: Function, inputs: dict[str, Tensor]) -> list[dict[str, float]]:
    """Mean, variance and largest value of each output, from the statistics of the inputs alone."""
    gm = trace_final(lambda **given: fn(*given.values()), **inputs)
    nodes = gm.graph.find_nodes(op="placeholder")
    floating = {n: inputs[n.name] for n in nodes if inputs[n.name].is_floating_point()}
    statistics = {node: Statistics(node.name) for node in floating}
    moments = analyse(gm, statistics)
    known = {
        symbol: float(number)
        for node, x in floating.items()
        for symbol, number in zip(
            statistics[node].ordered, (x.mean(), x.var(correction=0), x.abs().max()), strict=True
        )
    }
    outputs = gm.graph.output_node().args[0]
    outputs = outputs if isinstance(outputs, list | tuple) else [outputs]
    found = []
    for node in outputs:
        value = moments.of(node)
        parts = [moments.mean(value), moments.variance(value)]
        parts.append(moments.largest(value, elements(node)))
        symbols, evaluate = evaluator(parts, moments.definitions)
        numbers = evaluate(*(known[symbol] for symbol in symbols))
        found.append(dict(zip(("mean", "variance", "largest"), numbers, strict=True)))
    return found


def backward(fn: Function) -> Function:
    """The gradients of a function's operands, given that of its result."""

    def gradients(g: Tensor, *operands: Tensor) -> Any:
        return vjp(fn, *operands)[1](g)

    return gradients


X = {"x": normal(64, 256)}
SHIFTED = {"x": normal(64, 256, mean=0.7, deviation=1.5)}
TWO = {"x": normal(64, 256, mean=0.5), "y": normal(64, 256, mean=-1.0, deviation=2.0)}
GRADIENT = {"g": normal(64, 256, deviation=0.1), **SHIFTED}
MATRICES = {"x": normal(128, 96, mean=0.3), "w": normal(96, 80, deviation=0.2)}
ATTENDED = {name: normal(2, 4, 32, 16) for name in "xy"}
ROWS = {"x": normal(64, 256, deviation=3), "w": normal(256, mean=1, deviation=0.2)}
ROWS_AND_BIAS = {**ROWS, "b": normal(256, deviation=0.5)}
LOGITS = {"x": normal(512, 100), "targets": torch.randint(0, 100, (512,))}


def layer_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (256,), w, b)


def rms_norm(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, (256,), w)


def loss_gradient(x: Tensor, targets: Tensor) -> Tensor:
    return vjp(lambda x: F.cross_entropy(x, targets), x)[1](torch.ones(()))[0]


def rotated(x: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat((-right, left), dim=-1)


CASES: dict[str, tuple[Function, dict[str, Tensor]]] = {
    # arithmetic
    "add": (lambda x, y: x + 3 * y, TWO),
    "add_alpha": (lambda x, y: torch.sub(x, y, alpha=2), TWO),
    "add_to_itself": (lambda x: x + x.abs(), SHIFTED),
    "multiply": (lambda x, y: x * y, TWO),
    "square": (lambda x: x * x, SHIFTED),
    "cube": (lambda x: x * x * x - 2 * x + 1, SHIFTED),
    "power": (lambda x: x**4, {"x": normal(64, 256, mean=1, deviation=0.2)}),
    "divide": (lambda x, y: x / (1 + y * y), TWO),
    "fma": (lambda x, y: torch.ops.prims.fma(x, y, y.sin()), TWO),
    "square_root": (lambda x: (1 + x * x).sqrt(), SHIFTED),
    "reciprocal": (lambda x: 1 / (1 + x * x), SHIFTED),
    "exp": (torch.exp, {"x": normal(64, 256, mean=-0.2, deviation=0.5)}),
    "logarithm": (lambda x: (1 + x.exp()).log(), SHIFTED),
    # functions
    **{
        name: (function, SHIFTED)
        for name, function in {
            "erf": torch.erf,
            "tanh": torch.tanh,
            "sigmoid": torch.sigmoid,
            "silu": F.silu,
            "gelu": F.gelu,
            "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
            "relu": F.relu,
            "sin": torch.sin,
            "minimum": lambda x: x.clamp_max(0.5),
        }.items()
    },
    "swiglu": (lambda x, y: F.silu(x) * y, TWO),
    "where": (lambda x, y: torch.where(x > 1, y, 0.5 * y), TWO),
    # their gradients
    "silu_backward": (backward(F.silu), GRADIENT),
    "gelu_backward": (backward(F.gelu), GRADIENT),
    "gelu_tanh_backward": (backward(lambda x: F.gelu(x, approximate="tanh")), GRADIENT),
    "relu_backward": (backward(F.relu), GRADIENT),
    "tanh_backward": (backward(torch.tanh), GRADIENT),
    "sigmoid_backward": (backward(torch.sigmoid), GRADIENT),
    "multiply_backward": (backward(torch.mul), {**GRADIENT, "y": TWO["y"]}),
    # sums
    "sum": (lambda x: x.sum(0), SHIFTED),
    "mean": (lambda x: x.mean(0), SHIFTED),
    "variance": (lambda x: x.var(0), SHIFTED),
    # norms
    "layer_norm": (layer_norm, ROWS_AND_BIAS),
    "rms_norm": (rms_norm, ROWS),
    "layer_norm_backward": (backward(layer_norm), {"g": GRADIENT["g"], **ROWS_AND_BIAS}),
    "rms_norm_backward": (backward(rms_norm), {"g": GRADIENT["g"], **ROWS}),
    # products
    "mm": (torch.mm, MATRICES),
    "addmm": (torch.addmm, {"b": normal(80), **MATRICES}),
    "bmm": (lambda x, y: x @ y.mT, ATTENDED),
    "mm_backward": (backward(torch.mm), {"g": normal(128, 80), **MATRICES}),
    "convolution": (
        lambda x, w, b: F.conv2d(x, w, b, padding=0),
        {"x": normal(4, 8, 16, 16), "w": normal(24, 8, 3, 3), "b": normal(24)},
    ),
    # softmax and losses
    "softmax": (lambda x: x.softmax(-1), X),
    "log_softmax": (lambda x: x.log_softmax(-1), X),
    "cross_entropy_backward": (loss_gradient, LOGITS),
    # parts and wholes
    "embedding": (
        lambda w, ids: F.embedding(ids, w),
        {"w": MATRICES["w"], "ids": LOGITS["targets"] % 96},
    ),
    "views": (lambda x: x.t().reshape(128, 128).unsqueeze(0).expand(2, 128, 128), SHIFTED),
    "casts": (lambda x: x.bfloat16().float(), SHIFTED),
    "rotate": (rotated, X),
    "concatenate": (lambda x, y: torch.cat([x, x, y], 0), TWO),
    "pad": (lambda x: F.pad(x, (16, 16), value=2.0), SHIFTED),
    "write_a_part": (lambda x, y: torch.slice_scatter(x, y[:16], 0, 8, 24), TWO),
    "dropout": (lambda x: F.dropout(x, 0.2), SHIFTED),
    "dropout_of_inductor": (lambda x: (torch.rand(64, 256) > 0.2) * x * 1.25, SHIFTED),
    "random": (lambda x: x * torch.randn(64, 256) * torch.rand(64, 256), SHIFTED),
}


LEFT_OUT = {
    "silu_backward": 0.1,  # its factors depend on x, but one of them is multiplied with g first
    "softmax": 0.1,  # the sum of a row depends on its largest exponentials
}


@pytest.mark.parametrize("case", CASES)
def test_derived_moments_are_the_measured_ones(case: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    fn, inputs = CASES[case]
    results = fn(*inputs.values())
    results = results if isinstance(results, tuple) else (results,)
    with caplog.at_level(logging.DEBUG, "fp8compile"):
        found = derived(fn, inputs)
    assert "no rule" not in caplog.text
    for result, moments in zip(results, found, strict=True):
        mean, variance = float(result.mean()), float(result.var(correction=0))
        # Three deviations of Gaussian samples, a tenth for heavier tails, and what we leave out.
        error = 3 / math.sqrt(result.numel())
        off = 0.1 + LEFT_OUT.get(case, 0.0) + error * math.sqrt(2)
        assert moments["variance"] == pytest.approx(variance, rel=off)
        assert moments["mean"] == pytest.approx(mean, abs=(0.01 + error) * math.sqrt(variance))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def test_attention_is_judged_by_the_tokens_with_the_largest_values() -> None:
    """Those at the start, which attend to few keys, or which many attend to."""
    torch.manual_seed(0)
    g, q = normal(64, 8, 32, 16, deviation=0.1), normal(64, 8, 32, 16, deviation=0.1)
    k, v = normal(64, 4, 32, 16, deviation=0.1), normal(64, 4, 32, 16, deviation=0.5)
    results = (attention(q, k, v), *vjp(attention, q, k, v)[1](g))
    found = derived(attention, {"q": q, "k": k, "v": v})
    found += derived(backward(attention), {"g": g, "q": q, "k": k, "v": v})
    for result, moments in zip(results, found, strict=True):
        of_token = result.var((0, 1, 3), correction=0)
        assert moments["variance"] == pytest.approx(float(of_token.max()), rel=0.1)


def test_attention_without_a_fused_operator() -> None:
    torch.manual_seed(0)
    x, y = normal(2, 4, 32, 16), normal(2, 4, 32, 16, deviation=0.5)

    def masked(x: Tensor, y: Tensor) -> Tensor:
        future = torch.ones(32, 32, dtype=torch.bool).triu(1)
        scores = (x @ x.mT / 4).masked_fill(future, float("-inf"))
        return scores.softmax(-1) @ y

    (found,) = derived(masked, {"x": x, "y": y})
    assert found["variance"] == pytest.approx(0.25, rel=0.1)


def test_the_largest_value_of_gaussians_and_of_parts() -> None:
    torch.manual_seed(0)
    x, y = normal(512, 512), normal(512, 512, deviation=0.01)
    y[0, 0] = 3.0
    whole, weight, both = derived(
        lambda x, y: (x + 1, y.t().reshape(-1), torch.cat([x, 2 + y])), {"x": x, "y": y}
    )
    assert whole["largest"] == pytest.approx(float((x + 1).abs().max()), rel=0.1)
    assert weight["largest"] == 3.0  # that of an input is known
    assert both["largest"] == pytest.approx(float(x.abs().max()), rel=1e-6)


def test_scores_of_any_size_have_a_softmax() -> None:
    for size in (1e-6, 1.0, 1e3):
        (found,) = derived(lambda x: x.softmax(-1).log_softmax(-1).exp(), {"x": size * X["x"]})
        assert 0 < found["mean"] < 1 and 0 <= found["variance"] < 1


def test_an_operator_without_a_rule_is_named_and_passes_the_largest_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.DEBUG, "fp8compile"):
        (found,) = derived(lambda x, y: torch.hypot(x, y), TWO)
    assert "no rule for the moments of hypot, aten.hypot" in caplog.text
    assert found["variance"] == pytest.approx(float(TWO["y"].square().mean()), rel=1e-5)


def test_what_is_known_of_inputs_without_statistics() -> None:
    def fn(x: Tensor, ids: Tensor) -> Tensor:
        return x * ids

    gm = trace_final(fn, x=normal(8, 4).bfloat16(), ids=torch.arange(4))
    moments = analyse(gm)
    x, ids = (moments.of(node) for node in gm.graph.find_nodes(op="placeholder"))
    assert (moments.mean(x), moments.variance(x)) == (0, 1)
    assert (moments.mean(ids), moments.variance(ids)) == (1, 0)
