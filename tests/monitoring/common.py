"""Small models, and how these tests train them."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fp8compile import Record

ROLES = ("input", "weight", "grad_output")


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01)


def train(call: Callable[..., Tensor], optimizer: Any, steps: int) -> None:
    """Steps on one batch, so that nothing outgrows its scale."""
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        call(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def edges(records: list[Record], step: int) -> set[tuple[str, str]]:
    return {(r.site, r.operand) for r in records if r.step == step}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def squares(call: Callable[..., Tensor], x: Tensor) -> Tensor:
    return call(x).square().mean()
