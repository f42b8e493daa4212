"""The words of a graph: what fills them, and what takes amax from them."""

from __future__ import annotations

import torch

from fp8compile.backends.kernels.launch import run
from fp8compile.backends.words import fill_words, track_amax

COUNT = 600  # of which a program fills 256


def test_scales_are_where_there_are_slots_and_zeros_elsewhere() -> None:
    words, scale, other = torch.full((COUNT,), torch.nan), torch.arange(1.0, 9.0), torch.ones(2) / 4
    launch, source = fill_words(words, COUNT, [(scale, {3: 0, 255: 7, 256: 7}), (other, {599: 1})])
    run(launch)
    want = torch.zeros(COUNT)
    want[3], want[255], want[256], want[599] = 1.0, 8.0, 8.0, 0.25
    assert torch.equal(words, want)
    assert launch.writes == {"words_ptr"} and "def fp8_fill_words(" in source


def test_without_slots_all_words_are_zero() -> None:
    words = torch.full((8,), torch.nan)
    run(fill_words(words, 8, [])[0])
    assert torch.equal(words, torch.zeros(8))


def test_a_slot_keeps_the_largest_amax() -> None:
    words = torch.rand(COUNT)
    words[[2, 300, 500, 501]] = torch.tensor([5.0, 7.0, 0.5, torch.inf])
    amax, other = torch.tensor([6.0, 1.0, 2.0]), torch.zeros(3)
    slots = [(amax, {2: 0, 300: 0, 500: 1}), (other, {501: 2})]
    launch, _ = track_amax(words, slots)
    run(launch)
    assert torch.equal(amax, torch.tensor([7.0, 1.0, 2.0]))
    assert torch.equal(other, torch.tensor([0.0, 0.0, torch.inf]))
    assert launch.writes == {"amax_0_ptr", "amax_1_ptr"}
