"""Profiles: what they measure, and the formats and sites that follow from it."""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fp8compile
from fp8compile import RECIPES, Format, Gemm, Operand, OptionError, Profile
from fp8compile.options import parse_options
from fp8compile.profiles import HYSTERESIS_DB, Group, Seen
from tests.helpers import compile_interpreted
from tests.models import MLP, Llama, sqnr_db

pytestmark = pytest.mark.filterwarnings("ignore:FP8 is emulated here")


@pytest.fixture(autouse=True)
def compile_anew() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def squares(call: Callable[..., Tensor], x: Tensor) -> Tensor:
    return call(x).square().mean()


def gradients(step: Callable[[], Tensor], model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    step().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- what is measured ---------------------------------------------------------------------------


class OfOneRow(nn.Module):
    """One site multiplies a row with a column, which is traced as a product and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64, bias=False), nn.Linear(64, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x[0, 0, :1])


def test_a_site_without_a_gemm_is_known_as_well() -> None:
    """A later compile asks for the formats of every site, whatever became of it in tracing."""
    model, x = OfOneRow(), torch.randn(2, 2, 8, 64)
    found = fp8compile.profile(model, [x], sensitivity=False)
    assert [group.sites for group in found.groups] == [("first",)]
    assert found.left_out == ("second",)
    with torch.no_grad():
        out = compile_interpreted(model, {"profile": found, "formats": "auto"})(x)
        assert 20 < sqnr_db(model(x), out) < 60


def test_what_edges_hold() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64))
    batches = [torch.randn(48, 64) for _ in range(3)]
    found = fp8compile.profile(model, batches, step=squares, sensitivity=False)
    assert [group.sites for group in found.groups] == [("0",), ("1",)]
    edges = found.groups[0].edges
    assert list(edges) == [str(operand) for operand in Operand]
    every = torch.cat(batches)
    assert edges["input"].amax == float(every.abs().max())
    assert edges["input"].rms == pytest.approx(float(every.square().mean().sqrt()))
    halves = [float(batch.abs().quantile(0.5)) for batch in batches]
    assert edges["input"].quantiles["0.5"] == pytest.approx(statistics.mean(halves))
    assert edges["weight"].amax == float(model[0].weight.abs().max())
    assert found.groups[0].output_noise is None
    # Three bits of mantissa are 6 dB better than two.
    noise = edges["weight"].noise
    assert 5 < 10 * torch.tensor(noise["e5m2"] / noise["e4m3"]).log10() < 7


def test_noise_is_that_of_the_reference_cast() -> None:
    model, x = nn.Linear(64, 32, bias=False), torch.randn(48, 64)
    found = fp8compile.profile(model, [x], options={"recipe": "rowwise"}, sensitivity=False)
    q, _, scale_inv, _ = torch.ops.fp8.quantize_blocks(x, [1, 0], False, Format.E4M3.dtype)
    error = (q.float() * scale_inv.t() - x).square().sum(1) / x.square().sum(1)
    noise = found.groups[0].edges["input"].noise["e4m3"]
    assert noise == pytest.approx(float(error.mean()), rel=1e-5)


def test_delayed_scales_are_those_of_the_batches_before() -> None:
    """The second batch is twice as large: clipped with delayed scaling, not with current."""
    x = torch.randn(48, 64)
    model = nn.Linear(64, 32)
    clipped = {
        recipe: fp8compile.profile(
            model, [x, 2 * x, x], options={"recipe": recipe}, sensitivity=False
        )
        .groups[0]
        .edges["input"]
        .saturated["e4m3"]
        for recipe in ("delayed", "current")
    }
    assert clipped["current"] == 0
    too_large = float((2 * x.abs() > x.abs().max()).float().mean())
    assert clipped["delayed"] == pytest.approx(too_large / 3)


def test_noise_of_one_group_is_what_skipping_all_others_leaves() -> None:
    torch.manual_seed(1)
    model, x = MLP(), torch.randn(48, 64)
    found = fp8compile.profile(model, [x], step=squares)
    assert [group.sites for group in found.groups] == [("gate", "up"), ("down",)]
    with torch.no_grad():
        want = model(x)
        only_down = compile_interpreted(model, {"recipe": "current", "skip": ["gate", "up"]})(x)
    noise = float((only_down - want).square().sum() / want.square().sum())
    assert found.groups[1].output_noise == pytest.approx(noise, rel=1e-3)
    expected = gradients(partial(squares, model, x), model)
    compiled = compile_interpreted(model, {"recipe": "current", "skip": ["gate", "up"]})
    got = gradients(partial(squares, compiled, x), model)
    lost = [10 ** (-sqnr_db(expected[name], got[name]) / 10) for name in expected]
    assert found.groups[1].gradient_noise == pytest.approx(statistics.mean(lost), rel=1e-3)


def test_a_factor_that_was_folded_into_a_scale_counts() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 0.25

    model, x = Scaled(64, 32, bias=False), torch.randn(48, 64)
    explained = fp8compile.explain(model, x)
    assert explained.fp8_share == 1
    found = fp8compile.profile(model, [x], step=squares)
    # Were the factor lost, outputs would be four times as large in one of the runs, or in both.
    assert 1e-4 < found.groups[0].output_noise < 3e-3
    outputs: list[Tensor] = []

    def step(call: Callable[..., Tensor], x: Tensor) -> Tensor:
        outputs.append(call(x).detach())
        return outputs[-1]

    fp8compile.profile(model, [x], step=step, sensitivity=False)
    assert sqnr_db(model(x), outputs[0]) > 100


def test_batches_of_several_sizes_are_one_profile() -> None:
    """Though Dynamo makes a graph of its own for the second size."""
    model, x = MLP(), torch.randn(48, 64)
    one = fp8compile.profile(model, [x], step=squares)
    torch._dynamo.reset()
    both = fp8compile.profile(model, [x, torch.randn(32, 64)], step=squares)
    assert [group.sites for group in both.groups] == [("gate", "up"), ("down",)]
    for before, after in zip(one.groups, both.groups, strict=True):
        assert after.saved_us == before.saved_us is not None
        assert after.edges["input"].rms != before.edges["input"].rms


def test_nothing_is_left_behind() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Dropout(), nn.Linear(64, 64))
    x = torch.randn(48, 64)
    squares(model, x).backward()
    before = copy.deepcopy(model)
    grads = [p.grad for p in model.parameters()]
    random = torch.get_rng_state()
    fp8compile.profile(model, [x], step=squares)
    assert all(a is b for a, b in zip(grads, (p.grad for p in model.parameters()), strict=True))
    assert torch.equal(random, torch.get_rng_state())
    for (name, now), then in zip(
        model.state_dict().items(), before.state_dict().values(), strict=True
    ):
        assert torch.equal(now, then), name
    assert fp8compile.state_dict(model) == {}


def test_without_a_loss_nothing_is_known_of_gradients() -> None:
    found = fp8compile.profile(nn.Linear(64, 32), [torch.randn(48, 64)])
    assert list(found.groups[0].edges) == ["input", "weight"]
    assert found.groups[0].gradient_noise is None and found.groups[0].output_noise
    assert "gradients not measured" in str(found)


@pytest.mark.parametrize("batch", [(torch.ones(16, 16),), {"input": torch.ones(16, 16)}])
def test_batches_of_arguments(batch: Any) -> None:
    found = fp8compile.profile(nn.Linear(16, 16), [batch], sensitivity=False)
    assert found.groups[0].edges["input"].amax == 1


def test_nothing_to_profile() -> None:
    with pytest.raises(OptionError, match="at least one batch"):
        fp8compile.profile(nn.Linear(16, 16), [])
    for wrong in (torch.ones(16, 16), 3):
        with pytest.raises(OptionError, match=r"of type \w+; give a list .* such as \[x\]"):
            fp8compile.profile(nn.Linear(16, 16), wrong)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="no GEMM of this model can run in FP8"):
        fp8compile.profile(nn.ReLU(), [torch.ones(16, 16)])


def test_the_table() -> None:
    text = str(fp8compile.profile(MLP(), [torch.randn(48, 64)], step=squares))
    assert "gate, up" in text and "3 sites in 2 groups" in text
    assert text.count("grad_output") == 2


# --- files --------------------------------------------------------------------------------------


def test_saved_and_loaded(tmp_path: Path) -> None:
    found = fp8compile.profile(MLP(), [torch.randn(48, 64)], step=squares)
    found.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == found
    options = parse_options({"profile": tmp_path / "profile.json", "formats": "auto"})
    assert options.profile == found


@pytest.mark.parametrize(
    "change",
    [
        lambda held: held.pop("groups"),
        lambda held: held.update(more=1),
        lambda held: held.update(version=0),
        lambda held: held["groups"][0].pop("sites"),
        lambda held: held.update(version="1"),
        lambda held: held.update(groups={"a": 1}),
        lambda held: held.update(left_out="0"),
        lambda held: held["groups"][0].update(sites="0"),
        lambda held: held["groups"][0].update(edges=None),
        lambda held: held["groups"][0].update(output_noise="a lot"),
        lambda held: held["groups"][0].update(output_noise=-1),
        lambda held: held["groups"][0].update(saved_us="much"),
        lambda held: held["groups"][0]["edges"].update(input={}),
        lambda held: held["groups"][0]["edges"].update(output=held["groups"][0]["edges"]["input"]),
        lambda held: held["groups"][0]["edges"]["input"].update(noise={}),
        lambda held: held["groups"][0]["edges"]["input"].update(amax=None),
    ],
)
def test_other_files_are_refused(
    change: Callable[[dict[str, Any]], object], tmp_path: Path
) -> None:
    file = tmp_path / "profile.json"
    fp8compile.profile(nn.Linear(16, 16), [torch.ones(16, 16)]).save(file)
    held = json.loads(file.read_text())
    change(held)
    file.write_text(json.dumps(held))
    with pytest.raises(OptionError, match=r"profile\.json holds no profile of version 1: "):
        Profile.load(file)


@pytest.mark.parametrize("name", ["missing.json", "."])
def test_a_file_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"cannot be read: .*; give the path that Profile\.save"):
        parse_options({"profile": tmp_path / name})


@pytest.mark.parametrize("look", ["profile", "calibrate", "measure"])
def test_a_model_without_data_is_refused(look: str) -> None:
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(48, 64)
    with pytest.raises(OptionError, match=r"0\.weight has no data \(it is on meta, or fake"):
        if look == "measure":
            fp8compile.Monitor(model).measure(x)
        else:
            getattr(fp8compile, look)(model, [x])


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    for content in (b'{"version": 1, "gro', b"[]", b"\xff\xfe\x00"):
        file.write_bytes(content)
        with pytest.raises(OptionError, match="holds no profile"):
            Profile.load(file)


# --- formats ------------------------------------------------------------------------------------


def seen(e4m3: float, e5m2: float) -> Seen:
    return Seen(1.0, 1.0, {}, {"e4m3": e4m3, "e5m2": e5m2}, {}, {})


def profile_of(**edges: Seen) -> Profile:
    return Profile((Group(("fc",), edges),))


FINE, COARSE = (1e-3, 4e-3), (4e-3, 1e-3)


@pytest.mark.parametrize(
    ("noise", "formats"),
    [
        ((FINE, FINE, FINE), "e4m3 e4m3 e4m3"),
        ((FINE, FINE, COARSE), "e4m3 e4m3 e5m2"),
        ((COARSE, FINE, FINE), "e5m2 e4m3 e4m3"),
        # No GEMM takes two of them: the one that needs it most has it.
        (((9e-3, 1e-3), FINE, COARSE), "e5m2 e4m3 e4m3"),
    ],
)
def test_the_formats_that_lose_least(noise: Any, formats: str) -> None:
    names = [str(operand) for operand in Operand]
    found = profile_of(**{name: seen(*each) for name, each in zip(names, noise, strict=True)})
    chosen = found.formats_of("fc", RECIPES["delayed"])
    assert " ".join(str(fmt) for _, fmt in chosen) == formats


def test_a_draw_leaves_the_recipes_formats() -> None:
    for gain_db, changes in ((HYSTERESIS_DB - 0.1, False), (HYSTERESIS_DB + 0.1, True)):
        found = profile_of(grad_output=seen(1e-3, 1e-3 * 10 ** (gain_db / 10)))
        chosen = dict(found.formats_of("fc", RECIPES["delayed"]))
        assert (chosen[Operand.GRAD_OUTPUT] is Format.E4M3) is changes


def test_two_e5m2_where_no_gemm_multiplies_them() -> None:
    kept = replace(RECIPES["delayed"], high_precision=(Gemm.WGRAD,))
    found = profile_of(input=seen(*COARSE), weight=seen(*FINE), grad_output=seen(*COARSE))
    formats = [str(fmt) for _, fmt in found.formats_of("fc", kept)]
    assert formats == ["e5m2", "e4m3", "e5m2"]


def test_a_site_that_the_profile_does_not_know() -> None:
    with pytest.raises(OptionError, match="has not seen the site 'other'; it knows"):
        profile_of(input=seen(*FINE)).formats_of("other", RECIPES["delayed"])


class Weighted(nn.Module):
    """Tokens with small embeddings and a small part in the loss, over many octaves.

    What the norm does in backward makes all gradients of embeddings equally large again.
    """

    def __init__(self, octaves: float, tokens: int = 64, width: int = 64) -> None:
        super().__init__()
        share = 2.0 ** -torch.linspace(0, octaves, tokens)[:, None]
        self.register_buffer("share", share)
        self.embed = nn.Parameter(torch.randn(tokens, width) * share)
        self.norm = nn.RMSNorm(width, eps=0.0)
        self.fc = nn.Linear(width, width, bias=False)

    def forward(self, target: Tensor) -> Tensor:
        return ((self.fc(self.norm(self.embed)) - target).square() * self.share).sum()


@pytest.mark.parametrize(("octaves", "right"), [(4, "e4m3"), (24, "e5m2")])
def test_auto_formats_follow_the_range_of_gradients(octaves: float, right: str) -> None:
    model, target = Weighted(octaves), torch.randn(64, 64)
    found = fp8compile.profile(model, [target], sensitivity=False)
    want = gradients(partial(model, target), model)
    worst = {}
    options: dict[str, dict[str, Any]] = {
        "e5m2": {"recipe": "delayed"},
        "e4m3": {"recipe": "e4m3_only"},
        "auto": {"profile": found, "formats": "auto"},
    }
    for name, each in options.items():
        compiled = compile_interpreted(model, each)
        got = gradients(partial(compiled, target), model)
        worst[name] = min(sqnr_db(want[key], got[key]) for key in want)
        torch._dynamo.reset()
    (wrong,) = {"e4m3", "e5m2"} - {right}
    assert worst["auto"] == worst[right] > worst[wrong] + 2


def test_llama_gradients_with_auto_formats() -> None:
    """E4M3 everywhere here, at settled scales."""
    model, ids = Llama(), torch.randint(0, 256, (4, 64))

    def step(call: Callable[..., Tensor], ids: Tensor) -> Tensor:
        return F.cross_entropy(call(ids).flatten(0, 1), ids.roll(-1, 1).flatten())

    found = fp8compile.profile(model, [ids], step=step, sensitivity=False)
    want = gradients(partial(step, model, ids), model)
    compiled = compile_interpreted(model, {"profile": found, "formats": "auto"})
    for _ in range(3):
        got = gradients(partial(step, compiled, ids), model)
        fp8compile.update_scales(model)
    quality = {name: sqnr_db(want[name], got[name]) for name in want}
    assert {name: db for name, db in quality.items() if db < 21} == {}
    assert statistics.median(quality.values()) >= 22.5


def test_only_sites_whose_formats_differ_have_a_recipe_of_their_own() -> None:
    model, x = MLP(), torch.randn(48, 64)
    found = fp8compile.profile(model, [x], step=squares, sensitivity=False)
    options = {"profile": found, "formats": "auto"}
    for recipe, own in (("delayed", "delayed with chosen formats"), ("e4m3_only", "")):
        rows = fp8compile.explain(model, x, options={**options, "recipe": recipe}).rows
        assert {(row.recipe, row.formats) for row in rows} == {(own, "e4m3 x e4m3")}


# --- the budget ---------------------------------------------------------------------------------


def test_what_costs_most_per_microsecond_stays_in_high_precision() -> None:
    groups = [
        Group(("cheap",), {}, output_noise=1e-4, saved_us=10.0),
        Group(("dear",), {}, output_noise=2e-3, saved_us=1.0),
        Group(("fast",), {}, output_noise=3e-3, saved_us=1000.0),
        Group(("slow",), {}, output_noise=1e-6, saved_us=-5.0),
    ]
    profile = Profile(tuple(groups))
    assert list(profile.kept_for(20)) == []
    assert list(profile.kept_for(23)) == ["slow", "dear"]
    assert list(profile.kept_for(26)) == ["slow", "dear", "cheap", "fast"]
    assert profile.kept_for(23)["dear"] == "kept by the error budget of 23 dB: alone it has 27.0 dB"


class Outlier(nn.Module):
    """A residual block between two linear layers, the second of which has an outlier in its way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.last = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.first(x))
        spike = torch.zeros_like(h)
        spike[0, 0] = 1e6
        h = h + self.second(h + spike)[1:].mean() + h
        return self.last(h)


def test_the_budget_is_kept() -> None:
    model, x = Outlier(), torch.randn(48, 64)
    found = fp8compile.profile(model, [x], step=squares)
    assert found.groups[1].sites == ("second",)
    options = {"recipe": "current", "profile": found, "decline_slower": False}
    want = gradients(partial(squares, model, x), model)
    quality = {}
    for budget in (None, 20.0):
        torch._dynamo.reset()
        rows = fp8compile.explain(model, x, options={**options, "error_budget_db": budget}).rows
        kept = {row.fqn for row in rows if not row.is_fp8}
        compiled = compile_interpreted(model, {**options, "error_budget_db": budget})
        got = gradients(partial(squares, compiled, x), model)
        lost = [10 ** (-sqnr_db(want[name], got[name]) / 10) for name in want]
        quality[budget] = -10 * torch.tensor(statistics.mean(lost)).log10()
        assert "second" in kept if budget else not kept
    assert quality[20.0] > 20 > quality[None]


def test_strict_accepts_what_the_budget_keeps() -> None:
    model, x = MLP(), torch.randn(48, 64)
    found = fp8compile.profile(model, [x], step=squares)
    options = {"profile": found, "error_budget_db": 100.0, "strict": True}
    out = compile_interpreted(model, options)(x)
    assert sqnr_db(model(x), out) > 100


@pytest.mark.parametrize("decision", [{"formats": "auto"}, {"error_budget_db": 60.0}])
def test_a_profile_of_another_model_is_refused(decision: dict[str, Any]) -> None:
    found, x = profile_of(input=seen(*FINE)), torch.randn(48, 64)
    compiled = compile_interpreted(nn.Sequential(nn.Linear(64, 64)), {"profile": found, **decision})
    with pytest.raises(Exception, match="has not seen the site '0'; it knows") as caught:
        compiled(x)
    assert isinstance(caught.value.inner_exception, OptionError)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"formats": "auto"}, "needs to know the model"),
        ({"error_budget_db": 20.0}, "needs to know the model"),
        ({"error_budget_db": -1}, "give the SQNR"),
        ({"error_budget_db": True}, "give the SQNR"),
        ({"formats": "best"}, "choose one of"),
        ({"profile": 3}, "it must be a Profile"),
    ],
)
def test_what_is_wrong_with_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_options(options)


# --- for inference ------------------------------------------------------------------------------


def served(call: Callable[..., Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return call(x)


def blocks() -> nn.Sequential:
    """Four layers; the second one's weights, and what they add, are large."""
    model = nn.Sequential(*(MLP() for _ in range(4))).eval()
    with torch.no_grad():
        model[1].down.weight.mul_(8)
    return model


@pytest.mark.parametrize("how", ["eval", "no_grad"])
def test_a_profile_for_inference_runs_without_gradients(how: str) -> None:
    """Nobody asks for a backward, whose GEMMs would count in what FP8 saves."""
    model, x, enabled = MLP().train(how != "eval"), torch.randn(512, 64), []
    model.register_forward_hook(lambda *_: enabled.append(torch.is_grad_enabled()))
    with torch.set_grad_enabled(how == "eval"):
        found = fp8compile.profile(model, [x])
    trained = fp8compile.profile(model.train(), [x], step=squares, sensitivity=False)
    assert enabled[0] is False and enabled[-1] is True
    assert torch.is_grad_enabled()
    for group, other in zip(found.groups, trained.groups, strict=True):
        assert group.gradient_noise is None and group.output_noise
        assert list(group.edges) == ["input", "weight"]
        assert group.saved_us != other.saved_us
    assert "gradients not measured" in str(found)


def test_what_inference_loses_by_each_group() -> None:
    """The SQNR of outputs with a group alone in FP8 is what serves when all others are skipped."""
    model, x = blocks(), torch.randn(48, 64)
    found = fp8compile.profile(model, [x], options={"recipe": "current"})
    assert len(found.groups) == 8
    exact = served(model, x)
    for group in (found.groups[0], found.groups[3]):
        options = {"recipe": "current", "skip": lambda fqn, group=group: fqn not in group.sites}
        torch._dynamo.reset()
        alone = sqnr_db(exact, served(compile_interpreted(model, options), x))
        assert -10 * torch.tensor(group.output_noise).log10() == pytest.approx(alone, abs=0.1)


def test_the_budget_of_inference_is_kept_by_the_fewest_groups() -> None:
    model, x = blocks(), torch.randn(48, 64)
    found = fp8compile.profile(model, [x], options={"recipe": "current"})
    found = replace(found, groups=tuple(replace(g, saved_us=None) for g in found.groups))
    exact = served(model, x)
    options = {"recipe": "current", "profile": found}
    all_fp8 = sqnr_db(exact, served(compile_interpreted(model, options), x))
    budget = all_fp8 + 3
    kept = found.kept_for(budget)
    assert 0 < len(kept) < 12
    torch._dynamo.reset()
    options["error_budget_db"] = budget
    out = served(compile_interpreted(model, options), x)
    assert sqnr_db(exact, out) > budget - 0.5
    noise = sorted((g.output_noise for g in found.groups), reverse=True)
    count = sum(g.sites[0] in kept for g in found.groups)
    assert sum(noise[count:]) <= 10 ** (-budget / 10) < sum(noise[count - 1 :])


def test_which_groups_cost_most() -> None:
    noise = {"a": 1e-4, "b": 1e-2, "c": 1e-3}
    groups = tuple(Group((name,), {}, each) for name, each in noise.items())
    table = Profile(groups).sensitivity()
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert rows == [
        ("b", "20.0 dB", "29.6 dB"),
        ("c", "30.0 dB", "40.0 dB"),
        ("a", "40.0 dB", "exact"),
    ]
    unmeasured = Profile((Group(("a",), {}),)).sensitivity()
    assert [list(c.cells) for c in unmeasured.columns] == [["a"], ["not measured"], [""]]


@pytest.mark.parametrize("first", ["serve", "profile"])
def test_a_profile_and_what_serves_do_not_share_weights(first: str) -> None:
    """Both have the same graph of casts; only one of them casts."""
    model, x = blocks(), torch.randn(48, 64)
    alone = served(compile_interpreted(copy.deepcopy(model), {"recipe": "current"}), x)
    compiled = compile_interpreted(model, {"recipe": "current"})
    if first == "serve":
        assert torch.equal(served(compiled, x), alone)
    found = fp8compile.profile(model, [x], options={"recipe": "current"})
    assert torch.equal(served(compiled, x), alone)
    again = fp8compile.profile(copy.deepcopy(model), [x], options={"recipe": "current"})
    assert found == again
