"""Collect the graph before the passes, after each, and with its regions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from ..cost import COSTS
from ..ir import ATTENTION_SLOT, SLOT_NAMES, gemms
from ..observer import Observer
from ..report import Row
from .paths import Fold, folds
from .reader import Reader
from .records import Names, Record

FINAL = "fused regions"  # the snapshot of forward and backward, as they are compiled


@dataclass(frozen=True)
class Snapshot:
    """A graph at one moment: before the passes ("joint"), after one, or with its regions."""

    name: str
    records: tuple[Record, ...]
    folds: tuple[Fold, ...]


@dataclass
class Collector(Observer):
    """The snapshots of one compiled graph; ``sources``: the regions' Triton source by its key."""

    only_looks = True

    names: Names
    rows: list[Row] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._outputs: int | None = None
        self._forward: Reader | None = None

    def on_rows(self, rows: Sequence[Row]) -> None:
        self.rows += rows

    def on_graph(self, name: str, gm: fx.GraphModule) -> None:
        """Take a snapshot; forward and backward become one."""
        self._learn(gm)
        forward = self._forward if name == "backward" else None
        reader = Reader(gm, self.names, self.sources, outputs=self._outputs, forward=forward)
        reader.read()
        if name == "joint":
            self._outputs = reader.outputs
        elif name == "forward":
            self._forward = reader
        elif name == "backward":
            self.snapshots.pop()
        records = tuple(reader.finished())
        shown = FINAL if name in ("forward", "backward") else name
        self.snapshots.append(Snapshot(shown, records, tuple(folds(records))))

    def _learn(self, gm: fx.GraphModule) -> None:
        """Take over what this graph says about sites, and a later one no longer does."""
        self.names.costs.update(gm.meta.get(COSTS, {}))
        for _, info in gemms(gm):
            for site in info.sites:
                for offset, name in enumerate(SLOT_NAMES[ATTENTION_SLOT:]):
                    self.names.slots.setdefault(site.attention_slot + offset, f"{site.fqn}.{name}")
                for edge in (info.left, info.right):
                    slot = site.slot(edge.operand)
                    self.names.slots.setdefault(slot, f"{site.fqn}.{edge.operand}")
