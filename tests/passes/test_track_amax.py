"""track_amax: every value is recorded once."""

from __future__ import annotations

from expecttest import assert_expected_inline

from fp8compile import RECIPES
from fp8compile.ir import SLOTS_PER_SITE, TRACK_AMAX
from fp8compile.passes import joint_passes
from fp8compile.passes.pipeline import pass_name
from tests.passes.common import Pair, before, check_pass, linear_joint, lines_of, pair_joint


def test_forward_and_backward_write_to_tensors_of_their_own() -> None:
    gm, run = before("track_amax")
    assert check_pass(gm, run) == 3
    assert_expected_inline(
        lines_of(gm, "x_amax", "w_amax", "tangents_1_amax", "track_amax_fwd", "track_amax_bwd"),
        """\
x_amax : f32[1] = x_q[3]
w_amax : f32[1] = w_q[3]
tangents_1_amax : f32[1] = tangents_1_q[3]
track_amax_fwd : none = fp8.track_amax(amax_fwd, [x_amax, w_amax], [0, 1])
track_amax_bwd : none = fp8.track_amax(amax_bwd, [tangents_1_amax], [2])""",
    )


def test_sites_with_one_input_share_their_slots_merged_or_not() -> None:
    for width, casts in ((48, 3), (40, 5)):  # a width of 40 is not merged
        gm, run = before("track_amax", pair_joint(Pair(width=width)))
        assert check_pass(gm, run) == casts
        slots = [n.args[2] for n in gm.graph.nodes if n.target is TRACK_AMAX]
        assert [set(direction) for direction in slots] == [{0, 1}, {2}]


def test_gradients_of_several_outputs_have_slots_of_their_own() -> None:
    gm, run = before("track_amax", pair_joint(Pair(lambda a, b: (a.tanh(), b.sigmoid()))))
    assert check_pass(gm, run) == 5
    slots = [n.args[2] for n in gm.graph.nodes if n.target is TRACK_AMAX]
    assert [set(direction) for direction in slots] == [{0, 1}, {2, SLOTS_PER_SITE + 2}]


def test_both_must_stay_where_they_are() -> None:
    gm, run = before("track_amax")
    run(gm)
    tags = [n.meta["partitioner_tag"] for n in gm.graph.nodes if n.target is TRACK_AMAX]
    assert tags == ["must_be_in_forward", "must_be_in_backward"]


def test_inference_and_current_scaling_track_nothing() -> None:
    joint = linear_joint()
    inference = joint_passes(
        recipe=RECIPES["delayed"], sites=joint.sites, state=joint.state, training=False
    )
    current = joint_passes(recipe=RECIPES["current"], sites=joint.sites)
    for passes in (inference, current):
        assert "track_amax" not in [pass_name(run) for run in passes]
