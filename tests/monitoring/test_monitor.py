"""What a Monitor records, when, and for how long."""

from __future__ import annotations

import copy
import gc
import importlib
import math
import pickle
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fp8compile
from fp8compile import Events, Format, Monitor, MonitorError, Record
from fp8compile.ir import SLOTS_PER_SITE
from fp8compile.states import states_of
from tests.helpers import compile_interpreted
from tests.models import MLP
from tests.monitoring.common import ROLES, edges, rows_of, sgd, train, two_layers

pytestmark = pytest.mark.filterwarnings("ignore:FP8 is emulated here")


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


def test_records_are_values_that_a_pickle_finds_again() -> None:
    record = Record(1, "fc", "weight", Format.E4M3, scale=2.0, events=Events(0, 1, 0))
    assert pickle.loads(pickle.dumps(record)) == record
    assert pickle.loads(b"cfp8compile.records\nRecord\n.") is Record


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
    assert monitor._samples[0].values.shape == (5, 2 * SLOTS_PER_SITE), "one tensor for all edges"


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
    states = importlib.import_module("fp8compile.states")
    assert len(states._listeners) == 2
    del model
    torch._dynamo.reset()
    gc.collect()
    assert not any(ref() for ref in alive) and not states._listeners
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
