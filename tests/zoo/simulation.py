"""FP8 as plain eager PyTorch: what a model's numbers become, with no compiler involved.

Inside ``SimulatedFp8`` every matmul with a 2-D weight rounds its operands to FP8 and back, in
forward and backward, each with the scale of its own amax. This tells noise that FP8 itself brings
into a model from noise that a compiler adds: that is, from bugs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

ALIGNMENT = 16
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_LINEAR = (F.linear, torch._C._nn.linear)
_MATMUL = (torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__)
_ADDMM = (torch.addmm, torch.Tensor.addmm)


class SimulatedFp8(TorchFunctionMode):
    """Have matmuls with a 2-D weight round their operands to FP8.

    ``merged``: groups of weights that multiply one input as one matrix, with one scale, in the
    order of their calls.
    """

    def __init__(self, merged: Iterable[Sequence[Tensor]] = ()) -> None:
        super().__init__()
        self._merged: dict[int, list[Sequence[Tensor]]] = {}  # by the weight that is called first
        for group in merged:
            self._merged.setdefault(id(group[0]), []).append(group)
        self._parts: dict[tuple[int, int], Tensor] = {}  # (weight, input) -> its part of a product

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _LINEAR:
            return self._linear(*args, **kwargs)
        if func in _ADDMM:
            bias, x, w = args
            return _matmul(x, w, w_is_nk=False) + bias
        if func in _MATMUL and args[0].dim() == 2 and args[1].dim() > 2:
            w, x = args
            return self._linear(x.mT, w).mT
        if func in _MATMUL and args[0].dim() >= 2 and args[1].dim() == 2:
            x, w = args
            if _is_transposed(w):
                return self._linear(x, w._base)
            return _matmul(x, w, w_is_nk=False)
        return func(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self._merged.get(id(weight)):
            self._multiply_merged(input, self._merged[id(weight)].pop(0))
        out = self._parts.pop((id(weight), id(input)), None)
        if out is None:
            out = _matmul(input, weight, w_is_nk=True)
        return out if bias is None else out + bias

    def _multiply_merged(self, input: Tensor, group: Sequence[Tensor]) -> None:
        product = _matmul(input, torch.cat(list(group)), w_is_nk=True)
        parts = product.split([weight.shape[0] for weight in group], dim=-1)
        for weight, part in zip(group, parts, strict=True):
            self._parts[id(weight), id(input)] = part


def _is_transposed(w: Tensor) -> bool:
    """Whether a matrix is the transpose of another, such as ``weight.T``."""
    base = w._base
    return base is not None and base.dim() == 2 and w.stride() == base.stride()[::-1]


def _matmul(x: Tensor, w: Tensor, *, w_is_nk: bool) -> Tensor:
    out = _Matmul.apply(x.reshape(-1, x.shape[-1]), w, w_is_nk)
    return out.view(*x.shape[:-1], out.shape[-1])


class _Matmul(torch.autograd.Function):
    """``x[M, K] @ w``, for a weight stored as ``[N, K]`` or ``[K, N]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, w_is_nk: bool) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.w_is_nk = w_is_nk
        return _fp8_gemm(x, E4M3, w.t() if w_is_nk else w, E4M3)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (g,), (x, w) = grads, ctx.saved_tensors
        if ctx.w_is_nk:
            return _fp8_gemm(g, E5M2, w, E4M3), _fp8_gemm(g.t(), E5M2, x, E4M3), None
        return _fp8_gemm(g, E5M2, w.t(), E4M3), _fp8_gemm(x.t(), E4M3, g, E5M2), None


def _fp8_gemm(
    left: Tensor, left_format: torch.dtype, right: Tensor, right_format: torch.dtype
) -> Tensor:
    """``left @ right``, with operands in FP8 if its sizes allow that."""
    k, n = right.shape
    if k % ALIGNMENT or n % ALIGNMENT:
        return left @ right
    return rounded(left, left_format) @ rounded(right, right_format)


def rounded(x: Tensor, fp8: torch.dtype) -> Tensor:
    """A tensor as FP8 holds it: rounded with the scale that its amax asks for."""
    limit, amax = torch.finfo(fp8).max, x.abs().max()
    if amax == 0:
        return x
    scale = limit / amax.float()
    return ((x.float() * scale).clamp(-limit, limit).to(fp8).float() / scale).to(x.dtype)
