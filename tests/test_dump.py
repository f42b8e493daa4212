"""The dump: numbered graph text of every graph, each compile in a folder of its own."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import fx, nn
from torch._inductor.utils import fresh_cache

from fp8compile.dump import Dump
from fp8compile.ir import gemms
from fp8compile.options import DUMP_VARIABLE
from tests.helpers import compile_interpreted
from tests.models import MLP

pytestmark = pytest.mark.filterwarnings("ignore:FP8 is emulated here")
PASSES = [
    "unbatch_gemms", "find_gemms", "choose_precision", "merge_gemms", "choose_formats",
    "insert_casts", "take_frozen_weights", "fold_scales", "share_casts",
    "drop_unused_outputs",
]  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield


def names(folder: Path) -> list[str]:
    """The names of a folder's files without their numbers, which must count up from 0."""
    files = sorted(file.name for file in folder.iterdir())
    assert [int(name[:2]) for name in files] == list(range(len(files)))
    return [name[3:].removesuffix(".txt") for name in files]


def text_of(folder: Path, name: str) -> str:
    return next(folder.glob(f"??.{name}.txt")).read_text()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_training_with_cold_and_with_warm_caches(tmp_path: Path) -> None:
    with fresh_cache():
        for folder in ("cold", "warm"):
            torch._dynamo.reset()
            options = {"dump": tmp_path / folder}
            compiled = torch.compile(MLP(32, 64), backend="fp8", options=options)
            compiled(torch.randn(16, 32)).sum().backward()
    for folder in (tmp_path / "cold" / "graph_000", tmp_path / "warm" / "graph_000"):
        training = ["track_amax", "plan_saved", "keep_scales", "forward", "backward"]
        assert names(folder) == ["joint", *PASSES, *training], folder.parent.name
        assert "aten.mm(" in text_of(folder, "joint") and "fp8." not in text_of(folder, "joint")
        # The input of the block is a leaf without gradient; gate and up need dgrad for the norm.
        assert text_of(folder, "insert_casts").count("fp8.scaled_mm(") == 6
        forward, backward = text_of(folder, "forward"), text_of(folder, "backward")
        assert forward.count("fp8.scaled_mm(") == 2 and backward.count("fp8.scaled_mm(") == 4
        assert "fp8.track_amax" not in text_of(folder, "drop_unused_outputs")
        for name in ("track_amax", "forward", "backward"):
            assert "fp8.track_amax" in text_of(folder, name)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_inference(tmp_path: Path) -> None:
    with fresh_cache(), torch.no_grad():
        compiled = torch.compile(nn.Linear(32, 48), backend="fp8", options={"dump": tmp_path})
        compiled(torch.randn(16, 32))
    folder = tmp_path / "graph_000"
    assert names(folder) == ["joint", *PASSES, "weights", "forward"]
    assert text_of(folder, "weights").count("fp8.quantize(") == 1  # once, not at every call
    forward = text_of(folder, "forward")
    assert forward.count("fp8.quantize(") == 1
    assert forward.count("fp8.scaled_mm(") == 1 and "fp8.track_amax" not in forward


def test_environment_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DUMP_VARIABLE, str(tmp_path / "new" / "folder"))
    compile_interpreted(nn.Linear(16, 16))(torch.randn(16, 16))
    assert "joint" in names(tmp_path / "new" / "folder" / "graph_000")


def test_compiles_do_not_overwrite_each_other(tmp_path: Path) -> None:
    for width in (16, 32):
        torch._dynamo.reset()
        compile_interpreted(nn.Linear(width, 16), {"dump": tmp_path})(torch.randn(16, width))
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["graph_000", "graph_001"]
    for number, width in enumerate((16, 32)):
        assert f"f32[16, {width}]" in text_of(tmp_path / f"graph_{number:03d}", "joint")


def test_graphs_of_one_model_do_not_overwrite_each_other(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 32))

    def function(x: torch.Tensor) -> torch.Tensor:
        x = model[0](x)
        torch._dynamo.graph_break()
        return model[1](x)

    compile_interpreted(function, {"dump": tmp_path})(torch.randn(16, 16)).sum().backward()
    assert len(list(tmp_path.iterdir())) == 2
    for number, shape in enumerate(("f32[16, 16]", "f32[32, 16]")):
        folder = tmp_path / f"graph_{number:03d}"
        assert names(folder).count("joint") == 1 and shape in text_of(folder, "joint")


def test_numbers_and_safe_names(tmp_path: Path) -> None:
    dump = Dump(str(tmp_path))
    dump.text("a/b c.py", "x = 1\n")
    dump.text("d.txt", "")
    assert sorted(f.name for f in dump.folder.iterdir()) == ["00.a_b_c.py", "01.d.txt"]
    assert (dump.folder / "00.a_b_c.py").read_text() == "x = 1\n"
    assert Dump(str(tmp_path)).folder != dump.folder


def test_files_are_utf8_in_any_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io, "text_encoding", lambda given, level=2: given or "ascii")
    Dump(str(tmp_path)).text("a.txt", "größer\n")
    (file,) = (tmp_path / "graph_000").iterdir()
    assert file.read_bytes().decode() == "größer\n"


def test_a_pass_that_fails(tmp_path: Path) -> None:
    """What it did to the graph is what its author wants to see."""

    def careless(gm: fx.GraphModule) -> int:
        (gemm, *_) = [node for node, _ in gemms(gm)]
        with gm.graph.inserting_after(gemm):
            gm.graph.call_function(torch.ops.aten.neg.default, (gemm,), name="by_mistake")
        return 1

    def senseless(gm: fx.GraphModule) -> int:
        for node, _ in list(gemms(gm)):
            node.meta["fp8"] = "no GemmInfo"
        raise KeyError("a graph that has no text")

    for run in (careless, senseless):
        torch._dynamo.reset()
        options = {"dump": tmp_path / run.__name__, "own_passes": {"find_gemms": run}}
        with pytest.raises(Exception, match=f"PassError: pass {run.__name__} failed"):
            compile_interpreted(MLP(32, 64), options)(torch.randn(16, 32))
    folder = tmp_path / "careless" / "graph_000"
    assert names(folder) == ["joint", "unbatch_gemms", "find_gemms", "careless.failed"]
    assert "by_mistake" in text_of(folder, "careless.failed")
