"""Collected graphs, and the pages of small models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

from torch import Tensor, nn

from fp8compile import viewer
from fp8compile.viewer.collect import Collector
from fp8compile.viewer.records import Record


class Up(nn.Module):
    """One linear layer below the root."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return -self.up(x)


def collected(model: Callable[..., Any], *inputs: Any, **kwargs: Any) -> list[Collector]:
    """What ``view`` would put into its page."""
    found: list[Collector] = []

    def keep(path: object, collectors: list[Collector], rows: object, **rest: object) -> object:
        found.extend(collectors)
        return path

    with mock.patch.object(viewer, "write_page", keep):
        viewer.view(model, *inputs, **kwargs)
    return found


def records_of(collector: Collector, snapshot: str) -> dict[str, Record]:
    """The records of one snapshot by their names."""
    found = next(s for s in collector.snapshots if s.name == snapshot)
    return {record.name: record for record in found.records}
