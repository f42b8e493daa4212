"""What is compiled, and how it is called: parts of a model, losses, graph breaks, no_grad."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fp8compile
from fp8compile.states import states_of
from tests.habits.common import (
    EMULATED,
    GRAD_OUTPUT,
    HIDDEN,
    INPUT,
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
from tests.models import Llama, sqnr_db

pytestmark = pytest.mark.filterwarnings(EMULATED)


class Model(nn.Module):
    """Two blocks and a head that makes a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = mlp(), mlp()
        self.head = nn.Linear(WIDTH, 16)

    def features(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.features(x)), target)


# --- what is compiled ---------------------------------------------------------------------------

Loss = Callable[[Tensor, Tensor], Tensor]
_compiled = partial(compile_interpreted, options={"logits": "fp8"})  # the head, too


def whole_model(model: Model) -> Loss:
    return _compiled(model)


def a_function(model: Model) -> Loss:
    return _compiled(lambda x, target: model(x, target))


def a_method(model: Model) -> Loss:
    features = _compiled(model.features)
    return lambda x, target: F.cross_entropy(model.head(features(x)), target)


def blocks(model: Model) -> Loss:
    first, second = _compiled(model.first), _compiled(model.second)
    return lambda x, target: F.cross_entropy(model.head(second(torch.tanh(first(x)))), target)


def in_place(model: Model) -> Loss:
    """``model.second = torch.compile(model.second)``."""
    model.second = _compiled(model.second)  # type: ignore[assignment]
    return model


def the_loss(model: Model) -> Loss:
    """The head and the loss together, as chunked cross entropies are compiled."""
    loss = _compiled(lambda h, target: F.cross_entropy(model.head(h), target))
    return lambda x, target: loss(model.features(x), target)


def with_a_break(model: Model) -> Loss:
    def call(x: Tensor, target: Tensor) -> Tensor:
        h = model.features(x)
        torch._dynamo.graph_break()
        return F.cross_entropy(model.head(h), target)

    return _compiled(call)


PARTS: dict[str, tuple[Callable[[Model], Loss], set[str]]] = {
    "whole_model": (whole_model, {"first.0", "first.2", "second.0", "second.2", "head"}),
    "a_function": (a_function, {"first.0", "first.2", "second.0", "second.2", "head"}),
    "a_method": (a_method, {"first.0", "first.2", "second.0", "second.2"}),
    "blocks": (blocks, {"first.0", "first.2", "second.0", "second.2"}),
    "in_place": (in_place, {"second._orig_mod.0", "second._orig_mod.2"}),
    "the_loss": (the_loss, {"head"}),
    "with_a_break": (with_a_break, {"first.0", "first.2", "second.0", "second.2", "head"}),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_a_model(part: str) -> None:
    """Gradients are those of eager; the state is that of the parts, by their names in the model."""
    model, reference = twins(Model())
    compile_part, sites = PARTS[part]
    call, optimizer = compile_part(model), sgd(model, lr=0.0)
    for _ in range(3):
        x, target = batch(), torch.randint(0, 16, (16,))
        expected, loss = reference(x, target), call(x, target)
        torch.testing.assert_close(loss, expected, rtol=0.05, atol=0.0)
        assert not torch.equal(loss, expected)
        for m, value in ((reference, expected), (model, loss)):
            m.zero_grad()
            value.backward()
        found = {n.replace("_orig_mod.", ""): g for n, g in gradients(model).items()}
        for name, gradient in gradients(reference).items():
            assert sqnr_db(gradient, found[name]) >= 15, name
        optimizer.step()
    entries = fp8compile.state_dict(model)
    assert {key.rpartition(".weight")[0] for key in entries} == sites
    assert all((entries[f"{site}.weight.amax_history"][-3:] > 0).all() for site in sites)
    assert {state.updates for state in states_of(model)} == {3}


def test_the_same_numbers_whether_blocks_or_the_model_are_compiled() -> None:
    models = twins(nn.Sequential(mlp(), nn.Tanh(), mlp()))
    x = batch()
    whole, parts = models
    plain_loop(whole, [x, 2 * x])
    first, second = compile_interpreted(parts[0]), compile_interpreted(parts[2])
    plain_loop(parts, [x, 2 * x], call=lambda x: second(torch.tanh(first(x))))
    assert_same_training(*models)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_loop_around_inductors_code() -> None:
    """A graph break, accumulation and no_grad calls, with the code that users run."""
    model, reference = twins(Model())
    call = torch.compile(lambda x, target: model(x, target), backend="fp8")
    optimizers = [sgd(m, lr=0.05) for m in (model, reference)]
    for _ in range(4):
        for _ in range(2):
            x, target = batch(), torch.randint(0, 16, (16,))
            call(x, target).backward()
            reference(x, target).backward()
        with torch.no_grad():
            expected, loss = reference(x, target), call(x, target)
            torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert only_state(model).updates == 4


# --- gradients that do not come -----------------------------------------------------------------


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, HIDDEN)
        self.used = nn.Linear(HIDDEN, WIDTH)
        self.unused = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.body(x))
        return self.used(h), self.unused(10 * h)


def test_an_output_that_is_not_in_the_loss() -> None:
    """Its gradient is zero: no amax, no scale, and the rest is as if it were not there."""
    model, reference = twins(Heads())
    compiled = compile_interpreted(model)
    for _ in range(3):
        model.zero_grad()
        x = batch()
        loss_of(compiled(x)[0]).backward()
        fp8compile.update_scales(model)
    assert scale(model, "unused.weight")[GRAD_OUTPUT] == 0
    assert (scale(model, "unused.weight")[:GRAD_OUTPUT] > 0).all()
    assert (scale(model, "used.weight") > 0).all()
    loss_of(reference(x)[0]).backward()
    for name, gradient in gradients(reference).items():
        assert sqnr_db(gradient, gradients(model)[name]) >= 18, name
    # And once it is, its first gradient is as good as any.
    model.zero_grad()
    reference.zero_grad()
    loss_of(reference(x)[1]).backward()
    loss_of(compiled(x)[1]).backward()
    expected, found = reference.unused.weight.grad, model.unused.weight.grad
    assert sqnr_db(expected, found) >= 20


def test_a_detached_middle() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.decoder(torch.tanh(self.encoder(x)).detach())

    model, reference = twins(Detached())
    compiled, x = compile_interpreted(model), batch()
    for _ in range(2):
        model.zero_grad()
        loss_of(compiled(x)).backward()
        fp8compile.update_scales(model)
    loss_of(reference(x)).backward()
    assert gradients(model).keys() == {"decoder.weight", "decoder.bias"}
    for name, gradient in gradients(reference).items():
        assert sqnr_db(gradient, gradients(model)[name]) >= 20, name
    assert scale(model, "encoder.weight")[GRAD_OUTPUT] == 0
    assert (scale(model, "encoder.weight")[:GRAD_OUTPUT] > 0).all()


def test_no_grad_in_a_part() -> None:
    """A frozen encoder, run without gradients inside the model that is compiled."""

    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                h = torch.tanh(self.encoder(x))
            return self.decoder(h)

    model, reference = twins(Partly())
    x = batch()
    plain_loop(model, [x, x], sgd(model, lr=0.0))
    assert_near(reference(x), compile_interpreted(model)(x))
    assert only_state(model).updates == 2
    assert history(model, "decoder.weight", GRAD_OUTPUT)
    assert history(model, "encoder.weight", INPUT) == [float(x.abs().amax())] * 2


def test_a_branch_that_is_taken_now_and_then() -> None:
    """Layer drop: each path is a graph; what a layer has learned is known to all of them."""

    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, both: bool) -> Tensor:
            h = torch.tanh(self.first(x))
            return self.second(h) if both else h

    model, reference = twins(Dropping())
    compiled, x = compile_interpreted(model), batch()
    for both in (True, False, True, False):
        plain_loop(model, [x], sgd(model, lr=0.0), partial(compiled, both=both))
        assert_near(reference(x, both), compiled(x, both))
    assert (scale(model, "first.weight") > 0).all() and (scale(model, "second.weight") > 0).all()
    assert fp8compile.events(model) == {}


# --- other calls of the same model --------------------------------------------------------------


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_calls_without_gradients_between_the_steps_leave_no_trace(context: type) -> None:
    """A target network, an evaluation, a rollout."""
    models = twins(mlp())
    batches = [batch() for _ in range(3)]
    for model, asks in zip(models, (False, True), strict=True):
        compiled = compile_interpreted(model)
        for x in batches:
            if asks:
                with context():
                    assert_near(model(x), compiled(x), db=20)
            loss = loss_of(compiled(x))
            if asks:
                with context():
                    compiled(100 * x)
            loss.backward()
            sgd(model).step()
            model.zero_grad()
    assert_same_training(*models)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_rollout_before_the_training(context: type, mode: str) -> None:
    """Inference first, as in reinforcement learning: nothing is known yet, nothing is learned."""
    models = twins(mlp())
    x = batch()
    for model, asks in zip(models, (False, True), strict=True):
        compiled = compile_interpreted(model)
        if asks:
            model.train(mode == "train")
            with context():
                assert_near(model(x), compiled(x))
            if mode == "eval":  # and once with gradients, which leaves no trace either
                loss_of(compiled(100 * x)).backward()
            model.train()
            model.zero_grad()
        plain_loop(model, [x, x], call=compiled)
    assert_same_training(*models)


def test_a_teacher_in_eval_mode_in_the_students_graph() -> None:
    """Distillation in one function: the teacher comes first, and does not stop the student."""
    teacher, student = mlp().requires_grad_(False).eval(), mlp()
    compiled = compile_interpreted(lambda x: (teacher(x), student(x)))
    optimizer, x = sgd(student), batch()
    for step in range(1, 4):
        wanted, given = compiled(x)
        F.mse_loss(given, wanted).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert only_state(student).updates == step
    # They take the same input: the first of the sites, which is the teacher's, stands for both, but
    # not for the gradient, which comes from another output.
    known = [(scale(model, "0.weight") > 0).tolist() for model in (teacher, student)]
    assert known == [[True, True, False], [False, False, True]]
    assert (scale(student, "2.weight") > 0).all()


def test_training_and_evaluation_in_turns() -> None:
    models = twins(nn.Sequential(mlp(), nn.Dropout(0.0), mlp()))
    x = batch()
    for model, evaluates in zip(models, (False, True), strict=True):
        compiled = compile_interpreted(model)
        for _ in range(3):
            plain_loop(model, [x], call=compiled)
            if evaluates:
                model.eval()
                with torch.no_grad():
                    assert_near(model(x), compiled(x), db=20)
                compiled(3 * x)  # gradients are on, as in many an evaluation
                model.train()
    assert_same_training(*models)


# --- shapes -------------------------------------------------------------------------------------


def test_training_that_goes_on_in_eval_mode() -> None:
    """Nothing is observed there; but the scales of what has moved since would be wrong."""
    torch.manual_seed(0)
    model, x = mlp(), batch(64)
    call, optimizer = compile_interpreted(model), sgd(model, 0.1)
    plain_loop(model, [x] * 3, optimizer, call)
    with torch.no_grad():  # what an evaluation reads is still what training has seen
        model.eval()(x)
    assert (only_state(model).scale[:3] > 0).all()
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)  # as many steps would
        plain_loop(model, [x], optimizer, call)
        assert not only_state(model).scale.any()
        assert_near(model(x), call(x), 20.0)
    plain_loop(model.train(), [x], optimizer, call)
    assert only_state(model).scale[INPUT] > 0  # the weights have jumped


def test_a_saliency_map_in_eval_mode_leaves_no_trace() -> None:
    """Gradients alone are no training: scales are forgotten only if an optimizer steps then."""
    torch.manual_seed(0)
    model, other = twins(mlp())
    batches = [batch() for _ in range(4)]
    plain_loop(other, batches)
    call, optimizer = compile_interpreted(model), sgd(model)
    for x in batches:
        saliency = x.clone().requires_grad_()
        model.eval()
        call(saliency).sum().backward()
        model.zero_grad()
        plain_loop(model.train(), [x], optimizer, call)
    assert_same_training(model, other)


def test_batches_of_every_size() -> None:
    """As a data loader gives them: a last batch that is smaller, lengths that vary."""
    model, reference = twins(mlp())
    compiled = compile_interpreted(model)
    sizes = [(16, 12), (16, 12), (16, 7), (5, 12), (16, 30), (1, 12), (16, 12)]
    for rows, tokens in sizes:
        x = torch.randn(rows, tokens, WIDTH)
        x /= x.abs().amax()
        plain_loop(model, [x], sgd(model, lr=0.0), compiled)
        assert_near(reference(x), compiled(x))
    assert max(state.updates for state in states_of(model)) == len(sizes)
    assert history(model, "0.weight", INPUT) == [1.0] * len(sizes)
    assert len(states_of(model)) == 1


def test_varied_batches_and_lengths_compile_nothing_after_a_warm_up() -> None:
    model = Llama(layers=1, width=32, heads=4, kv_heads=2, hidden=64, vocab=64)
    compiled, optimizer = compile_interpreted(model), sgd(model)

    def train(sizes: Sequence[tuple[int, int]]) -> int:
        """One step of each size; how many graphs there are then."""
        for step, size in enumerate(sizes):
            ids = torch.randint(0, 64, size)
            out = compiled(ids)
            if step % 10 == 0:
                assert_near(model(ids), out, db=18)
            F.cross_entropy(out.flatten(0, 1), ids.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    torch._dynamo.utils.counters.clear()
    # The first size, any size, and a batch of one: Dynamo takes a size of one for a constant.
    warm = train([(4, 16), (6, 32), (1, 8)])
    numbers = random.Random(0)
    varied = [(numbers.randint(1, 8), numbers.randint(2, 64)) for _ in range(50)]
    assert train(varied) == warm <= 3
    assert only_state(model).updates == 53


def test_several_models_in_one_process() -> None:
    """Of one class, of another width, one under another recipe: each as if it were alone."""
    models = [mlp(), mlp(), mlp(bias=False)]
    alone = copy.deepcopy(models)
    recipes = ["delayed", "current", "delayed"]
    batches = [batch() for _ in range(3)]
    for model, recipe in zip(alone, recipes, strict=True):
        torch._dynamo.reset()
        plain_loop(model, batches, call=compile_interpreted(model, {"recipe": recipe}))
    torch._dynamo.reset()
    calls = [
        compile_interpreted(model, {"recipe": recipe})
        for model, recipe in zip(models, recipes, strict=True)
    ]
    for x in batches:
        for model, call in zip(models, calls, strict=True):
            plain_loop(model, [x], call=call)
    for model, reference in zip(models, alone, strict=True):
        assert_equal(model.state_dict(), reference.state_dict())
        assert_equal(fp8compile.state_dict(model), fp8compile.state_dict(reference))
    assert fp8compile.state_dict(models[1]) == {}


def test_one_model_compiled_under_two_recipes() -> None:
    """Only one of them has a state that may be stale."""
    model, x = nn.Linear(WIDTH, HIDDEN, bias=False), batch()
    delayed, current = (compile_interpreted(model, {"recipe": r}) for r in ("delayed", "current"))
    plain_loop(model, [x], sgd(model, lr=0.0), delayed)
    grown = 100 * x
    stale, right = delayed(grown), current(grown)
    assert_near(model(grown), right)
    assert sqnr_db(model(grown).detach(), stale.detach()) < 5
