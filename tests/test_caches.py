"""Inductor's caches across processes: what hits, that it computes the same, and what must miss.

``python -m tests.test_caches CASES`` is the process that the tests start: it trains a small model
under each of some options, and prints what the caches did and what came out.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fp8compile
from fp8compile import Profile, internals
from fp8compile.compile import GraphCompiler, _may_be_cached
from fp8compile.cost import H100, H200
from fp8compile.options import Options, parse_options

ROOT = Path(__file__).parents[1]
STEPS = 4

Result = dict[str, Any]


# --- the other process --------------------------------------------------------------------------


def main(cases: Sequence[Mapping[str, Any]]) -> None:
    results = [trained(options) for options in cases]
    print(json.dumps({"package": fp8compile.__file__, "results": results}))


def trained(options: Mapping[str, Any]) -> Result:
    """Train and evaluate in a fresh Dynamo; everything that may differ from another process."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    # Without pointwise operators there is no C++ to compile, which would take most of the time.
    model = nn.Sequential(nn.Linear(32, 64, bias=False), nn.Linear(64, 32, bias=False))
    compiled = torch.compile(model, backend="fp8", options=dict(options))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x, states = torch.randn(16, 32), []
    for _ in range(STEPS):
        compiled(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        states.append(digest(fp8compile.state_dict(model).values()))
    with torch.no_grad():
        out = compiled(x)
    return {
        **cache_counts(),
        "states": states,
        "result": digest([out, *model.state_dict().values()]),
        "explained": str(fp8compile.explain(model, x)),
    }


def digest(tensors: Iterable[Tensor]) -> str:
    together = hashlib.sha256()
    for tensor in tensors:
        together.update(tensor.detach().numpy().tobytes())
    return together.hexdigest()


def cache_counts() -> dict[str, list[int]]:
    """Hits, misses and bypasses of AOTAutograd's cache, and of Inductor's for its graphs."""
    counters = torch._dynamo.utils.counters
    return {
        cache: [counters[group][f"{name}_{event}"] for event in ("hit", "miss", "bypass")]
        for cache, group, name in (
            ("aot", "aot_autograd", "autograd_cache"),
            ("graphs", "inductor", "fxgraph_cache"),
        )
    }


# --- this process -------------------------------------------------------------------------------

# The model has a training graph, which is a forward and a backward, and one for inference, of which
# AOTAutograd's cache takes none: it is one that casts the weights, and one for all the rest.
HIT = {"aot": [1, 0, 0], "graphs": [4, 0, 0]}
MISS = {"aot": [0, 1, 0], "graphs": [0, 4, 0]}
NO_WEIGHTS = {**MISS, "graphs": [0, 3, 0]}  # are cast where everything is declined
DEFAULT: dict[str, Any] = {}
OTHERS: dict[str, dict[str, Any]] = {
    "recipe": {"recipe": "current"},
    "recipe of a site": {"overrides": {"0": "current"}},
    "skip": {"skip": ["0"]},
    "device": {"decline_slower": "H100"},
    "option": {"save_activations": "fp8"},
    "inductor": {"inductor": {"epilogue_fusion": False}},
}


def in_another_process(
    cases: Sequence[Mapping[str, Any]], caches: Path, package: Path = ROOT
) -> list[Result]:
    """Run the cases there, one after the other, with that copy of the package."""
    dropped = ("FP8COMPILE_DUMP", "TRITON_INTERPRET")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(caches)
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (package, ROOT)))
    # -P: the path above, not the current folder, says which package it is.
    command = [sys.executable, "-P", "-m", "tests.test_caches", json.dumps(cases)]
    process = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    printed = json.loads(process.stdout.splitlines()[-1])
    assert Path(printed["package"]).is_relative_to(package)
    return printed["results"]


def caches_of(result: Result) -> dict[str, list[int]]:
    return {name: result[name] for name in ("aot", "graphs")}


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(scope="module")
def first(caches: Path) -> Result:
    """With empty caches."""
    (result,) = in_another_process([DEFAULT], caches)
    return result


@pytest.fixture(scope="module")
def second(caches: Path, first: Result) -> dict[str, Result]:
    """The same again, and other options."""
    cases = {"same": DEFAULT, **OTHERS}
    return dict(zip(cases, in_another_process([*cases.values()], caches), strict=True))


def test_the_first_process_finds_nothing(first: Result) -> None:
    assert caches_of(first) == MISS


def test_a_second_process_finds_all_graphs(second: dict[str, Result]) -> None:
    assert caches_of(second["same"]) == HIT


def test_cached_graphs_train_and_evaluate_bit_for_bit_as_new_ones(
    first: Result, second: dict[str, Result]
) -> None:
    assert second["same"]["result"] == first["result"]


def test_scales_go_on_being_updated_by_cached_graphs(
    first: Result, second: dict[str, Result]
) -> None:
    assert len(set(first["states"])) == STEPS
    assert second["same"]["states"] == first["states"]


def test_explain_says_the_same_of_a_cached_model(first: Result, second: dict[str, Result]) -> None:
    assert "2 sites, 5 of 5 GEMMs in FP8" in first["explained"]
    assert second["same"]["explained"] == first["explained"]


@pytest.mark.parametrize("what", OTHERS)
def test_another_choice_misses(second: dict[str, Result], what: str) -> None:
    assert caches_of(second[what]) == (NO_WEIGHTS if what == "device" else MISS)


def test_an_edited_pass_misses(first: Result, caches: Path, tmp_path: Path) -> None:
    edited = copy_of_package(tmp_path)
    edit(edited / "passes" / "share_casts.py")
    (result,) = in_another_process([DEFAULT], caches, package=tmp_path)
    assert caches_of(result) == MISS
    assert result["result"] == first["result"]


# --- the key ------------------------------------------------------------------------------------


def copy_of_package(folder: Path) -> Path:
    """As it lies in the repository, where two of its folders are links to what is beside it."""
    for name in ("fp8compile", "passes", "backends"):
        unread = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=unread)
    return folder / "fp8compile"


def edit(file: Path) -> None:
    file.write_text(file.read_text() + "# edited\n")


def hash_of(package: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(internals, "__file__", str(package / "internals.py"))
    internals.get_hash_for_files.cache_clear()
    return internals.source_hash.__wrapped__()


@pytest.mark.parametrize(
    "file",
    ["compile.py", "passes/share_casts.py", "backends/emit.py", "backends/kernels/launch.py"],
)
def test_every_source_file_is_in_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    package = copy_of_package(tmp_path)
    before = hash_of(package, monkeypatch)
    assert before == hash_of(package, monkeypatch)
    edit(package / file)
    assert before != hash_of(package, monkeypatch)


CHANGES: dict[str, Any] = {
    "recipe": "current",
    "overrides": {"*": "current"},
    "skip": lambda fqn: True,
    "strict": True,
    "dump": "somewhere",
    "kernels": "reference",
    "inductor": {"epilogue_fusion": False},
    "decline_slower": "H100",
    "save_activations": "fp8",
    "on_error": "fallback",
    "logits": "fp8",
    "attention": "fp8",
    "profile": Profile(()),
    "formats": "auto",
    "scaling": "auto",
    "error_budget_db": 20.0,
    "own_passes": {"find_gemms": print},
}
# What goes with a change to be one.
WITH: dict[str, dict[str, Any]] = {
    "formats": {"profile": Profile(())},
    "error_budget_db": {"profile": Profile(())},
}
# These keep a graph from the caches, or count by what they come to.
FROM_A_PROFILE = ("profile", "formats", "error_budget_db")
NOT_IN_THE_KEY = ("overrides", "skip", "dump", "on_error", "logits", "own_passes", *FROM_A_PROFILE)


def test_every_option_has_a_change() -> None:
    assert [*CHANGES] == [field.name for field in fields(Options)]


@pytest.mark.parametrize("name", CHANGES)
def test_every_option_is_in_the_key_or_keeps_from_the_caches(name: str) -> None:
    options = parse_options({name: CHANGES[name], **WITH.get(name, {})})
    default = parse_options({})
    changed = options.cache_key() != default.cache_key()
    assert changed == (name not in NOT_IN_THE_KEY)
    assert _may_be_cached(default, None)
    assert _may_be_cached(options, None) == (name not in ("dump", "on_error", "own_passes"))


def test_static_scales_keep_from_the_caches() -> None:
    """A graph from the cache runs no passes, and it is a pass that finds the expressions."""
    assert not _may_be_cached(parse_options({"recipe": "static"}), None)


def test_the_device_that_costs_are_predicted_for_is_in_the_key() -> None:
    keys = {
        GraphCompiler(parse_options({}), [], "reference", predict_for=device).cache_key()
        for device in (None, H100, H200)
    }
    assert len(keys) == 3


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
