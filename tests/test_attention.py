"""The reference of FP8 attention: PyTorch's attention, but for the rounding to E4M3."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fp8compile.ops import quantize
from tests.models import sqnr_db

E4M3 = torch.float8_e4m3fn
OP, BACKWARD = (getattr(torch.ops.fp8, n).default for n in ("attention", "attention_backward"))
CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
# batch, heads, kv_heads, queries, keys, head, is_causal
SHAPES = [
    (2, 4, 4, 48, 48, 32, True),
    (1, 8, 2, 64, 64, 16, True),
    (2, 4, 1, 24, 40, 64, False),
]


def operands(shape: tuple[int, ...]) -> tuple[list[Tensor], tuple[object, ...]]:
    """What is cast, ``[batch * tokens, heads * D]``; and what the operator takes."""
    batch, heads, kv_heads, queries, keys, head, is_causal = shape
    sizes = (heads, queries), (kv_heads, keys), (kv_heads, keys)
    values = [torch.randn(batch * n, count * head) for count, n in sizes]
    casts = [quantize(value, None, 0, E4M3, True, False) for value in values]
    args = [cast[0] for cast in casts] + [cast[2] for cast in casts] + [casts[-1][4]]
    return values, (*args, batch, heads, kv_heads, bool(is_causal), 0.3)


def operands_of_backward(shape: tuple[int, ...]) -> tuple[list[Tensor], tuple[object, ...]]:
    """What is cast, the output's gradient last; and what the operator takes, with known scales."""
    values, args = operands(shape)
    grad_out = torch.randn_like(values[0])
    copy, _, inverse, *_ = quantize(grad_out, None, 0, E4M3, True, False)
    out, sums = OP(*args)
    q, k, v, *inverses = args[:6]
    how = args[7:]
    loose = torch.full((4,), 1.0)
    given = (copy, q, k, v, out, sums, inverse, *inverses)
    amax = BACKWARD(*given, loose, loose[:1], *how)[3]
    scales = 448 / amax
    return [*values, grad_out], (*given, scales, 1 / scales[:1], *how)


def in_float32(values: list[Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """PyTorch's attention, and the logarithms of the sums."""
    batch, heads, kv_heads, queries, _, head, is_causal = shape
    q, k, v = (
        value.view(batch, -1, count, head).transpose(1, 2).repeat_interleave(heads // count, 1)
        for value, count in zip(values, (heads, kv_heads, kv_heads), strict=True)
    )
    out = F.scaled_dot_product_attention(q, k, v, is_causal=bool(is_causal), scale=0.3)
    products = q @ k.transpose(-1, -2) * 0.3
    if is_causal:
        products.masked_fill_(torch.ones(queries, queries).triu(1).bool(), -torch.inf)
    return out.transpose(1, 2).reshape(batch * queries, -1), products.logsumexp(-1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_attention_of_what_was_cast(shape: tuple[int, ...]) -> None:
    _, args = operands(shape)
    scales_inv = args[3:6]
    exact = [x.float() * inv for x, inv in zip(args[:3], scales_inv, strict=True)]
    want, want_sums = in_float32(exact, shape)
    out, sums = OP(*args)
    assert (out.dtype, out.shape, out.is_contiguous()) == (E4M3, args[0].shape, True)
    torch.testing.assert_close(sums, want_sums)
    # Numerators and the output are rounded to three bits: 2**-4 of each at most.
    found = out.float() * scales_inv[-1]
    assert 28 < sqnr_db(want, found) < 34
    assert (found - want).abs().max() < 2**-3 * want.abs().max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_close_to_attention(shape: tuple[int, ...]) -> None:
    values, args = operands(shape)
    out, _ = OP(*args)
    assert sqnr_db(in_float32(values, shape)[0], out.float() * args[5]) > 22


def test_numerators_are_rounded_and_their_sum_is_not() -> None:
    """1 and 0.96, of which E4M3 makes 0.9375: averages of ones are 1.9375 / 1.96 of what they are,
    by which 0.975 comes to be nearer to 0.9375 than to 1.
    """
    one, q, k = torch.ones(1), torch.zeros(1, 16), torch.zeros(2, 16)
    q[0, 0] = k[0, 0] = 1
    k[1, 0] = 0.875
    scale = -math.log(0.96) / 0.125
    operands = (x.to(E4M3) for x in (q, k, torch.ones(2, 16)))
    out, sums = OP(*operands, one, one, one, 0.975 * one, 1, 1, 1, False, scale)
    assert (out.float() == 0.9375).all()
    torch.testing.assert_close(sums.flatten(), scale + torch.tensor([1.96]).log())


def test_an_output_that_is_larger_than_its_scale_is_for_saturates() -> None:
    _, args = operands(SHAPES[0])
    large = (*args[:6], args[6] * 1e4, *args[7:])
    assert OP(*large)[0].float().abs().max() == 448


def test_what_is_not_finite_stays_visible() -> None:
    _, args = operands(SHAPES[0])
    args[2][5, 3] = torch.nan  # a value of the first head, which tokens from 5 on take
    out = OP(*args)[0].float().isnan()
    assert out[5:48, 3].all() and out.sum() == out[:48, 3].sum()


def test_it_is_an_operator() -> None:
    _, args = operands(SHAPES[1])
    # Its test of the schema multiplies FP8, which a CPU cannot.
    torch.library.opcheck(OP, args, test_utils=CHECKS)


def gradients_in_float32(values: list[Tensor], shape: tuple[int, ...]) -> list[Tensor]:
    *given, grad_out = values
    leaves = [value.clone().requires_grad_() for value in given]
    in_float32(leaves, shape)[0].backward(grad_out)
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_is_close_to_attention_s(shape: tuple[int, ...]) -> None:
    values, args = operands_of_backward(shape)
    *found, amax = BACKWARD(*args)
    scales = args[10]
    assert isinstance(scales, Tensor)
    for i, (want, copy) in enumerate(zip(gradients_in_float32(values, shape), found, strict=True)):
        assert (copy.dtype, copy.shape, copy.is_contiguous()) == (E4M3, want.shape, True)
        assert sqnr_db(want, copy.float() / scales[i + 1]) > 17
        assert 0.8 < amax[i + 1] / want.abs().max() < 1.25
    torch.testing.assert_close(amax[0] * scales[0], torch.tensor(448.0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_rounds_what_it_says(shape: tuple[int, ...]) -> None:
    """Beside the gradients of the exact operands: P or dS, the output, and the gradient itself."""
    _, args = operands_of_backward(shape)
    copies = (args[1], args[2], args[3], args[0])
    inverses = (*args[7:10], args[6])
    exact = [x.float() * y for x, y in zip(copies, inverses, strict=True)]  # type: ignore[operator]
    *found, _ = BACKWARD(*args)
    for i, (want, copy) in enumerate(zip(gradients_in_float32(exact, shape), found, strict=True)):
        assert sqnr_db(want, copy.float() / args[10][i + 1]) > 22  # type: ignore[index]


def test_backward_saturates() -> None:
    _, args = operands_of_backward(SHAPES[0])
    many = torch.full((4,), 2.0**40)
    *found, amax = BACKWARD(*args[:10], many, 1 / many[:1], *args[12:])
    assert all(copy.float().abs().max() == 448 for copy in found)
    assert amax.isfinite().all()


def test_operators_of_backward() -> None:
    _, args = operands_of_backward(SHAPES[1])
    torch.library.opcheck(BACKWARD, args, test_utils=CHECKS)
    known = torch.tensor([9.0, 0.0, 3.0, 0.0, 5.0])
    scales = (known, 1, *args[6:10], 16, 0.25)
    torch.library.opcheck(torch.ops.fp8.gradient_scales.default, scales, test_utils=CHECKS)


def test_scales_are_those_known_or_leave_room() -> None:
    """What is not known is guessed: from the first step on, nothing is clipped, and E4M3's normal
    numbers reach down to a thousandth of what is typical.
    """
    values, args = operands_of_backward((2, 8, 2, 256, 256, 64, True))
    amax = 448 / args[10]  # type: ignore[operator]
    how = (*args[6:10], 64, 0.3)
    known = torch.tensor([7.0, 0.0, 2.0, 0.0, 0.0])
    scales, *inverses = torch.ops.fp8.gradient_scales(known, 1, *how)
    assert scales[1] == 2 and all(
        inverse == 1 / x for inverse, x in zip(inverses, scales, strict=True)
    )
    scales = torch.ops.fp8.gradient_scales(torch.zeros(4), 0, *how)[0]
    assert (amax * scales <= 448).all()
    *gradients, _ = BACKWARD(*args[:10], scales, 1 / scales[:1], *args[12:])
    for i, (want, copy) in enumerate(
        zip(gradients_in_float32(values, (2, 8, 2, 256, 256, 64, True)), gradients, strict=True)
    ):
        assert sqnr_db(want, copy.float() / scales[i + 1]) > 17
    nothing = torch.ops.fp8.gradient_scales(
        torch.zeros(4), 0, *(torch.zeros(1) for _ in range(4)), 64, 0.3
    )
    assert all(x.isfinite().all() and (x > 0).all() for x in nothing)
