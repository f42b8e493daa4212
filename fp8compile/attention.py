"""``fp8::attention``: scaled dot product attention of FP8 operands, forward only.

The body defines the numerics, as those in ops.py do. They are those of cuDNN's FP8 attention: what
the tensor cores take is E4M3 (q, k, v, and the softmax's numerators), everything else float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .formats import Format

_MAX = Format.E4M3.max  # also the scale of numerators, which are at most 1


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
    products = queries @ keys.transpose(-1, -2) * scale
    if is_causal:
        later = torch.ones(products.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        products = products.masked_fill(later, -torch.inf)
    largest = products.amax(-1, keepdim=True)
    numerators = (products - largest).exp()
    total = numerators.sum(-1, keepdim=True)
    rounded = (numerators * _MAX).to(Format.E4M3.dtype).float() / _MAX
    out = (rounded @ values / total * out_scale).clamp(-_MAX, _MAX).to(Format.E4M3.dtype)
    return (
        out.transpose(1, 2).reshape(q.shape).contiguous(),
        (largest + total.log()).squeeze(-1).contiguous(),
    )


def _by_head(x: Tensor, scale_inv: Tensor, batch: int, heads: int) -> Tensor:
    """``f32[batch, heads, rows, D]``."""
    return (x.float() * scale_inv).view(batch, x.shape[0] // batch, heads, -1).transpose(1, 2)


def fake(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """The types of the results."""
    *_, batch, heads, _, _, _ = others
    sums = (batch, heads, q.shape[0] // batch)
    return q.new_empty(q.shape), q.new_empty(sums, dtype=torch.float32)


SCHEMA = torch.library.infer_schema(attention, mutates_args=())
torch.library.define("fp8::attention", SCHEMA, tags=torch.Tag.needs_exact_strides)
torch.library.impl("fp8::attention", "default", attention)
torch.library.register_fake("fp8::attention", fake)
