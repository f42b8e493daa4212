"""Passes of the user's, plugged into the pipeline."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import fp8compile
from fp8compile import Format, OptionError, PassError
from fp8compile.ir import QUANTIZE, emit, gemms, quantize_output
from fp8compile.options import parse_options
from fp8compile.passes import joint_passes
from fp8compile.passes.pipeline import JOINT_PASSES, pass_name
from tests.helpers import compile_interpreted


@pytest.fixture(autouse=True)
def compile_anew() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))


def no_fp8(gm: fx.GraphModule) -> int:
    for node, info in list(gemms(gm)):
        node.meta["fp8"] = replace(info, reason="not today")
    return 1


def test_it_runs_after_the_pass_that_is_named() -> None:
    order: list[str] = []

    def noting(gm: fx.GraphModule) -> int:
        order.append(str({info.left.format for _, info in gemms(gm)}))
        return 0

    for after in ("merge_gemms", "choose_formats"):
        fp8compile.explain(mlp(), torch.randn(32, 64), options={"own_passes": {after: noting}})
    assert order[0] == "{None}" and "E4M3" in order[1] and len(order) == 2


def test_what_it_decides_is_what_is_compiled() -> None:
    model, x = mlp(), torch.randn(32, 64)
    options = {"own_passes": {"choose_precision": no_fp8}}
    explained = fp8compile.explain(model, x, options=options)
    assert {row.reason for row in explained.rows} == {"not today"}
    with pytest.warns(UserWarning, match="not today"):
        compiled = compile_interpreted(model, options)
        torch.testing.assert_close(compiled(x), model(x))


def test_settings_may_be_bound_or_kept_by_an_object() -> None:
    """By ``partial``, as the passes of the pipeline have theirs."""

    def keep(gm: fx.GraphModule, *, reason: str) -> int:
        node, info = next(gemms(gm))
        node.meta["fp8"] = replace(info, reason=reason)
        return 1

    class Keep:
        def __call__(self, gm: fx.GraphModule) -> int:
            return keep(gm, reason="not today")

    class Broken:
        def __call__(self, gm: fx.GraphModule) -> int:
            raise KeyError("no such site")

    model, x = mlp(), torch.randn(32, 64)
    for run in (partial(keep, reason="not today"), Keep()):
        explained = fp8compile.explain(model, x, options={"own_passes": {"choose_precision": run}})
        assert {row.reason for row in explained.rows} == {"not today", ""}
    with pytest.raises(PassError, match=r"pass Broken failed.*no such site"):
        fp8compile.explain(model, x, options={"own_passes": {"choose_precision": Broken()}})


def test_what_goes_wrong_names_it() -> None:
    def broken(gm: fx.GraphModule) -> int:
        return 1 // 0

    def careless(gm: fx.GraphModule) -> int:
        """An fp8 tensor without its scale means nothing."""
        cast = gm.graph.find_nodes(op="call_function", target=QUANTIZE)[0]
        copy = quantize_output(cast, "fp8")
        assert copy is not None
        with gm.graph.inserting_after(copy):
            emit(gm.graph, torch.ops.aten.clone.default, (copy,), "copy_of_it")
        return 1

    def too_late(gm: fx.GraphModule) -> int:
        """It would be FP8 all the same."""
        return no_fp8(gm)

    def without_value(gm: fx.GraphModule) -> int:
        """As passes of torch.fx add nodes."""
        gemm, _ = next(gemms(gm))
        with gm.graph.inserting_after(gemm):
            twice = gm.graph.call_function(torch.ops.aten.mul.Tensor, (gemm, 2.0))
        gemm.replace_all_uses_with(twice, delete_user_cb=lambda user: user is not twice)
        return 1

    cases = (
        ("find_gemms", broken, "broken.*ZeroDivisionError"),
        ("insert_casts", careless, "careless.*takes the fp8 tensor"),
        ("insert_casts", too_late, "too_late.*not today.*before insert_casts"),
        ("find_gemms", without_value, r"without_value.*no meta\['val'\].*ir.emit"),
        ("plan_saved", without_value, r"without_value.*no meta\['val'\].*ir.emit"),
    )
    for after, run, message in cases:
        torch._dynamo.reset()
        call = compile_interpreted(mlp(), {"own_passes": {after: run}})
        with pytest.raises(Exception, match=f"(?s)PassError: .*{message}"):
            call(torch.randn(32, 64))


def test_a_format_that_no_scale_is_kept_for_is_refused() -> None:
    """A delayed scale leaves room for the largest value of the recipe's format."""

    def narrowed(gm: fx.GraphModule) -> int:
        for node, info in list(gemms(gm)):
            if info.left.format is Format.E5M2:
                left = replace(info.left, format=Format.E4M3)
                node.meta["fp8"] = replace(info, left=left)
        return 1

    x = torch.randn(32, 64)
    for recipe in ("current", "delayed"):
        torch._dynamo.reset()
        call = compile_interpreted(
            mlp(), {"recipe": recipe, "own_passes": {"choose_formats": narrowed}}
        )
        if recipe == "current":
            call(x).sum().backward()
            continue
        with pytest.raises(Exception, match="grad_output shall be e4m3, but the scale"):
            call(x).sum().backward()


def test_unknown_names_and_things_that_are_no_passes() -> None:
    call = compile_interpreted(mlp(), {"own_passes": {"choose_format": no_fp8}})
    with pytest.raises(Exception, match="no_fp8 run after 'choose_format'; the passes of a"):
        call(torch.randn(32, 64))
    for wrong in ([no_fp8], {"find_gemms": 1}, {1: no_fp8}):
        with pytest.raises(OptionError, match="own_passes"):
            parse_options({"own_passes": wrong})


def test_all_passes_can_be_named() -> None:
    """Those of every setting are in the list, in its order."""
    names = [run.__name__ for run in JOINT_PASSES]
    static: dict[str, Any] = {"recipe": fp8compile.RECIPES["static"], "statistics_of": {}}
    delayed: dict[str, Any] = {"recipe": fp8compile.RECIPES["delayed"]}
    state = fp8compile.passes.StateNodes(*[fx.Graph().placeholder("x")] * 3)
    device = fp8compile.cost.H200
    asked = ("store_in_fp8", "choose_scales", "attention_in_fp8", "attention_backward_in_fp8")
    chosen = dict.fromkeys(asked, True)
    for settings, left_out in ((static, "take_attention_output"), (delayed, "derive_scales")):
        passes = joint_passes(**settings, **chosen, state=state, device=device)
        assert [pass_name(run) for run in passes] == [n for n in names if n != left_out]


def test_the_guide_writes_one(capsys: pytest.CaptureFixture[str]) -> None:
    guide = Path(__file__).parents[1] / "examples" / "guides" / "write_a_pass.md"
    code = re.search(r"```python\n(.*?)```", guide.read_text(encoding="utf-8"), re.DOTALL)
    assert code
    exec(code[1], {})
    assert "the first layer's gradient matters" in capsys.readouterr().out
