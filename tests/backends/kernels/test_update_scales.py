"""The delayed-scaling step, bit for bit against torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp8compile.backends.kernels.update_scales import update_scales

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def apart(history: Tensor, limit: float) -> Tensor:
    seen = history > 0
    return (history > limit * history.where(seen, torch.inf).amin(0)).any(0)


def reference_update(
    state: dict[str, Tensor], position: int, jump_limit: float, saturation_limit: float
) -> None:
    amax = torch.maximum(state["amax_fwd"], state["amax_bwd"])
    bad = ~amax.isfinite()
    state["events"][0] += bad
    state["events"][1] += ~bad & (amax * state["scale"] > 1.0625 * state["fp8_max"])
    unknown = (amax > saturation_limit * state["history"].amax(0)) & ~bad
    if position == 0:
        unknown &= state["history"].amax(0) > 0
    before = apart(state["history"], jump_limit)
    state["history"][position] = torch.where(bad, 0.0, amax)
    now = apart(state["history"], jump_limit)
    state["events"][2] += now & ~before
    largest = state["history"].amax(0)
    new = (state["fp8_max"] / largest).clamp(max=2.0**126)
    state["scale"].copy_(torch.where(largest > 0, new, state["scale"]).where(~(unknown | now), 0.0))
    state["amax_fwd"].zero_()
    state["amax_bwd"].zero_()


@pytest.mark.parametrize(
    "limits", [(32.0, 1.0625), (1.0, 1.0), (7.7, 3.3), (torch.inf, torch.inf), (1e38, 1e38)]
)
def test_matches_the_definition_over_many_steps(limits: tuple[float, float]) -> None:
    slots, history_len = 200, 5
    generator = torch.Generator().manual_seed(0)
    state = {
        "scale": torch.rand(slots, generator=generator),
        "amax_fwd": torch.zeros(slots),
        "amax_bwd": torch.zeros(slots),
        "history": torch.zeros(history_len, slots),
        "events": torch.zeros(3, slots, dtype=torch.int32),
        "fp8_max": torch.tensor([448.0, 57344.0]).repeat(slots // 2),
    }
    kernel_state = {name: tensor.clone().to(DEVICE) for name, tensor in state.items()}
    for step in range(2 * history_len):
        forward = torch.rand(slots, generator=generator) * 10.0 ** (step - 5)
        forward[8:100] = torch.rand(92, generator=generator)  # may lie apart, and agree again
        forward[100:120] *= step % 3 > 0
        forward[:8] = torch.tensor(
            [0.0, torch.inf, torch.nan, 1e-45, 3e38, 1e-37, torch.inf * (step == 3), 0.0]
        ).nan_to_num(nan=torch.nan, posinf=torch.inf)
        backward = torch.rand(slots, generator=generator) * (step % 2)
        backward[:7] = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 2.0])
        backward[7] = torch.inf if step == 4 else 0.0
        for amax, value in (("amax_fwd", forward), ("amax_bwd", backward)):
            state[amax].copy_(value)
            kernel_state[amax].copy_(value)
        reference_update(state, step % history_len, *limits)
        update_scales(
            **kernel_state,
            position=step % history_len,
            jump_limit=limits[0],
            saturation_limit=limits[1],
        )
        for name, want in state.items():
            assert torch.equal(kernel_state[name].cpu(), want), (step, name)
    happened = state["events"].sum(1) > 0
    assert happened.tolist() == [True, True, limits[0] < 1e38]


def test_a_slot_without_information_keeps_its_scale() -> None:
    scale, fwd, bwd, fp8_max = (
        torch.tensor([value], device=DEVICE) for value in (3.0, torch.inf, 2.0, 448.0)
    )
    history = torch.zeros(4, 1, device=DEVICE)
    events = torch.zeros(3, 1, dtype=torch.int32, device=DEVICE)
    update_scales(scale, fwd, bwd, history, events, fp8_max, 2, 32.0, 1.0625)
    assert (scale.item(), fwd.item(), bwd.item()) == (3.0, 0.0, 0.0)
    assert events.tolist() == [[1], [0], [0]]
    assert not history.any()
