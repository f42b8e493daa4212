"""Where in the module tree things belong, and which layers are alike."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .records import DECISIONS, Record


@dataclass(frozen=True)
class Fold:
    """Layers ``parent.first`` to ``parent.last``, which hold the same operators."""

    parent: str
    first: int
    last: int


def layer_of(path: str) -> str:
    """The layer that a path is in: ``layers.3`` of ``layers.3.mlp.up``; else its first part."""
    parts = path.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[: number + 1])


def common(paths: Iterable[str]) -> str:
    """The innermost module that holds all of these."""
    split = [path.split(".") for path in paths]
    shared = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def home(anchor: str, paths: Iterable[str]) -> str:
    """The innermost module of the anchor's layer that holds all of the paths that are in it."""
    layer = layer_of(anchor)
    return common([anchor, *(path for path in paths if layer_of(path) == layer)])


def folds(records: Sequence[Record]) -> list[Fold]:
    """The longest runs of two or more numbered modules, one after the other, that are alike.

    They are where the same modules have the same weights and GEMMs, with the same types, formats
    and reasons. First and last layers differ from others in what is fused across their borders.
    """
    contents: dict[tuple[str, int], list[object]] = defaultdict(list)
    for record in records:
        parts = record.path.split(".")
        for i, part in enumerate(parts):
            if part.isdigit():
                inside = contents[".".join(parts[:i]), int(part)]
                if record.kind in ("gemm", "parameter"):
                    inside.append((".".join(parts[i + 1 :]), *_look(record)))
    found: list[Fold] = []
    for (parent, number), inside in sorted(contents.items(), key=lambda item: item[0]):
        last = found[-1] if found else None
        follows = last and (last.parent, last.last) == (parent, number - 1)
        if last and follows and _alike(contents[parent, last.last], inside):
            found[-1] = Fold(parent, last.first, number)
        else:
            found.append(Fold(parent, number, number))
    return [fold for fold in found if fold.last > fold.first]


def _look(record: Record) -> tuple[object, ...]:
    """What a GEMM or a weight has in common with those of other layers."""
    if record.kind == "parameter":
        return (record.label.rpartition(".")[2], record.type)
    told = [note for note in record.notes if note[0] in DECISIONS]
    return (record.op, record.type, record.label, *told)


def _alike(one: Sequence[object], other: Sequence[object]) -> bool:
    return Counter(one) == Counter(other)
