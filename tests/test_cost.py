"""The cost model: its formulas, its crossover, and what it says of real sizes."""

from __future__ import annotations

import math

import pytest
import sympy

from fp8compile.cost import (
    H100,
    H200,
    MARGIN,
    TOKENS,
    AttentionWork,
    Cast,
    Device,
    GemmWork,
    K,
    M,
    N,
    Prediction,
    crossover,
    gemm_terms,
    gemm_us,
    kernel_us,
    predict,
)

ROUND = Device("round", 1e12, 1e-6, 100e12, 200e12, sms=8)
HALF = sympy.Rational(1, 2)


def size(value: int) -> sympy.Integer:
    return sympy.Integer(value)


def at(expression: sympy.Expr, m: int, n: int, k: int) -> float:
    return float(expression.subs({M: m, N: n, K: k}))


def linear_site(n: int, k: int, fused: bool = True) -> tuple[GemmWork, ...]:
    """fprop, dgrad and wgrad of a linear layer from k to n features, with its casts."""
    out, into = size(n), size(k)
    activation = (0, 2, 2, 0) if fused else (2, 2, 0, 1)
    x = Cast(TOKENS, into, *activation, share=HALF)
    g = Cast(TOKENS, out, *activation, share=HALF)
    w = Cast(out, into, read=2, written=1)
    return (
        GemmWork(TOKENS, out, into, 2, (x, w)),
        GemmWork(TOKENS, into, out, 2, (g, w)),
        GemmWork(out, into, TOKENS, 2, (g, x)),
    )


def model_sites(width: int, ff: int) -> list[tuple[GemmWork, ...]]:
    """The distinct linear layers of a Llama layer; attention's are cast on their own."""
    return [
        linear_site(width, width, fused=False),
        linear_site(width // 4, width, fused=False),
        linear_site(ff, width),
        linear_site(width, ff),
    ]


def predictions(width: int, ff: int, tokens: int, device: Device = H200) -> list[Prediction]:
    return [predict(site, tokens, device) for site in model_sites(width, ff)]


# --- formulas -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("m", "n", "whole_waves"),
    [(8 * 128, 256, 1), (8 * 128 + 1, 256, 2), (16 * 128, 256, 2), (128, 256 * 9, 2)],
)
def test_arithmetic_takes_whole_waves_of_tiles(m: int, n: int, whole_waves: int) -> None:
    arithmetic, _ = gemm_terms(ROUND, 2, fp8=False)
    wave = 2 * 128 * 256 * 8 * 512 / 100e12 * 1e6
    assert at(arithmetic, m, n, 512) == pytest.approx(whole_waves * wave)


@pytest.mark.parametrize(("tiles", "splits"), [(1, 8), (2, 4), (3, 2), (4, 2), (5, 1)])
def test_few_tiles_share_k_among_the_multiprocessors(tiles: int, splits: int) -> None:
    arithmetic, _ = gemm_terms(ROUND, 2, fp8=True)
    wave = 2 * 128 * 256 * 8 * 512 / 200e12 * 1e6
    assert at(arithmetic, 128 * tiles, 256, 512) == pytest.approx(wave / splits)


@pytest.mark.parametrize(("fp8", "operands"), [(False, 2), (True, 1)])
def test_bytes_are_moved_at_the_copy_roof(fp8: bool, operands: int) -> None:
    _, memory = gemm_terms(ROUND, 2, fp8=fp8)
    moved = operands * (64 * 48 + 32 * 48) + 2 * 64 * 32
    assert at(memory, 64, 32, 48) == pytest.approx(moved / 1e12 * 1e6)


def test_a_gemm_takes_the_larger_term_and_its_launch() -> None:
    for m in (16, 16384):
        terms = [at(term, m, 4096, 4096) for term in gemm_terms(H200, 2, fp8=True)]
        assert at(gemm_us(H200, 2, fp8=True), m, 4096, 4096) == pytest.approx(max(terms) + 2.5)


def test_times_are_those_of_the_expressions_for_any_tile_count() -> None:
    gemm = GemmWork(TOKENS, size(768), size(512), 2)
    high, fp8 = gemm.times(H200)
    for tokens in range(128, 128 * 400, 128 * 3):
        tiles = math.ceil(tokens / 128) * 3
        waves = math.ceil(tiles / 132) / max(1, 132 // tiles)
        arithmetic = waves * 132 * 2 * 128 * 256 * 512 / 690e12 * 1e6
        moved = (2 * (tokens + 768) * 512 + 2 * tokens * 768) / 4.24e12 * 1e6
        assert high(tokens) == pytest.approx(max(arithmetic, moved) + 2.5)
        assert fp8(tokens) < high(tokens)


def test_float32_multiplies_at_half_the_rate() -> None:
    (bf16, _), (f32, _) = (gemm_terms(H200, itemsize, fp8=False) for itemsize in (2, 4))
    assert sympy.simplify(f32 / bf16) == 2


@pytest.mark.parametrize(
    ("cast", "us"),
    [
        (Cast(size(1000), size(1000), read=2, written=1), 3 / 0.85 + 1),
        (Cast(size(1000), size(1000), read=2, written=2, share=HALF), 2 / 0.85 + 0.5),
        (Cast(size(1000), size(1000), read=0, written=2, launches=0), 2 / 0.85),
        (Cast(size(1000), size(1000), read=0, written=1, spared=2, launches=0), 1 / 0.85 - 2),
    ],
    ids=["alone", "shared", "fused", "fused, instead of the value"],
)
def test_casts(cast: Cast, us: float) -> None:
    assert float(cast.us(ROUND)) == pytest.approx(us)


# --- crossover ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("n", "k"), [(768, 768), (2048, 768), (4096, 4096), (14336, 4096)])
def test_the_crossover_is_where_the_relaxed_times_meet(n: int, k: int, fused: bool) -> None:
    site = linear_site(n, k, fused)
    root = crossover(site, H200)
    assert root is not None and root.is_Rational and root > 0

    def gain(tokens: sympy.Expr) -> sympy.Expr:
        total = sympy.S.Zero
        for gemm in site:
            high, fp8 = (
                max(t.subs(TOKENS, tokens) for t in gemm.relaxed(H200, fp8=f)) for f in (0, 1)
            )
            casts = sum(cast.us(H200).subs(TOKENS, tokens) for cast in gemm.casts)
            total += sympy.Rational(98, 100) * (high + sympy.Rational(5, 2))
            total -= fp8 + sympy.Rational(5, 2) + casts
        return total

    assert gain(root) == 0
    assert gain(root * 2) > 0 > gain(root / 2)


def test_never_where_casts_cost_more_than_the_gemm_saves() -> None:
    site = linear_site(64, 64, fused=False)
    assert crossover(site, H200) is None
    found = predict(site, 10**6, H200)
    assert not found.pays and found.pays_from is None


def test_always_without_casts() -> None:
    """Bytes alone are a reason: half of them."""
    gemm = GemmWork(TOKENS, size(8192), size(8192), 2)
    assert crossover((gemm,), H200) == 0
    assert predict((gemm,), 1, H200).pays_from == 1


@pytest.mark.parametrize("tokens", [16, 100, 1000, 2000, 2500, 3000, 4096, 5000, 16384])
@pytest.mark.parametrize("width", [512, 768, 1024])
def test_what_is_shown_does_not_contradict_the_decision(width: int, tokens: int) -> None:
    for site in model_sites(width, 4 * width):
        found = predict(site, tokens, H200)
        if found.pays_from is not None:
            assert found.pays == (tokens >= found.pays_from)
        else:
            assert not found.pays


# --- real sizes ---------------------------------------------------------------------------------


def test_large_layers_pay_clearly() -> None:
    for found in predictions(4096, 14336, tokens=16384):
        assert found.pays and sum(found.fp8_us) < 0.7 * sum(found.high_us)


@pytest.mark.parametrize(("width", "ff"), [(768, 2048), (4096, 14336), (8192, 28672)])
def test_64_tokens_do_not_pay_in_training(width: int, ff: int) -> None:
    assert not any(found.pays for found in predictions(width, ff, tokens=64))


def test_small_layers_are_at_the_edge() -> None:
    found = predictions(768, 2048, tokens=16384)
    assert {each.pays for each in found} == {True, False}
    high, fp8 = (sum(sum(getattr(p, name)) for p in found) for name in ("high_us", "fp8_us"))
    large = predictions(4096, 14336, tokens=16384)
    assert fp8 / high > 1.2 * sum(sum(p.fp8_us) for p in large) / sum(sum(p.high_us) for p in large)


def test_less_bandwidth_makes_casts_dearer() -> None:
    site = linear_site(1024, 1024, fused=False)
    h100, h200 = crossover(site, H100), crossover(site, H200)
    assert h100 is not None and h200 is not None
    assert predict(site, 16384, H100).fp8_us > predict(site, 16384, H200).fp8_us


def attention(tokens: int, head: int = 128, is_causal: bool = True) -> AttentionWork:
    """16384 tokens in sequences of so many, 4096 features, a quarter of these of keys."""
    return AttentionWork(
        16384 // tokens, 4096 // head, 1024 // head, tokens, tokens, head, is_causal
    )


@pytest.mark.parametrize(
    ("head", "tokens", "high", "fp8"),
    # As measured on an H200, microseconds; without casts.
    [
        (128, 8192, 1727, 1161),
        (128, 2048, 505, 379),
        (64, 8192, 2357, 2039),
        (64, 4096, 1239, 1128),
    ],
)
def test_attention_takes_about_what_was_measured(
    head: int, tokens: int, high: float, fp8: float
) -> None:
    work = attention(tokens, head)
    found, with_casts = work.us(H200)
    assert found == pytest.approx(high, rel=0.2)
    casts = kernel_us(H200, 5 * 16384 * (4096 + 2048))
    assert with_casts - casts == pytest.approx(fp8, rel=0.25)


def test_long_sequences_pay_for_attention_in_fp8() -> None:
    def pays(work: AttentionWork) -> bool:
        high, fp8 = work.us(H200)
        return fp8 < MARGIN * high

    assert [pays(attention(n)) for n in (1024, 2048, 4096, 8192)] == [False, False, True, True]
    assert pays(attention(2048, is_causal=False))  # twice the products of as many values
    assert not pays(attention(4096, head=64)) and pays(attention(8192, head=64))
