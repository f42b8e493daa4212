"""Predict how long GEMMs and their casts take on a device, and from how many tokens FP8 pays.

The model is a roofline: a kernel takes as long as its arithmetic or its bytes, whichever is more,
plus its launch. Times are microseconds, as sympy expressions in the GEMM's sizes ``M``, ``N`` and
``K``, of which one is the number of tokens, ``TOKENS``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

import sympy

M, N, K, TOKENS = sympy.symbols("m n k tokens", positive=True)
MARGIN = sympy.Rational(98, 100)  # FP8 pays below this share of the time in high precision
COSTS = "fp8_costs"  # key in a graph's meta: (site index, Gemm) -> GemmCost
_TILE_M, _TILE_N = 128, 256
_CAST_EFFICIENCY = sympy.Rational(85, 100)  # of the copy roof, reached by hand-written casts
_ALIGNMENT = 16  # tokens; wgrad contracts over them, and pads them to a multiple
_MAX_TILES = 1024  # how far beyond its token count a site's crossover is looked for

Size: TypeAlias = sympy.Expr  # an Integer, or TOKENS


@dataclass(frozen=True)
class Device:
    """What a prediction depends on. ``copy_bandwidth``: bytes read and written per second;
    ``bf16_flops`` and ``fp8_flops``: per second, of large GEMMs; ``sms``: multiprocessors.
    """

    name: str
    copy_bandwidth: float
    launch_seconds: float
    bf16_flops: float
    fp8_flops: float
    sms: int


H200 = Device("NVIDIA H200", 4.24e12, 2.5e-6, 690e12, 1400e12, 132)
H100 = replace(H200, name="NVIDIA H100", copy_bandwidth=2.95e12)
DEVICES = {"H200": H200, "H100": H100}


@dataclass(frozen=True)
class Cast:
    """One quantize kernel, or the part of it that one GEMM pays for.

    ``read``, ``written``: bytes per element. ``spared``: bytes per element that high precision
    would have to write instead. A cast that is fused into the kernel that computes its input
    reads nothing and has no launch of its own. ``share``: the GEMM's part of the whole.
    """

    rows: Size
    columns: Size
    read: int
    written: int
    spared: int = 0
    launches: int = 1
    share: sympy.Rational = sympy.S.One

    def us(self, device: Device) -> sympy.Expr:
        """Its share of the kernel's time, less what it spares."""
        moved = (self.read + self.written) / _CAST_EFFICIENCY - self.spared
        memory = moved * self.rows * self.columns / _exact(device.copy_bandwidth)
        return 10**6 * self.share * (memory + self.launches * _exact(device.launch_seconds))

    def microseconds(self, tokens: int, device: Device) -> float:
        """Its share of the kernel's time for that many tokens."""
        return float(self.us(device).xreplace({TOKENS: sympy.Integer(tokens)}))


@dataclass(frozen=True)
class GemmWork:
    """A GEMM ``[m, k] @ [k, n]`` and the casts it needs in FP8.

    ``itemsize``: of its operands in high precision and of its output.
    """

    m: Size
    n: Size
    k: Size
    itemsize: int
    casts: tuple[Cast, ...] = ()

    def times(self, device: Device) -> tuple[Callable[[int], float], Callable[[int], float]]:
        """Its microseconds for a number of tokens: in high precision; in FP8 with its casts."""
        high, fp8 = (_gemm_function(device, self.itemsize, fp8) for fp8 in (False, True))
        casts = _linear_function(sympy.Add(*(cast.us(device) for cast in self.casts)))

        def sizes(tokens: int) -> Iterable[int]:
            return (tokens if size is TOKENS else int(size) for size in (self.m, self.n, self.k))

        return lambda t: high(*sizes(t)), lambda t: fp8(*sizes(t)) + casts(t)

    def relaxed(self, device: Device, fp8: bool) -> tuple[sympy.Expr, sympy.Expr]:
        """The two terms whose maximum is the GEMM's time, linear in the tokens."""
        sizes = {M: self.m, N: self.n, K: self.k}
        arithmetic, memory = gemm_terms(device, self.itemsize, fp8=fp8, relaxed=True)
        return arithmetic.xreplace(sizes), sympy.expand(memory.xreplace(sizes))


@functools.cache
def gemm_terms(
    device: Device, itemsize: int, *, fp8: bool, relaxed: bool = False
) -> tuple[sympy.Expr, sympy.Expr]:
    """The microseconds of a GEMM's arithmetic and of its bytes.

    Arithmetic takes whole waves of tiles, one tile per SM; with fewer tiles than SMs, as many SMs
    as each tile can have share its K. ``relaxed`` leaves this rounding out. float32 multiplies
    in TF32, at half the rate of bfloat16.
    """
    tiles = sympy.ceiling(M / _TILE_M) * sympy.ceiling(N / _TILE_N)
    # The halves keep float arithmetic from rounding a whole quotient to its neighbour.
    half = sympy.Rational(1, 2)
    splits = sympy.Max(1, sympy.floor((device.sms + half) / tiles), evaluate=False)
    waves = sympy.ceiling((tiles - half) / device.sms)
    outputs = waves * device.sms * _TILE_M * _TILE_N / splits
    flops = _exact(device.fp8_flops) if fp8 else _exact(device.bf16_flops) * 2 / itemsize
    arithmetic = 2 * K * (M * N if relaxed else outputs) / flops
    moved = (M + N) * K * (1 if fp8 else itemsize) + M * N * itemsize
    return 10**6 * arithmetic, 10**6 * moved / _exact(device.copy_bandwidth)


def gemm_us(device: Device, itemsize: int, *, fp8: bool) -> sympy.Expr:
    """The microseconds of a GEMM, in ``M``, ``N`` and ``K``."""
    terms = gemm_terms(device, itemsize, fp8=fp8)
    return sympy.Max(*terms, evaluate=False) + 10**6 * _exact(device.launch_seconds)


# FLOP/s of cuDNN's attention in bfloat16 and in FP8, by the elements of a head (H200; causal, 16384
# tokens of 8192 each, 32 heads of 128 or 64 of 64).
_ATTENTION_FLOPS = {64: (467e12, 539e12), 128: (637e12, 947e12)}


# The same of backward, for heads of 128, between GEMMs, where the power limit slows down both; and
# what else FP8 takes, in bytes moved for an element of query, key and value: fitted to steps of
# 8192 tokens (0.55 ms less a layer) and of 1024 (0.09 ms more).
_BACKWARD_FLOPS, _BACKWARD_BYTES = (423e12, 477e12), 7


@dataclass(frozen=True)
class AttentionWork:
    """The work of attention: ``queries`` and ``keys`` are tokens of a sequence, ``head`` the
    elements of a head, ``kv_heads`` the heads of keys and values.
    """

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head: int
    is_causal: bool

    def us(self, device: Device) -> tuple[float, float]:
        """The microseconds of its forward in 16 bits; and in FP8, with a search for the amax of
        query, key and value and their casts.
        """
        high, fp8 = self._us(device, 4, _ATTENTION_FLOPS[64 if self.head <= 64 else 128])
        looked_at, cast = 2, 2 + 1  # bytes of an element
        return high, fp8 + kernel_us(device, self._elements * (looked_at + cast))

    def backward_us(self, device: Device) -> tuple[float, float]:
        """The microseconds of its backward in 16 bits; and in FP8, with what is cast for it, and
        without what then need not be written in 16 bits.
        """
        high, fp8 = self._us(device, 10, _BACKWARD_FLOPS)
        return high, fp8 + kernel_us(device, self._elements * _BACKWARD_BYTES)

    def _us(self, device: Device, each: int, flops: tuple[float, float]) -> tuple[float, float]:
        """In 16 bits and in FP8, with so many FLOP for each element of a product's rows."""
        products = self.batch * self.heads * self.queries * self.keys / (2 if self.is_causal else 1)
        speed = device.bf16_flops / H200.bf16_flops
        high, fp8 = (1e6 * each * products * self.head / (speed * rate) for rate in flops)
        return high, fp8

    @property
    def _elements(self) -> int:
        """Those of query, key and value."""
        tokens = self.heads * self.queries + 2 * self.kv_heads * self.keys
        return self.batch * tokens * self.head


def kernel_us(device: Device, moved: float) -> float:
    """The microseconds of a memory-bound kernel of ours that reads and writes ``moved`` bytes."""
    seconds = moved / (float(_CAST_EFFICIENCY) * device.copy_bandwidth) + device.launch_seconds
    return 1e6 * seconds


@functools.cache
def _gemm_function(device: Device, itemsize: int, fp8: bool) -> Callable[..., float]:
    return sympy.lambdify((M, N, K), gemm_us(device, itemsize, fp8=fp8), modules="math")


def _linear_function(expression: sympy.Expr) -> Callable[[int], float]:
    slope, constant = (float(part) for part in _slope_and_constant(expression))
    return lambda tokens: slope * tokens + constant


# --- sites --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GemmCost:
    """What is predicted of one GEMM on the device of that name. ``fp8_us``: with its part of the
    casts, or None if it cannot be FP8. ``pays_from``: of its site, see Prediction.
    """

    device: str
    high_us: float
    fp8_us: float | None = None
    pays_from: int | None = None


@dataclass(frozen=True)
class Prediction:
    """Microseconds of GEMMs that are decided together; ``fp8_us`` includes their casts.

    ``pays``: whether they are faster in FP8, as a whole. ``pays_from``: the tokens from which on
    they are, or None if they never are.
    """

    high_us: tuple[float, ...]
    fp8_us: tuple[float, ...]
    pays: bool
    pays_from: int | None


@functools.lru_cache(maxsize=4096)  # the layers of a model are alike
def predict(gemms: tuple[GemmWork, ...], tokens: int, device: Device) -> Prediction:
    """What the GEMMs take with that many tokens, in high precision and in FP8."""
    times = [gemm.times(device) for gemm in gemms]

    def gain(count: int) -> float:
        return sum(float(MARGIN) * high(count) - fp8(count) for high, fp8 in times)

    return Prediction(
        high_us=tuple(high(tokens) for high, _ in times),
        fp8_us=tuple(fp8(tokens) for _, fp8 in times),
        pays=gain(tokens) > 0,
        pays_from=_pays_from(gain, crossover(gemms, device), tokens),
    )


def crossover(gemms: Sequence[GemmWork], device: Device) -> sympy.Expr | None:
    """The tokens above which FP8 pays, solved for exactly, or None if it never pays.

    The rounding to whole waves is left out. Then a GEMM's time is the maximum of two linear
    terms, and between the tokens where such maxima switch, FP8's gain is linear in the tokens:
    the answer is the last root of a piece.
    """
    high = [gemm.relaxed(device, fp8=False) for gemm in gemms]
    fp8 = [gemm.relaxed(device, fp8=True) for gemm in gemms]
    launches = len(gemms) * (MARGIN - 1) * 10**6 * _exact(device.launch_seconds)
    casts = sympy.Add(*(cast.us(device) for gemm in gemms for cast in gemm.casts))

    def piece(inside: sympy.Expr) -> sympy.Expr:
        return MARGIN * _maxima(high, inside) - _maxima(fp8, inside) - casts + launches

    switches = {root for left, right in high + fp8 for root in _roots(left - right) if root > 0}
    bounds = [sympy.S.Zero, *sorted(switches)]
    last = piece(bounds[-1] + 1)
    slope, constant = _slope_and_constant(last)
    if slope < 0 or (slope == 0 and constant <= 0):
        return None
    pieces = [(low, high, piece((low + high) / 2)) for low, high in pairwise(bounds)]
    for low, high_bound, gain in [(bounds[-1], sympy.oo, last), *reversed(pieces)]:
        for root in _roots(gain):
            if low <= root <= high_bound:
                return root
    return sympy.S.Zero


def _maxima(terms: Iterable[tuple[sympy.Expr, sympy.Expr]], inside: sympy.Expr) -> sympy.Expr:
    """The sum of the larger term of each pair at a number of tokens."""
    at = {TOKENS: inside}
    return sympy.Add(*(max(pair, key=lambda term: term.xreplace(at)) for pair in terms))


def _roots(linear: sympy.Expr) -> list[sympy.Expr]:
    slope, constant = _slope_and_constant(linear)
    return [] if slope == 0 else [-constant / slope]


def _slope_and_constant(linear: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    constant = linear.xreplace({TOKENS: sympy.S.Zero})
    return linear.xreplace({TOKENS: sympy.S.One}) - constant, constant


def _pays_from(gain: Callable[[int], float], root: sympy.Expr | None, tokens: int) -> int | None:
    """The crossover as a number of tokens that does not contradict the decision for ``tokens``:
    rounding to whole waves moves it to either side of the exact root.
    """
    aligned = None if root is None else max(1, math.ceil(root / _ALIGNMENT)) * _ALIGNMENT
    if gain(tokens) > 0:
        return tokens if aligned is None else min(aligned, tokens)
    if aligned is None or aligned > tokens:
        return aligned
    later = range(tokens // _TILE_M + 1, tokens // _TILE_M + _MAX_TILES)
    return next((_TILE_M * tile for tile in later if gain(_TILE_M * tile) > 0), None)


def _exact(value: float) -> sympy.Rational:
    return sympy.Rational(repr(value))
