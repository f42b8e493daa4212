"""The words of a graph: one buffer for all single numbers of its regions, and what programs share.

On the host a launch takes about 1 us for every pointer and 1 us for every view that it is passed,
and 2 us for a tensor of its own that holds one number. So a region takes one pointer, behind which
its kernels find the scales of its casts and leave their inverses and amax, where GEMMs read them.
A kernel before all regions puts the scales there, and zeros elsewhere; one behind them takes the
amax to the scaling state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import triton

from .fused import load
from .kernels.launch import Launch

Slots = Mapping[int, int]  # word -> the slot of a scaling state that it stands for

FILL, TRACK = "fp8_fill_words", "fp8_track"
_BLOCK = 256
_IMPORTS = "import triton\nimport triton.language as tl"


def fill_words(words: Any, count: int, scales: Sequence[tuple[Any, Slots]]) -> tuple[Launch, str]:
    """Fill all words, with scales where there are slots; the launch, and its kernel's source.

    ``words``: ``f32[count]``; ``scales``: tensors, ``f32[slots]``.
    """
    lines = ["number = tl.zeros_like(word).to(tl.float32)"]
    for i, (_, slots) in enumerate(scales):
        lines += _slot_of(slots)
        lines.append(f"number += tl.load(scale_{i}_ptr + slot, mask=slot >= 0, other=0.0)")
    lines.append(f"tl.store(words_ptr + word, number, mask=word < {count})")
    tensors = {f"scale_{i}": scale for i, (scale, _) in enumerate(scales)}
    return _launch(FILL, lines, words, tensors, count, writes={"words_ptr"})


def track_amax(words: Any, amaxes: Sequence[tuple[Any, Slots]]) -> tuple[Launch, str]:
    """Let each slot have the largest amax of its words, or keep its own if that is larger."""
    lines = []
    for i, (_, slots) in enumerate(amaxes):
        lines += _slot_of(slots)
        lines.append("amax = tl.load(words_ptr + word, mask=slot >= 0, other=0.0)")
        track = f"tl.atomic_max(amax_{i}_ptr + slot, amax, mask=slot >= 0"
        lines.append(f'{track}, sem="relaxed")')
    tensors = {f"amax_{i}": amax for i, (amax, _) in enumerate(amaxes)}
    count = 1 + max(word for _, slots in amaxes for word in slots)
    return _launch(TRACK, lines, words, tensors, count, writes={f"{name}_ptr" for name in tensors})


def _slot_of(slots: Slots) -> list[str]:
    """The slot of each word, -1 for none."""
    lines = [f"slot = tl.where(word == {word}, {slot}, slot)" for word, slot in slots.items()]
    return ["slot = tl.zeros_like(word) - 1", *lines]


def _launch(
    name: str,
    lines: Sequence[str],
    words: Any,
    tensors: Mapping[str, Any],
    count: int,
    writes: set[str],
) -> tuple[Launch, str]:
    arguments = ", ".join(["words_ptr", *(f"{tensor}_ptr" for tensor in tensors)])
    first = f"word = tl.program_id(0) * {_BLOCK} + tl.arange(0, {_BLOCK})"
    body = [f"    {line}" for line in (first, *lines)]
    kernel = "\n".join(["@triton.jit", f"def {name}({arguments}):", *body])
    text = f'"""{name}: for {count} words."""\n\n{_IMPORTS}\n\n\n{kernel}\n'
    launch = Launch(
        getattr(load(text), name),
        {"words_ptr": words, **{f"{tensor}_ptr": value for tensor, value in tensors.items()}},
        sizes={},
        constants={},
        grid=(triton.cdiv(count, _BLOCK), 1, 1),
        writes=frozenset(writes),
    )
    return launch, text
