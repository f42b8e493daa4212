"""One kernel launch as a value.

A `Launch` is data: the eager launcher below runs it, and the compiler turns the same value into
a node of the graph. The tensors may therefore be torch tensors or graph nodes, and whoever builds
a `Launch` never looks inside them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True)
class Launch:
    """A kernel and everything it is launched with.

    Attributes:
        kernel: a `@triton.jit` function.
        tensors: kernel argument -> tensor, graph node, or None (the kernel then never uses it).
        sizes: kernel argument -> number known at run time (or a proxy of a graph node).
        constants: kernel argument -> compile-time constant.
        grid: number of programs per axis; may hold proxies.
        descriptors: those of `tensors` that are passed as TMA descriptors -> block shape.
        writes: those of `tensors` that the kernel writes; None: whoever must know finds out.
    """

    kernel: Any
    tensors: dict[str, Any]
    sizes: dict[str, Any]
    constants: dict[str, int | float | bool]
    grid: tuple[Any, ...]
    descriptors: dict[str, list[int]] = field(default_factory=dict)
    writes: frozenset[str] | None = None
    num_warps: int = 4
    num_stages: int = 3


def run(launch: Launch) -> None:
    """Launch the kernel now, on the current stream."""
    tensors = dict(launch.tensors)
    for name, block_shape in launch.descriptors.items():
        tensors[name] = TensorDescriptor.from_tensor(tensors[name], block_shape)
    launch.kernel[launch.grid](
        **tensors,
        **launch.sizes,
        **launch.constants,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )


def static_value(size: Any) -> Any:
    """What is known of a size while compiling: itself, or the SymInt of a graph node's proxy."""
    return size.node.meta["val"] if isinstance(size, fx.Proxy) else size
