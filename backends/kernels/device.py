"""Device functions shared by all kernels: the one place for FP8 numerics, and for tile order.

Kernels import these by name (`from .device import saturate`), because the compiler copies
a kernel's source, and that of every function it names, into the code that it generates.
"""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST_SCALE = tl.constexpr(2.0**126)  # its inverse, which GEMMs multiply by, is no denormal
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def finite_or_inf(amax):
    """NaN -> +inf. A float atomic max compares bits, which is only safe for numbers >= 0."""
    return tl.where(amax == amax, amax, float("inf"))


@triton.jit
def sigmoid(x):
    """`1 / (1 + exp(-x))` with the hardware's reciprocal: half the instructions of a division."""
    if INTERPRETED:
        return tl.sigmoid(x)
    return tl.inline_asm_elementwise(
        """{
        .reg .f32 t;
        mul.f32 t, $1, 0fBFB8AA3B;
        ex2.approx.ftz.f32 t, t;
        add.f32 t, t, 0f3F800000;
        rcp.approx.ftz.f32 $0, t;
        }""",
        "=f,f",
        [x],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def exp2(x):
    """`2 ** x`; what would be denormal is 0, where to keep it takes three more instructions."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def exp(x):
    """`e ** x`, as `exp2`."""
    return exp2(x * 1.4426950408889634)


@triton.jit
def erf_plus_1(x):
    """`erf(x) + 1`, as in a GELU, within 2.5e-7.

    For t >= 0, `erfc(t) = 2 ** (t * p(t))`, with the p of degree 7 whose largest error of erfc is
    least. Its leading coefficient is negative: beyond 4, where erfc is 0 in float32, so is this.
    libdevice's erf has one polynomial for small and one for large t, and moves the coefficients of
    either into registers: a GELU and its cast in two copies take 57 instructions, with this 35.
    """
    t = tl.abs(x)
    p = tl.fma(t, -4.535860352916643e-05, 0.0004455077287275344)
    p = tl.fma(p, t, -0.0014894419582560658)
    p = tl.fma(p, t, -0.000774629064835608)
    p = tl.fma(p, t, 0.02825368009507656)
    p = tl.fma(p, t, -0.1484816074371338)
    p = tl.fma(p, t, -0.9184163808822632)
    p = tl.fma(p, t, -1.6279085874557495)
    complement = exp2(p * t)
    return tl.where(x < 0.0, complement, 2.0 - complement)


@triton.jit
def widen(x):
    """Float32 of what was loaded.

    Of bfloat16, two values are taken from a word at a time: Triton's conversion moves the upper one
    down first, only to shift it up again.
    """
    if INTERPRETED or x.dtype != tl.bfloat16:
        return x.to(tl.float32)
    return tl.inline_asm_elementwise(
        "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000;",
        "=r,=r,r",
        [x],
        dtype=tl.float32,
        is_pure=True,
        pack=2,
    )


@triton.jit
def log1p(x):
    """`log(1 + x)` to 17 bits, also where 1 + x rounds most of x away: there, its Taylor series."""
    series = x * (1.0 - x * (0.5 - x * 0.33333334))
    return tl.where(tl.abs(x) < 0.015625, series, tl.log(1.0 + x))


@triton.jit
def magnitude_bits(x):
    """|x| as an integer. The order of these integers is that of |x|, with NaN above infinity."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def inside(values, in_tile, EVEN: tl.constexpr):
    """`values`, 0 outside of the matrix; EVEN: there is no outside."""
    if EVEN:
        return values
    return tl.where(in_tile, values, 0)


@triton.jit
def tile_amax(bits):
    """The largest of the tile's `magnitude_bits`, as a float; infinite if any is not finite."""
    return finite_or_inf(tl.max(bits).to(tl.float32, bitcast=True))


@triton.jit
def divide(a, b):
    """`a / b`, correctly rounded, at most `LARGEST_SCALE`; for a >= 1 and b > 0, where the quotient
    is no denormal.

    A division by Triton branches to where extreme exponents are dealt with. A thread waits there
    for each of its divisions in turn, and the call takes registers: a cast of both copies with
    scales per block has 34 of them, and takes 124 us instead of 100 (H200). Here the exponents are
    subtracted; the mantissas are divided by a Newton step for the reciprocal, and one for the
    remainder (Markstein, IBM J. Res. Dev. 34, 1990: correctly rounded). Where b is denormal, its
    mantissa is not what is divided by, but the quotient is beyond the largest scale.
    """
    if INTERPRETED:
        quotient = tl.div_rn(a, b)
        return tl.where(quotient > LARGEST_SCALE, LARGEST_SCALE, quotient)
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 m, e;
        .reg .f32 b, r, t, q;
        and.b32 m, $2, 0x007FFFFF;
        or.b32 m, m, 0x3F800000;
        mov.b32 b, m;
        rcp.approx.ftz.f32 r, b;
        neg.f32 b, b;
        fma.rn.f32 t, b, r, 0f3F800000;
        fma.rn.f32 r, t, r, r;
        mul.rn.f32 q, $1, r;
        fma.rn.f32 t, b, q, $1;
        fma.rn.f32 q, t, r, q;
        and.b32 e, $2, 0x7F800000;
        sub.u32 e, 0x3F800000, e;
        mov.b32 m, q;
        add.u32 m, m, e;
        min.u32 $0, m, 0x7E800000;
        }""",
        "=f,f,r",
        [a, b.to(tl.int32, bitcast=True)],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def scale_from_amax(amax, FP8_MAX):
    """`FP8_MAX / amax`, correctly rounded, at most `LARGEST_SCALE`; `amax` must be > 0."""
    return divide(FP8_MAX, amax)


@triton.jit
def resolve_scale(delayed_scale, amax, FP8_MAX):
    """The delayed scale where it is known (> 0), else the current one, from `amax`.

    An amax that is zero or not finite stands for no information: the scale is then 1.
    """
    usable = (amax > 0) & (amax < float("inf"))
    current = scale_from_amax(tl.where(usable, amax, FP8_MAX), FP8_MAX)
    return tl.where(delayed_scale > 0, delayed_scale, current)


@triton.jit
def saturate(x, scale, FP8_MAX: tl.constexpr):
    """Float32 `x * scale`, ready to cast: finite values saturate, NaN and infinity become NaN.

    Infinity times 0 is NaN: to add that takes two instructions, where a comparison takes three, and
    a predicate that registers have to hold between several casts of the same `x`. As a product of
    Triton's, `x * 0` would be held instead.
    """
    x = x.to(tl.float32)
    if INTERPRETED:
        return tl.where(tl.abs(x) < float("inf"), _clamp(x * scale, FP8_MAX), float("nan"))
    return tl.inline_asm_elementwise(
        """{
        .reg .f32 t;
        mul.rn.f32 t, $1, 0f00000000;
        fma.rn.f32 $0, $1, $2, t;
        }""",
        "=f,f,f",
        [x, scale],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def scaled(x, scale, FP8_MAX: tl.constexpr):
    """`saturate` with the scale of x's own group, which is NaN if not all of it is finite."""
    y = x.to(tl.float32) * scale
    return _clamp(y, FP8_MAX) if INTERPRETED else y


@triton.jit
def _clamp(y, FP8_MAX: tl.constexpr):
    """What the hardware's conversion does itself (cvt.rn.satfinite).

    Comparisons instead of min/max: NaN-propagating min/max miscompile (triton issue 11111).
    """
    y = tl.where(y > FP8_MAX, FP8_MAX, y)
    return tl.where(y < -FP8_MAX, -FP8_MAX, y)


# Four float32 values in, their FP8 bytes in a word out. A permutation puts the halves of the word
# together: where they are moved into it and are one pair of values, as zeros outside of a narrow
# matrix are, ptxas (12.8 and 12.9) converts that once and merges it with a register that holds
# something else. All in a line: Inductor copies a constant into a string of its code.
FOUR_TO_E4M3 = tl.constexpr(
    "{ .reg .b16 pair, zero; .reg .b32 low, high; mov.b16 zero, 0;"
    " cvt.rn.satfinite.e4m3x2.f32 pair, $2, $1; mov.b32 low, {pair, zero};"
    " cvt.rn.satfinite.e4m3x2.f32 pair, $4, $3; mov.b32 high, {pair, zero};"
    " prmt.b32 $0, low, high, 0x5410; }"
)
FOUR_TO_E5M2 = tl.constexpr(FOUR_TO_E4M3.value.replace("e4m3x2", "e5m2x2"))


@triton.jit
def to_fp8(y, dtype: tl.constexpr):
    """Cast float32 values to FP8."""
    if INTERPRETED:
        return y.to(dtype)
    assembly: tl.constexpr = FOUR_TO_E4M3 if dtype == tl.float8e4nv else FOUR_TO_E5M2
    codes = tl.inline_asm_elementwise(
        assembly, "=r,f,f,f,f", [y], dtype=tl.int8, is_pure=True, pack=4
    )
    return codes.to(dtype, bitcast=True)


@triton.jit
def pack_fp8(y0, y1, y2, y3, dtype: tl.constexpr):
    """Cast four float32 values to FP8, into the bytes of an int32; `y0` is the lowest.

    On the hardware it converts once more instead of taking apart what `to_fp8` has converted: ptxas
    12.8 gives wrong bytes where one conversion is used whole and in parts.
    """
    if INTERPRETED:
        low = _byte(y0, 0, dtype) | _byte(y1, 1, dtype)
        return low | _byte(y2, 2, dtype) | _byte(y3, 3, dtype)
    assembly: tl.constexpr = FOUR_TO_E4M3 if dtype == tl.float8e4nv else FOUR_TO_E5M2
    return tl.inline_asm_elementwise(
        assembly, "=r,f,f,f,f", [y0, y1, y2, y3], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def store_transposed(q_t_ptr, y0, y1, y2, y3, first_m, first_n, rows_left, cols_left, M):
    """Store a tile transposed; `y0` to `y3` (`[rows / 4, cols]`) hold every fourth row of it.

    `M`, the length of a row of the copy, is a multiple of 16: one thread holds four rows of each of
    its columns, and packs those four bytes into a word. Moving words between threads, not bytes,
    makes every access to memory 16 bytes wide, and avoids `tl.trans` on FP8, which some releases of
    Triton miscompile.
    """
    dtype: tl.constexpr = q_t_ptr.dtype.element_ty
    words = pack_fp8(y0, y1, y2, y3, dtype)
    word = tl.arange(0, y0.shape[0])[:, None]
    col = tl.arange(0, y0.shape[1])[None, :]
    pitch = (M // 16) * 4  # M // 4, in a form that shows it to be a multiple of 4
    mask = (word < (rows_left // 16) * 4) & (col < cols_left)
    words_ptr = q_t_ptr.to(tl.pointer_type(tl.int32))
    words_ptr += first_n.to(tl.int64) * pitch + first_m // 4
    tl.store(words_ptr + tl.trans(col * pitch + word), tl.trans(words), mask=tl.trans(mask))


@triton.jit
def quantize_groups(x, FP8_MAX: tl.constexpr):
    """A tile ready to cast, with a scale per 128 elements of a row; and each scale's inverse."""
    ROWS: tl.constexpr = x.shape[0]
    GROUPS: tl.constexpr = x.shape[1] // 128
    groups = tl.reshape(x.to(tl.float32), (ROWS, GROUPS, 128))
    scale = group_scale(tl.max(magnitude_bits(groups), axis=2), FP8_MAX, False)
    y = scaled(groups, scale[:, :, None], FP8_MAX)
    return tl.reshape(y, (ROWS, GROUPS * 128)), inverse(scale)


@triton.jit
def floor_to_power_of_two(scale):
    """Rounded down to a power of two: the number without its mantissa."""
    return (scale.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def group_scale(bits, FP8_MAX: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """The scale of a row, column or block, from the largest of its `magnitude_bits`; 1 if that is
    zero, NaN if it is not finite. POWER_OF_TWO: rounded down to one.
    """
    amax = tl.where(bits > 0, bits.to(tl.float32, bitcast=True), FP8_MAX)
    scale = scale_from_amax(amax, FP8_MAX)
    if POWER_OF_TWO:
        scale = floor_to_power_of_two(scale)
    return tl.where(bits < 0x7F800000, scale, float("nan"))


@triton.jit
def inverse(scale):
    """The inverse of a `group_scale`; 1 of NaN."""
    return divide(1.0, tl.where(scale == scale, scale, 1.0))


@triton.jit
def settle_scales(
    found_ptrs, inverse_ptrs, mask, FP8_MAX: tl.constexpr, POWER_OF_TWO: tl.constexpr
):
    """Replace the largest `magnitude_bits` of rows or columns by scales; store their inverses."""
    scale = group_scale(tl.load(found_ptrs, mask=mask, other=0), FP8_MAX, POWER_OF_TWO)
    tl.store(found_ptrs, scale.to(tl.int32, bitcast=True), mask=mask)
    tl.store(inverse_ptrs, inverse(scale), mask=mask)


@triton.jit
def block_scales(
    bits, HIGH: tl.constexpr, WIDE: tl.constexpr, FP8_MAX: tl.constexpr, POWER_OF_TWO: tl.constexpr
):
    """The scale of every HIGH x WIDE elements of a tile of `magnitude_bits`; and that of each
    element.
    """
    DOWN: tl.constexpr = bits.shape[0] // HIGH
    ACROSS: tl.constexpr = bits.shape[1] // WIDE
    if HIGH == 1:
        rows = bits
    elif DOWN == 1:
        rows = tl.max(bits, axis=0, keep_dims=True)
    else:
        rows = tl.max(tl.reshape(bits, (DOWN, HIGH, bits.shape[1])), axis=1)
    if WIDE == 1:
        largest = rows
    elif ACROSS == 1:
        largest = tl.max(rows, axis=1, keep_dims=True)
    else:
        largest = tl.max(tl.reshape(rows, (DOWN, ACROSS, WIDE)), axis=2)
    scale = group_scale(largest, FP8_MAX, POWER_OF_TWO)
    spread = tl.broadcast_to(scale[:, None, :, None], (DOWN, HIGH, ACROSS, WIDE))
    return scale, tl.reshape(spread, (DOWN * HIGH, ACROSS * WIDE))


@triton.jit
def _byte(y, position: tl.constexpr, dtype: tl.constexpr):
    return y.to(dtype).to(tl.uint8, bitcast=True).to(tl.int32) << (8 * position)


@triton.jit
def add_rows(row_ptr, rows, pitch, in_n, BLOCK_M: tl.constexpr):
    """The sum over `rows` rows of float32, `pitch` elements apart; `row_ptr` (`[1, cols]`): the
    first. Other programs may have written them: they are not read from this one's cache.
    """
    total = tl.zeros((BLOCK_M, row_ptr.shape[1]), dtype=tl.float32)
    for first in range(0, rows, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)[:, None]
        mask = (row < rows) & in_n
        total += tl.load(row_ptr + row * pitch, mask=mask, other=0.0, cache_modifier=".cg")
    return tl.sum(total, axis=0, keep_dims=True)


# --- where a tile lies --------------------------------------------------------------------------


@triton.jit
def tile_position(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of a tile: down GROUP_M rows, then right, so that L2 holds what several tiles
    read, and lines that several write parts of.
    """
    group_size = GROUP_M * tiles_n
    first_m = (tile // group_size) * GROUP_M
    rows = tl.minimum(tiles_m - first_m, GROUP_M)
    return first_m + (tile % group_size) % rows, (tile % group_size) // rows
