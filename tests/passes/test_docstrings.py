"""The Before and After texts of the passes are true: they are lines of a real graph's text."""

from __future__ import annotations

import inspect
import re
from functools import partial

import pytest
import torch
from torch import Tensor, fx

from fp8compile import RECIPES
from fp8compile.cost import H200
from fp8compile.passes import (
    add_in_gemms,
    cast_attention,
    choose_precision,
    choose_scaling,
    find_gemms,
    grow_regions,
    split_regions,
    store_activations,
    take_attention_output,
    take_frozen_weights,
)
from fp8compile.passes.pipeline import JOINT_PASSES, Pass
from tests.helpers import Joint, trace_final, trace_joint
from tests.passes.common import (
    Linear,
    attended,
    before,
    fprop,
    frozen_fprop,
    linear_joint,
    lines_of,
    negated_linear,
    pair_joint,
    projected,
    query_joint,
    residual,
)

PASSES = [*JOINT_PASSES, add_in_gemms, grow_regions, split_regions]
SECTIONS = ("Before:", "After:", "Requires:", "Ensures:", "Leaves alone:", "Numerics:")


class Exponential(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).exp()


class Scaled(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.125


def scaled_joint() -> Joint:
    return trace_joint(Scaled(), torch.randn(16, 32, dtype=torch.bfloat16))


class LastToken(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, -1:])


def last_token_joint() -> Joint:
    model = LastToken().requires_grad_(False)
    joint = trace_joint(model, torch.randn(4, 8, 32, dtype=torch.bfloat16))
    names = {"arg0_1": "x", "arg1_1": "w"}
    for node in joint.gm.graph.find_nodes(op="placeholder"):
        node._rename(names.get(node.name, node.name))
    return joint


def exponential_joint() -> Joint:
    x = torch.randn(512, 32, dtype=torch.bfloat16, requires_grad=True)
    return trace_joint(Exponential(256), x)


def product_in_two() -> fx.GraphModule:
    """A product that is returned as it is and cast, by one region."""

    def fn(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        product = x * y
        q = torch.ops.fp8.quantize(product, None, 0, torch.float8_e4m3fn, True, False)
        return q[0], q[2], product

    x, y = (torch.randn(16, 32, dtype=torch.bfloat16) for _ in range(2))
    gm = trace_final(fn, x=x, y=y)
    grow_regions(gm)
    return gm


def example(name: str) -> tuple[fx.GraphModule, Pass]:
    if name == "choose_precision":
        gm = fprop()
        find_gemms(gm)
        return gm, partial(choose_precision, skips=lambda fqn: True)
    if name == "choose_scaling":
        gm, _ = before("insert_casts")
        return gm, partial(choose_scaling, recipe=RECIPES["delayed"], device=H200)
    if name == "take_frozen_weights":
        return frozen_fprop(), take_frozen_weights
    if name == "cast_attention":
        return attended(), cast_attention
    if name == "take_attention_output":
        return projected(), take_attention_output
    if name == "cast_attention_backward":
        asked = dict.fromkeys(("attention_in_fp8", "attention_backward_in_fp8"), True)
        return before(name, query_joint(), **asked)
    if name == "add_in_gemms":
        return residual(), partial(add_in_gemms, pays=lambda gemm: True)
    if name == "grow_regions":
        return negated_linear(), grow_regions
    if name == "split_regions":
        return product_in_two(), partial(split_regions, least_bytes=1)
    if name == "store_activations":
        gm, plan = before("plan_saved", exponential_joint())
        plan(gm)
        return gm, store_activations
    joints = {
        "unbatch_gemms": last_token_joint,
        "merge_gemms": pair_joint,
        "fold_scales": scaled_joint,
        "derive_scales": partial(linear_joint, recipe="static"),
        "keep_scales": partial(linear_joint, recipe="current"),
    }
    recipe = {"derive_scales": "static", "keep_scales": "current"}.get(name, "delayed")
    return before(name, joints[name]() if name in joints else None, recipe)


def section(doc: str, title: str) -> list[str]:
    """The lines under a title, up to the next title or blank line, without column padding."""
    lines = doc.split(f"{title}\n")[1].splitlines()
    ends = (i for i, line in enumerate(lines) if not line or line.strip() in SECTIONS)
    return [" ".join(line.split()) for line in lines[: next(ends)]]


def stands_in(line: str, text: str) -> bool:
    pattern = ".*".join(re.escape(part) for part in line.split("..."))
    return any(re.fullmatch(pattern, whole) for whole in text.splitlines())


@pytest.mark.parametrize("run", PASSES, ids=lambda run: run.__name__)
def test_before_and_after_are_lines_of_the_example_graph(run: Pass) -> None:
    doc = inspect.getdoc(run) or ""
    gm, bound = example(run.__name__)
    for title in ("Before:", "After:"):
        expected = section(doc, title)
        assert expected
        text = lines_of(gm)
        for line in expected:
            assert stands_in(line, text), f"{title} {line!r} is not in\n{text}"
        if title == "Before:":
            gone = [line for line in section(doc, "After:") if line not in expected]
            assert gone, "After must differ from Before"
            bound(gm)


@pytest.mark.parametrize("run", PASSES, ids=lambda run: run.__name__)
def test_every_section_is_there(run: Pass) -> None:
    doc = inspect.getdoc(run) or ""
    positions = [doc.index(section) for section in SECTIONS]
    assert positions == sorted(positions)
    assert re.search(r"Numerics: (exact|reorders|quantizes)", doc)
