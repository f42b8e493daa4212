"""What ``explain``, ``view``, ``profile`` and the tests are told of a compile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from .cost import Device
from .ir import Site
from .report import Row


@dataclass(frozen=True)
class FinalGraphs:
    """What a Dynamo graph became, before kernels are put in.

    ``predict_for``: the device that costs are predicted for. ``backward``, and ``saved``, the
    outputs of ``forward`` that it keeps for it: of training. ``weights``: of inference, what casts
    weights, once, whose results are the last inputs of ``forward``; None if nothing does.
    """

    forward: fx.GraphModule
    sites: tuple[Site, ...]
    predict_for: Device | None
    backward: fx.GraphModule | None = None
    saved: Sequence[fx.Node] = ()
    weights: fx.GraphModule | None = None


class Observer:
    """Is told of the compile of one Dynamo graph, in the order of these methods.

    A subclass has those that it wants; here they do nothing. Costs are predicted for whoever
    observes. ``only_looks``: the final graphs get their regions, on any machine, but no kernels:
    for a compile whose code is never run.
    """

    only_looks = False

    def on_sites(self, sites: Sequence[Site]) -> None:
        """All sites, also those that have no GEMM in the graph."""

    def on_graph(self, name: str, gm: fx.GraphModule) -> None:
        """A graph: ``name`` is "joint", that of the pass it comes from, "forward" or "backward".

        It is changed after the call; the last two come after all other methods.
        """

    def on_rows(self, rows: Sequence[Row]) -> None:
        """What the passes decided about every GEMM, and the matmuls that belong to no site."""

    def on_final(self, final: FinalGraphs) -> None:
        """The forward and the backward that the joint graph became, or what inference runs."""
