"""keep_logits: which matmuls make the logits of a loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fp8compile
from fp8compile.passes import keep_logits, tag_sites
from fp8compile.passes.keep_logits import LOGITS
from tests.helpers import compile_interpreted

pytestmark = pytest.mark.filterwarnings("ignore:FP8 is emulated here")


class Classifier(nn.Module):
    """Two linear layers, and what is done with the second one's output and the targets."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.body = nn.Linear(32, 64)
        self.head = nn.Linear(64, 48)
        self.temperature = nn.Parameter(torch.ones(48))
        self.loss = loss

    def forward(self, x: Tensor, targets: Tensor) -> Any:
        return self.loss(self.head(self.body(x).relu()), targets)


def kept(model: nn.Module, *inputs: Any) -> list[str]:
    """The sites that the pass keeps, by name; its return value must be their number."""
    torch._dynamo.reset()
    found: list[str] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        tag_sites(gm)
        count = keep_logits(gm)
        names = [site.fqn for site in gm.meta["fp8_sites"] if site.reason == LOGITS]
        assert count == len(names)
        found.extend(names)
        return gm.forward

    torch.compile(model, backend=backend)(*inputs)
    return [name.removeprefix("l_self_modules_").split("_parameters")[0] for name in found]


def softcapped(logits: Tensor, targets: Tensor) -> Tensor:
    """As in Gemma 2, and the shift of a language model."""
    logits = 30 * torch.tanh(logits.float() / 30)
    return F.cross_entropy(logits.unsqueeze(0)[:, :-1].flatten(0, 1), targets[1:])


LOSSES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "cross_entropy": F.cross_entropy,
    "module": lambda logits, targets: nn.CrossEntropyLoss()(logits, targets),
    "keyword": lambda logits, targets: F.cross_entropy(input=logits, target=targets),
    "log_softmax": lambda logits, targets: F.nll_loss(F.log_softmax(logits, -1), targets),
    "method": lambda logits, targets: F.nll_loss(logits.log_softmax(-1), targets),
    "torch": lambda logits, targets: F.nll_loss(torch.log_softmax(logits, -1), targets),
    "binary": lambda logits, targets: F.binary_cross_entropy_with_logits(logits[:, 0], targets / 9),
    "softcapped": softcapped,
    "masked": lambda logits, targets: F.cross_entropy(
        logits.masked_fill(logits > 9, -9.0), targets
    ),
}


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(16, 32), torch.arange(16) % 4


@pytest.mark.parametrize("loss", LOSSES)
def test_keeps_the_head(loss: str, inputs: tuple[Tensor, Tensor]) -> None:
    assert kept(Classifier(LOSSES[loss]), *inputs) == ["head"]


NOT_LOGITS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "returned": lambda y, targets: y,
    "regression": lambda y, targets: F.mse_loss(y[:, 0], targets.float()),
    "softmax": lambda y, targets: y.softmax(-1) * 2,  # a router's, or attention's
    "sum_of_two": lambda y, targets: F.cross_entropy(y + y.sin(), targets),
}


@pytest.mark.parametrize("what", NOT_LOGITS)
def test_leaves_alone_what_is_not_the_logits_of_a_loss(
    what: str, inputs: tuple[Tensor, Tensor]
) -> None:
    assert kept(Classifier(NOT_LOGITS[what]), *inputs) == []


def test_looks_into_checkpointed_regions(inputs: tuple[Tensor, Tensor]) -> None:
    class Checkpointed(Classifier):
        def forward(self, x: Tensor, targets: Tensor) -> Any:
            def loss(hidden: Tensor) -> Tensor:
                return F.cross_entropy(self.head(hidden), targets)

            return checkpoint(loss, self.body(x).relu(), use_reentrant=False)

    assert kept(Checkpointed(F.cross_entropy), *inputs) == ["head"]


def test_looks_through_what_is_done_with_parameters(inputs: tuple[Tensor, Tensor]) -> None:
    class Scaled(Classifier):
        def forward(self, x: Tensor, targets: Tensor) -> Any:
            return F.cross_entropy(self.head(self.body(x)) * self.temperature, targets)

    assert kept(Scaled(F.cross_entropy), *inputs) == ["head"]


def test_keeps_another_reason(inputs: tuple[Tensor, Tensor]) -> None:
    class Contrastive(Classifier):
        def forward(self, x: Tensor, targets: Tensor) -> Any:
            y = self.head(self.body(x))
            return F.cross_entropy(y.sin() @ y.cos().t(), targets)

    assert kept(Contrastive(F.cross_entropy), *inputs) == []


@pytest.mark.parametrize("logits, in_fp8", [("high_precision", 3), ("fp8", 6)])
def test_is_an_option(logits: str, in_fp8: int, inputs: tuple[Tensor, Tensor]) -> None:
    model, x = Classifier(F.cross_entropy), inputs[0].requires_grad_()
    explanation = fp8compile.explain(model, x, inputs[1], options={"logits": logits})
    rows = [row for row in explanation.rows if row.is_fp8]
    assert len(rows) == in_fp8
    assert {row.fqn for row in rows} == {"body"} | ({"head"} if logits == "fp8" else set())
    assert {row.reason for row in explanation.rows if row.fqn == "head"} == (
        {""} if logits == "fp8" else {LOGITS}
    )


def test_kept_logits_are_exact_and_no_violation_of_strict(inputs: tuple[Tensor, Tensor]) -> None:
    model = Classifier(lambda logits, targets: logits.log_softmax(-1))
    x = torch.zeros(16, 32)  # so that the body's result is its bias, in FP8 too
    compiled = compile_interpreted(model, {"strict": True})
    torch.testing.assert_close(compiled(x, inputs[1]), model(x, inputs[1]))


def test_a_graph_of_nothing_but_logits_is_as_it_should_be(inputs: tuple[Tensor, Tensor]) -> None:
    """Such as a head and its loss behind a graph break: no warning, no violation of strict."""
    head, x = nn.Linear(32, 48), inputs[0]
    torch._dynamo.reset()
    loss = compile_interpreted(lambda x, t: F.cross_entropy(head(x), t), {"strict": True})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "FP8 is emulated here")
        torch.testing.assert_close(loss(x, inputs[1]), F.cross_entropy(head(x), inputs[1]))
