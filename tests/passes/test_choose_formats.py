"""choose_formats: E4M3 for values and weights, E5M2 for gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fp8compile import RECIPES, Format, Operand, PassError, Recipe
from fp8compile.ir import edge_graph, gemms
from fp8compile.passes import choose_formats, choose_precision, find_gemms
from tests.passes.common import before, check_pass, fprop


def formats(gm: object) -> dict[str, str]:
    return {str(i.gemm): f"{i.left.format} x {i.right.format}" for _, i in gemms(gm)}  # type: ignore[arg-type]


def test_formats_by_operand_role() -> None:
    gm, run = before("choose_formats")
    assert check_pass(gm, run) == 3
    assert formats(gm) == {
        "fprop": "e4m3 x e4m3",
        "wgrad": "e5m2 x e4m3",
        "dgrad": "e5m2 x e4m3",
    }


def test_another_recipe() -> None:
    e4m3 = tuple((operand, Format.E4M3) for operand in Operand)
    gm, _ = before("choose_formats")
    choose_formats(gm, recipe=Recipe("e4m3 everywhere", formats=e4m3))
    assert set(formats(gm).values()) == {"e4m3 x e4m3"}


def test_leaves_gemms_in_high_precision_alone() -> None:
    gm = fprop()
    find_gemms(gm)
    choose_precision(gm, skips=lambda fqn: True)
    assert check_pass(gm, lambda g: choose_formats(g, recipe=RECIPES["delayed"])) == 0
    assert formats(gm) == {"fprop": "None x None"}


def test_e5m2_times_e5m2_is_refused() -> None:
    recipe = RECIPES["delayed"]
    illegal = object.__new__(Recipe)  # past the check that every Recipe makes of itself
    e5m2 = tuple((operand, Format.E5M2) for operand in Operand)
    illegal.__dict__.update(replace(recipe).__dict__, formats=e5m2)
    gm, _ = before("choose_formats")
    with pytest.raises(PassError, match="e5m2 with e5m2"):
        choose_formats(gm, recipe=illegal)


def test_the_edges_are_a_graph_from_values_to_gemms() -> None:
    gm, run = before("choose_formats")
    run(gm)
    edges = [
        (str(a), str(b), str(edge.operand), str(edge.format))
        for a, b, edge in edge_graph(gm).edges(data="edge")
    ]
    assert sorted(edges) == [
        ("tangents_1", "mm_1", "grad_output", "e5m2"),
        ("tangents_1", "mm_2", "grad_output", "e5m2"),
        ("w", "mm", "weight", "e4m3"),
        ("w", "mm_2", "weight", "e4m3"),
        ("x", "mm", "input", "e4m3"),
        ("x", "mm_1", "input", "e4m3"),
    ]
