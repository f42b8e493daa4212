"""The runner: order, counts, and errors that name the pass."""

from __future__ import annotations

import pytest
from torch import fx

from fp8compile import RECIPES, PassError
from fp8compile.passes import StateNodes, find_gemms, joint_passes, run_passes
from fp8compile.passes.pipeline import pass_name
from tests.passes.common import fprop, linear_joint


def test_the_order() -> None:
    joint = linear_joint()
    assert joint.state is not None
    passes = joint_passes(recipe=RECIPES["delayed"], sites=joint.sites, state=joint.state)
    assert [pass_name(run) for run in passes] == [
        "unbatch_gemms",
        "find_gemms",
        "choose_precision",
        "merge_gemms",
        "choose_formats",
        "insert_casts",
        "take_frozen_weights",
        "fold_scales",
        "share_casts",
        "drop_unused_outputs",
        "track_amax",
        "plan_saved",
        "keep_scales",
    ]
    static = joint_passes(
        recipe=RECIPES["static"], state=StateNodes(joint.state.scale), statistics_of={}
    )
    assert [pass_name(run) for run in static][-4:] == [
        "drop_unused_outputs",
        "derive_scales",
        "plan_saved",
        "keep_scales",
    ]
    seen: list[str] = []
    counts = run_passes(joint.gm, passes, after_each=lambda name, gm: seen.append(name))
    assert seen == list(counts)
    assert counts["find_gemms"] == counts["insert_casts"] == 3


def test_a_failing_pass_is_named() -> None:
    def broken_pass(gm: fx.GraphModule) -> int:
        raise KeyError("lost")

    with pytest.raises(PassError, match="broken_pass failed: KeyError: 'lost'"):
        run_passes(fprop(), [find_gemms, broken_pass])


def test_a_pass_that_breaks_the_graph_is_named() -> None:
    def breaks_the_order(gm: fx.GraphModule) -> int:
        mm = next(node for node in gm.graph.nodes if node.name == "mm")
        next(iter(gm.graph.nodes)).prepend(mm)
        return 1

    with pytest.raises(PassError, match="breaks_the_order failed: the graph does not lint"):
        run_passes(fprop(), [breaks_the_order])
