"""What runs the FP8 nodes of a final graph: the reference bodies, or Triton kernels.

``fp8::`` operators are opaque calls to Inductor. The *reference* backend leaves them so: their
eager bodies run, on any device. The *triton* backend replaces them by kernel launches.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import fx

from ..cost import Device
from ..errors import OptionError
from ..report import KernelRow
from . import cublaslt, cudnn_attention  # whose operators compiled code from a cache calls

REFERENCE, TRITON = "reference", "triton"
MIN_CAPABILITY = (9, 0)

_told: set[str] = set()


def resolve_kernels(kernels: str, device: torch.device) -> str:
    """Which kernels to use on a device: "triton" or "reference".

    "auto" takes Triton where it can and says once per device type that it emulates elsewhere.
    Raises OptionError if "triton" was asked for on a device that cannot run it.
    """
    problem = why_not_triton(device)
    if kernels == TRITON and problem:
        raise OptionError(f"kernels='triton' needs {problem}; use kernels='auto' or 'reference'")
    if kernels == REFERENCE or (kernels == "auto" and problem):
        if kernels == "auto" and device.type not in _told:
            _told.add(device.type)
            warnings.warn(
                f"FP8 is emulated here, with the same results and no speed-up: it needs {problem}",
                stacklevel=2,
            )
        return REFERENCE
    return TRITON


def why_not_triton(device: torch.device) -> str | None:
    """What a device lacks for the Triton kernels, or None."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"an NVIDIA GPU; the model is on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"compute capability 9.0; {torch.cuda.get_device_name(device)} has {capability}"
    return None


def why_not_attention() -> str | None:
    """What FP8 attention lacks where the Triton kernels run, or None."""
    return cudnn_attention.why_not()


def check_attention(kernels: str) -> None:
    """Raise OptionError if attention cannot run in FP8 with these kernels."""
    missing = None if kernels == REFERENCE else why_not_attention()
    if missing:
        raise OptionError(f"attention in FP8 needs {missing}")


def library_versions(kernels: str) -> tuple[int | None, ...]:
    """Of what compiled code depends on, besides PyTorch and Triton."""
    return () if kernels == REFERENCE else (cublaslt.version(),)


def device_constants(device: torch.device) -> Device:
    """What FP8's gain is predicted from; without an FP8 GPU, the constants of an H200."""
    from .device import ASSUMED, constants_of

    return ASSUMED if why_not_triton(device) else constants_of(device)


def lower(gm: fx.GraphModule, kernels: str) -> dict[str, str]:
    """Replace the FP8 nodes of a final graph; returns the kernels' source by name."""
    if kernels == REFERENCE:
        return {}
    from .triton import lower_to_triton  # Triton itself is only needed from here on

    return lower_to_triton(gm)


def kernel_name(node: fx.Node, kernels: str) -> str:
    """What runs an ``fp8::scaled_mm`` node: "reference", "cublaslt" (its first algorithm),
    "cublaslt #1" (its second) or our kernel and its tile.
    """
    if kernels == REFERENCE:
        return REFERENCE
    from .gemm_choice import gemm_kernel_name

    return gemm_kernel_name(node)


def sums_in_gemms(kernels: str) -> Callable[[fx.Node], bool] | None:
    """Which ``fp8::scaled_mm`` nodes had better add a matrix to their output; None: none at all."""
    if kernels == REFERENCE:
        return None
    from .gemm_choice import had_better_add

    return had_better_add


def kernel_rows(gm: fx.GraphModule, direction: str, device: Device | None) -> list[KernelRow]:
    """The fused kernels of a graph after ``grow_regions``, on whatever device it was traced."""
    from .rows import kernel_rows

    return kernel_rows(gm, direction, device)
