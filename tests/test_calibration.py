"""Static scales from a few batches: what they are, who reads them, and what becomes of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fp8compile
from fp8compile import Format, OptionError, Recipe, Scaling, ScalingStateError
from fp8compile.compile import compile_graph
from fp8compile.histogram import Histogram
from fp8compile.ir import QUANTIZE, SLOTS_PER_SITE, TRACK_AMAX, args_of
from fp8compile.observers import OBSERVERS, Observed, chosen_amax
from fp8compile.options import parse_options
from fp8compile.states import states_of
from tests.helpers import compile_interpreted, interpret
from tests.models import MLP, SharedInput, sqnr_db

pytestmark = pytest.mark.filterwarnings("ignore:FP8 is emulated here")
BIN = 2 ** (1 / Histogram.PER_OCTAVE)
E4M3_MAX = Format.E4M3.max
INPUT, WEIGHT, GRAD_OUTPUT = range(3)


@pytest.fixture(autouse=True)
def compile_anew() -> None:
    torch._dynamo.reset()


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32)).eval()


def served(model: Callable[..., Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def cast(x: Tensor, amax: float, fmt: Format = Format.E4M3) -> Tensor:
    """What a tensorwise cast makes of a value, with ``FP8_MAX / amax``."""
    scale = torch.tensor(fmt.max) / torch.tensor(amax)
    q = (x.float() * scale).clamp(-fmt.max, fmt.max).to(fmt.dtype)
    return q.float() * scale.reciprocal()


# --- the scales ---------------------------------------------------------------------------------


def test_scales_are_the_formats_maximum_over_the_largest_magnitude() -> None:
    model = two_layers()
    batches = [torch.randn(16, 32), 3 * torch.randn(8, 32), torch.randn(24, 32)]
    found = fp8compile.calibrate(model, batches)
    inside = [model[:2](batch).detach() for batch in batches]
    largest = [float(max(x.abs().max() for x in xs)) for xs in (batches, inside)]
    assert found == {"0.weight.input": largest[0], "2.weight.input": largest[1]}
    state = fp8compile.state_dict(model)
    for name, amax in (("0", largest[0]), ("2", largest[1])):
        weight = model.get_submodule(name).weight.detach().abs().max()
        expected = torch.stack([E4M3_MAX / torch.tensor(amax), E4M3_MAX / weight, torch.zeros(())])
        assert torch.equal(state[f"{name}.weight.scale"], expected)


@pytest.mark.parametrize("percentile", [50.0, 99.0, 99.9, 100.0])
def test_percentile_is_that_of_all_batches(percentile: float) -> None:
    model, batches = nn.Linear(32, 16), [torch.randn(500, 32), 4 * torch.randn(300, 32)]
    found = fp8compile.calibrate(model, batches, observer="percentile", percentile=percentile)
    every = torch.cat(batches).abs().flatten()
    expected = float(every.quantile(percentile / 100, interpolation="higher"))
    assert expected / BIN <= found["weight.input"] <= expected * BIN


def test_zeros_count_as_elements() -> None:
    seen = Observed(Histogram(torch.device("cpu")))
    seen.add(torch.cat([torch.zeros(900), torch.full((90,), 2.0), torch.full((10,), 8.0)]))
    chosen = [chosen_amax(seen, "percentile", p, Format.E4M3) for p in (50, 95, 99, 99.5)]
    assert chosen == [2.0, 2.0, 2.0, 8.0]


@pytest.mark.parametrize("fmt", Format)
@pytest.mark.parametrize("draw", [torch.randn, lambda *s: torch.randn(*s).exp(), torch.rand])
def test_mse_is_the_amax_that_loses_least(draw: Callable[..., Tensor], fmt: Format) -> None:
    """No amax of a fine grid loses noticeably less, by casting the values themselves."""
    x = draw(256, 64)
    seen = Observed(Histogram(x.device))
    seen.add(x[:100])
    seen.add(x[100:])

    def error(amax: float) -> float:
        return float((cast(x, amax, fmt) - x).square().mean())

    chosen = chosen_amax(seen, "mse", 99.99, fmt)
    others = [error(float(x.abs().max()) * 2 ** (i / 37)) for i in range(-200, 37)]
    assert error(chosen) <= 1.01 * min(others)
    assert error(chosen) <= error(float(x.abs().max()))


def test_sites_with_one_input_share_the_scales_of_the_first() -> None:
    model, x = SharedInput(), torch.randn(32, 48)
    with torch.no_grad():
        model.k.weight.mul_(5)
    found = fp8compile.calibrate(model, [x])
    assert list(found) == ["q.weight.input", "out.weight.input"]
    state = fp8compile.state_dict(model)
    amax = torch.stack([x.abs().max(), model.k.weight.detach().abs().max()])
    assert torch.equal(state["q.weight.scale"][:2], E4M3_MAX / amax)
    assert torch.equal(state["k.weight.scale"], torch.zeros(3))  # nothing reads them


def test_one_graph_that_serves_several_modules_gives_each_its_scales() -> None:
    """A graph break has the layers compiled one by one; Dynamo takes one graph for both."""

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Layer(), Layer()])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                torch._dynamo.graph_break()
                x = layer(x)
            return x

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return 10 * self.fc(x)

    model, x = Layers(), torch.randn(16, 32)
    found = fp8compile.calibrate(model, [x])
    between = float(served(model.layers[0], x).abs().max())
    assert found["layers.0.fc.weight.input"] == float(x.abs().max())
    assert found["layers.1.fc.weight.input"] == pytest.approx(between)


def test_a_weight_used_twice_has_scales_for_both_uses() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.fc(x) * 8)

    model, x = Twice(), torch.randn(16, 32)
    found = fp8compile.calibrate(model, [x])
    assert found["fc.weight.input"] == float(x.abs().max())
    assert found["fc.weight#1.input"] == pytest.approx(float((8 * model.fc(x)).abs().max()))


# --- who reads them -----------------------------------------------------------------------------


def by_hand(model: nn.Sequential, x: Tensor, amaxes: list[float]) -> Tensor:
    """The forward of ``two_layers`` with static scales, by the operators' reference bodies."""
    for layer, amax in zip((model[0], model[2]), amaxes, strict=True):
        operands = [(x, amax), (layer.weight.detach(), float(layer.weight.abs().max()))]
        cast = [
            torch.ops.fp8.quantize(value, E4M3_MAX / torch.tensor([of]), 0, Format.E4M3.dtype)
            for value, of in operands
        ]
        (a, _, a_inv, *_), (b, _, b_inv, *_) = cast
        bias = layer.bias.detach()
        x = torch.ops.fp8.scaled_mm(a, b, a_inv, b_inv, bias, torch.float32, True)
        x = x.tanh() if layer is model[0] else x
    return x


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("order", ["before", "after"])
def test_inference_reads_the_scales_bit_for_bit(observer: str, order: str) -> None:
    model, batches = two_layers(), [torch.randn(64, 32) for _ in range(3)]
    x = 2 * torch.randn(64, 32)  # larger than what was seen: clipped
    compiled = compile_interpreted(model)
    if order == "after":
        current = served(compiled, x)
    found = fp8compile.calibrate(model, batches, observer=observer, percentile=99)
    out = served(compiled, x)
    assert torch.equal(out, by_hand(model, x, list(found.values())))
    if order == "after":
        assert not torch.equal(out, current)


def test_the_graph_of_inference_looks_for_no_amax() -> None:
    model, x = two_layers(), torch.randn(16, 32)
    fp8compile.calibrate(model, [x])
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, examples: Any) -> Any:
        def keep(gm: fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
            graphs.append(gm)
            return interpret(gm, inputs)

        return compile_graph(gm, examples, parse_options({}), inner_compile=keep)

    served(torch.compile(model, backend=backend), x)
    nodes = [node for gm in graphs for node in gm.graph.nodes]
    casts = [node for node in nodes if node.target is QUANTIZE]
    assert len(casts) == 4 and all(args_of(node)[1] is not None for node in casts)
    outputs = {user.args[1] for node in casts for user in node.users}
    assert 3 not in outputs  # the amax
    assert not [node for node in nodes if node.target is TRACK_AMAX]


def test_batches_of_any_size() -> None:
    model, sizes = two_layers(), (16, 24, 7, 40)
    batches = [torch.randn(size, 32) for size in sizes]
    found = fp8compile.calibrate(model, batches)
    compiled = compile_interpreted(model, dynamic=True)
    for batch in batches:
        expected = by_hand(model, batch, list(found.values()))
        assert torch.equal(served(compiled, batch), expected)
    assert len(states_of(model)) == 1


def test_inductor_reads_them() -> None:
    """And so does the code that is really served, on whatever device."""
    model, x = two_layers(), torch.randn(16, 32)
    found = fp8compile.calibrate(model, [x / 4])
    out = served(torch.compile(model, backend="fp8"), x)
    torch.testing.assert_close(out, by_hand(model, x, list(found.values())), rtol=1e-5, atol=1e-5)


def test_other_uses_of_a_batch() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 16)

        def forward(self, x: Tensor, *, by: float = 1.0) -> Tensor:
            return self.fc(x * by)

    model, x = Keyword(), torch.randn(16, 32)
    amax = float(x.abs().max())
    assert fp8compile.calibrate(model, [{"x": x, "by": 2.0}]) == {"fc.weight.input": 2 * amax}
    step = fp8compile.calibrate(model, [x], step=lambda call, batch: call(batch, by=4.0))
    assert step == {"fc.weight.input": 4 * amax}


def test_sites_that_were_skipped_or_find_their_own_scales_have_none() -> None:
    model, x = two_layers(), torch.randn(16, 32)
    skip = fp8compile.calibrate(copy.deepcopy(model), [x], options={"skip": ["0"]})
    assert list(skip) == ["2.weight.input"]
    rows = fp8compile.calibrate(model, [x], options={"overrides": {"2": "rowwise"}})
    assert list(rows) == ["0.weight.input"]


# --- rare outliers ------------------------------------------------------------------------------


def lost_db(linear: nn.Linear, x: Tensor, observer: str, calibrated: Tensor) -> float:
    """SQNR of a layer's result, each row counting alike."""
    torch._dynamo.reset()
    linear = copy.deepcopy(linear)
    fp8compile.calibrate(linear, [calibrated], observer=observer)
    exact, out = served(linear, x), served(compile_interpreted(linear), x)
    noise = (out - exact).square().sum(1) / exact.square().sum(1)
    return float(-10 * noise.mean().log10())


def test_percentile_saves_what_rare_outliers_make_underflow() -> None:
    """One element in 50000 a million times as large: under its scale all others are zero."""
    linear, x = nn.Linear(512, 256, bias=False), torch.randn(1024, 512)
    calibrated = torch.where(torch.rand(x.shape) < 2e-5, x * 1e6, x)
    found = {each: lost_db(linear, x, each, calibrated) for each in ("max", "percentile")}
    print(found)
    assert found["max"] < 3 and found["percentile"] > 27


def test_mse_finds_the_scale_at_which_most_values_lie_on_the_grid() -> None:
    """Most activations are at a clamp, and rare outliers decide how well that is cast."""
    linear, x = nn.Linear(512, 256, bias=False), (3 * torch.randn(1024, 512)).clamp(-1, 1)
    x = torch.where(torch.rand(x.shape) < 3e-5, x * 3, x)
    found = {each: lost_db(linear, x, each, x) for each in ("max", "mse")}
    print(found)
    assert found["mse"] > found["max"] + 3


def test_percentile_clips_where_the_largest_values_count() -> None:
    """Student's t, 3 degrees of freedom: a heavy tail, but one that the exponents of FP8 cover."""
    linear = nn.Linear(512, 256, bias=False)
    x = torch.randn(1024, 512) / torch.randn(3, 1024, 512).square().mean(0).sqrt()
    found = {each: lost_db(linear, x, each, x) for each in OBSERVERS}
    print(found)
    assert found["percentile"] < found["max"] - 3
    assert found["mse"] == pytest.approx(found["max"], abs=0.2)


# --- the state ----------------------------------------------------------------------------------


def test_scales_are_saved_and_loaded() -> None:
    model, x = two_layers(), torch.randn(16, 32)
    other = copy.deepcopy(model)
    fp8compile.calibrate(model, [x / 2])
    fp8compile.load_state_dict(other, fp8compile.state_dict(model))
    out, again = (served(compile_interpreted(each), x) for each in (model, other))
    assert torch.equal(out, again)
    assert not torch.equal(out, served(compile_interpreted(copy.deepcopy(model)), x))


def test_they_replace_what_was_loaded_before_the_first_call() -> None:
    model, x = two_layers(), torch.randn(16, 32)
    donor = copy.deepcopy(model)
    fp8compile.calibrate(donor, [x / 8])
    fp8compile.load_state_dict(model, fp8compile.state_dict(donor))
    found = fp8compile.calibrate(model, [x])
    part = compile_interpreted(model[2])  # a graph, and so a state, of its own
    served(part, torch.randn(16, 64))
    scales = {
        float(state.scale[INPUT])
        for state in states_of(model[2])
        if len(state.scale) == SLOTS_PER_SITE
    }
    assert scales == {float(E4M3_MAX / torch.tensor(found["2.weight.input"]))}


def trained(model: nn.Module, steps: int, x: Tensor) -> Callable[..., Any]:
    compiled = compile_interpreted(model.train())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        compiled(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return compiled


def test_training_goes_on_from_them() -> None:
    """As if the step before had been one with these batches; then its own amax count."""
    model, x = two_layers(), torch.randn(16, 32)
    fp8compile.calibrate(model, [2 * x], observer="percentile", percentile=90)
    history = fp8compile.state_dict(model)["0.weight.amax_history"]
    assert torch.equal(history[:-1], torch.zeros(15, 3))
    largest = 2 * x.abs().max()
    assert torch.equal(history[-1, INPUT], largest) and history[-1, GRAD_OUTPUT] == 0
    trained(model, 1, x)
    state = fp8compile.state_dict(model)
    assert len(states_of(model)) == 1
    assert torch.equal(state["0.weight.scale"][INPUT], E4M3_MAX / largest)
    assert state["0.weight.scale"][GRAD_OUTPUT] > 0
    trained(model, 15, x)
    scale = fp8compile.state_dict(model)["0.weight.scale"][INPUT]
    assert torch.equal(scale, E4M3_MAX / x.abs().max())
    assert fp8compile.events(model) == {}


def test_calibration_after_training_keeps_gradients_and_events() -> None:
    model, x = two_layers(), torch.randn(16, 32)
    trained(model, 3, x)
    trained(model, 1, 4 * x)  # saturates
    before, events = fp8compile.state_dict(model), fp8compile.events(model)
    assert events
    fp8compile.calibrate(model.eval(), [x])
    after = fp8compile.state_dict(model)
    for name in ("0.weight.scale", "0.weight.amax_history"):
        assert torch.equal(after[name][..., GRAD_OUTPUT], before[name][..., GRAD_OUTPUT])
    assert fp8compile.events(model) == events
    assert torch.equal(after["0.weight.scale"][INPUT], E4M3_MAX / x.abs().max())
    out = served(compile_interpreted(model), x)
    assert sqnr_db(model(x), out) > 25


def test_weights_that_were_written_to_are_measured_anew() -> None:
    """Else inference would let them find their own scales at every write, for good."""
    model, x = two_layers(), torch.randn(16, 32)
    fp8compile.calibrate(model, [x])
    with torch.no_grad():
        model[0].weight.mul_(3)
        model[2].weight.mul_(2)
    (state,) = states_of(model)
    assert state.weights_changed
    found = fp8compile.calibrate(model, [x], options={"skip": ["2"]})
    assert not state.weights_changed and list(found) == ["0.weight.input"]
    expected = E4M3_MAX / model[0].weight.detach().abs().max()
    assert torch.equal(state.scale[WEIGHT], expected)
    assert state.scale[SLOTS_PER_SITE + WEIGHT] == 0  # of a weight that nobody has looked at


def test_nothing_else_is_changed() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.Dropout(), nn.Linear(64, 32))
    x = torch.randn(16, 32)
    model(x).sum().backward()
    before = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    rng = torch.get_rng_state()
    fp8compile.calibrate(model, [x])
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    pairs = zip(gradients, model.parameters(), strict=True)
    assert all(torch.equal(gradient, p.grad) for gradient, p in pairs)
    assert model.training


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["current", "static", "rowwise", "blockwise", "mx"])
def test_a_recipe_without_scales_to_set(recipe: str) -> None:
    with pytest.raises(OptionError, match=r"choose one of delayed scaling: \['delayed', 'e4m3_on"):
        fp8compile.calibrate(two_layers(), [torch.randn(16, 32)], options={"recipe": recipe})


def test_a_delayed_recipe_of_ones_own() -> None:
    recipe = Recipe("short", Scaling.DELAYED, history_len=2)
    model, x = two_layers(), torch.randn(16, 32)
    found = fp8compile.calibrate(model, [x], options={"recipe": recipe})
    assert found["0.weight.input"] == float(x.abs().max())
    assert fp8compile.state_dict(model)["0.weight.amax_history"].shape == (2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": []}, "calibrate needs at least one batch"),
        (
            {"batches": torch.ones(16, 32)},
            r"of type Tensor; give a list .* such as \[x\]",
        ),
        ({"batches": {"input": torch.ones(16, 32)}}, "batches is of type dict"),
        ({"observer": "mean"}, r"observer='mean'; choose one of \['max', 'percentile', 'mse'\]"),
        ({"percentile": 0}, "percentile=0; give a share of all elements, such as 99.99"),
        ({"percentile": True}, "percentile=True; give a share of all elements"),
        ({"percentile": 101}, "percentile=101"),
        ({"percentile": "99"}, "percentile='99'"),
        ({"model": nn.ReLU()}, "no GEMM of this model can run in FP8 with a scale that is kept"),
        ({"model": torch.relu}, r"calibrate takes a model, an nn\.Module, and no "),
        ({"options": {"reciep": "delayed"}}, "unknown option 'reciep'"),
        ({"options": {"skip": ["*"]}}, "no GEMM of this model can run in FP8"),
    ],
)
@pytest.mark.filterwarnings("ignore:no GEMM of this graph runs in FP8")
def test_what_cannot_be_calibrated(arguments: dict[str, Any], message: str) -> None:
    given = {"model": two_layers(), "batches": [torch.randn(16, 32)], **arguments}
    with pytest.raises(OptionError, match=message):
        fp8compile.calibrate(**given)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("observer", OBSERVERS)
def test_what_is_not_finite_is_named_and_changes_nothing(observer: str, bad: float) -> None:
    model, x = two_layers(), torch.randn(16, 32)
    fp8compile.calibrate(model, [x])
    before = fp8compile.state_dict(model)
    batches = [2 * x, torch.full_like(x, bad), x]
    with pytest.raises(ScalingStateError, match=r"^0\.weight\.input is not finite in batch 1"):
        fp8compile.calibrate(model, batches, observer=observer)
    after = fp8compile.state_dict(model)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_an_input_of_zeros_keeps_its_scale() -> None:
    model, x = nn.Linear(32, 16), torch.randn(16, 32)
    assert fp8compile.calibrate(model, [0 * x]) == {}
    assert fp8compile.state_dict(model)["weight.scale"][INPUT] == 0
    fp8compile.calibrate(model, [x])
    fp8compile.calibrate(model, [0 * x], observer="mse")
    assert fp8compile.state_dict(model)["weight.scale"][INPUT] == E4M3_MAX / x.abs().max()


def test_mlp_with_merged_gemms_is_as_good_as_with_current_scales() -> None:
    model, x = MLP(), torch.randn(48, 64)
    exact = served(model, x)
    fp8compile.calibrate(model, [x])
    static, current = (
        sqnr_db(exact, served(compile_interpreted(model, {"recipe": recipe}), x))
        for recipe in ("delayed", "current")
    )
    assert static == pytest.approx(current, abs=0.5)
