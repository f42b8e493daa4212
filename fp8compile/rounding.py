"""Round weights so that the errors of one input's weights make up for those of the others.

Rounding to the nearest leaves each weight with an error of its own. What counts is the error of the
layer's output on inputs as they occur: where two of them go together, the errors of their weights
may cancel. GPTQ (arXiv 2210.17323) rounds the columns of a weight one after the other, and changes
those that are left so that they make up best for the error so far.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .errors import OptionError
from .formats import Format
from .progress import progress
from .recipe import Granularity
from .untouched import Step, left_as_it_was

_BYTES = 4 * 2**30  # of the Gram matrices that are held at a time
_COLUMNS = 128  # are rounded before the others learn of it
_DAMPING = 0.01  # of the mean of the Gram matrix's diagonal, added to it (section 3.3)


def in_groups(modules: Mapping[str, nn.Linear]) -> Iterator[dict[str, nn.Linear]]:
    """The modules in order, in groups whose Gram matrices may be held at the same time."""
    group: dict[str, nn.Linear] = {}
    size = 0
    for name, module in modules.items():
        needed = 4 * module.in_features**2
        if group and size + needed > _BYTES:
            yield group
            group, size = {}, 0
        group[name] = module
        size += needed
    if group:
        yield group


@torch.no_grad()
def gram_matrices(
    model: nn.Module, modules: Mapping[str, nn.Linear], batches: Sequence[Any], step: Step
) -> dict[str, Tensor]:
    """Run the batches; for each module the sum of ``x x^T`` over its inputs ``x``, ``f32[K, K]``.

    A module that is not called has none. The model is left as it was. Raises OptionError for inputs
    that are not finite.
    """
    found: dict[str, Tensor] = {}

    def look(name: str, module: nn.Linear, args: Any, kwargs: Any) -> None:
        x = args[0] if args else kwargs["input"]
        x = x.detach().reshape(-1, module.in_features).float()
        gram = x.t() @ x
        found[name] = found[name] + gram if name in found else gram

    with left_as_it_was(model), ExitStack() as hooks:
        for name, module in modules.items():
            hook = module.register_forward_pre_hook(partial(look, name), with_kwargs=True)
            hooks.enter_context(hook)
        for batch in progress(batches, "looking at inputs"):
            step(model, batch)
    for name, gram in found.items():
        if not gram.isfinite().all():
            raise OptionError(
                f"the inputs of {name} are not finite, or too large, in these batches, and nothing "
                "can be rounded for them; leave such batches out"
            )
    return found


@torch.no_grad()
def rounded(weight: Tensor, weight_scale: Tensor, granularity: Granularity, gram: Tensor) -> Tensor:
    """A weight ``[N, K]`` in E4M3, with the scales that it has, for inputs with a Gram matrix.

    ``weight_scale``: as ``quantize_weight`` returns it. ``gram``: ``f32[K, K]``. Those inputs are
    rounded first that are largest, when most others can still make up for them. Returns
    ``e4m3[N, K]``.
    """
    order = gram.diagonal().argsort(descending=True)
    left = weight.float()[:, order]
    factor = _factor(gram[order][:, order])
    rows, columns = granularity.block
    scales = weight_scale if rows < 2 else weight_scale.repeat_interleave(rows, 0)[: len(weight)]
    found = torch.empty(weight.shape, dtype=Format.E4M3.dtype, device=weight.device)
    places = order.tolist()
    for start in range(0, len(places), _COLUMNS):
        end = min(start + _COLUMNS, len(places))
        errors = torch.empty_like(left[:, start:end])
        for i in range(start, end):
            scale = scales[..., places[i] // columns if columns else 0]
            q = _cast(left[:, i] / scale)
            error = (left[:, i] - q.float() * scale) / factor[i, i]
            left[:, i + 1 : end] -= error[:, None] * factor[i, i + 1 : end]
            found[:, places[i]], errors[:, i - start] = q, error
        left[:, end:] -= errors @ factor[start:end, end:]
    return found


def _cast(x: Tensor) -> Tensor:
    return x.clamp(-Format.E4M3.max, Format.E4M3.max).to(Format.E4M3.dtype)


def _factor(gram: Tensor) -> Tensor:
    """The upper triangular U with ``U^T U`` the inverse of the Gram matrix (section 3.3, step 3).

    Inputs that never differ from zero, or always go together, leave it without one: damped more, it
    has one in float32, too.
    """
    mean = gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    damping = _DAMPING
    while True:
        lower, failed = torch.linalg.cholesky_ex(gram / mean + damping * identity)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            factor, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return factor
        damping *= 10
