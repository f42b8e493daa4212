"""What multiplies a GEMM's operands: PyTorch's operator, another algorithm of cuBLASLt, or ours.

Tensorwise GEMMs are timed (tuning.py); for those with a scale per row or block it is known.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from ..internals import stays_below
from ..ir import SCALED_MM_BLOCKS, args_of, size_expr
from ..regions import hint, is_aligned
from .block_gemms import is_scaled_mm
from .kernels.scaled_mm import TileConfig
from .kernels.scaled_mm_blocks import config_for
from .kernels.scaled_mm_few_rows import (
    FEW_ROWS,
    FEW_ROWS_BLOCK,
    FEW_ROWS_OF_BLOCKS,
    FewRowsConfig,
    few_rows_config_for,
)
from .tuning import CUBLASLT, CublasltAlgorithm, GemmShape, choose_gemm


def gemm_kernel_name(node: fx.Node) -> str:
    """What was, or will be, chosen for a scaled_mm node."""
    if node.target is SCALED_MM_BLOCKS:
        if (few_rows := few_rows_config(node)) is not None:
            return f"triton {few_rows}"
        return "_scaled_mm" if is_scaled_mm(node) else f"triton {block_config(node)}"
    device = args_of(node)[0].meta["val"].device
    choice = choose_gemm(gemm_shape(node), device.index or 0)
    if choice is None or isinstance(choice, CublasltAlgorithm):
        return str(choice or CUBLASLT)
    return f"triton {choice}"


def had_better_add(node: fx.Node) -> bool:
    """Whether a scaled_mm that adds a matrix to its output is faster than one without, and a kernel
    that reads the two and writes their sum, instead of the sum alone.
    """
    device = args_of(node)[0].meta["val"].device
    shape = replace(gemm_shape(node), adds=True)
    return device.type == "cuda" and choose_gemm(shape, device.index or 0) is not None


def few_rows_config(node: fx.Node) -> FewRowsConfig | None:
    """What multiplies few rows with scales per row or block; None for other GEMMs with blocks."""
    m, n, _ = _gemm_sizes(node)
    *_, (_, columns), _, fast_accum = args_of(node)
    most = {0: FEW_ROWS, FEW_ROWS_BLOCK: FEW_ROWS_OF_BLOCKS}.get(columns, 0)
    if m > most or not stays_below(args_of(node)[0].meta["val"].shape[0], most):
        return None
    return few_rows_config_for(m, n, fast_accum=fast_accum)


def block_config(node: fx.Node) -> TileConfig:
    """The tile of our kernel for operands with a scale per row or block."""
    return config_for(*_gemm_sizes(node), args_of(node)[6][1])


def _gemm_sizes(node: fx.Node) -> tuple[int, int, int]:
    """m, n and k; hints where they are symbolic."""
    a, b = (value.meta["val"] for value in args_of(node)[:2])
    return hint(a.shape[0]), hint(b.shape[0]), hint(a.shape[1])


def gemm_shape(node: fx.Node) -> GemmShape:
    """What the choice for a tensorwise GEMM depends on."""
    a, b, _, _, bias, out_dtype, fast_accum, *addend = args_of(node)
    m, n, k = _gemm_sizes(node)
    return GemmShape(
        m=m,
        n=n,
        k=k,
        left=a.meta["val"].dtype,
        right=b.meta["val"].dtype,
        out=out_dtype,
        bias=None if bias is None else bias.meta["val"].dtype,
        fast_accum=bool(fast_accum),
        aligned=is_aligned(size_expr(b.meta["val"].shape[0])),
        grows=m <= FEW_ROWS and not stays_below(a.meta["val"].shape[0], FEW_ROWS),
        fixed=all(isinstance(size, int) for size in (*a.meta["val"].shape, b.meta["val"].shape[0])),
        adds=bool(addend),
    )
