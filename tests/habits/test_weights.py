"""Weights that are loaded, replaced, cast, copied, shared or computed between two steps."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fp8compile
from fp8compile import ScalingStateError
from fp8compile.states import states_of
from tests.habits.common import (
    EMULATED,
    HIDDEN,
    INPUT,
    WEIGHT,
    WIDTH,
    assert_equal,
    assert_near,
    assert_same_training,
    batch,
    gradients,
    history,
    loss_of,
    mlp,
    only_state,
    plain_loop,
    scale,
    sgd,
    twins,
)
from tests.helpers import compile_interpreted
from tests.models import sqnr_db

pytestmark = pytest.mark.filterwarnings(EMULATED)


# --- loading weights ----------------------------------------------------------------------------


def test_parameters_are_swapped_on_conversion() -> None:
    """PyTorch refuses to while anything refers weakly to one."""
    model, fresh, x = mlp(), mlp(), batch()
    compiled = torch.compile(model, backend="fp8", options={"recipe": "current"})
    plain_loop(model, [x], call=compiled)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.load_state_dict(fresh.state_dict())
        model.to(torch.bfloat16)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert model[0].weight.dtype is torch.bfloat16
    assert_near(fresh(x), compiled(x.bfloat16()).float())


def times(model: nn.Module, factor: float) -> dict[str, Tensor]:
    return {name: factor * value for name, value in model.state_dict().items()}


@pytest.mark.parametrize("factor", [1e-6, 2.0, 100.0])
def test_weights_loaded_in_place_are_evaluated_with_a_scale_of_their_own(factor: float) -> None:
    """The one of training would clip them at every call, and nothing would say so."""
    model, x = nn.Linear(WIDTH, HIDDEN), batch()
    compiled = compile_interpreted(model)
    plain_loop(model, [x] * 2, call=compiled)
    before = fp8compile.state_dict(model)
    model.load_state_dict(times(model, factor))
    for _ in range(2):
        with torch.no_grad():
            assert sqnr_db(model(x), compiled(x)) >= 25
    assert_equal(fp8compile.state_dict(model), before)


def test_loaded_in_place_weights_keep_their_state() -> None:
    model, x = mlp(), batch()
    compiled = compile_interpreted(model)
    plain_loop(model, [x], call=compiled)
    before = fp8compile.state_dict(model)
    model.load_state_dict(times(model, 1.0))
    assert_equal(fp8compile.state_dict(model), before)
    plain_loop(model, [x], call=compiled)
    assert only_state(model).updates == 2


def test_much_larger_weights_saturate_for_one_step() -> None:
    """The delayed scale is that of the old weights: finite, counted, and right one step later."""
    model, x = nn.Linear(WIDTH, HIDDEN, bias=False), batch()
    compiled = compile_interpreted(model)
    plain_loop(model, [x] * 3, sgd(model, lr=0.0), compiled)
    model.load_state_dict(times(model, 100.0))
    expected, out = model(x), compiled(x)
    assert out.isfinite().all() and sqnr_db(expected.detach(), out.detach()) < 5
    loss_of(out).backward()
    fp8compile.update_scales(model)
    assert fp8compile.events(model)["weight.weight"] == (0, 1, 1)
    assert_near(expected, compiled(x))


def test_assigned_weights_start_with_a_state_of_their_own() -> None:
    """``assign=True`` puts other parameters in place of those that the state belongs to."""
    model, x = nn.Linear(WIDTH, HIDDEN, bias=False), batch()
    compiled = compile_interpreted(model)
    plain_loop(model, [x] * 3, sgd(model, lr=0.0), compiled)
    model.load_state_dict(times(model, 100.0), assign=True)
    assert fp8compile.state_dict(model) == {}
    assert_near(model(x), compiled(x))
    plain_loop(model, [x], call=compiled)
    assert only_state(model).updates == 1
    assert scale(model, "weight")[WEIGHT] > 0


@pytest.mark.parametrize("assign", [False, True])
def test_the_scaling_state_can_be_loaded_with_the_weights(assign: bool) -> None:
    model, x = mlp(), batch()
    compiled = compile_interpreted(model)
    plain_loop(model, [x] * 2, call=compiled)
    saved = copy.deepcopy(model.state_dict()), fp8compile.state_dict(model)
    plain_loop(model, [50 * x] * 3, call=compiled)
    # A copy: load_state_dict(assign=True) notes in the dict itself that it is to be assigned.
    model.load_state_dict(copy.deepcopy(saved[0]), assign=assign)
    fp8compile.load_state_dict(model, saved[1])
    assert_equal(fp8compile.state_dict(model), saved[1])
    reference = mlp()
    reference.load_state_dict(saved[0])
    fp8compile.load_state_dict(reference, saved[1])
    for m, call in ((model, compiled), (reference, compile_interpreted(reference))):
        m.requires_grad_(True)
        plain_loop(m, [x] * 2, call=call)
    assert_equal(model.state_dict(), reference.state_dict())
    assert_equal(fp8compile.state_dict(model), fp8compile.state_dict(reference))


def test_a_parameter_that_is_replaced() -> None:
    """A new head for a new task: the graph's other sites go on with what they know."""
    model, x = mlp(), batch()
    compiled = compile_interpreted(model)
    plain_loop(model, [x] * 2, call=compiled)
    model[2].weight = nn.Parameter(100 * model[2].weight.detach())
    assert set(fp8compile.state_dict(model)) == {"0.weight.scale", "0.weight.amax_history"}
    before = scale(model, "0.weight")
    assert_near(model(x), compiled(x))
    assert torch.equal(scale(model, "0.weight"), before)
    assert scale(model, "2.weight")[WEIGHT] == 0  # not known yet
    assert len(states_of(model)) == 2  # the old one ends with its last weight


# --- a whole run, interrupted -------------------------------------------------------------------


def new_run(dynamic: bool | None) -> tuple[nn.Module, Any, torch.optim.Optimizer]:
    torch._dynamo.reset()
    model = mlp()
    compiled = compile_interpreted(model, dynamic=dynamic)
    return model, compiled, torch.optim.AdamW(model.parameters(), lr=1e-2)


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("at", ["start", "warm"])
def test_a_resumed_run_is_the_uninterrupted_one(dynamic: bool | None, at: str) -> None:
    """Weights, optimizer and scales from a file; into a new model, or one that has run before."""
    sizes = [16, 32, 48, 16, 80, 16, 32, 48] if dynamic else [16] * 8
    batches = [batch(size) * (1 + step % 3) for step, size in enumerate(sizes)]
    model, compiled, optimizer = new_run(dynamic)
    plain_loop(model, batches[:4], optimizer, compiled)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), fp8compile.state_dict(model)], file)
    expected = plain_loop(model, batches[4:], optimizer, compiled)

    file.seek(0)
    weights, steps, scales = torch.load(file, weights_only=True)
    resumed, compiled, optimizer = new_run(dynamic)
    if at == "warm":
        plain_loop(resumed, batches[:2], optimizer, compiled)
    resumed.load_state_dict(weights)
    optimizer.load_state_dict(steps)
    fp8compile.load_state_dict(resumed, scales)
    assert plain_loop(resumed, batches[4:], optimizer, compiled) == expected
    assert_equal(resumed.state_dict(), model.state_dict())
    assert_equal(fp8compile.state_dict(resumed), fp8compile.state_dict(model))


def test_a_teacher_and_a_student_in_one_graph_are_saved_together() -> None:
    """They share the scale of their input: the state of the student alone is not enough."""

    def new_pair() -> tuple[nn.ModuleList, Callable[..., Any]]:
        torch._dynamo.reset()
        pair = nn.ModuleList([mlp().requires_grad_(False).eval(), mlp()])
        return pair, compile_interpreted(lambda x: pair[1](x) - pair[0](x))

    (pair, call), x = new_pair(), batch()
    plain_loop(pair[1], [x] * 3, call=call)
    saved = copy.deepcopy(pair.state_dict()), fp8compile.state_dict(pair)
    expected = plain_loop(pair[1], [x] * 2, call=call)
    again, call = new_pair()
    again.load_state_dict(saved[0])
    fp8compile.load_state_dict(again, saved[1])
    assert plain_loop(again[1], [x] * 2, call=call) == expected

    alone, call = new_pair()
    of_student = {k.removeprefix("1."): v for k, v in saved[1].items() if k.startswith("1.")}
    fp8compile.load_state_dict(alone[1], of_student)
    with pytest.raises(ScalingStateError, match="all of the graph's modules"):
        call(x)


# --- copies -------------------------------------------------------------------------------------


def test_an_average_of_the_weights() -> None:
    """``AveragedModel`` is a deep copy that nobody trains: each call finds its own scales."""
    model, x = mlp(), batch()
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    compiled, ask = compile_interpreted(model), compile_interpreted(averaged)
    for step in range(3):
        plain_loop(model, [(step + 1) * x], call=compiled)
        averaged.update_parameters(model)
        with torch.no_grad():
            assert_near(averaged(x), ask(x))
    assert fp8compile.events(averaged) == {} and only_state(model).updates == 3
    assert all(state.updates == 0 for state in states_of(averaged))


def test_averaging_does_not_change_the_training() -> None:
    models = twins(mlp())
    x = batch()
    for model, averages in zip(models, (False, True), strict=True):
        averaged = torch.optim.swa_utils.AveragedModel(model)
        compiled, ask = compile_interpreted(model), compile_interpreted(averaged)
        for _ in range(3):
            plain_loop(model, [x], call=compiled)
            if averages:
                averaged.update_parameters(model)
                ask(x)
    assert_same_training(*models)


def test_weights_swapped_for_an_evaluation_and_back() -> None:
    """The weights of an average are evaluated in the model's own parameters."""
    models = twins(mlp())
    x = batch()
    for model, swaps in zip(models, (False, True), strict=True):
        compiled = compile_interpreted(model)
        plain_loop(model, [x], call=compiled)
        if swaps:
            kept = copy.deepcopy(model.state_dict())
            model.load_state_dict(times(model, 0.9))
            model.eval()
            with torch.no_grad():
                assert_near(model(x), compiled(x), db=24)
            model.train()
            model.load_state_dict(kept)
        plain_loop(model, [x], call=compiled)
    assert_same_training(*models)


def test_a_model_that_was_pickled_is_a_new_model() -> None:
    model, x = mlp(), batch()
    compiled = compile_interpreted(model)
    plain_loop(model, [x], call=compiled)
    again = pickle.loads(pickle.dumps(model))
    assert fp8compile.state_dict(again) == {}
    fp8compile.load_state_dict(again, fp8compile.state_dict(model))
    losses = [plain_loop(m, [x] * 2, call=compile_interpreted(m)) for m in (model, again)]
    assert losses[0] == losses[1]
    assert_equal(fp8compile.state_dict(model), fp8compile.state_dict(again))


def test_a_compiled_model_is_deep_copied_as_without_fp8() -> None:
    model, x = mlp(), batch()
    compiled = torch.compile(model, backend="fp8")
    twin = copy.deepcopy(compiled)
    assert twin._orig_mod is not model
    assert_equal(twin.state_dict(), compiled.state_dict())
    assert torch.equal(twin(x), compiled(x))


# --- dtypes -------------------------------------------------------------------------------------


def test_to_another_dtype_after_the_first_step() -> None:
    """``model.to`` keeps the parameters and changes what is in them: the history goes on."""
    model, x = mlp(), batch()
    compiled = compile_interpreted(model)
    plain_loop(model, [x], call=compiled)
    model.to(torch.bfloat16)
    plain_loop(model, [2 * x.bfloat16()], call=compiled)
    assert only_state(model).updates == 2
    largest = float(x.bfloat16().abs().amax())
    assert history(model, "0.weight", INPUT)[1:] == [2 * largest]
    with torch.no_grad():
        expected, out = model(x.bfloat16()), compiled(x.bfloat16())
    assert out.dtype is torch.bfloat16
    assert_near(expected, out)


# --- weights that are computed ------------------------------------------------------------------


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).t()


PARAMETRIZED: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": lambda layer: parametrizations.orthogonal(layer, orthogonal_map="cayley"),
    "own": lambda layer: parametrize.register_parametrization(layer, "weight", Symmetric()),
}


@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_parametrized_weights(kind: str) -> None:
    """The weight is computed in the graph; the state has no parameter to be found by."""
    model = PARAMETRIZED[kind](nn.Linear(WIDTH, WIDTH)).eval()
    reference, x, direction = copy.deepcopy(model), batch(), batch()
    if kind != "spectral_norm":  # its buffers change in training
        model.train()
    compiled, optimizer = compile_interpreted(model), sgd(model)
    for _ in range(3):
        model.zero_grad()
        reference.zero_grad()
        reference.load_state_dict(model.state_dict())
        expected, out = reference(x), compiled(x)
        assert_near(expected, out, db=24)
        for y in (expected, out):
            (y * direction).mean().backward()
        for name, gradient in gradients(reference).items():
            assert sqnr_db(gradient, gradients(model)[name]) >= 18, name
        optimizer.step()


def test_a_parametrized_weight_has_delayed_scales_too() -> None:
    model, x = parametrizations.weight_norm(nn.Linear(WIDTH, HIDDEN, bias=False)), batch()
    compiled = compile_interpreted(model)
    plain_loop(model, [x] * 2, sgd(model, lr=0.0), compiled)
    grown = compiled(100 * x)
    assert sqnr_db(100 * model(x).detach(), grown.detach()) < 5


def test_update_scales_reaches_the_state_of_computed_weights() -> None:
    """A loop without an optimizer, and a graph none of whose weights is a parameter."""
    model, other = (parametrizations.weight_norm(nn.Linear(WIDTH, HIDDEN)) for _ in range(2))
    x = batch()
    calls = [compile_interpreted(m) for m in (model, other)]
    for call in calls:
        loss_of(call(x)).backward()
    fp8compile.update_scales(other)  # not this one's
    assert_near(model(100 * x), calls[0](100 * x))  # it has no scale yet
    fp8compile.update_scales(model)
    model.zero_grad()
    assert sqnr_db(model(1e4 * x).detach(), calls[0](1e4 * x).detach()) < 5


def test_a_weight_under_a_cast_is_the_parameter_itself() -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(HIDDEN, WIDTH) / 8)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x.bfloat16(), self.weight.to(torch.bfloat16))

    model = Cast()
    compiled = compile_interpreted(model)
    loss_of(compiled(batch()).float()).backward()
    fp8compile.update_scales(model)
    assert (scale(model, "weight") > 0).all()


# --- calls with weights that are given ----------------------------------------------------------


def test_functional_call_with_the_modules_own_parameters() -> None:
    called, plain = models = twins(mlp())
    x = batch()
    plain_loop(plain, [x] * 3)

    def functional(x: Tensor) -> Tensor:
        return torch.func.functional_call(called, dict(called.named_parameters()), (x,))

    plain_loop(called, [x] * 3, call=compile_interpreted(functional))
    assert_same_training(*models)


def test_functional_call_with_other_weights() -> None:
    """Meta-learning and evolution strategies: the weights are no parameters."""
    model, x = mlp(), batch()
    weights = {n: (3 * p).detach().requires_grad_() for n, p in model.named_parameters()}

    def functional(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (x,))

    compiled = compile_interpreted(functional)
    expected = functional(weights, x)
    out = compiled(weights, x)
    assert_near(expected, out, db=24)
    references = torch.autograd.grad(loss_of(expected), list(weights.values()))
    for reference, found in zip(
        references, torch.autograd.grad(loss_of(out), list(weights.values())), strict=True
    ):
        assert sqnr_db(reference, found) >= 18


@pytest.mark.parametrize("transform", ["grad", "vmap", "grad_and_value", "vjp"])
def test_torch_func_inside_what_is_compiled(transform: str) -> None:
    model, x = mlp(bias=False), batch()
    weights = dict(model.named_parameters())

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return loss_of(torch.func.functional_call(model, weights, (x,)))

    functions: dict[str, Callable[[Tensor], Any]] = {
        "grad": lambda x: torch.func.grad(loss, argnums=1)(weights, x),
        "grad_and_value": lambda x: torch.func.grad_and_value(loss, argnums=1)(weights, x)[0],
        "vmap": lambda x: torch.vmap(model)(x.view(4, 4, WIDTH)),
        "vjp": lambda x: torch.func.vjp(model, x)[1](x)[0],
    }
    function = functions[transform]
    expected = function(x)
    with torch.no_grad():
        out = compile_interpreted(function)(x)
    assert_near(expected, out, db=18)
