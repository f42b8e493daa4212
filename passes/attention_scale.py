"""Let attention multiply by a constant that its query or key is multiplied by."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from ..ir import VIEWS, args_of, aten, constant_factor, fake_mode_of

_COPIES = (*VIEWS, aten.clone.default)
_KINDS = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
FORWARD, BACKWARD = (
    [getattr(aten, f"_scaled_dot_product_{kind}{end}").default for kind in _KINDS]
    for end in ("", "_backward")
)
QUERY = dict.fromkeys(FORWARD, 0) | dict.fromkeys(BACKWARD, 1)  # which argument; then the key


def into_attention(node: fx.Node) -> int:
    """Fold a constant times the query or key of attention; how many multiplications are gone.

    What attention makes of ``q * c`` with a scale is what it makes of q with c times that scale.
    Its backward then has the gradient of q itself, which used to be multiplied by c afterwards.
    """
    found = constant_factor(node)
    if found is None:
        return 0
    value, factor = found
    reads = list(_reads(node))
    calls = [call for call, _ in reads]
    if not calls or len(set(calls)) < len(calls) or None in (_operand_of(*read) for read in reads):
        return 0
    products = [product for read in reads for product in _gradient_reads(*read)]
    if not all(_is_product(product, factor) for product in products):
        return 0
    fakes = _fakes_without(node, value, calls)
    if not fakes:
        return 0
    for copy in _copies(node):
        copy.meta["val"] = fakes[copy]
    for call in calls:
        call.kwargs = {**call.kwargs, "scale": factor * _scale_of(call)}
    for product in (node, *products):
        product.replace_all_uses_with(args_of(product)[0])
    return 1 + len(products)


def _copies(value: fx.Node) -> Iterator[fx.Node]:
    """The views and copies of a value."""
    for user in value.users:
        if user.target in _COPIES:
            yield user
            yield from _copies(user)


def _reads(value: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """What reads a value, or a view or a copy of it; and which of these it reads."""
    for copy in (value, *_copies(value)):
        yield from ((user, copy) for user in copy.users if user.target not in _COPIES)


def _operand_of(call: fx.Node, read: fx.Node) -> int | None:
    """0 for attention that reads a value as its query, 1 for its key, None for anything else."""
    first, args = QUERY.get(call.target), args_of(call)
    if first is None or args.count(read) != 1:
        return None
    operand = args.index(read) - first
    return operand if operand in (0, 1) else None


def _gradient_reads(call: fx.Node, read: fx.Node) -> Iterator[fx.Node]:
    """What reads the gradient that attention's backward has for an operand."""
    if call.target in BACKWARD:
        for item in call.users:
            if args_of(item)[1] == _operand_of(call, read):
                yield from (user for user, _ in _reads(item))


def _is_product(node: fx.Node, factor: float) -> bool:
    found = constant_factor(node)
    return found is not None and math.isclose(found[1], factor) and is_like(node, found[0])


def _scale_of(call: fx.Node) -> float:
    query = args_of(call)[QUERY[call.target]].meta["val"]
    scale = call.kwargs.get("scale")
    return float(query.shape[-1] ** -0.5 if scale is None else scale)  # type: ignore[arg-type]


def _fakes_without(node: fx.Node, value: fx.Node, calls: list[fx.Node]) -> dict[fx.Node, Any]:
    """The fake results of what reads a product, if that reads the value instead.

    Empty if the value's strides rule out a view, or would give attention's results others.
    """
    fakes = {node: value.meta["val"]}
    for reader in (*_copies(node), *calls):
        args, kwargs = fx.node.map_arg(
            (reader.args, dict(reader.kwargs)), lambda n: fakes.get(n, n.meta["val"])
        )
        try:
            with fake_mode_of(node.graph):
                fakes[reader] = reader.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, ValueError):
            return {}
    fits = all(_same_layout(fakes[call], call.meta["val"]) for call in calls)
    return fakes if fits else {}


def _same_layout(value: Any, other: Any) -> bool:
    """Whether one result can stand for the other."""
    if isinstance(value, tuple | list):
        return all(map(_same_layout, value, other))
    if not isinstance(value, torch.Tensor):
        return True
    kinds = ((v.dtype, tuple(v.shape), v.stride()) for v in (value, other))
    return next(kinds) == next(kinds)


def is_like(node: fx.Node, other: fx.Node) -> bool:
    return _same_layout(node.meta["val"], other.meta["val"])
