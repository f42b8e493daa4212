"""Emitted kernels against the FX subgraph that they stand for."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fp8compile.backends.emit import Source, bytes_read, emit, search_apart
from fp8compile.backends.fused import Tile, partial_rows, prepare, tiles
from fp8compile.backends.kernels.launch import run
from fp8compile.ops import padded
from fp8compile.regions import POINTWISE, POWERS
from tests.backends.common import (
    E4M3,
    E5M2,
    Case,
    assert_close,
    no_region_is_small,
    only_region,
    parts_of_region,
    quantize,
)
from tests.models import rotate

Outputs = tuple[Tensor, ...]


def gradients(fn: Callable[..., Tensor], inputs: Outputs, grad: Tensor) -> Outputs:
    leaves = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(fn(*leaves), leaves, grad)


def rms(x: Tensor, w: Tensor) -> Tensor:
    f = x.float()
    return w * (f * torch.rsqrt(f.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


# --- what is compiled ---------------------------------------------------------------------------


def plain(x: Tensor, scale: Tensor | None) -> Outputs:
    return quantize(x, scale)


def row_major_only(x: Tensor, scale: Tensor | None) -> Outputs:
    return quantize(F.relu(x) + 1, scale)[0::2]


def residual_add(x: Tensor, y: Tensor, z: Tensor, scale: Tensor | None) -> Outputs:
    h = x + y
    return (*quantize(h, scale, 1), h * z, h)


def attention_output(x: Tensor, w: Tensor, scale: Tensor | None) -> Outputs:
    """What is in FP8 is read as it is; attention's backward reads it in another precision."""
    rows = (x.to(E4M3).float() * w).to(x.dtype)
    return (*quantize(rows, scale), rows.unflatten(0, (2, -1)).cumsum(0))


def norm(x: Tensor, w: Tensor, scale: Tensor | None) -> Outputs:
    return quantize(rms(x, w), scale)[0::2]


def norm_of_sum(x: Tensor, o: Tensor, w: Tensor, scale: Tensor | None) -> Outputs:
    h = x + o
    return (*quantize(rms(h, w).flatten(0, 1), scale, 1), h)


def norm_backward(x: Tensor, w: Tensor, g: Tensor, other: Tensor, scale: Tensor | None) -> Outputs:
    dx, dw = gradients(rms, (x, w), g)
    dx = dx + other
    return (*quantize(dx, scale, 1, E5M2), dw, dx)


def builtin_norm(x: Tensor, w: Tensor, scale: Tensor | None) -> Outputs:
    return quantize(F.rms_norm(x, w.shape, w), scale)


def layer_norm(x: Tensor, w: Tensor, b: Tensor, scale: Tensor | None) -> Outputs:
    y = F.layer_norm(x, w.shape, w, b)
    return quantize(y.flatten(0, 1), scale)


def layer_norm_rows(x: Tensor, w: Tensor, b: Tensor, scale: Tensor | None) -> Outputs:
    y = F.layer_norm(x, w.shape, w, b)
    return quantize(y.flatten(0, 1), scale)[0::2]


def softmax(x: Tensor, scale: Tensor | None) -> Outputs:
    return quantize(x.softmax(-1), scale)


def gelu(x: Tensor, scale: Tensor | None) -> Outputs:
    return quantize(F.gelu(x), scale)


def gelu_tanh(x: Tensor, scale: Tensor | None) -> Outputs:
    return quantize(F.gelu(x, approximate="tanh"), scale)


def gelu_backward(x: Tensor, g: Tensor, scale: Tensor | None) -> Outputs:
    (dx,) = gradients(F.gelu, (x,), g)
    return (*quantize(dx, scale, 1, E5M2), dx.sum(0))


def gelu_tanh_backward(x: Tensor, g: Tensor, scale: Tensor | None) -> Outputs:
    (dx,) = gradients(lambda x: F.gelu(x, approximate="tanh"), (x,), g)
    return (*quantize(dx, scale, 1, E5M2), dx.sum([0]))


def mish(x: Tensor, scale: Tensor | None) -> Outputs:
    return quantize(F.mish(x), scale)


def merged_swiglu(gate_up: Tensor, scale: Tensor | None) -> Outputs:
    return quantize(swiglu(*gate_up.chunk(2, -1)), scale)


def swiglu_backward(gate: Tensor, up: Tensor, g: Tensor, scale: Tensor | None) -> Outputs:
    """The activation, cast again, and the gradients of both halves as one matrix."""
    dgate, dup = gradients(swiglu, (gate, up), g)
    both = quantize(torch.cat([dgate, dup], 1), scale, 1, E5M2)
    return (*quantize(swiglu(gate, up), scale)[1:], *both, dup.sum(0), dgate.sum(0))


def bias_gradient(g: Tensor, scale: Tensor | None) -> Outputs:
    flat = g.flatten(0, 1)
    return (*quantize(flat, scale, 1, E5M2), g.sum([0, 1]), flat.sum(0, keepdim=True))


def converted_sums(x: Tensor, g: Tensor, scale: Tensor | None) -> Outputs:
    """Sums in float32 of what is bfloat16, as in LayerNorm's backward; one is also read as such."""
    a, b = (x.float() * g).sum(0), g.float().sum(0)
    return (*quantize(x * g, scale, 1, E5M2), a.to(x.dtype), b.to(x.dtype), b * 2)


def dropout(x: Tensor, mask: Tensor, scale: Tensor | None) -> Outputs:
    return quantize(x * mask * 2.0, scale)


def relu_and_mask(x: Tensor, scale: Tensor | None) -> Outputs:
    """The mask is written for others."""
    mask = x > 0
    return (*quantize(torch.where(mask, x, 0.0), scale), mask)


def rotary_backward(g: Tensor, cos: Tensor, sin: Tensor, scale: Tensor | None) -> Outputs:
    (dq,) = gradients(lambda x: rotate(x, cos, sin), (g,), g)
    return quantize(dq.transpose(1, 2).flatten(2).flatten(0, 1), scale, 1, E5M2)


def qkv_backward(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, scale: Tensor | None
) -> Outputs:
    dq, dk = (gradients(lambda x: rotate(x, cos, sin), (g,), g)[0] for g in (q, k))
    flat = [x.transpose(1, 2).flatten(2).flatten(0, 1) for x in (dq, dk, v)]
    return quantize(torch.cat(flat, 1), scale, 1, E5M2)


def qkv_rows(q: Tensor, k: Tensor, v: Tensor, scale: Tensor | None) -> Outputs:
    return quantize(torch.cat([-q, k, v], 1), scale)[0::2]


def joined_rows(a: Tensor, b: Tensor, c: Tensor, scale: Tensor | None) -> Outputs:
    return quantize(torch.cat([a, b, c]), scale)


def joined_columns(a: Tensor, b: Tensor, scale: Tensor | None) -> Outputs:
    return quantize(torch.cat([a.exp(), b], 1), scale)


def head_slice(x: Tensor, scale: Tensor | None) -> Outputs:
    """Views of all kinds."""
    y = x.permute(1, 0, 2)[:, 1:, ::2].unsqueeze(2).expand(-1, -1, 3, -1)
    return quantize(y.reshape(y.shape[0] * y.shape[1], -1), scale)


FUNCTIONS: dict[str, tuple[Callable[..., Outputs], dict[str, tuple[int, ...]]]] = {
    "plain": (plain, {"x": (50, 80)}),
    "padded_rows": (plain, {"x": (32, 75)}),
    "padded_columns": (plain, {"x": (49, 80)}),
    "padded_in_both": (residual_add, {"x": (49, 75), "y": (49, 75), "z": (49, 75)}),
    "padded_norm": (norm, {"x": (19, 77), "w": (77,)}),
    "padded_parts": (joined_columns, {"a": (33, 60), "b": (33, 60)}),
    "padded_branches": (joined_columns, {"a": (20, 128), "b": (20, 75)}),
    "row_major_only": (row_major_only, {"x": (33, 300)}),
    "residual_add": (residual_add, {"x": (48, 96), "y": (48, 96), "z": (48, 96)}),
    "norm": (norm, {"x": (19, 80), "w": (80,)}),
    "norm_of_sum": (norm_of_sum, {"x": (2, 19, 96), "o": (2, 19, 96), "w": (96,)}),
    "norm_backward": (
        norm_backward,
        {"x": (64, 80), "w": (80,), "g": (64, 80), "other": (64, 80)},
    ),
    "uneven_norm_backward": (
        norm_backward,
        {"x": (33, 77), "w": (77,), "g": (33, 77), "other": (33, 77)},
    ),
    "norm_backward_of_a_row": (
        norm_backward,
        {"x": (1, 80), "w": (80,), "g": (1, 80), "other": (1, 80)},
    ),
    "builtin_norm": (builtin_norm, {"x": (32, 48), "w": (48,)}),
    "layer_norm": (layer_norm, {"x": (3, 17, 80), "w": (80,), "b": (80,)}),
    "layer_norm_rows": (layer_norm_rows, {"x": (3, 17, 80), "w": (80,), "b": (80,)}),
    "softmax": (softmax, {"x": (33, 80)}),
    "gelu": (gelu, {"x": (50, 192)}),
    "gelu_tanh": (gelu_tanh, {"x": (16, 48)}),
    "gelu_backward": (gelu_backward, {"x": (50, 80), "g": (50, 80)}),
    "gelu_tanh_backward": (gelu_tanh_backward, {"x": (48, 80), "g": (48, 80)}),
    "mish": (mish, {"x": (50, 80)}),
    "attention_output": (attention_output, {"x": (50, 96), "w": (1,)}),
    "merged_swiglu": (merged_swiglu, {"gate_up": (50, 192)}),
    "swiglu_backward": (swiglu_backward, {"gate": (64, 80), "up": (64, 80), "g": (64, 80)}),
    "bias_gradient": (bias_gradient, {"g": (2, 24, 80)}),
    "converted_sums": (converted_sums, {"x": (50, 80), "g": (50, 80)}),
    "dropout": (dropout, {"x": (40, 96), "mask": (40, 96)}),
    "relu_and_mask": (relu_and_mask, {"x": (40, 96)}),
    "rotary_backward": (rotary_backward, {"g": (2, 4, 9, 16), "cos": (9, 16), "sin": (9, 16)}),
    "qkv_backward": (
        qkv_backward,
        {
            "q": (2, 4, 16, 64),
            "k": (2, 2, 16, 64),
            "v": (2, 2, 16, 64),
            "cos": (16, 64),
            "sin": (16, 64),
        },
    ),
    "uneven_qkv_backward": (
        qkv_backward,
        {
            "q": (2, 4, 9, 16),
            "k": (2, 1, 9, 16),
            "v": (2, 1, 9, 16),
            "cos": (9, 16),
            "sin": (9, 16),
        },
    ),
    "qkv_rows": (qkv_rows, {"q": (20, 256), "k": (20, 128), "v": (20, 128)}),
    "joined_rows": (joined_rows, {"a": (32, 48), "b": (1, 48), "c": (17, 48)}),
    "branches_of_rows": (joined_rows, {"a": (128, 48), "b": (256, 48), "c": (17, 48)}),
    "head_slice": (head_slice, {"x": (5, 6, 32)}),
}


def make(name: str, scales: list[float] | None, dtype: torch.dtype = torch.bfloat16) -> Case:
    return only_region(FUNCTIONS[name][0], **inputs_of(name, scales, dtype))


def inputs_of(
    name: str, scales: list[float] | None, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    _, shapes = FUNCTIONS[name]
    inputs: dict[str, Any] = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    inputs = {n: x > 0 if n == "mask" else x.to(dtype) for n, x in inputs.items()}
    return {**inputs, "scale": None if scales is None else state(scales)}


def state(scales: list[float]) -> Tensor:
    """Scales that may be missing (0): one alone would be one that is given."""
    return torch.tensor([*scales, 1.0])


def calls_of(op: Any) -> list[Callable[[Tensor, Tensor], Tensor]]:
    """What an operator is tested with: two matrices, or a matrix and a number."""
    if op is torch.ops.aten.pow.Tensor_Scalar:
        return [lambda x, y, power=power: op(x, power) for power in POWERS]
    if op is torch.ops.aten.where.self:
        return [lambda x, y: op(x > y, x, y)]
    if op._overloadname == "Scalar" or "clamp" in op.name():
        return [lambda x, y: op(x, 0.5)]
    takes = sum(str(argument.type) == "Tensor" for argument in op._schema.arguments)
    return [lambda x, y: op(*(x, y)[:takes])]


ONLY_POSITIVE = ("log", "log1p", "sqrt", "rsqrt", "pow")


@pytest.mark.parametrize("op", sorted(POINTWISE, key=str), ids=str)
def test_every_operator(op: Any) -> None:
    """Each is computed in the kernel, which else would take its result as an input."""
    x, y = 3 * torch.rand(32, 48) + 0.01, torch.rand(32, 48) + 0.5
    y[31] = x[31]
    if op._opname not in ONLY_POSITIVE:
        x[::2] *= -1
    for call in calls_of(op):

        def fn(x: Tensor, y: Tensor, scale: Tensor) -> Outputs:
            value = call(x, y)  # noqa: B023
            value = torch.where(value, 2.0, y) if value.dtype == torch.bool else value
            return quantize(value, scale)

        given = {"x": x, "y": y, "scale": state([0.0])}
        case = only_region(fn, **given)
        for taken in case.inputs.values():
            assert any(torch.equal(taken.cpu(), value) for value in given.values())
        assert_close(case.run(), case.oracle())


def test_log1p_of_what_an_addition_of_1_rounds_away() -> None:
    x = torch.randn(32, 48) * 1e-6
    case = only_region(lambda x, scale: quantize(x.log1p(), scale), x=x, scale=state([0.0]))
    assert_close(case.run(), case.oracle())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_tile(name: str) -> None:
    case = make(name, [30.0, 700.0])
    expected = case.oracle()
    for tile in tiles(case.region):
        assert_close(case.run(tile), expected)


# One for each way in which the search for the amax differs.
KINDS = ("plain", "layer_norm_rows", "norm_of_sum", "norm_backward", "swiglu_backward", "qkv_rows")


@pytest.mark.parametrize("scales", [None, [0.0, 0.0], [0.0, 700.0]], ids=str)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", [nullcontext, no_region_is_small], ids=["small", "large"])
def test_without_a_scale_the_current_one_is_used(
    size: Callable[[], AbstractContextManager[None]], name: str, scales: list[float] | None
) -> None:
    case = make(name, scales)
    with size():
        assert_close(case.run(), case.oracle())


def test_the_search_for_amax_is_left_out_where_every_scale_is_known() -> None:
    names = ("row_major_only", "plain")
    inside = [emit(make(name, [30.0]).region).text for name in names]
    with no_region_is_small():
        rows, tiled = (emit(make(name, [30.0]).region).text for name in names)
    known = "(tl.load(words_ptr + 33).to(tl.float32, bitcast=True) > 0)"
    for text in (*inside, rows):
        assert f"known = {known}\n    if not known:\n        _search(" in text
    assert f"tiles = tl.where({known}, 0, tiles)" in tiled
    for name in names:  # every step searches, in a kernel of its own
        always = emit(make(name, None).region)
        assert always.amax_name in always.text and "words_ptr + 33" not in always.text


def test_kernels_of_small_tiles_look_for_a_missing_amax_of_small_matrices_only() -> None:
    def main(source: Source) -> str:
        return source.text.split(f"def {source.name}(")[1].split("@triton.jit")[0]

    rows, small = (emit(make(name, [30.0]).region) for name in ("row_major_only", "plain"))
    for source in (rows, small):
        assert source.amax_name not in source.text and "_search(" in main(source)
    with no_region_is_small():
        large = emit(make("plain", [30.0]).region)
    assert large.amax_name in large.text and "_search(" not in main(large)


def test_values_are_under_way_when_a_search_is_decided_on() -> None:
    """Which waits for a scale; and by as high tiles as one of the four sets of rows."""
    text = emit(make("plain", [30.0]).region).text
    assert "_search(input_1_ptr, words_ptr, BLOCK_M // 4, BLOCK_N)" in text
    assert text.rindex("= _values(") < text.index("known = ") < text.index("resolve_scale(tl")


def test_a_search_at_every_call_makes_the_sums_over_rows_too() -> None:
    known, always = (emit(make("norm_backward", scale).region) for scale in ([30.0, 700.0], None))
    assert f"def {known.sums_name}(" in known.text
    assert f"def {always.sums_name}(" not in always.text
    search = always.text.split(f"def {always.amax_name}(")[1].split("@triton.jit")[0]
    assert "_sums_0(" in search and "tl.store(totals_ptr" in search


def test_the_kernel_that_sums_over_rows_looks_for_a_missing_amax() -> None:
    source = emit(make("norm_backward", [30.0, 700.0]).region)
    kernels = source.text.split("@triton.jit\n")
    (sums,) = (text for text in kernels if text.startswith(f"def {source.sums_name}("))
    assert "if not known:" in sums and sums.count("tl.atomic_max(words_ptr") == 1
    others = "".join(text for text in kernels if text is not sums)
    assert source.amax_name not in others and "known" not in others


# --- a region in two parts, see split_regions -----------------------------------------------------

SPLIT = [
    "norm_backward_of_a_row",
    "uneven_norm_backward",
    "norm_of_sum",
    "converted_sums",
    "bias_gradient",
    "relu_and_mask",
]


@pytest.mark.parametrize("scales", [None, [0.0, 0.0], [30.0, 700.0]], ids=str)
@pytest.mark.parametrize("name", SPLIT)
def test_what_stores_and_what_casts(name: str, scales: list[float] | None) -> None:
    stores, casts = parts_of_region(FUNCTIONS[name][0], **inputs_of(name, scales))
    assert not stores.region.casts and len(stores.region.scales) == (scales is None)
    assert not casts.region.values and not casts.region.sums
    for part in (stores, casts):
        for tile in tiles(part.region):
            assert_close(part.run(tile), part.oracle())


def test_a_scale_is_found_over_all_programs_and_not_looked_for_again() -> None:
    x = torch.randn(300, 80)
    x[299, 79] = -1000.0  # which only the last program sees
    fn, _ = FUNCTIONS["norm_of_sum"]
    for other in (1.0, torch.inf, torch.nan):
        x[150, 3] = other
        inputs = {"x": x[None], "o": torch.zeros(1, 300, 80), "w": torch.ones(80), "scale": None}
        stores, casts = parts_of_region(fn, **inputs)
        name = stores.region.scales[0].name
        found, want = (results[name] for results in (stores.run(Tile(1, 128, 4)), stores.oracle()))
        assert torch.allclose(found, want, rtol=1e-6) and (want == 1) == (other != 1)
        assert min(casts.region.numbers.values()) == 0 and not search_apart(casts.region)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_column_of_tiles_that_completes_sums_has_a_counter(name: str) -> None:
    region = make(name, [30.0, 700.0]).region
    if region.completes_sums:
        for tile in tiles(region):
            width = padded(int(region.space.n), region.padding)
            assert -(-width // tile.block_n) <= region.word_count - region.first_counter, tile


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_others_read_of_the_words_is_aligned_and_lies_apart(name: str) -> None:
    region = make(name, [30.0, 700.0]).region
    read = ("scale_inv", "scale_used", "found_scale")
    assert not [at for n, at in region.numbers.items() if n.startswith(read) and at % 4]
    words = [*region.numbers.values(), region.first_counter]
    assert len(set(words)) == len(words) and max(words) == region.first_counter


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_program_reads_a_word_from_a_line_with_one_that_all_raise(name: str) -> None:
    """It would wait for their atomics, which doubled the time of casts."""
    region = make(name, [30.0, 700.0]).region
    source = emit(region)
    main = source.text.split(f"def {source.name}(")[1].split("@triton.jit")[0]
    read, raised = (
        {int(word) // 32 for word in re.findall(rf"tl\.{operation}\(words_ptr \+ (\d+)", main)}
        for operation in ("load", "atomic_max")
    )
    assert read and not read & raised
    assert bool(raised) == any("amax" in cast.outputs for cast in region.casts)


def test_sums_over_columns_are_completed_at_every_launch() -> None:
    """Also where the words that programs share are not zeroed in between."""
    case = make("swiglu_backward", [30.0, 700.0])
    made, results = prepare(case.gm, case.inputs)
    sums = [node.name for node in case.region.sums]
    assert case.region.completes_sums
    for _ in range(2):
        for name in sums:
            results[name].fill_(torch.nan)
        for launch in made:
            run(launch)
        assert_close({n: results[n] for n in sums}, {n: case.oracle()[n] for n in sums})


def test_a_program_that_goes_from_row_to_row_leaves_one_row_of_partial_sums() -> None:
    """Not every row its own, which would be as many bytes again as the matrix has."""
    stores, _ = parts_of_region(norm_backward, **inputs_of("norm_backward", None))
    for rows, programs in ((2, 2), (1000, 264), (2**14, 264), (2**20, 264)):
        sums = len(stores.region.sums)
        assert partial_rows(stores.region, rows, Tile(1, 128, 4)) == programs * sums
    text = emit(stores.region).text
    assert "for tile in tl.range(" in text and "tl.program_id(0) * N + cols" in text


def test_loads_of_a_loop_are_ahead_as_far_as_shared_memory_holds_them() -> None:
    def stages(columns: int, dtype: torch.dtype) -> str:
        shapes = {"x": (2, columns), "w": (columns,), "g": (2, columns), "other": (2, columns)}
        random = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
        stores, _ = parts_of_region(norm_backward, **random, scale=None)
        return emit(stores.region).text.split("num_stages=")[1][0]

    dtypes = (torch.bfloat16, torch.float32)
    found = [stages(n, dtype) for n in (768, 4096, 16384) for dtype in dtypes]
    assert found == list("333321")


# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["norm_backward", "merged_swiglu", "converted_sums", "dropout"])
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    case = make(name, [30.0, 700.0], dtype)
    assert_close(case.run(), case.oracle())


def test_values_that_are_not_finite_stay_visible() -> None:
    x = torch.randn(33, 48)
    x[3, 5], x[9, 7], x[32, 47] = torch.nan, torch.inf, -torch.inf
    for fn in (plain, relu_and_mask, gelu_tanh):
        case = only_region(fn, x=x, scale=torch.tensor([30.0]))
        assert_close(case.run(), case.oracle())


def test_a_group_that_is_not_finite_is_cast_to_nan() -> None:
    x = torch.randn(33, 256)
    x[3, 5], x[9, 200] = torch.nan, torch.inf
    case = only_region(lambda x: torch.ops.fp8.quantize_groups(x * 2), x=x)
    want = torch.ops.fp8.quantize_groups(x * 2)
    for expected, found in zip(want, case.run().values(), strict=True):
        assert torch.equal(expected.float().nan_to_num(-1), found.float().nan_to_num(-1))


# --- values that are the same in a whole row or column --------------------------------------------


SHAPES = {"row": (32, 1), "column": (48,), "number": ()}


@pytest.mark.parametrize("kind", SHAPES)
def test_a_value_that_rows_or_columns_share(kind: str) -> None:
    def fn(x: Tensor, scale: Tensor) -> Outputs:
        wide = (x / 3).expand(32, 48)
        return (*quantize(wide, scale), wide.sum(0))

    case = only_region(fn, x=torch.randn(SHAPES[kind]), scale=torch.tensor([30.0]))
    for tile in tiles(case.region):
        assert_close(case.run(tile), case.oracle())


@pytest.mark.parametrize("width", [16, 128])
def test_parts_of_a_concatenation_that_rows_share(width: int) -> None:
    def fn(x: Tensor, row: Tensor, number: Tensor, scale: Tensor) -> Outputs:
        parts = [x, row.expand(32, width), number.expand(32, width)]
        return quantize(torch.cat(parts, 1), scale)

    inputs = {"x": (32, width), "row": (32, 1), "number": ()}
    random = {name: torch.randn(shape) for name, shape in inputs.items()}
    case = only_region(fn, **random, scale=torch.tensor([30.0]))
    assert_close(case.run(), case.oracle())


def test_one_number_per_row_is_written() -> None:
    def fn(x: Tensor, scale: Tensor) -> Outputs:
        rstd = torch.rsqrt(x.square().mean(-1, keepdim=True))
        return (*quantize(x * rstd, scale), rstd)

    for columns in (48, 200):  # one tile of columns, and several
        case = only_region(fn, x=torch.randn(33, columns), scale=torch.tensor([30.0]))
        assert case.region.values
        for tile in tiles(case.region):
            assert_close(case.run(tile), case.oracle())


def test_inputs_and_variables_do_not_share_names() -> None:
    def fn(x: Tensor, scale: Tensor) -> Outputs:
        odd = x.abs() ** 2.5  # not computed by the kernel, and called pow_1 there
        return quantize((odd**2) ** 2 + odd, scale)

    case = only_region(fn, x=torch.randn(16, 32), scale=torch.tensor([3.0]))
    assert "pow_1" in case.inputs
    assert_close(case.run(), case.oracle())


def test_inputs_and_outputs_do_not_share_names() -> None:
    def fn(x: Tensor, scale: Tensor) -> Outputs:
        wide = x * x.amax(0) + x.sum(0) + x.cumsum(0).split([8, 24])[1].sum(0)
        other = quantize(wide * 2, scale, 1, E5M2)
        return (*quantize(wide, scale), *other, wide, wide.sum(0), (wide * 2).sum(0))

    case = only_region(fn, x=torch.randn(32, 32), scale=torch.tensor([3.0, 20.0]))
    assert_close(case.run(), case.oracle())


# --- the text -------------------------------------------------------------------------------------


# Elements at several places: two halves; what is beside in a rotation.
SEVERAL = ("merged_swiglu", "rotary_backward", "qkv_backward", "uneven_qkv_backward")


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in SEVERAL])
def test_a_function_loads_each_input_once(name: str) -> None:
    functions = functions_of(make(name, [30.0, 700.0]))
    assert functions
    for text in functions.values():
        loaded = re.findall(r"tl\.load\((\w+)", text)
        assert loaded and sorted(set(loaded)) == sorted(loaded), text


def functions_of(case: Case) -> dict[str, str]:
    """The emitted functions that compute values, by name."""
    text = emit(case.region).text
    found = re.findall(r"def (_\w+)\(.*?\):\n(.*?)\n\n", text, re.DOTALL)
    return {name: body for name, body in found if name != "_search"}


def test_sums_over_rows_come_from_functions_of_their_own() -> None:
    names = {name: [*functions_of(make(name, None))] for name in ("norm", "layer_norm", "gelu")}
    assert names["norm"] == ["_sums_0", "_values"]
    assert names["layer_norm"] == ["_sums_0", "_sums_1", "_values"]
    assert names["gelu"] == ["_values"]


def test_only_an_erf_that_1_is_added_to_may_lose_what_is_small() -> None:
    def erf_alone(x: Tensor, scale: Tensor | None) -> Outputs:
        return quantize(torch.erf(x.float()), scale)

    small = torch.randn(32, 48) * 1e-6
    alone = only_region(erf_alone, x=small, scale=None)
    assert_close(alone.run(), alone.oracle())
    for case, function in ((alone, "tl.erf"), (make("gelu", None), "erf_plus_1")):
        (body,) = functions_of(case).values()
        assert [name for name in ("tl.erf", "erf_plus_1") if f"{name}(" in body] == [function]


def test_the_header_says_what_is_computed_and_how_many_bytes_are_moved() -> None:
    case = only_region(plain, x=torch.randn(1000, 512), scale=None)
    text = emit(case.region).text
    twice = "and before that what the scales are found in"
    assert text.startswith(f'"""fp8_cast: reads 2.0 MB, writes 1.0 MB, each byte once, {twice}.')
    assert "= fp8.quantize(input_1, None, slot, e4m3)" in text.split('"""')[1]


def test_halves_that_change_places_are_counted_once() -> None:
    def rotated(x: Tensor) -> Tensor:
        heads = x[:, :64].view(16, 4, 16)
        left, right = heads.split(8, -1)
        return quantize((heads + torch.cat([-right, left], -1)).view(16, 64), None, 0)[0]

    def shifted(x: Tensor) -> Tensor:
        return quantize(x[:, :64] + x[:, 16:80], None, 0)[0]

    x = torch.randn(16, 96)
    assert bytes_read(only_region(rotated, x=x).region) == 16 * 64 * 4
    assert bytes_read(only_region(shifted, x=x).region) == 16 * 80 * 4


def test_parts_at_multiples_of_a_tile_are_told_apart_by_branches() -> None:
    assert [*functions_of(make("qkv_rows", None))] == ["_part_0", "_part_1", "_part_2"]
    assert [*functions_of(make("branches_of_rows", None))] == ["_part_0", "_part_1", "_part_2"]
    assert [*functions_of(make("uneven_qkv_backward", None))] == ["_values"]
    assert [*functions_of(make("joined_rows", None))] == ["_values"]


def test_halves_that_change_places_are_loaded_and_computed_once() -> None:
    (text,) = functions_of(make("rotary_backward", None)).values()
    loaded = [line for line in text.splitlines() if "tl.load" in line]
    names = sorted(line.split("tl.load(")[1].split("_ptr")[0] for line in loaded)
    # Each value where it is, cos; each at its place in the other half, with sin.
    assert names == ["input_1", "input_1", "input_2", "input_3"]
    assert text.count(" * input_") == 2
