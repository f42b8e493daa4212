"""``fp8::attention`` and its backward: scaled dot product attention of FP8 operands.

The bodies define the numerics, as those in ops.py do. They are those of cuDNN's FP8 attention: what
the tensor cores take is E4M3 (q, k, v and the softmax's numerators; in backward also the gradients
of the output and of the products), everything else float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .formats import Format

_MAX = Format.E4M3.max  # also the scale of numerators, which are at most 1
_LEAST = 2.0**-96  # of an amax, so that its scale is finite
# What backward rounds with a scale that has to be known, in the order of these scales.
GRADIENTS = ("products", "query", "key", "value")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale_inv: Tensor,
    k_scale_inv: Tensor,
    v_scale_inv: Tensor,
    out_scale: Tensor,
    batch: int,
    heads: int,
    kv_heads: int,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """``softmax(q @ k.T * scale) @ v`` for every head, in E4M3.

    Args:
        q: ``e4m3[batch * queries, heads * D]``. k, v: ``e4m3[batch * keys, kv_heads * D]``. All
            contiguous; ``heads / kv_heads`` heads of q share one of k and v.
        q_scale_inv, k_scale_inv, v_scale_inv: ``f32[1]``. out_scale: ``f32[1]``, of the output.
            As an average of v it fits where v does.
        is_causal: query i takes keys 0 to i. scale: of the products.

    Returns the output, ``e4m3[batch * queries, heads * D]``, saturated at E4M3's maximum; and the
    logarithm of each softmax's sum, ``f32[batch, heads, queries]``, which a backward takes.

    Numerators ``exp(x - max(x))`` are summed up in float32, and rounded to E4M3 to be multiplied
    with v (arXiv 2407.08608, section 3.3).
    """
    queries = _by_head(q, q_scale_inv, batch, heads)
    keys, values = (
        _by_head(x, scale_inv, batch, kv_heads).repeat_interleave(heads // kv_heads, 1)
        for x, scale_inv in ((k, k_scale_inv), (v, v_scale_inv))
    )
    products = _products(queries, keys, is_causal, scale)
    largest = products.amax(-1, keepdim=True)
    numerators = (products - largest).exp()
    total = numerators.sum(-1, keepdim=True)
    out = _by_token(_rounded(numerators) @ values / total, out_scale)
    return out, (largest + total.log()).squeeze(-1).contiguous()


def gradient_scales(
    known: Tensor,
    slot: int,
    grad_out_scale_inv: Tensor,
    q_scale_inv: Tensor,
    k_scale_inv: Tensor,
    v_scale_inv: Tensor,
    head: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The scales of what attention's backward rounds, of which none can be found while it runs.

    Args:
        known: ``f32[slots]``, the scales of a state; those of the gradients of the products
            ``q @ k.T``, of q, of k and of v are the four from ``slot`` on. 0: not known.
        grad_out_scale_inv, ...: ``f32[1]``, of the operands, whose amax is thus ``448 * scale_inv``
            at most. head: elements of a head. scale: of the products.

    Returns ``f32[4]``, and the inverse of each, ``f32[1]``. What is not known is
    guessed, from sums of terms of any sign: a product of two rows of D elements is ``sqrt(D)``
    times what its largest term could be, a gradient of q or k has one such product for its largest
    term, and one of v sixteen rows of the output's gradient. These are on the large side: E4M3 has
    14 powers of two for normal numbers, and what is too large would be clipped.
    """
    grad_out, q, k, v = (
        _MAX * inverse for inverse in (grad_out_scale_inv, q_scale_inv, k_scale_inv, v_scale_inv)
    )
    products = scale * head**0.5 * grad_out * v
    amax = torch.cat([products, products * k, products * q, 16 * grad_out])
    scales = known[slot : slot + len(GRADIENTS)]
    scales = torch.where(scales > 0, scales, _MAX / amax.clamp(min=_LEAST))
    of_products, of_q, of_k, of_v = scales.reciprocal().split(1)
    return scales, of_products.clone(), of_q.clone(), of_k.clone(), of_v.clone()


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    grad_out_scale_inv: Tensor,
    q_scale_inv: Tensor,
    k_scale_inv: Tensor,
    v_scale_inv: Tensor,
    scales: Tensor,
    products_scale_inv: Tensor,
    batch: int,
    heads: int,
    kv_heads: int,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of ``fp8::attention``, in E4M3.

    Args:
        grad_out: ``e4m3[batch * queries, heads * D]``, the gradient of the output. q, k, v: what
            forward was given; out, sums: what it returned. All contiguous.
        grad_out_scale_inv, q_scale_inv, k_scale_inv, v_scale_inv: ``f32[1]``; out has v's.
        scales: ``f32[4]``, those of the gradients of products, q, k and v; products_scale_inv:
            ``f32[1]``, the inverse of the first. The others as forward's.

    Returns the gradients of q, k and v in their shapes, ``e4m3``, saturated; and the amax of what
    ``scales`` are of, ``f32[4]``, before it was rounded.

    With ``P = exp(products - sums)`` (arXiv 2205.14135, algorithm 4) the gradient of v is
    ``P.T @ grad_out``, that of ``q @ k.T`` is ``dS = scale * P * (grad_out @ v.T - rowsum(grad_out
    * out))``, of q ``dS @ k`` and of k ``dS.T @ q``; P and dS are rounded to E4M3.
    """
    queries = _by_head(q, q_scale_inv, batch, heads)
    output = _by_head(out, v_scale_inv, batch, heads)
    gradient = _by_head(grad_out, grad_out_scale_inv, batch, heads)
    keys, values = (
        _by_head(x, scale_inv, batch, kv_heads).repeat_interleave(heads // kv_heads, 1)
        for x, scale_inv in ((k, k_scale_inv), (v, v_scale_inv))
    )
    numerators = (_products(queries, keys, is_causal, scale) - sums.unsqueeze(-1)).exp()
    of_products = gradient @ values.transpose(-1, -2) - (gradient * output).sum(-1, keepdim=True)
    of_products = scale * of_products * numerators
    rounded = (of_products * scales[0]).clamp(-_MAX, _MAX).to(Format.E4M3.dtype).float()
    rounded = rounded * products_scale_inv
    of_v = _rounded(numerators).transpose(-1, -2) @ gradient
    of_k = rounded.transpose(-1, -2) @ queries
    gradients = [
        rounded @ keys,
        *(x.unflatten(1, (kv_heads, -1)).sum(2) for x in (of_k, of_v)),
    ]
    copies = [_by_token(x, scales[i + 1]) for i, x in enumerate(gradients)]
    amax = torch.stack([x.abs().amax() for x in (of_products, *gradients)])
    return copies[0], copies[1], copies[2], amax


def _products(queries: Tensor, keys: Tensor, is_causal: bool, scale: float) -> Tensor:
    """``f32[batch, heads, queries, keys]``, -inf for keys that a query does not take."""
    products = queries @ keys.transpose(-1, -2) * scale
    if is_causal:
        later = torch.ones(products.shape[-2:], dtype=torch.bool, device=products.device).triu(1)
        products = products.masked_fill(later, -torch.inf)
    return products


def _rounded(numerators: Tensor) -> Tensor:
    """What the tensor cores take of numbers of at most 1."""
    return (numerators * _MAX).clamp(max=_MAX).to(Format.E4M3.dtype).float() / _MAX


def _by_token(x: Tensor, scale: Tensor) -> Tensor:
    """``e4m3[batch * rows, heads * D]``, of ``f32[batch, heads, rows, D]``."""
    rounded = (x * scale).clamp(-_MAX, _MAX).to(Format.E4M3.dtype)
    return rounded.transpose(1, 2).flatten(2).flatten(0, 1).contiguous()


def _by_head(x: Tensor, scale_inv: Tensor, batch: int, heads: int) -> Tensor:
    """``f32[batch, heads, rows, D]``."""
    return (x.float() * scale_inv).view(batch, x.shape[0] // batch, heads, -1).transpose(1, 2)


def fake(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """The types of the results."""
    *_, batch, heads, _, _, _ = others
    sums = (batch, heads, q.shape[0] // batch)
    return q.new_empty(q.shape), q.new_empty(sums, dtype=torch.float32)


def fake_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The types of the results."""
    q, k, v = (x.new_empty(x.shape) for x in args[1:4])
    return q, k, v, q.new_empty(len(GRADIENTS), dtype=torch.float32)


def _fake_scales(known: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    one, two, three, four = (known.new_empty(1) for _ in GRADIENTS)
    return known.new_empty(len(GRADIENTS)), one, two, three, four


SCHEMA, BACKWARD_SCHEMA = (
    torch.library.infer_schema(body, mutates_args=()) for body in (attention, attention_backward)
)
for _name, _body, _fake in (
    ("fp8::attention", attention, fake),
    ("fp8::attention_backward", attention_backward, fake_backward),
    ("fp8::gradient_scales", gradient_scales, _fake_scales),
):
    _schema = torch.library.infer_schema(_body, mutates_args=())
    torch.library.define(_name, _schema, tags=torch.Tag.needs_exact_strides)
    torch.library.impl(_name, "default", _body)
    torch.library.register_fake(_name, _fake)
