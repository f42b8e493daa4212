"""What an edge holds, and what a cast to either format would lose of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .formats import Format
from .ir import Edge
from .ops import current_scale, in_blocks, per_row
from .profiles import Seen
from .recipe import Granularity, Recipe, Scaling

QUANTILES = (0.5, 0.9, 0.99, 0.999)
_SAMPLE = 2**20  # elements that quantiles are found from, at most


@dataclass
class EdgeRecord:
    """The sums that a Seen is made of."""

    edge: Edge
    recipe: Recipe
    amax: list[float] = field(default_factory=list)
    squares: float = 0.0
    elements: int = 0
    quantiles: list[Tensor] = field(default_factory=list)
    lost: dict[Format, list[tuple[float, float, float]]] = field(
        default_factory=lambda: {each: [] for each in Format}
    )

    def add(self, x: Tensor) -> None:
        """Look at ``[rows, K]``, as a GEMM takes it."""
        if not x.numel():
            return
        x = x.float()
        self.amax.append(float(x.abs().amax()))
        self.squares += float(x.double().square().sum())
        self.elements += x.numel()
        sample = x.flatten()[:: max(1, x.numel() // _SAMPLE)].abs()[:_SAMPLE]
        self.quantiles.append(sample.quantile(sample.new_tensor(QUANTILES)).cpu())
        for each, lost in self.lost.items():
            lost.append(_lost(x, self._dequantized(x, each)))

    def _dequantized(self, x: Tensor, each: Format) -> tuple[Tensor, Tensor]:
        """What a cast to a format makes of a value, and which elements it clips."""
        past = self.amax[:-1][-self.recipe.history_len :]
        delayed = self.recipe.scaling is Scaling.DELAYED and past
        scale = current_scale(x.new_tensor(max(past) if delayed else self.amax[-1]), each.max)
        return dequantized(x, self.edge.granularity, self.recipe, each, scale)

    def seen(self) -> Seen:
        def mean(each: Format, which: int) -> float:
            return sum(lost[which] for lost in self.lost[each]) / max(1, len(self.lost[each]))

        found = torch.stack(self.quantiles).mean(0).tolist() if self.quantiles else []
        noise, underflow, saturated = (
            {str(each): mean(each, which) for each in Format} for which in range(3)
        )
        return Seen(
            amax=max(self.amax, default=0.0),
            rms=(self.squares / max(1, self.elements)) ** 0.5,
            quantiles=dict(zip(map(str, QUANTILES), found, strict=False)),
            noise=noise,
            underflow=underflow,
            saturated=saturated,
        )


def dequantized(
    x: Tensor, granularity: Granularity, recipe: Recipe, to: Format, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """What a cast makes of ``x``, ``f32[rows, K]``, and which elements it clips.

    ``scale``: that of a tensorwise cast; others find their own, and clip nothing.
    """
    if granularity is not Granularity.TENSOR:
        block = granularity.block
        q, scale_inv = in_blocks(x, block, recipe.power_of_two, to.dtype)
        per = per_row(scale_inv, block, q).repeat_interleave(block[1] or q.shape[1], 1)
        return (q.float() * per)[:, : x.shape[1]], torch.zeros_like(x, dtype=torch.bool)
    y = (x * scale).clamp(-to.max, to.max).to(to.dtype).float() / scale
    return y, x.abs() * scale > to.max


def _lost(x: Tensor, cast: tuple[Tensor, Tensor]) -> tuple[float, float, float]:
    """Noise per row, and the shares of elements that underflow and saturate; see Seen."""
    y, clipped = cast
    power, error = x.square().sum(1), (y - x).square().sum(1)
    noise = (error / power)[power > 0]
    there = x != 0
    underflow = (there & (y == 0)).sum() / there.sum().clamp(min=1)
    return (
        float(noise.mean()) if noise.numel() else 0.0,
        float(underflow),
        float(clipped.float().mean()),
    )
