"""Monitor: what it records and when, where it writes, and what it says where it cannot."""

from __future__ import annotations

import copy
import csv
import gc
import importlib
import math
import pickle
import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fp8compile
from fp8compile import Events, Format, Monitor, MonitorError, OptionError, Record
from fp8compile.ops import SATURATED
from fp8compile.recipe import RECIPES
from fp8compile.records import COLUMNS
from fp8compile.scaling import states_of
from tests.helpers import compile_interpreted
from tests.models import MLP, sqnr_db

pytestmark = pytest.mark.filterwarnings("ignore:FP8 is emulated here")
README = Path(__file__).parents[1] / "README.md"
ROLES = ("input", "weight", "grad_output")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    scaling = importlib.import_module("fp8compile.scaling")
    scaling._listeners.clear()  # tests leave monitors open


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01)


def train(call: Callable[..., Tensor], optimizer: Any, steps: int) -> None:
    """Steps on one batch, so that nothing outgrows its scale."""
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        call(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def edges(records: list[Record], step: int) -> set[tuple[str, str]]:
    return {(r.site, r.operand) for r in records if r.step == step}


# --- what is recorded ---------------------------------------------------------------------------


def test_records_are_what_the_state_holds() -> None:
    model, x = two_layers(), torch.randn(16, 32)
    compiled, optimizer = compile_interpreted(model), sgd(model)
    monitor = Monitor(model, every=1)
    weight = model[0].weight.detach().clone()
    compiled(x).square().mean().backward()
    optimizer.step()
    records = monitor.records
    # The input needs no gradient, so there is no dgrad; but wgrad casts the gradient.
    assert edges(records, 1) == {(site, role) for site in ("0", "2") for role in ROLES}
    by_edge = {(r.site, r.operand): r for r in records}
    assert by_edge["0", "input"].amax == float(x.abs().max())
    assert by_edge["0", "weight"].amax == float(weight.abs().max())
    for key, state in fp8compile.state_dict(model).items():
        if key.endswith(".scale"):
            scales = [by_edge[key.removesuffix(".weight.scale"), role].scale for role in ROLES]
            assert scales == state.tolist()
    for record in records:
        gradient = record.operand == "grad_output"
        assert record.format is (Format.E5M2 if gradient else Format.E4M3)
        assert record.events == Events(0, 0, 0) and record.sqnr_db is None
        assert record.headroom == pytest.approx(0, abs=1e-5) and not record.is_measured


def test_the_interval_counts_optimizer_steps() -> None:
    model = two_layers()
    monitor = Monitor(model, every=3)
    train(compile_interpreted(model), sgd(model), 8)
    assert monitor.step == 8
    assert list(dict.fromkeys(r.step for r in monitor.records)) == [3, 6]


def test_nothing_leaves_the_device_between_intervals() -> None:
    model = two_layers()
    monitor = Monitor(model, every=3)
    compiled, optimizer = compile_interpreted(model), sgd(model)
    samples = importlib.import_module("fp8compile.monitoring.samples")
    with mock.patch("fp8compile.monitoring.monitor.sample_of", wraps=samples.sample_of) as copied:
        train(compiled, optimizer, 2)
        assert not copied.called
        train(compiled, optimizer, 1)
    assert copied.call_count == len(states_of(model)) == 1
    assert monitor._samples[0].values.shape == (5, 8), "one tensor for all edges"


def test_events_are_those_of_the_state() -> None:
    model = nn.Linear(32, 32)
    compiled, optimizer = compile_interpreted(model), sgd(model)
    with Monitor(model, every=1) as monitor:
        for scale in (1.0, 100.0, math.inf):
            with warnings.catch_warnings():
                compiled(scale * torch.ones(16, 32)).mean().backward()
            optimizer.zero_grad()  # the weights stay finite
            optimizer.step()
            fp8compile.update_scales(model)
    found = {r.step: r for r in monitor.records if r.operand == "input"}
    assert [found[step].amax for step in (1, 2, 3)] == [1.0, 100.0, None]
    assert found[1].scale == Format.E4M3.max
    assert found[2].scale is None, "the next cast finds its own"
    assert found[2].headroom is None
    assert found[2].events == Events(not_finite=0, saturated=1, jumped=1)
    assert found[3].events == Events(not_finite=1, saturated=1, jumped=1)
    assert fp8compile.events(model)["weight.input"] == found[3].events


def test_several_graphs_are_one_step() -> None:
    model = two_layers()

    def call(x: Tensor) -> Tensor:
        hidden = model[1](model[0](x))
        torch._dynamo.graph_break()
        return model[2](hidden)

    monitor = Monitor(model, every=2)
    train(compile_interpreted(call), sgd(model), 4)
    assert len(states_of(model)) == 2
    assert monitor.step == 4 and {r.step for r in monitor.records} == {2, 4}
    assert edges(monitor.records, 4) == {(site, role) for site in ("0", "2") for role in ROLES}


def test_two_optimizers_end_one_step() -> None:
    model = two_layers()

    def call(x: Tensor) -> Tensor:
        hidden = model[1](model[0](x))
        torch._dynamo.graph_break()
        return model[2](hidden)

    compiled, parts = compile_interpreted(call), (sgd(model[0]), sgd(model[2]))
    monitor = Monitor(model, every=1)
    for _ in range(3):
        compiled(torch.randn(16, 32)).square().mean().backward()
        for optimizer in parts:
            optimizer.step()
    assert monitor.step == 3
    for step in (1, 2, 3):
        assert edges(monitor.records, step) == {(s, r) for s in ("0", "2") for r in ROLES}
    assert len(monitor.records) == 3 * 6, "each state once a step"


def test_a_model_of_another_optimizer_does_not_count() -> None:
    ours, other = two_layers(), two_layers()
    monitor = Monitor(ours, every=1)
    train(compile_interpreted(other), sgd(other), 2)
    assert monitor.step == 0 and not monitor.records
    train(compile_interpreted(ours), sgd(ours), 1)
    assert monitor.step == 1


def test_without_an_optimizer() -> None:
    model = two_layers()
    compiled, monitor = compile_interpreted(model), Monitor(model, every=2)
    for _ in range(4):
        compiled(torch.randn(16, 32)).square().mean().backward()
        fp8compile.update_scales(model)
    assert monitor.step == 4 and {r.step for r in monitor.records} == {2, 4}


def test_update_scales_after_an_optimizer_is_no_second_step() -> None:
    model = two_layers()
    compiled, optimizer, monitor = compile_interpreted(model), sgd(model), Monitor(model, every=1)
    for _ in range(3):
        train(compiled, optimizer, 1)
        fp8compile.update_scales()
    assert monitor.step == 3


def test_update_scales_of_another_model_is_no_step() -> None:
    ours, other = two_layers(), two_layers()
    monitor = Monitor(ours, every=1)
    compiled = [compile_interpreted(model) for model in (ours, other)]
    for call in (compiled[0], compiled[1], compiled[1]):
        call(torch.randn(16, 32)).square().mean().backward()
        fp8compile.update_scales()
    assert monitor.step == 1


def test_accumulation_and_checkpointing() -> None:
    """Micro-batches are one step, whose amax is the largest; a recomputed forward adds nothing."""
    model = two_layers()
    compiled, optimizer = compile_interpreted(model), sgd(model)
    monitor = Monitor(model, every=1)
    batches = [scale * torch.randn(16, 32) for scale in (1, 4, 2)]
    for x in batches:
        checkpoint(compiled, x, use_reentrant=False).square().mean().backward()
    optimizer.step()
    assert monitor.step == 1
    found = {(r.site, r.operand): r for r in monitor.records}
    assert set(found) == {(site, role) for site in ("0", "2") for role in ROLES}
    assert found["0", "input"].amax == max(float(x.abs().max()) for x in batches)
    assert found["0", "input"].events == Events(0, 0, 0)


def test_sites_that_share_an_input_stand_under_the_first() -> None:
    model = MLP(32, 64)
    monitor = Monitor(model, every=1)
    train(compile_interpreted(model), sgd(model), 1)
    assert edges(monitor.records, 1) == {
        (site, role) for site in ("gate", "down") for role in ROLES
    }


def test_eval_is_no_step() -> None:
    model = two_layers()
    compiled, monitor = compile_interpreted(model), Monitor(model, every=1)
    with torch.no_grad():
        compiled(torch.randn(16, 32))
    assert monitor.step == 0 and not monitor.records


def test_a_weight_that_is_used_twice_has_two_edges() -> None:
    model = nn.Linear(32, 32)
    monitor = Monitor(model, every=1)
    compiled = compile_interpreted(lambda x: model(10 * torch.tanh(model(x))))
    train(compiled, sgd(model), 1)
    found = {(r.site, r.operand): r for r in monitor.records}
    assert {site for site, _ in found} == {"weight", "weight#1"}
    x = torch.ones(16, 32)
    measured = {(r.site, r.operand): r for r in monitor.measure(x)}
    assert {site for site, _ in measured} == {"weight"}, "the model itself uses it once"


def test_static_scaling_has_scales_only() -> None:
    model = two_layers()
    options = {"recipe": "static"}
    compiled, monitor = compile_interpreted(model, options), Monitor(model, every=2)
    with pytest.warns(UserWarning, match=r"no amax and no events; monitor\.measure"):
        train(compiled, sgd(model), 4)
    assert {r.step for r in monitor.records} == {2, 4}
    state = fp8compile.state_dict(model)
    for record in monitor.records:
        role = ROLES.index(record.operand)
        assert record.scale == float(state[f"{record.site}.weight.scale"][role])
        assert record.amax is record.events is record.headroom is None


def test_current_scaling_says_that_nothing_is_kept_and_offers_measure() -> None:
    model = two_layers()
    options = {"recipe": "rowwise"}
    compiled, monitor = compile_interpreted(model, options), Monitor(model, 2, options=options)
    with pytest.warns(UserWarning, match="keeps none; monitor.measure") as seen:
        train(compiled, sgd(model), 6)
    assert sum("monitor.measure" in str(each.message) for each in seen) == 1
    assert not monitor.records
    with pytest.raises(MonitorError, match=r"nothing is recorded: .* keeps none; monitor.measure"):
        monitor.plot()
    found = monitor.measure(torch.randn(16, 32))
    assert [(r.step, r.scale) for r in found] == [(6, None)] * 4 and monitor.records == found


def test_sites_with_current_scales_are_named() -> None:
    model = two_layers()
    options = {"overrides": {"2": "rowwise"}}
    compiled, monitor = compile_interpreted(model, options), Monitor(model, 1, options=options)
    with pytest.warns(UserWarning, match="the recipes of 2 keep no scales"):
        train(compiled, sgd(model), 1)
    assert {r.site for r in monitor.records} == {"0"}
    assert {r.site for r in monitor.measure(torch.randn(16, 32))} == {"0", "2"}


def test_names_are_those_of_the_model_that_is_given() -> None:
    model = two_layers()
    outer = nn.ModuleDict({"net": model})
    compiled = torch.compile(model, backend="eager")  # what torch.compile returns is unwrapped
    whole, part = Monitor(outer, 1), Monitor(compiled, 1)
    train(compile_interpreted(model), sgd(model), 1)
    assert {r.site for r in whole.records} == {"net.0", "net.2"}
    assert {r.site for r in part.records} == {"0", "2"}


# --- measure ------------------------------------------------------------------------------------


def squares(call: Callable[..., Tensor], x: Tensor) -> Tensor:
    return call(x).square().mean()


def test_measure_casts_with_the_scales_of_the_state() -> None:
    """A batch four times as large as those of training is clipped, by its own count."""
    model = two_layers()
    compiled, optimizer = compile_interpreted(model), sgd(model)
    monitor = Monitor(model, every=1)
    train(compiled, optimizer, 2)
    scale = float(fp8compile.state_dict(model)["0.weight.scale"][0])
    x = 4 * torch.randn(16, 32)
    x[0, :8] = 0.0
    x[1, 0] = 1e-6
    found = {(r.site, r.operand): r for r in monitor.measure(x, step=squares)}
    assert set(found) == {(site, role) for site in ("0", "2") for role in ROLES}
    record = found["0", "input"]
    assert (record.scale, record.amax, record.step) == (scale, float(x.abs().max()), 2)
    clipped = (x.abs() * scale > SATURATED * Format.E4M3.max).float().mean()
    assert record.saturated_share == pytest.approx(float(clipped)) and clipped > 0
    cast = (x * scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() / scale
    assert record.underflowed_share == pytest.approx(1 / (16 * 32 - 8))
    assert record.sqnr_db == pytest.approx(sqnr_db(x, cast), abs=1e-3)
    assert record.events is None and record.is_measured
    histogram = monitor.measured["0", "input"]
    assert int(histogram.counts.sum()) == histogram.nonzero == 16 * 32 - 8


def test_measure_leaves_everything_as_it_was() -> None:
    model = two_layers()
    compiled, optimizer = compile_interpreted(model), sgd(model)
    monitor = Monitor(model, every=100)
    train(compiled, optimizer, 2)
    state = {key: value.clone() for key, value in fp8compile.state_dict(model).items()}
    gradients, generator = [p.grad for p in model.parameters()], torch.get_rng_state()
    monitor.measure(torch.randn(16, 32, generator=torch.Generator()), step=squares)
    assert all(torch.equal(value, state[k]) for k, value in fp8compile.state_dict(model).items())
    assert [p.grad for p in model.parameters()] == gradients
    assert torch.equal(torch.get_rng_state(), generator) and monitor.step == 2


@pytest.mark.parametrize("recipe", ["current", "static", "rowwise", "blockwise", "mx"])
def test_measure_knows_every_recipe(recipe: str) -> None:
    model = two_layers()
    monitor = Monitor(model, options={"recipe": recipe})
    x = torch.randn(16, 32)
    found = {(r.site, r.operand): r for r in monitor.measure(x, step=squares)}
    assert set(found) == {(site, role) for site in ("0", "2") for role in ROLES}
    one_scale = RECIPES[recipe].is_tensorwise
    for record in found.values():
        assert (record.scale is not None) == one_scale and record.saturated_share == 0
        floor = 28 if record.format is Format.E4M3 else 22
        assert record.sqnr_db is not None and floor < record.sqnr_db < 45


def test_measure_of_what_is_not_finite_or_zero() -> None:
    model = nn.Linear(32, 32)
    monitor = Monitor(model)
    for value, amax in ((math.nan, None), (math.inf, None), (0.0, 0.0)):
        record = monitor.measure(torch.full((16, 32), value))[0]
        assert (record.amax, record.sqnr_db, record.underflowed_share) == (amax, None, 0.0)


def test_measure_with_the_options_of_another_compile() -> None:
    model = two_layers()
    train(compile_interpreted(model, {"recipe": "e4m3_only"}), sgd(model), 1)
    with pytest.raises(OptionError, match=r"e4m3_only .* options say delayed .* Monitor\(model, o"):
        Monitor(model).measure(torch.randn(16, 32))
    assert Monitor(model, options={"recipe": "e4m3_only"}).measure(torch.randn(16, 32))


def test_measure_of_a_model_without_gemms() -> None:
    model = nn.LayerNorm(32)
    with pytest.raises(OptionError, match="nothing to measure"):
        Monitor(model).measure(torch.randn(16, 32))


# --- where it writes ----------------------------------------------------------------------------


class Writer:
    """What a Monitor needs of TensorBoard's SummaryWriter."""

    def __init__(self) -> None:
        self.scalars: dict[str, dict[int, float]] = {}

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.scalars.setdefault(tag, {})[global_step] = scalar_value


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_several_sinks_at_once(tmp_path: Path) -> None:
    model = two_layers()
    writer, called, path = Writer(), [], tmp_path / "run.csv"
    monitor = Monitor(model, every=2, to=[writer, str(path), called.append])
    train(compile_interpreted(model), sgd(model), 4)
    records = monitor.records
    assert called == records and len(records) == 2 * 6
    rows = rows_of(path)
    assert list(rows[0]) == list(COLUMNS)
    for row, record in zip(rows, records, strict=True):
        assert (row["step"], row["site"]) == (str(record.step), record.site)
        assert (row["operand"], row["format"]) == (record.operand, str(record.format))
        assert torch.tensor(float(row["amax"])) == record.amax, "no bit of a float32 is lost"
        assert torch.tensor(float(row["scale"])) == record.scale
        assert row["saturated"] == "0" and row["sqnr_db"] == ""
        assert writer.scalars[f"fp8_scale/{record.site}.{record.operand}"][record.step] == (
            record.scale
        )
    assert {tag.partition("/")[0] for tag in writer.scalars} == {"fp8_amax", "fp8_scale"}
    monitor.measure(torch.randn(16, 32))
    assert "fp8_sqnr_db/0.input" in writer.scalars and float(rows_of(path)[-1]["sqnr_db"]) > 20


def test_a_run_goes_on_in_its_csv(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    model = two_layers()
    compiled, optimizer = compile_interpreted(model), sgd(model)
    with Monitor(model, every=2, to=path):
        train(compiled, optimizer, 4)
    whole = path.read_text()
    path.write_text(whole + "6,0,inp")  # it was killed here
    with Monitor(model, every=2, to=path) as monitor:
        assert monitor.step == 4 and path.read_text() == whole
        train(compiled, optimizer, 2)
    assert path.read_text().startswith(whole)
    steps = [row["step"] for row in rows_of(path)]
    assert steps == ["2"] * 6 + ["4"] * 6 + ["6"] * 6
    with Monitor(model, every=2, to=path, step=100) as monitor:
        assert monitor.step == 100


@pytest.mark.parametrize("content", ["", "step,si", ",".join(COLUMNS), ",".join(COLUMNS) + "\r\n"])
def test_a_csv_that_has_no_rows_yet(content: str, tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    path.write_text(content, newline="")
    model = two_layers()
    with Monitor(model, every=1, to=path) as monitor:
        assert monitor.step == 0
        train(compile_interpreted(model), sgd(model), 1)
    assert path.read_text().count("step") == 1 and len(rows_of(path)) == 6


def test_a_long_csv_is_read_from_its_end(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    rows = "".join(f"{step},0,input,e4m3,1,448,0,0,0,,,\r\n" for step in range(1, 5001))
    path.write_text(",".join(COLUMNS) + "\r\n" + rows + "50", newline="")
    assert path.stat().st_size > 2**17
    assert Monitor(two_layers(), to=path).step == 5000
    assert path.read_text().endswith("0,0,0,,,\n")


def test_a_file_of_another_kind_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.csv"
    path.write_text("mine\n")
    with pytest.raises(OptionError, match="does not begin with the columns"):
        Monitor(two_layers(), to=path)
    assert path.read_text() == "mine\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"to": 3}, "cannot write to 3"),
        ({"every": 0}, "every=0: give a number"),
        ({"every": 2.5}, "every=2.5: give a number"),
        ({"options": {"recipes": "delayed"}}, "recipes"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        Monitor(two_layers(), **arguments)


def test_a_function_has_no_names() -> None:
    with pytest.raises(OptionError, match=r"give it an nn\.Module"):
        Monitor(F.relu)  # type: ignore[arg-type]


def test_an_exception_of_a_callback_reaches_the_training_loop() -> None:
    model = two_layers()

    def stop(record: Record) -> None:
        raise KeyboardInterrupt

    monitor = Monitor(model, every=1, to=stop)
    with pytest.raises(KeyboardInterrupt):
        train(compile_interpreted(model), sgd(model), 1)
    assert len(monitor.records) == 6, "and is not raised again"


# --- what has to arrive first -------------------------------------------------------------------


def test_samples_of_a_gpu_are_written_a_step_later() -> None:
    """The copy is awaited when the next step has been launched, or when somebody asks."""
    model, called = two_layers(), []
    monitor = Monitor(model, every=1, to=called.append)
    compiled, optimizer, events = compile_interpreted(model), sgd(model), []
    samples = importlib.import_module("fp8compile.monitoring.samples")

    def on_a_gpu(*args: Any) -> Any:
        events.append(mock.Mock())
        sample = samples.sample_of(*args)
        return samples.replace(sample, arrived=events[-1])

    with mock.patch("fp8compile.monitoring.monitor.sample_of", on_a_gpu):
        train(compiled, optimizer, 1)
        sgd(model).step()  # a second optimizer, in the same step
        assert not called and not events[0].synchronize.called
        train(compiled, optimizer, 1)
        assert {r.step for r in called} == {1} and events[0].synchronize.call_count == 1
        assert not events[1].synchronize.called
        monitor.close()
    assert {r.step for r in called} == {1, 2} and events[1].synchronize.call_count == 1


# --- its life -----------------------------------------------------------------------------------


def test_close_ends_recording() -> None:
    model = two_layers()
    compiled, optimizer = compile_interpreted(model), sgd(model)
    with Monitor(model, every=1) as monitor:
        train(compiled, optimizer, 1)
    train(compiled, optimizer, 1)
    monitor.close()
    assert monitor.step == 1 and len(monitor.records) == 6


def test_a_monitor_keeps_neither_model_nor_states_alive(tmp_path: Path) -> None:
    """And nobody has to hold it: it records as long as the model lives."""
    path, model = tmp_path / "run.csv", two_layers()
    Monitor(model, every=1, to=path)
    monitor = Monitor(model, every=1)
    gc.collect()
    train(compile_interpreted(model), sgd(model), 1)
    assert len(rows_of(path)) == 6
    alive = [weakref.ref(model), *map(weakref.ref, states_of(model))]
    scaling = importlib.import_module("fp8compile.scaling")
    assert len(scaling._listeners) == 2
    del model
    torch._dynamo.reset()
    gc.collect()
    assert not any(ref() for ref in alive) and not scaling._listeners
    assert len(monitor.records) == 6
    with pytest.raises(MonitorError, match="no longer exists"):
        monitor.measure(torch.randn(16, 32))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_monitor_cannot_be_copied(duplicate: Callable[[Any], Any]) -> None:
    monitor = Monitor(two_layers())
    with pytest.raises(MonitorError, match=r"neither copied nor pickled.*make a new one"):
        duplicate(monitor)


def test_a_copy_of_the_model_is_another_model() -> None:
    model = two_layers()
    monitor = Monitor(model, every=1)
    train(compile_interpreted(model), sgd(model), 1)
    twin = copy.deepcopy(model)
    train(compile_interpreted(twin), sgd(twin), 2)
    assert monitor.step == 1


# --- pictures -----------------------------------------------------------------------------------


def test_plot_shows_scales_and_amax_of_every_role(tmp_path: Path) -> None:
    model = two_layers()
    monitor = Monitor(model, every=1)
    compiled, optimizer = compile_interpreted(model), sgd(model)
    train(compiled, optimizer, 3)
    compiled(100 * torch.randn(16, 32)).square().mean().backward()
    optimizer.step()
    figure = monitor.plot(tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["input (e4m3)", "weight (e4m3)", "grad_output (e5m2)"]
    medians = figure.axes[0].lines[0].get_xydata()
    records = [r for r in monitor.records if r.operand == "input" and r.step == 2]
    expected = sum(math.log2(r.scale or 1) for r in records) / 2
    assert medians[1].tolist() == pytest.approx([2, expected])
    heat = figure.axes[3]
    assert [label.get_text() for label in heat.get_yticklabels()] == ["0", "2"]
    marked = heat.collections[-1].get_offsets().tolist()
    assert [4, 0] in marked, "the input of 0 has outgrown its scale in step 4"


def test_plot_of_measured_records_only(tmp_path: Path) -> None:
    model = two_layers()
    monitor = Monitor(model, options={"recipe": "rowwise"})
    monitor.measure(torch.randn(16, 32))
    texts = [text.get_text() for axes in monitor.plot().axes for text in axes.texts]
    assert texts == ["no scale per tensor"] * 2
    assert monitor.plot_edge("2", "weight", tmp_path / "edge.svg")
    assert b"<svg" in (tmp_path / "edge.svg").read_bytes()


def test_plot_edge_colours_what_is_lost() -> None:
    model = MLP(32, 64)
    monitor = Monitor(model, every=1)
    train(compile_interpreted(model), sgd(model), 1)
    x = torch.randn(16, 32)
    with torch.no_grad():
        model.norm.weight.copy_(8.0 ** torch.arange(1, -31, -1))  # from 8 to 2^-90
    monitor.measure(x)
    figure = monitor.plot_edge("up", "input")  # which shares its scale with gate
    histogram, grids = figure.axes
    labels = [text.get_text() for text in histogram.get_legend().get_texts()]
    assert labels == ["becomes zero", "representable in e4m3", "saturates"]
    edge = monitor.measured["gate", "input"]
    heights = sum(bar.get_height() for bar in histogram.patches)
    assert heights == pytest.approx(1) and edge.underflowed > edge.nonzero / 2
    e4m3, e5m2 = (len(lines.get_segments()) for lines in grids.collections)
    assert (e4m3, e5m2) == (126, 123), "finite values above zero, OCP 8-bit specification"


def test_plots_say_what_they_lack() -> None:
    model = two_layers()
    monitor = Monitor(model, every=10)
    train(compile_interpreted(model), sgd(model), 2)
    with pytest.raises(MonitorError, match="2 steps have ended, and every=10"):
        monitor.plot()
    with pytest.raises(MonitorError, match=r"call monitor\.measure"):
        monitor.plot_edge("0")
    monitor.measure(torch.randn(16, 32))
    with pytest.raises(MonitorError, match=r"no edge '1', 'input' is measured; there are 0 input"):
        monitor.plot_edge("1")
    with (
        mock.patch.dict("sys.modules", {"matplotlib.figure": None}),
        pytest.raises(MonitorError, match="pip install matplotlib"),
    ):
        monitor.plot()


# --- the README ---------------------------------------------------------------------------------


def test_the_example_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    section = README.read_text().split("\n## Watch the numbers\n")[1].split("\n## ")[0]
    code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    names: dict[str, Any] = {}
    exec(code, names)
    monitor = names["monitor"]
    assert {r.step for r in monitor.records} == {10, 20, 30}
    assert len(rows_of(tmp_path / "scales.csv")) == len(monitor.records)
    assert {file.suffix for file in tmp_path.iterdir()} == {".csv", ".png"}
