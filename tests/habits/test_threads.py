"""Several threads: two that train, and two that ask one model."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fp8compile import RECIPES, states
from fp8compile.compiled_graph import CompiledGraph
from fp8compile.ir import Site
from tests.habits.common import (
    EMULATED,
    assert_same_training,
    batch,
    loss_of,
    mlp,
    only_state,
    plain_loop,
    sgd,
)
from tests.helpers import compile_interpreted

pytestmark = pytest.mark.filterwarnings(EMULATED)


@pytest.fixture(autouse=True)
def switch_often() -> Iterator[None]:
    """Threads take turns every few instructions, so that a race is lost here and not elsewhere."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_once(*calls: Callable[[], object]) -> None:
    """Run each in a thread of its own, all started together; raises what they raise."""
    barrier = threading.Barrier(len(calls))

    def wait_and_run(call: Callable[[], object]) -> object:
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        for future in [pool.submit(wait_and_run, call) for call in calls]:
            future.result()


def test_two_threads_train_two_models() -> None:
    """Each ends where it would have alone."""
    models = [mlp(), mlp()]
    alone = copy.deepcopy(models)
    batches = [batch() for _ in range(20)]
    for model in alone:
        plain_loop(model, batches)
    calls = [compile_interpreted(model) for model in models]
    for model, call in zip(models, calls, strict=True):  # Dynamo itself compiles one at a time
        plain_loop(model, batches[:1], call=call)
    at_once(
        *(
            partial(plain_loop, model, batches[1:], call=call)
            for model, call in zip(models, calls, strict=True)
        )
    )
    for model, reference in zip(models, alone, strict=True):
        assert_same_training(model, reference)


def test_threads_that_share_a_graph_get_the_scales_of_their_own_weights() -> None:
    """Modules of equal form share their compiled code, which looks for its state at each call."""
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    graph = CompiledGraph(
        lambda weight, scale, amax_fwd, amax_bwd: scale,
        [Site(0, "site", weight=0)],
        [RECIPES["delayed"]],
        torch.device("cpu"),
        weights[:1],
    )
    scales = [graph(weight) for weight in weights]
    assert scales[0] is not scales[1]

    def ask(index: int) -> None:
        assert all(graph(weights[index]) is scales[index] for _ in range(20_000))

    at_once(partial(ask, 0), partial(ask, 1))


def test_one_model_asked_by_two_threads() -> None:
    model, x = mlp(), batch()
    compiled = compile_interpreted(model)
    plain_loop(model, [x], call=compiled)
    with torch.no_grad():
        expected = compiled(x)

    def ask() -> None:
        with torch.no_grad():
            for _ in range(100):
                assert torch.equal(compiled(x), expected)

    at_once(ask, ask)
    assert only_state(model).updates == 1


def test_optimizer_steps_while_other_models_get_their_states() -> None:
    """The hook of every optimizer goes through all states while other threads add to them."""
    model = mlp()
    loss_of(compile_interpreted(model)(batch())).backward()
    optimizer = sgd(model, lr=0.0)
    recipe = RECIPES["delayed"]
    others: list[Tensor] = []

    def add_states() -> None:
        for _ in range(1000):
            others.append(nn.Parameter(torch.zeros(1)))
            states.find_state([others[-1]], [recipe], torch.device("cpu"))

    def step() -> None:
        for _ in range(1000):
            optimizer.step()

    at_once(add_states, step, step)
    assert len(others) == 1000
