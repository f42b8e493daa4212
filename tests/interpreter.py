"""Make Triton's interpreter, which runs kernels on a CPU, compute what the hardware computes.

As shipped it rounds float -> FP8 wrongly (the carry into the exponent is lost, subnormals are
truncated, ties are not even), and multiplies bfloat16 matrices as if their bits were integers.
Here both go through torch, which rounds to nearest even. A value beyond the FP8 range becomes NaN,
where the hardware would saturate: kernels must clamp, and a test sees it if one does not.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch


def enable() -> None:
    """Run all kernels in the interpreter. Must come before the first import of triton."""
    os.environ["TRITON_INTERPRET"] = "1"
    # Kernels divide by, and overflow, what they then mask out.
    np.seterr(divide="ignore", over="ignore", invalid="ignore")
    _fix_numerics()


def _fix_numerics() -> None:
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source.name not in _TORCH_DTYPES or target.name not in _TORCH_DTYPES:
            return original(data, source, target, rounding)
        values = _as_tensor(data, source)
        if target.is_fp8():
            values = values.float()
            limit = torch.finfo(_TORCH_DTYPES[target.name]).max
            # Below the midpoint to the next value, numbers still round down to the largest.
            values = torch.where(values.abs() > limit * 1.03, torch.nan, values)
            values = values.clamp(-limit, limit)
        return _as_bits(values.to(_TORCH_DTYPES[target.name])).reshape(data.shape)

    def create_dot(builder: Any, a: Any, b: Any, acc: Any, *options: Any) -> Any:
        a_data, b_data = (_as_tensor(x.data, x.dtype.scalar).float().numpy() for x in (a, b))
        product = np.matmul(a_data, b_data, dtype=acc.data.dtype)
        return interpreter.TensorHandle(product + acc.data, acc.dtype.scalar)

    patch_tensor = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        # Triton 3.6 converts an array of one number, which NumPy 2.4 refuses.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_lang_tensor
    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot


_TORCH_DTYPES = {
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
_SIGNED = {1: (torch.uint8, np.uint8), 2: (torch.int16, np.int16), 4: (torch.int32, np.int32)}
_SIGNED[8] = (torch.int64, np.int64)


def _as_tensor(data: Any, dtype: Any) -> torch.Tensor:
    """A copy of an interpreter array, which holds FP8 and bfloat16 as integers, as numbers."""
    bits = np.ascontiguousarray(data)
    bits = bits.view(_SIGNED[bits.dtype.itemsize][1]).copy()
    return torch.from_numpy(bits).view(_TORCH_DTYPES[dtype.name])


def _as_bits(values: torch.Tensor) -> Any:
    """The bits of `values`, as the unsigned integers that the interpreter works on."""
    size = values.dtype.itemsize
    return values.view(_SIGNED[size][0]).numpy().view(getattr(np, f"uint{8 * size}"))
