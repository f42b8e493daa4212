"""Keep the matmuls that make a loss's logits in high precision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from ..ir import SITE_TAG, args_of

LOGITS = "makes the logits; cast it with options={'logits': 'fp8'}"
_LOSSES = (
    F.cross_entropy,
    F.log_softmax,
    F.binary_cross_entropy_with_logits,
    torch.log_softmax,
    torch.special.log_softmax,
)
_METHODS = ("log_softmax",)


def keep_logits(gm: fx.GraphModule) -> int:
    """Give the sites whose result is the logits of a loss a reason to stay in high precision.

    Before:
        linear = linear(x, w)    # meta["custom"]["fp8_site"] = 0
        loss = cross_entropy(linear, targets)
    After:
        the same, and gm.meta["fp8_sites"][0].reason = LOGITS

    Their error adds to the loss itself, and to the gradient that all others come from: a GPT of
    108 M parameters had 0.85 and 1.27 % more loss than in bf16 after 1000 steps with everything in
    FP8, and within 0.3 % of it with the head in high precision (``examples/bench/soak.py``).

    Requires: tag_sites.
    Ensures: a site has this reason if nothing but views, casts, and functions of this one value
        stand between its call and a cross entropy (softmax, or binary) of the same graph or
        activation-checkpointed region.
    Leaves alone: sites that have a reason already; a loss that is computed outside of the graph.
    Numerics: exact.
    """
    sites = gm.meta["fp8_sites"]
    found = 0
    for body in gm.modules():
        if not isinstance(body, fx.GraphModule):
            continue
        for call in _calls_behind_losses(body):
            for index, site in enumerate(sites):
                if site.call == call and site.reason is None:
                    sites[index] = replace(site, reason=LOGITS)
                    found += 1
    return found


def _calls_behind_losses(body: fx.GraphModule) -> Iterator[int]:
    """The tags of the matmul calls whose results are logits."""
    for node in body.graph.nodes:
        is_method = node.op == "call_method" and node.target in _METHODS
        if is_method or (node.op == "call_function" and node.target in _LOSSES):
            logits = args_of(node)[0] if node.args else node.kwargs["input"]
            made_by = _call_behind(logits)
            if made_by is not None:
                yield made_by


def _call_behind(value: Any) -> int | None:
    """The tag of the matmul call that a value is a function of, if it is one of nothing else."""
    while isinstance(value, fx.Node):
        tag = (value.meta.get("custom") or {}).get(SITE_TAG)
        if tag is not None:
            return int(tag)
        sources = [node for node in value.all_input_nodes if _is_computed_float(node)]
        value = sources[0] if len(sources) == 1 else None
    return None


def _is_computed_float(node: fx.Node) -> bool:
    value = node.meta.get("example_value", node.meta.get("val"))
    is_given = node.op in ("placeholder", "get_attr")
    return not is_given and isinstance(value, torch.Tensor) and value.is_floating_point()
