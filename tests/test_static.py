"""The static recipe: scales from the weights' statistics, and nothing that looks at values."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn

import fp8compile
from fp8compile import ScalingStateError
from fp8compile.formats import Format
from fp8compile.ir import QUANTIZE, SLOTS_PER_SITE, TRACK_AMAX, quantize_output
from fp8compile.passes.derive_scales import MARGIN
from fp8compile.scaling import ScalingState
from fp8compile.states import states_of
from tests import helpers
from tests.helpers import compile_interpreted
from tests.models import Llama, sqnr_db

pytestmark = [
    pytest.mark.filterwarnings("ignore:FP8 is emulated here"),
    pytest.mark.usefixtures("fresh_dynamo"),
]
INPUT, WEIGHT, GRAD_OUTPUT = range(3)
E4M3, E5M2 = Format.E4M3, Format.E5M2
STATIC = {"recipe": "static"}


# --- numerics at initialisation -----------------------------------------------------------------


class MLP(nn.Sequential):
    """Three activations, and biases."""

    def __init__(self) -> None:
        layers = (nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.GELU())
        super().__init__(*layers, nn.Linear(512, 256), nn.Tanh(), nn.Linear(256, 64))


class GPT(nn.Module):
    """Layer norms, GELU, dropout, learned positions, biases, and q, k and v of one matrix."""

    def __init__(self, width: int = 128, layers: int = 2) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, width), nn.Embedding(64, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class WithLoss(nn.Module):
    """A model with its loss in the same graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return cross_entropy(self.model(ids), ids)


def cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, -2), ids.roll(-1, -1).flatten())


def tokens() -> Tensor:
    return torch.randint(0, 256, (4, 64))


def classes(logits: Tensor, x: Tensor) -> Tensor:
    targets = torch.randint(0, 64, (len(x),), generator=torch.Generator().manual_seed(1))
    return F.cross_entropy(logits.float(), targets)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], Callable[..., Tensor]]] = {
    "llama": (Llama, tokens, cross_entropy),
    "mlp": (MLP, lambda: torch.randn(128, 256), classes),
    "gpt": (GPT, tokens, cross_entropy),
    "gpt_with_loss": (lambda: WithLoss(GPT()), tokens, lambda loss, ids: loss),
}


class Recorder(fx.Interpreter):
    """Runs a graph and notes how much of its format every cast fills, and with which scale."""

    filled: list[tuple[float, float]]
    graphs: list[fx.GraphModule]

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        if target is QUANTIZE and args[1] is not None:
            x, scale, slot, dtype = args[:4]
            amax = float(x.float().abs().max())
            self.filled.append(
                (amax * float(scale[slot]) / Format.of(dtype).max, float(scale[slot]))
            )
        return super().call_function(target, args, kwargs)


@pytest.fixture
def recorded() -> Iterator[type[Recorder]]:
    """Every compiled graph is noted, and runs in a Recorder."""

    class Here(Recorder):
        filled, graphs = [], []

    def interpret(gm: fx.GraphModule, example_inputs: Any, **kwargs: Any) -> Any:
        Here.graphs.append(gm)
        return make_boxed_func(lambda *args: Here(gm).run(*args))

    with mock.patch.object(helpers, "interpret", interpret):
        yield Here


def step(
    call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor, loss: Callable[..., Tensor]
) -> dict[str, Tensor]:
    """The output and every parameter's gradient."""
    model.zero_grad()
    output = call(x)
    loss(output, x).backward()
    return {"output": output.detach(), **{n: p.grad.clone() for n, p in model.named_parameters()}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_static_scales_are_as_good_as_current_ones_and_nothing_saturates(
    name: str, dtype: torch.dtype, recorded: type[Recorder]
) -> None:
    make, draw, loss = MODELS[name]
    model, x = make().to(dtype), draw()
    x = x.to(dtype) if x.is_floating_point() else x
    expected = step(model, model, x, loss)
    quality = {}
    for recipe in ("current", "static"):
        recorded.graphs.clear(), recorded.filled.clear()
        torch._dynamo.reset()
        actual = step(compile_interpreted(model, {"recipe": recipe}), model, x, loss)
        found = {key: sqnr_db(expected[key], actual[key]) for key in expected}
        output = found.pop("output")
        quality[recipe] = (output, min(found.values()), statistics.median(found.values()))
    print(name, dtype, {k: [round(db, 2) for db in v] for k, v in quality.items()})
    differences = [c - s for c, s in zip(quality["current"], quality["static"], strict=True)]
    assert max(differences[1:] if name == "gpt_with_loss" else differences) <= 3, quality
    assert recorded.filled and all(scale > 0 and part <= 0.5 for part, scale in recorded.filled)
    assert_no_amax(recorded.graphs)


def assert_no_amax(graphs: list[fx.GraphModule]) -> None:
    assert len(graphs) == 2  # forward and backward
    nodes = [node for gm in graphs for node in gm.graph.nodes]
    casts = [node for node in nodes if node.target is QUANTIZE]
    assert casts and all(quantize_output(cast, "amax") is None for cast in casts)
    assert not any(node.target is TRACK_AMAX for node in nodes)


@pytest.mark.parametrize("factor", [1 / 8, 8], ids=["smaller", "larger"])
def test_the_margin_leaves_room_on_both_sides(factor: float) -> None:
    """Values that are so much larger or smaller than derived are cast as well."""
    make, draw, loss = MODELS["mlp"]
    model, x = make(), draw()
    expected, compiled = step(model, model, x, loss), compile_interpreted(model, STATIC)
    quality = []
    for _ in range(2):
        actual = step(compiled, model, x, loss)
        quality.append({key: sqnr_db(expected[key], actual[key]) for key in expected})
        only_state(model).scale.mul_(factor)
    before, after = quality
    assert all(after[key] >= before[key] - 0.5 for key in before)


# --- the values ---------------------------------------------------------------------------------


def only_state(model: nn.Module) -> ScalingState:
    (state,) = states_of(model)
    return state


def train(call: Callable[..., Tensor], *inputs: Tensor) -> None:
    for x in inputs:
        call(x).square().mean().backward()


def test_scales_of_a_linear_layer() -> None:
    model, x = nn.Linear(32, 64, bias=False), torch.randn(16, 32)
    compile_interpreted(model, STATIC)(x).sum().backward()
    amax = torch.tensor(
        [
            (2 * torch.tensor(512.0).log()).sqrt(),  # of so many Gaussians of variance 1
            model.weight.detach().abs().max(),
            1 / 16,  # of the gradient of a loss that is the mean over 16 rows
        ]
    )
    margin = torch.tensor([MARGIN[E4M3], MARGIN[E4M3], MARGIN[E5M2]])
    expected = torch.tensor([E4M3.max, E4M3.max, E5M2.max]) / (margin * amax)
    state = fp8compile.state_dict(model)
    torch.testing.assert_close(state["weight.scale"], expected, rtol=1e-6, atol=0)
    assert torch.equal(state["weight.amax_history"], torch.zeros(1, 3))


class Weighted(Block):
    """Attention alone, of values that are multiplied by a number."""

    def __init__(self, factor: float) -> None:
        super().__init__(64)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v * self.factor, is_causal=True)
        return self.out(attended.transpose(1, 2).flatten(-2))


@pytest.mark.parametrize("attention", ["high_precision", "fp8"])
def test_what_attention_averages_has_the_size_of_the_values(attention: str) -> None:
    """In FP8 or not: the scale of what comes after is that of the values."""
    x, found = torch.randn(2, 64, 64, requires_grad=True), []
    for factor in (1.0, 1 / 64):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Weighted(factor)
        options = {**STATIC, "attention": attention, "decline_slower": False}
        compile_interpreted(model, options)(x).sum().backward()
        found.append(fp8compile.state_dict(model)["out.weight.scale"][INPUT])
    assert found[1] == pytest.approx(64 * float(found[0]), rel=1e-5)
    expected = E4M3.max / (MARGIN[E4M3] * model.qkv(x)[..., 128:].abs().max() / 64)
    assert found[1] == pytest.approx(float(expected), rel=0.3)


class Multiplied(nn.Module):
    """Keys and values of one matrix each, whose product with a number attention reads."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.out = nn.Linear(64, 64, bias=False), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        v = (self.v(x) / 64).unflatten(-1, (4, 16)).transpose(1, 2)
        heads = x.unflatten(-1, (4, 16)).transpose(1, 2)
        attended = F.scaled_dot_product_attention(heads, heads, v, is_causal=True)
        return self.out(attended.transpose(1, 2).flatten(-2))


def test_a_factor_that_a_gemm_has_taken_counts() -> None:
    """fold_scales has made it part of the scale that the GEMM multiplies by."""
    model, x = Multiplied(), torch.randn(2, 64, 64, requires_grad=True)
    compile_interpreted(model, STATIC)(x).sum().backward()
    expected = E4M3.max / (MARGIN[E4M3] * model.v(x).abs().max() / 64)
    found = fp8compile.state_dict(model)["out.weight.scale"][INPUT]
    assert found == pytest.approx(float(expected), rel=0.3)


def test_scales_stay_as_they_are_in_training() -> None:
    model, x = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32)), torch.randn(16, 32)
    compiled = compile_interpreted(model, STATIC)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    train(compiled, x)
    first = only_state(model).scale.clone()
    for _ in range(3):
        train(compiled, 10 * x)
        optimizer.step()
        optimizer.zero_grad()
    state = only_state(model)
    assert torch.equal(state.scale, first) and first.count_nonzero() == 6
    assert state.updates == 0 and not state.amax_fwd.any() and not state.events.any()
    assert fp8compile.events(model) == {}


def test_weights_that_something_else_wrote_to_get_new_scales() -> None:
    model, x = nn.Linear(32, 64), torch.randn(16, 32)
    compiled = compile_interpreted(model, STATIC)
    train(compiled, x)
    before = only_state(model).scale.clone()
    larger = {name: 1000 * value for name, value in model.state_dict().items()}
    model.load_state_dict(larger)
    out = compiled(x).detach()
    after = only_state(model).scale
    assert float(after[WEIGHT]) == pytest.approx(float(before[WEIGHT]) / 1000, rel=1e-5)
    assert after[INPUT] == before[INPUT]
    assert sqnr_db(model(x).detach(), out) >= 25


def test_a_loop_without_an_optimizer_ends_each_step_itself() -> None:
    model, x = nn.Linear(32, 64), torch.randn(16, 32)
    compiled = compile_interpreted(model, STATIC)
    train(compiled, x)
    before = only_state(model).scale.clone()
    with torch.no_grad():
        model.weight.mul_(1.5)
    fp8compile.update_scales(model)
    train(compiled, x)
    assert torch.equal(only_state(model).scale, before)


def test_weights_that_are_zero_leave_it_to_the_casts() -> None:
    model, x = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32)), torch.randn(16, 32)
    nn.init.zeros_(model[1].weight)
    compiled = compile_interpreted(model, STATIC)
    train(compiled, x)
    scale = only_state(model).scale
    assert (
        scale[SLOTS_PER_SITE + WEIGHT] == 0 and scale[GRAD_OUTPUT] == 0
    )  # no gradient comes through it
    assert scale[SLOTS_PER_SITE + INPUT] > 0 and scale[SLOTS_PER_SITE + GRAD_OUTPUT] > 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    optimizer.step()
    assert sqnr_db(model(x).detach(), compiled(x).detach()) >= 23


# --- who has which scales -----------------------------------------------------------------------


class Cancelling(nn.Module):
    """Its first layer gets a gradient that is zero whatever the values are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 32), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.first(x)
        return self.second(x), y - y


def test_a_gradient_that_cancels_out_has_no_scale() -> None:
    model, x = Cancelling(), torch.randn(48, 64, requires_grad=True)
    output, nothing = compile_interpreted(model, STATIC)(x)
    (output + nothing).sum().backward()
    assert sqnr_db(model(x)[0], output) > 25 and not nothing.any()
    assert not model.first.weight.grad.any() and model.second.weight.grad.all()
    scale = only_state(model).scale
    assert scale[GRAD_OUTPUT] == 0  # that cast finds its own
    assert scale.count_nonzero() == 3  # of the input, both weights and the other gradient


@pytest.mark.parametrize("quiet", ["eval", "no_grad"])
def test_inference_first_and_training_later(quiet: str) -> None:
    model, x = nn.Sequential(nn.Linear(32, 64), nn.Dropout(0.5)), torch.randn(16, 32)
    compiled = compile_interpreted(model, STATIC)
    if quiet == "eval":
        model.eval()
    with torch.inference_mode() if quiet == "no_grad" else torch.no_grad():
        compiled(x)
    scale = only_state(model).scale.clone()
    assert scale[INPUT] > 0 and scale[WEIGHT] > 0 and scale[GRAD_OUTPUT] == 0
    train(compiled, x)
    both = only_state(model).scale
    assert torch.equal(both[:GRAD_OUTPUT], scale[:GRAD_OUTPUT]) and both[GRAD_OUTPUT] > 0


def test_one_graph_of_several_models_has_scales_for_each() -> None:
    models = [nn.Linear(32, 64, bias=False) for _ in range(2)]
    with torch.no_grad():
        models[1].weight.mul_(100)
    x, call = torch.randn(16, 32), compile_interpreted(lambda layer, x: layer(x), STATIC)
    for model in (*models, *models):
        assert sqnr_db(model(x).detach(), call(model, x).detach()) >= 25
    scales = [float(only_state(model).scale[WEIGHT]) for model in models]
    amaxes = [float(model.weight.detach().abs().max()) for model in models]
    assert scales[0] / scales[1] == pytest.approx(amaxes[1] / amaxes[0], rel=1e-5)


def test_a_frozen_and_a_tied_weight() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.fc = nn.Embedding(64, 32), nn.Linear(32, 32)
            self.head = nn.Linear(32, 64, bias=False)
            self.head.weight = self.embed.weight
            self.fc.requires_grad_(False)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.tanh(self.fc(self.embed(ids))))

    model, ids = Tied(), torch.randint(0, 64, (4, 16))
    expected = model(ids).detach()
    compiled = compile_interpreted(model, STATIC)
    out = compiled(ids)
    out.square().mean().backward()
    assert sqnr_db(expected, out.detach()) >= 20
    state = fp8compile.state_dict(model)
    assert {key.rpartition(".")[0] for key in state} == {"fc.weight", "embed.weight"}
    assert all((state[f"{name}.scale"] > 0).all() for name in ("fc.weight", "embed.weight"))


def test_dynamic_sizes_use_those_of_the_traced_call() -> None:
    model = nn.Linear(32, 64, bias=False)
    compiled = compile_interpreted(model, STATIC, dynamic=True)
    train(compiled, torch.randn(16, 32))
    first = only_state(model).scale.clone()
    x = torch.randn(48, 32)
    assert sqnr_db(model(x).detach(), compiled(x).detach()) >= 25
    assert torch.equal(only_state(model).scale, first) and (first[:3] > 0).all()


def test_weights_that_are_arguments() -> None:
    x, w = torch.randn(16, 32), (1000 * torch.randn(64, 32)).requires_grad_()
    out = compile_interpreted(F.linear, STATIC)(x, w)
    assert sqnr_db(F.linear(x, w).detach(), out.detach()) >= 25


# --- saved and loaded ---------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before the first call", "after it"])
def test_loaded_scales_are_used(when: str) -> None:
    model, x = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32)), torch.randn(16, 32)
    train(compile_interpreted(model, STATIC), x)
    saved = {key: 2 * value for key, value in fp8compile.state_dict(model).items()}
    torch._dynamo.reset()
    other = copy.deepcopy(model)
    compiled = compile_interpreted(other, STATIC)
    if when == "after it":
        train(compiled, x)
    fp8compile.load_state_dict(other, saved)
    train(compiled, x)
    loaded = fp8compile.state_dict(other)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(value, saved[key]) for key, value in loaded.items())


def test_the_scales_of_another_recipe_are_refused() -> None:
    model, x = nn.Linear(32, 64), torch.randn(16, 32)
    train(compile_interpreted(model, STATIC), x)
    saved = fp8compile.state_dict(model)
    other = nn.Linear(32, 64)
    fp8compile.load_state_dict(other, saved)
    torch._dynamo.reset()
    with pytest.raises(ScalingStateError, match=r"history has 1 steps; .*'delayed' keeps 16"):
        compile_interpreted(other)(x)


# --- gradients that enter the graph -------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_gradients_of_any_size_keep_their_precision(size: float) -> None:
    """A sum, a mean, or a loss that is scaled: nothing in the graph tells."""
    model, x = MLP(), torch.randn(64, 256)

    def gradients(call: Callable[..., Tensor]) -> dict[str, Tensor]:
        model.zero_grad()
        (classes(call(x), x) * size).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    want = gradients(model)
    quality = {}
    for recipe in ("current", "static"):
        torch._dynamo.reset()
        got = gradients(compile_interpreted(model, {"recipe": recipe}))
        quality[recipe] = min(sqnr_db(want[name], got[name]) for name in want)
    assert quality["static"] > quality["current"] - 3


@pytest.mark.parametrize("gradient", [0.0, float("inf"), float("nan")])
def test_gradients_that_say_nothing(gradient: float) -> None:
    model, x = nn.Linear(64, 32), torch.randn(48, 64)
    output = compile_interpreted(model, STATIC)(x)
    direction = torch.full((48, 32), gradient)
    output.backward(direction)
    if gradient == 0:
        assert not model.weight.grad.any()
    else:  # visible, as in float32
        assert not model.weight.grad.isfinite().any()


class Parts(nn.Module):
    """Two results, each with a gradient of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.second(y)


@pytest.mark.parametrize("tokens", [(0, 32), (32, 0), (0, 0)], ids=str)
def test_a_result_without_elements_has_no_amax(tokens: tuple[int, int]) -> None:
    torch._dynamo.reset()
    model, inputs = Parts(), [torch.randn(count, 64) for count in tokens]
    found = []
    for call in (model, compile_interpreted(model, STATIC)):
        model.zero_grad()
        sum(part.square().sum() for part in call(*inputs)).backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for want, got in zip(*found, strict=True):
        assert not got.any() if not want.any() else sqnr_db(want, got) > 20
