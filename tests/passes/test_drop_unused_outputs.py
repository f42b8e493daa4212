"""drop_unused_outputs: only the copies that are read are written."""

from __future__ import annotations

from expecttest import assert_expected_inline

from tests.passes.common import before, check_pass, lines_of


def test_a_weight_writes_one_copy_in_each_direction() -> None:
    gm, run = before("drop_unused_outputs")
    assert check_pass(gm, run) == 2
    assert_expected_inline(
        lines_of(gm, "x_q", "w_q", "w_q_1"),
        """\
x_q : (e4m3[16, 32], e4m3[32, 16], f32[1], f32[1], f32[1]) = fp8.quantize(x, scale, 0, e4m3)
w_q : (e4m3[64, 32], e4m3[0], f32[1], f32[1], f32[1]) = fp8.quantize(w, scale, 1, e4m3, True, False)
w_q_1 : (e4m3[0], e4m3[32, 64], f32[1], f32[1], f32[1]) = fp8.quantize(w, scale, 1, e4m3, False, True)""",  # noqa: E501
    )


def test_a_copy_that_is_dropped_later_is_dropped_again() -> None:
    gm, run = before("drop_unused_outputs")
    run(gm)
    item = next(node for node in gm.graph.nodes if node.name == "x_fp8_t")
    item.replace_all_uses_with(next(node for node in gm.graph.nodes if node.name == "x_fp8"))
    gm.graph.erase_node(item)
    assert run(gm) == 1
    assert lines_of(gm, "x_q").endswith("fp8.quantize(x, scale, 0, e4m3, True, False)")
