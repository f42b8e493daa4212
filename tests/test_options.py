"""Options: what is legal, what a wrong one says, and what each one does."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import fp8compile
from fp8compile import RECIPES, OptionError, Recipe, RecipeError, StrictError
from fp8compile.compile import GraphCompiler, _declines, _predict_for
from fp8compile.cost import H100, H200
from fp8compile.options import DUMP_VARIABLE, Options, parse_options
from fp8compile.passes.choose_precision import SLOWER
from tests.helpers import compile_interpreted
from tests.models import MLP, sqnr_db

pytestmark = [
    pytest.mark.filterwarnings("ignore:FP8 is emulated here"),
    pytest.mark.usefixtures("fresh_dynamo"),
]


# --- parsing ------------------------------------------------------------------------------------


def test_defaults() -> None:
    assert parse_options(None) == parse_options({}) == Options()
    assert parse_options({}).recipe is RECIPES["delayed"]


def test_everything_at_once(tmp_path: Path) -> None:
    own = Recipe("own", history_len=4)
    options = parse_options(
        {
            "recipe": own,
            "skip": ["lm_head", "layers.0.*"],
            "strict": True,
            "dump": tmp_path,
            "kernels": "reference",
            "inductor": {"max_autotune": True},
            "decline_slower": False,
        }
    )
    assert options == Options(
        recipe=own,
        skip=("lm_head", "layers.0.*"),
        strict=True,
        dump=str(tmp_path),
        kernels="reference",
        inductor={"max_autotune": True},
        decline_slower=False,
    )


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"recipy": "current"}, ["'recipy'", "did you mean 'recipe'", "'kernels'", "'inductor'"]),
        ({"zzz": 1}, ["'zzz'", "Legal options", "'strict'"]),
        ({7: 1}, ["7", "Legal options"]),
        ({"max_autotune": True}, ["'max_autotune'", "'inductor': {...}"]),
        ({"recipe": 8}, ["'recipe'", "8", "current", "delayed"]),
        ({"recipe": None}, ["'recipe'", "None", "current", "delayed"]),
        ({"skip": "lm_head"}, ["'skip'", "'lm_head'", "list of globs"]),
        ({"skip": [1]}, ["'skip'", "[1]"]),
        ({"strict": "yes"}, ["'strict'", "'yes'", "bool"]),
        ({"strict": 1}, ["'strict'", "1", "bool"]),
        ({"dump": 3}, ["'dump'", "3", "folder"]),
        ({"kernels": "cuda"}, ["'kernels'", "'cuda'", "auto", "triton", "reference"]),
        ({"kernels": ["auto"]}, ["'kernels'", "auto", "triton", "reference"]),
        ({"decline_slower": 1}, ["'decline_slower'", "1", "True, False", "H100", "H200"]),
        ({"decline_slower": "B200"}, ["'decline_slower'", "'B200'", "H100", "H200"]),
        ({"inductor": ["max_autotune"]}, ["'inductor'", "dict"]),
        ({"inductor": {"max_autotun": True}}, ["'max_autotun'", "max_autotune"]),
        ({"inductor": {3: True}}, ["'inductor'", "3"]),
        ({"inductor": {"max_autotune": "yes"}}, ["'max_autotune'", "'yes'", "bool"]),
        ({"inductor": {"triton.cudagraphs": 1}}, ["'triton.cudagraphs'", "1", "bool"]),
    ],
    ids=str,
)
def test_what_is_wrong_is_named_and_what_is_legal_listed(
    given: Mapping[Any, Any], parts: list[str]
) -> None:
    with pytest.raises(OptionError) as error:
        parse_options(given)
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_unknown_recipe() -> None:
    with pytest.raises(
        RecipeError, match=r"'mxfp8'.*\['blockwise', 'current', .* 'rowwise', 'static'\]"
    ):
        parse_options({"recipe": "mxfp8"})


@pytest.mark.parametrize("options", ["rowwise", ["rowwise"], [], 3])
def test_options_are_a_dict(options: Any) -> None:
    with pytest.raises(OptionError, match=r"options is .*; give a dict .*\{'recipe': 'current'\}"):
        parse_options(options)


def test_unknown_mode() -> None:
    with pytest.raises(OptionError, match=r"'fast'.*reduce-overhead"):
        parse_options({}, mode="fast")


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_mode_means_what_it_means_with_inductor(mode: str) -> None:
    assert parse_options(None, mode).inductor == torch._inductor.list_mode_options(mode)
    assert parse_options(None, "default").inductor == {}


def test_inductor_options_may_have_dashes_and_values_of_several_types() -> None:
    given = {"max-autotune": True, "cpp.simdlen": None}
    found = parse_options({"inductor": given}).inductor
    assert found == {"max_autotune": True, "cpp.simdlen": None}


def test_inductor_options_win_over_the_mode() -> None:
    given = {"inductor": {"triton.cudagraphs": False}}
    assert parse_options(given, "reduce-overhead").inductor["triton.cudagraphs"] is False


def test_dump_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DUMP_VARIABLE, "from_environment")
    assert parse_options({}).dump == "from_environment"
    assert parse_options({"dump": "given"}).dump == "given"
    monkeypatch.setenv(DUMP_VARIABLE, "")
    assert parse_options({}).dump is None


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().strict = True  # type: ignore[misc]


def test_cache_key_tells_apart_what_compiles_differently() -> None:
    different: list[dict[str, Any]] = [
        {},
        {"recipe": "current"},
        {"kernels": "reference"},
        {"inductor": {"dce": True}},
        {"decline_slower": False},
        {"decline_slower": "H200"},
    ]
    keys = {parse_options(given).cache_key() for given in different}
    assert len(keys) == len(different)
    order = [{"dce": True, "max_autotune": True}, {"max_autotune": True, "dce": True}]
    assert len({parse_options({"inductor": given}).cache_key() for given in order}) == 1


def test_globs() -> None:
    options = Options(skip=("lm_head", "layers.*.down"))
    names = ["lm_head", "lm_head2", "layers.0.down", "layers.0.up", "x.lm_head"]
    assert [options.skips(name) for name in names] == [True, False, True, False, False]


# --- what a user meets through torch.compile ----------------------------------------------------


@contextlib.contextmanager
def raises(kind: type[Exception], match: str) -> Iterator[list[str]]:
    """The error reaches the user: as it is, or inside of Dynamo's BackendCompilerFailed."""
    message: list[str] = []
    with pytest.raises((kind, BackendCompilerFailed), match=match) as error:
        yield message
    message.append(str(error.value))
    assert isinstance(getattr(error.value, "inner_exception", error.value), kind)


def test_torch_compile_reports_a_wrong_option() -> None:
    with raises(OptionError, match="unknown option 'stricd'; did you mean 'strict'"):
        torch.compile(nn.Linear(16, 16), backend="fp8", options={"stricd": 1})(torch.randn(16, 16))


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0),
    reason="this device runs the Triton kernels",
)
def test_triton_kernels_where_they_cannot_run() -> None:
    with raises(OptionError, match="kernels='triton' needs .*'auto' or 'reference'"):
        compile_interpreted(nn.Linear(16, 16), {"kernels": "triton"})(torch.randn(16, 16))


def decisions(model: Callable[..., Any], *inputs: Any, **options: Any) -> dict[str, set[str]]:
    """For each site, how its GEMMs were decided: "fp8" or the reason."""
    found: dict[str, set[str]] = {}
    for row in fp8compile.explain(model, *inputs, options=options).rows:
        found.setdefault(row.fqn, set()).add("fp8" if row.is_fp8 else row.reason)
    return found


@pytest.mark.parametrize(
    "skip",
    [["d*"], ("down",), {"down"}, lambda name: name == "down"],
    ids=["list", "tuple", "set", "callable"],
)
def test_skip(skip: Any) -> None:
    found = decisions(MLP(), torch.randn(16, 64), skip=skip)
    assert found == {"{gate,up}": {"fp8"}, "down": {"skipped by the user"}}


@pytest.mark.parametrize("strict", [False, True])
def test_skip_everything_is_eager_bit_for_bit(
    strict: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = MLP(), torch.randn(16, 64)
    with warnings.catch_warnings(), caplog.at_level("INFO"):
        warnings.simplefilter("error")
        out = compile_interpreted(model, {"skip": ["*"], "strict": strict})(x)
    torch.testing.assert_close(out, model(x), rtol=1e-6, atol=1e-6)
    assert "no GEMM of this graph runs in FP8 (down: skipped by the user" in caplog.text


@pytest.mark.parametrize("option", [{"skip": ["head"]}, {"overrides": {"head": "current"}}])
def test_a_glob_for_another_graph_of_a_function(option: dict[str, Any]) -> None:
    body, head = nn.Linear(32, 64), nn.Linear(64, 16)

    def step(x: torch.Tensor) -> torch.Tensor:
        y = body(x)
        torch._dynamo.graph_break()
        y = torch.relu(y)
        torch._dynamo.graph_break()
        return head(y)

    x = torch.randn(16, 32)
    with pytest.warns(
        UserWarning, match=r"'head' matches nothing in this graph.*\['body'\]"
    ) as all_:
        out = compile_interpreted(step, option)(x)
    assert sum("matches nothing" in str(each.message) for each in all_) == 1
    assert sqnr_db(step(x), out) > 20


def test_a_glob_that_matches_nothing_names_the_sites() -> None:
    with raises(OptionError, match=r"skip='dwn' matches nothing.*'down', 'gate', 'up'"):
        compile_interpreted(MLP(), {"skip": ["gate", "dwn"]})(torch.randn(16, 64))


@pytest.mark.parametrize("option", [{"skip": ["mix"]}, {"overrides": {"m?x": "current"}}])
def test_a_glob_that_matches_a_module_and_none_of_its_sites(option: dict[str, Any]) -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.MultiheadAttention(32, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(x, x, x, need_weights=False)[0]

    x = torch.randn(16, 2, 32)
    sites = r"\['mix.in_proj_weight', 'mix.out_proj'\]"
    with pytest.warns(UserWarning, match=rf"matches a module, .* sites {sites}; 'm.x\.\*' does"):
        compile_interpreted(Attends(), option)(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile_interpreted(Attends(), {"skip": ["mix.*"]})(x)


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.second = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        torch._dynamo.graph_break()
        return self.second(x)


@pytest.mark.parametrize("wrapped_by", ["module", "function"])
@pytest.mark.parametrize("skipped", ["first", "second"])
def test_a_glob_that_matches_in_one_of_two_graphs(skipped: str, wrapped_by: str) -> None:
    model = Broken()
    call = model if wrapped_by == "module" else lambda x: model(x)
    found = decisions(call, torch.randn(16, 32), skip=[skipped])
    other = {"first": "second", "second": "first"}[skipped]
    assert found == {skipped: {"skipped by the user"}, other: {"fp8"}}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "no GEMM of this graph runs in FP8")
        out = compile_interpreted(call, {"skip": [skipped]})(torch.randn(16, 32))
    assert out.isfinite().all()


def test_skip_for_blocks_that_are_compiled_one_by_one() -> None:
    model = nn.Sequential(MLP(), MLP())
    options = {"skip": ["1.down"]}
    for block in model:
        block.forward = compile_interpreted(block.forward, options)
    assert model(torch.randn(16, 64)).isfinite().all()


# --- strict, and nothing to do ------------------------------------------------------------------


def test_no_fp8_at_all_warns_once_and_changes_nothing() -> None:
    model, x = nn.Linear(32, 32).double(), torch.randn(16, 32).double()
    compiled = compile_interpreted(model)
    with pytest.warns(UserWarning, match="no GEMM of this graph runs in FP8") as warned:
        out = compiled(x)
        compiled(x)
    assert len(warned) == 1
    torch.testing.assert_close(out, model(x))


@pytest.mark.parametrize("strict", [False, True])
def test_a_skipped_layer_beside_what_has_no_fp8_form_is_nothing_to_complain_about(
    strict: bool, caplog: pytest.LogCaptureFixture
) -> None:
    class Scores(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) @ x.transpose(1, 2)

    model, x = nn.Sequential(Scores(32, 32)), torch.randn(2, 16, 32)
    with warnings.catch_warnings(), caplog.at_level("INFO"):
        warnings.simplefilter("error")
        compile_interpreted(model, {"skip": ["0"], "strict": strict})(x)
    assert "0: skipped by the user" in caplog.text


def test_a_skipped_layer_beside_one_that_cannot_be_fp8_still_warns() -> None:
    with pytest.warns(UserWarning, match="no GEMM of this graph runs in FP8 .*float64"):
        compile_interpreted(HalfDouble(), {"skip": ["0"]})(torch.randn(16, 32))


@pytest.mark.parametrize("strict", [False, True])
def test_a_graph_without_matmuls_is_nothing_to_complain_about(
    strict: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as what lies between two graph breaks of a model."""
    model, x = nn.Sequential(nn.LayerNorm(32), nn.GELU()), torch.randn(16, 32)
    with warnings.catch_warnings(), caplog.at_level("INFO"):
        warnings.simplefilter("error")
        out = compile_interpreted(model, {"strict": strict})(x)
    torch.testing.assert_close(out, model(x))
    assert "this graph has no matmul" in caplog.text


class HalfDouble(nn.Sequential):
    """Two sites: ``0`` in float32, ``1`` in float64."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(32, 64), nn.Linear(64, 16).double())

    def forward(self, x: Tensor) -> Tensor:
        return self[1](self[0](x).double())


def test_strict_names_site_and_reason() -> None:
    with raises(StrictError, match=r"1 fprop: dtype float64 has no FP8 form") as message:
        compile_interpreted(HalfDouble(), {"strict": True})(torch.randn(16, 32))
    assert "  0 fprop" not in message[0]


def test_strict_names_matmuls_that_belong_to_no_site() -> None:
    class Vector(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + super().forward(x[0])

    with raises(StrictError, match=r"\(other: 1 x aten\.\w+\) : a 1-D operand") as message:
        compile_interpreted(Vector(32, 64), {"strict": True})(torch.randn(16, 32))
    assert "fprop" not in message[0]


def test_strict_accepts_matmuls_of_activations() -> None:
    class Scores(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) @ x.transpose(1, 2)

    compile_interpreted(Scores(32, 32), {"strict": True})(torch.randn(2, 16, 32))


def test_strict_accepts_what_was_skipped_on_purpose() -> None:
    model, x = HalfDouble(), torch.randn(16, 32)
    out = compile_interpreted(model, {"strict": True, "skip": ["1"]})(x)
    assert 20 <= sqnr_db(model(x).detach(), out.detach()) < 60


def test_strict_accepts_a_model_that_is_all_fp8() -> None:
    model, x = MLP(), torch.randn(16, 64)
    out = compile_interpreted(model, {"strict": True})(x)
    assert sqnr_db(model(x).detach(), out.detach()) >= 25


# --- declining what would be slower -------------------------------------------------------------


def test_emulation_declines_nothing() -> None:
    assert set().union(*decisions(MLP(), torch.randn(16, 64)).values()) == {"fp8"}


def test_a_named_device_declines_whatever_runs() -> None:
    found = decisions(MLP(), torch.randn(16, 64), decline_slower="H200")
    reasons = set().union(*found.values())
    assert reasons and all(reason.startswith(SLOWER) for reason in reasons)
    sizes = {"decline_slower": "H200", "kernels": "reference"}
    large = MLP(2048, 4096, bias=False).bfloat16()
    found = decisions(large, torch.randn(4096, 2048, dtype=torch.bfloat16), **sizes)
    assert set().union(*found.values()) == {"fp8"}


@pytest.mark.parametrize(
    ("decline_slower", "kernels", "declines"),
    [
        (True, "triton", True),
        (True, "reference", False),
        (False, "triton", False),
        (False, "reference", False),
        ("H100", "triton", True),
        ("H100", "reference", True),
    ],
)
def test_where_slower_gemms_are_declined(
    decline_slower: bool | str, kernels: str, declines: bool
) -> None:
    options, cpu = parse_options({"decline_slower": decline_slower}), torch.device("cpu")
    assert _declines(options, kernels) is declines
    predicted_for = _predict_for(options, kernels, cpu, report=False)
    assert (predicted_for is not None) is declines, "nothing is predicted that nobody asks for"
    assert _predict_for(options, kernels, cpu, report=True) is not None


def test_other_constants_are_other_code() -> None:
    keys = {GraphCompiler(Options(), [], "triton", d).cache_key() for d in (H100, H200, None)}
    assert len(keys) == 3


@pytest.mark.parametrize("strict", [False, True])
def test_declined_is_neither_an_error_nor_a_warning(
    strict: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = MLP(), torch.randn(16, 64)
    caplog.set_level("INFO", logger="fp8compile")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "FP8 is emulated here")
        out = compile_interpreted(model, {"decline_slower": "H200", "strict": strict})(x)
    torch.testing.assert_close(out, model(x), rtol=1e-6, atol=1e-6)
    assert f"no GEMM of this graph runs in FP8 (down: {SLOWER}" in caplog.text


def test_strict_still_names_what_cannot_be_fp8() -> None:
    options = {"strict": True, "decline_slower": "H200"}
    with raises(StrictError, match=r"1 fprop: dtype float64 has no FP8 form") as message:
        compile_interpreted(HalfDouble(), options)(torch.randn(16, 32))
    assert SLOWER not in message[0]


# --- modes, with Inductor's own code ------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_reduce_overhead() -> None:
    model, x = nn.Linear(32, 48), torch.randn(16, 32)
    with torch.no_grad():
        out = torch.compile(model, backend="fp8", mode="reduce-overhead")(x)
    assert 25 <= sqnr_db(model(x).detach(), out) < 60


def test_inductor_cpp_wrapper() -> None:
    """Calls without Python: the inputs that the scales come in by are inputs like any other."""
    model, x = nn.Linear(32, 48), torch.randn(16, 32)
    results = []
    for wrapper in (False, True):
        torch._dynamo.reset()
        options = {"decline_slower": False, "inductor": {"cpp_wrapper": wrapper}}
        with torch.no_grad():
            results.append(torch.compile(model, backend="fp8", options=options)(x))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert 25 <= sqnr_db(model(x).detach(), results[0]) < 60


@pytest.mark.parametrize(
    "inductor", [{"use_joint_graph_passes": False}, {"use_dce": False}], ids=str
)
def test_inductor_options_cannot_turn_fp8_off_in_silence(inductor: dict[str, bool]) -> None:
    """mode="lite" sets both of these."""
    assert torch._inductor.list_mode_options("lite").items() >= inductor.items()
    model, x = nn.Linear(32, 48), torch.randn(16, 32)
    try:
        out = compile_interpreted(model, {"inductor": inductor})(x)
    except (OptionError, BackendCompilerFailed) as error:
        assert next(iter(inductor)) in str(error)
    else:
        assert 25 <= sqnr_db(model(x).detach(), out.detach()) < 60
