"""FP8 as plain eager PyTorch: what a model's numbers become, with no compiler involved.

Inside ``SimulatedFp8`` every matmul with a 2-D parameter rounds its operands to FP8 and back, in
forward and backward, each with the scale of its own amax. This tells noise that FP8 itself brings
into a model from noise that a compiler adds: that is, from bugs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_LINEAR = (F.linear, torch._C._nn.linear)
_MATMUL = (torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__)
_ADDMM = (torch.addmm, torch.Tensor.addmm)


class SimulatedFp8(TorchFunctionMode):
    """Have matmuls with a 2-D parameter round their operands to FP8.

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
        if func in _LINEAR and _is_parameter(args[1]):
            return self._linear(*args, **kwargs)
        if func in _ADDMM and _is_parameter(args[2]):
            bias, x, w = args
            return self._matmul(x, w) + bias
        if func in _MATMUL and _is_parameter(args[0]):  # w @ x
            return self._linear(args[1].mT, args[0]).mT
        if func in _MATMUL and _is_parameter(args[1]._base):  # x @ w.T
            return self._linear(args[0], args[1]._base)
        return func(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self._merged.get(id(weight)):
            self._multiply_merged(input, self._merged[id(weight)].pop(0))
        out = self._parts.pop((id(weight), id(input)), None)
        if out is None:
            out = self._matmul(input, weight, is_nk=True)
        return out if bias is None else out + bias

    def _multiply_merged(self, input: Tensor, group: Sequence[Tensor]) -> None:
        product = self._matmul(input, torch.cat(list(group)), is_nk=True)
        parts = product.split([weight.shape[0] for weight in group], dim=-1)
        for weight, part in zip(group, parts, strict=True):
            self._parts[id(weight), id(input)] = part

    def _matmul(self, x: Tensor, w: Tensor, is_nk: bool = False) -> Tensor:
        out = _Matmul.apply(x.reshape(-1, x.shape[-1]), w, is_nk)
        return out.view(*x.shape[:-1], out.shape[-1])


def _is_parameter(value: Any) -> bool:
    return isinstance(value, nn.Parameter) and value.dim() == 2


class _Matmul(torch.autograd.Function):
    """``x[M, K] @ w``, for a weight stored as ``[N, K]`` or ``[K, N]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, is_nk: bool) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.is_nk = is_nk
        return _fp8_gemm(x, E4M3, w.t() if is_nk else w, E4M3)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (g,), (x, w) = grads, ctx.saved_tensors
        grad_x = _fp8_gemm(g, E5M2, w if ctx.is_nk else w.t(), E4M3)
        left, right = (g, x) if ctx.is_nk else (x, g)
        formats = (E5M2, E4M3) if ctx.is_nk else (E4M3, E5M2)
        return grad_x, _fp8_gemm(left.t(), formats[0], right, formats[1]), None


def _fp8_gemm(
    left: Tensor, left_format: torch.dtype, right: Tensor, right_format: torch.dtype
) -> Tensor:
    """``left @ right``, with both operands in FP8."""
    return rounded(left, left_format) @ rounded(right, right_format)


def rounded(x: Tensor, fp8: torch.dtype) -> Tensor:
    """A tensor as FP8 holds it: rounded with the scale that its amax asks for."""
    limit, amax = torch.finfo(fp8).max, x.abs().max()
    if amax == 0:
        return x
    scale = limit / amax.float()
    return ((x.float() * scale).clamp(-limit, limit).to(fp8).float() / scale).to(x.dtype)
