"""Random programs: small modules as a hypothesis strategy.

A ``Program`` is text, the lines of an ``__init__`` and of a ``forward``: it prints as a module that
one can paste, and hypothesis shrinks it to few lines. Lines are drawn one by one; each is run on
meta tensors at once, so that the next one knows what shapes there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from fp8compile.formats import Format
from fp8compile.options import ATTENTION
from fp8compile.recipe import RECIPES, Gemm, Operand, Recipe

_NAMES = {"torch": torch, "nn": nn, "F": F}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WIDTHS = (32, 16, 48, 64, 24, 17, 1)
_ALIGNED = _WIDTHS[:4]
_ROWS = (16, 32, 48, 8, 17, 1, 0)
_READ_MAX, _RESULT_MAX = 1 << 14, 1 << 18  # elements of a value that is read, and of a result


@dataclass(frozen=True)
class Input:
    """An argument of ``forward``: random numbers, or indices below ``below``."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    requires_grad: bool = False
    below: int | None = None

    def make(self, generator: torch.Generator) -> Tensor:
        if self.below is not None:
            return torch.randint(self.below, self.shape, generator=generator)
        x = torch.randn(self.shape, generator=generator).to(self.dtype)
        return x.requires_grad_(self.requires_grad)


@dataclass(frozen=True)
class Program:
    """A module and its inputs, as code.

    ``recipe``, ``overrides``: by glob, of sites; see ``recipe_of``. ``formats``: "recipe", or
    "auto": by a profile of the module. ``attention``: the option of that name. ``unknown_batch``:
    whether the first size of every input is a symbol in graphs.
    """

    inputs: tuple[Input, ...]
    init: tuple[str, ...]
    forward: tuple[str, ...]
    outputs: str
    recipe: str = "delayed"
    overrides: tuple[tuple[str, str], ...] = ()
    formats: str = "recipe"
    attention: str = "high_precision"
    unknown_batch: bool = False

    def __str__(self) -> str:
        arguments = ", ".join(("self", *(x.name for x in self.inputs)))
        lines = ["class Model(nn.Module):", "    def __init__(self):"]
        lines += [f"        {line}" for line in ("super().__init__()", *self.init)]
        lines += [f"    def forward({arguments}):"]
        lines += [f"        {line}" for line in (*self.forward, f"return {self.outputs}")]
        return "\n".join(lines)

    def __repr__(self) -> str:
        inputs = "".join(f"\n# {x}" for x in self.inputs)
        lines = [f"# {glob} has the recipe {own}\n" for glob, own in self.overrides]
        how = f"# recipe: {self.recipe}; formats: {self.formats}; attention: {self.attention}"
        how += "; the batch is unknown\n" if self.unknown_batch else "\n"
        return f"\n{self}\n{inputs}\n{how}{''.join(lines)}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # hypothesis asks for it
        printer.text(repr(self))

    def build(self) -> nn.Module:
        """The module, with the same parameters every time."""
        names: dict[str, Any] = {**_NAMES}
        exec(str(self), names)
        torch.manual_seed(0)
        return names["Model"]()

    def make_inputs(self, seed: int) -> tuple[Tensor, ...]:
        """Arguments for ``forward``."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(x.make(generator) for x in self.inputs)

    @property
    def options(self) -> dict[str, Any]:
        """Those of the compiler."""
        overrides = {glob: recipe_of(own) for glob, own in self.overrides}
        recipes = {"recipe": recipe_of(self.recipe), "overrides": overrides}
        return {**recipes, "attention": self.attention}


def recipe_of(text: str) -> Recipe:
    """A recipe with changes, such as "current, weight in e5m2" or "rowwise, dgrad is not cast"."""
    name, *changes = text.split(", ")
    recipe = RECIPES[name]
    for change in changes:
        what, _, how = change.partition(" ")
        if how == "is not cast":
            recipe = replace(recipe, name=text, high_precision=(Gemm(what),))
        elif how == "in e5m2":
            kinds = {o: Format.E5M2 if str(o) == what else Format.E4M3 for o in Operand}
            recipe = replace(recipe, name=text, formats=tuple(kinds.items()))
        else:
            assert change == "powers of two", change
            recipe = replace(recipe, name=text, power_of_two=True)
    return recipe


@dataclass
class Value:
    """A tensor of the program: how it is called, and itself on the meta device.

    ``fresh``: nothing has read it yet, and backward does not need it: it may be written in place.
    """

    name: str
    meta: Tensor
    fresh: bool = False
    used: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.meta.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.meta.dtype

    @property
    def width(self) -> int:
        return self.shape[-1]

    @property
    def is_float(self) -> bool:
        return self.meta.is_floating_point()

    @property
    def is_matrix(self) -> bool:
        return self.is_float and self.meta.dim() >= 2

    @property
    def has_numbers(self) -> bool:
        return self.meta.numel() > 0


@dataclass
class Builder:
    """A program that is being drawn."""

    draw: st.DrawFn
    dtypes: tuple[torch.dtype, ...]
    inputs: list[Input] = field(default_factory=list)
    init: list[str] = field(default_factory=list)
    forward: list[str] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    weights: dict[str, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)
    module: SimpleNamespace = field(default_factory=SimpleNamespace)
    count: int = 0

    # --- choices ---

    def one_of(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def flip(self) -> bool:
        return self.draw(st.booleans())

    def seldom(self) -> bool:
        return self.draw(st.integers(0, 5)) == 5

    def name(self, letter: str) -> str:
        self.count += 1
        return f"{letter}{self.count}"

    def pick(self, accept: Callable[[Value], bool]) -> Value | None:
        """A value, mostly one of the last ones; None if there is none of that kind."""
        small = (value for value in reversed(self.values) if value.meta.numel() <= _READ_MAX)
        found = [value for value in small if accept(value)]
        return found[min(self.draw(st.integers(0, 3)), len(found) - 1)] if found else None

    # --- lines ---

    def input(self, shape: tuple[int, ...], **kwargs: Any) -> Value:
        given = Input(self.name("x"), shape, **kwargs)
        self.inputs.append(given)
        dtype = given.dtype if given.below is None else torch.int64
        self.values.append(Value(given.name, torch.empty(shape, dtype=dtype, device="meta")))
        return self.values[-1]

    def emit(self, text: str, *read: Value, fresh: bool = False) -> Value:
        """A line ``name = text``."""
        value = Value(self.name("v"), self._evaluate(text), fresh)
        self.run(f"{value.name} = {text}", *read)
        self.values.append(value)
        return value

    def emit_parts(self, text: str, *read: Value) -> list[Value]:
        """A line that takes a tuple apart."""
        parts = [Value(self.name("v"), meta) for meta in self._evaluate(text)]
        self.run(f"{''.join(part.name + ', ' for part in parts)}= {text}", *read)
        self.values += parts
        return parts

    def run(self, line: str, *read: Value) -> None:
        """Any line; what it reads is no longer unused."""
        self.forward.append(line)
        for value in read:
            value.used, value.fresh = True, False

    def _evaluate(self, text: str) -> Any:
        known = {value.name: value.meta for value in self.values}
        return eval(text, {**_NAMES, **known, "self": self.module})

    def attribute(self, letter: str, text: str) -> str:
        """A line of ``__init__``; returns ``self.name``."""
        name = self.name(letter)
        with torch.device("meta"):
            setattr(self.module, name, eval(text, {**_NAMES}))
        self.init.append(f"self.{name} = {text}")
        return f"self.{name}"

    def weight(self, *shape: int, dtype: torch.dtype, fan_in: int = 1) -> str:
        """A parameter; sometimes one that there is already."""
        same = [name for name, kind in self.weights.items() if kind == (shape, dtype)]
        if same and self.seldom():
            return self.one_of(*same)
        numbers = f"torch.randn{shape} * {max(fan_in, 1) ** -0.5:.3f}"
        frozen = ", requires_grad=False" if self.seldom() else ""
        name = self.attribute("w", f"nn.Parameter(({numbers}).to({dtype}){frozen})")
        self.weights[name] = (shape, dtype)
        return name


# --- kinds of steps -------------------------------------------------------------------------------
# Each draws one or several lines, or none where no value fits.


def linear(b: Builder) -> None:
    x = b.pick(lambda value: value.is_matrix)
    if x:
        _project(b, x, b.one_of(*_WIDTHS))


def _project(b: Builder, x: Value, width: int) -> Value:
    """A matmul with a weight, in one of its many forms."""
    k, dtype = x.width, x.dtype
    form = b.one_of("linear", "module", "transposed", "matmul", "operator", "mm", "addmm")
    if form == "module":
        text = f"nn.Linear({k}, {width}, bias={b.flip()}, dtype={dtype})"
        return b.emit(f"{b.attribute('fc', text)}({x.name})", x, fresh=True)
    shape = (width, k) if form in ("linear", "transposed") else (k, width)
    w = b.weight(*shape, dtype=dtype, fan_in=k)
    if dtype is not torch.float32 and b.seldom():
        w = f"{b.weight(*shape, dtype=torch.float32, fan_in=k)}.to({dtype})"  # a master weight
    if form == "linear":
        bias = f", {b.weight(width, dtype=dtype)}" if b.flip() else ""
        text = f"F.linear({x.name}, {w}{bias})"
    elif form == "transposed":
        text = f"{x.name} @ {w}.t()"
    elif form == "mm" and len(x.shape) == 2:
        text = f"torch.mm({x.name}, {w})"
    elif form == "addmm" and len(x.shape) == 2:
        sizes = b.one_of((width,), (1, width), (x.shape[0], width), (1, 1))
        text = f"torch.addmm({b.weight(*sizes, dtype=dtype)}, {x.name}, {w})"
    elif form == "matmul":
        text = f"torch.matmul({x.name}, {w})"
    else:
        text = f"{x.name} @ {w}"
    return b.emit(text, x, fresh=True)


def weight_left(b: Builder) -> None:
    x = b.pick(lambda value: value.is_float and len(value.shape) == 2)
    if x:
        w = b.weight(b.one_of(*_WIDTHS), x.shape[0], dtype=x.dtype, fan_in=x.shape[0])
        b.emit(f"{w} @ {x.name}", x, fresh=True)


def shared_input(b: Builder) -> None:
    """Several projections of one value, as of q, k and v."""
    x = b.pick(lambda value: value.is_matrix)
    if x:
        biased = b.flip()
        for _ in range(b.one_of(2, 3)):
            width = b.one_of(*_ALIGNED)
            w = b.weight(width, x.width, dtype=x.dtype, fan_in=x.width)
            bias = f", {b.weight(width, dtype=x.dtype)}" if biased else ""
            b.emit(f"F.linear({x.name}, {w}{bias})", x, fresh=True)


def swiglu(b: Builder) -> None:
    x = b.pick(lambda value: value.is_matrix)
    if x:
        hidden = b.one_of(*_ALIGNED)
        if b.flip():
            gate, up = (_project(b, x, hidden) for _ in range(2))
        else:
            both = _project(b, x, 2 * hidden)
            gate, up = b.emit_parts(f"{both.name}.chunk(2, -1)", both)
        h = b.emit(f"F.silu({gate.name}) * {up.name}", gate, up)
        _project(b, h, x.width)


def attention(b: Builder) -> None:
    x = b.pick(lambda value: value.is_float and len(value.shape) == 3 and value.width in _ALIGNED)
    if not x:
        return
    batch, tokens, width = x.shape
    heads = b.one_of(1, 2)
    parts = []
    for _ in range(3):
        w = b.weight(width, width, dtype=x.dtype, fan_in=width)
        y = b.emit(f"F.linear({x.name}, {w})", x)
        split = f"view({batch}, {tokens}, {heads}, {width // heads}).transpose(1, 2)"
        parts.append(b.emit(f"{y.name}.{split}", y))
    q, k, v = (part.name for part in parts)
    if b.flip():
        scores = f"({q} @ {k}.transpose(-2, -1) * {(width // heads) ** -0.5}).softmax(-1)"
        out = b.emit(f"{scores} @ {v}", *parts)
    else:
        how = b.one_of("", ", scale=1.0")
        q, k = (f"({x} * {b.one_of(*_FACTORS)})" if b.flip() else x for x in (q, k))
        text = f"F.scaled_dot_product_attention({q}, {k}, {v}, is_causal=True{how})"
        out = b.emit(text, *parts)
    joined = b.emit(f"{out.name}.transpose(1, 2).reshape({batch}, {tokens}, {width})", out)
    _project(b, joined, width)


def product(b: Builder) -> None:
    """A matmul of two values that are not views of one.

    Of ``x @ x.t()``, which is in FP8 for an input ``x``, both gradients are dgrads to the compiler.
    """

    def fits(x: Value, y: Value) -> bool:
        memory = {value.meta.untyped_storage()._cdata for value in (x, y)}
        few = math.prod(x.shape[:-1]) * y.shape[-2] <= _RESULT_MAX
        same_kind = few and len(memory) == 2 and (x.dtype, x.width) == (y.dtype, y.width)
        return same_kind and (len(y.shape) == 2 or y.shape[:-2] == x.shape[:-2])

    x = b.pick(lambda value: value.is_matrix)
    y = b.pick(lambda value: value.is_matrix and x is not None and fits(x, value))
    if x and y:
        scale = max(x.width, 1) ** -0.5
        b.emit(f"{x.name} @ {y.name}.transpose(-2, -1) * {scale:.3f}", x, y)


_FACTORS = (0.125, 2, 0.3)


def factors(b: Builder) -> None:
    """Matmuls of a value and of its multiples; constants on the way in, out, and at the weight."""
    x = b.pick(lambda value: value.is_matrix)
    if not x:
        return
    for left in ("{}", "({} * {})", "({} / {} * {})")[: b.one_of(2, 3)]:
        width = b.one_of(*_ALIGNED)
        left = left.format(x.name, *(b.one_of(*_FACTORS) for _ in range(2)))
        w = b.weight(width, x.width, dtype=x.dtype, fan_in=x.width)
        right = b.one_of("{}", "({} * {})").format(w, b.one_of(*_FACTORS))
        out = b.one_of("", " * {}", " * {} / {}").format(*(b.one_of(*_FACTORS) for _ in range(2)))
        b.emit(f"F.linear({left}, {right}){out}", x, fresh=True)


_POINTWISE = (
    *("F.relu({})", "F.gelu({})", "F.gelu({}, approximate='tanh')", "F.silu({})"),
    *("torch.tanh({})", "torch.sigmoid({})", "{}.softmax(-1)", "{}.softmax(0)"),
    *("{} * 0.125", "{} * 64", "{} + 1", "{} / 3", "-{}", "{}.abs()", "2 - {}"),
    *("F.dropout({}, 0.0)", "{}.detach()"),
)


def pointwise(b: Builder) -> None:
    """An activation, a softmax or arithmetic with a constant."""
    x = b.pick(lambda value: value.is_matrix)
    if x:
        b.emit(b.one_of(*_POINTWISE).format(x.name), x)


def cast(b: Builder) -> None:
    x = b.pick(lambda value: value.is_float)
    if x:
        b.emit(f"{x.name}.to({b.one_of(*b.dtypes)})", x)


def norm(b: Builder) -> None:
    x = b.pick(lambda value: value.is_matrix and value.width > 1)
    if not x:
        return
    n, dtype = x.width, x.dtype
    form = b.one_of("rms", "layer", "RMSNorm", "LayerNorm", "by hand", "plain")
    if form == "plain":
        b.emit(f"F.layer_norm({x.name}, ({n},))", x)
    elif form in ("RMSNorm", "LayerNorm"):
        layer = b.attribute("norm", f"nn.{form}({n}, dtype={dtype})")
        b.emit(f"{layer}({x.name})", x)
    elif form == "layer":
        w, c = (b.weight(n, dtype=dtype) for _ in range(2))
        b.emit(f"F.layer_norm({x.name}, ({n},), {w}, {c})", x)
    elif form == "rms":
        b.emit(f"F.rms_norm({x.name}, ({n},), {b.weight(n, dtype=dtype)}, 1e-5)", x)
    else:
        f = f"{x.name}.float()"
        root = f"torch.rsqrt({f}.square().mean(-1, keepdim=True) + 1e-5)"
        b.emit(f"{b.weight(n, dtype=dtype)} * ({f} * {root}).to({dtype})", x)


def reduce(b: Builder) -> None:
    x = b.pick(lambda value: value.is_matrix and value.has_numbers)
    if x:
        b.emit(f"{x.name}.{b.one_of('mean(-1, keepdim=True)', 'sum(0)', 'amax(-1)', 'mean(0)')}", x)


def view(b: Builder) -> None:
    """A view, or what may be one."""
    x = b.pick(lambda value: len(value.shape) >= 1)
    if x:
        dim = b.draw(st.integers(0, len(x.shape) - 1))
        texts = [*_views(x.shape, dim)]
        if len(x.shape) >= 2:
            order = b.draw(st.permutations(range(len(x.shape))))
            texts += [f"permute{tuple(order)}", "transpose(0, 1)", "flatten(0, 1)", "flatten()"]
            texts += ["transpose(-2, -1).contiguous()"]
        b.emit(f"{x.name}.{b.one_of(*texts)}", x)


def _views(shape: tuple[int, ...], dim: int) -> list[str]:
    """Views that change one dimension."""
    size = shape[dim]
    texts = [f"unsqueeze({dim})", f"flip({dim})"]
    for factor in (2, 4, 16):
        if size > factor and size % factor == 0:
            split = (*shape[:dim], size // factor, factor, *shape[dim + 1 :])
            texts += [f"reshape{split}", f"unflatten({dim}, (-1, {factor}))"]
    if size > 1:
        texts += [f"narrow({dim}, 1, {size - 1})", f"narrow({dim}, 0, {size // 2})"]
        texts += [f"select({dim}, -1)", f"unfold({dim}, 1, 2).squeeze(-1)"]
    if size == 1:
        wide = [16 if i == dim else -1 for i in range(len(shape))]
        texts += [f"squeeze({dim})", f"expand({wide})"]
    if 0 < math.prod(shape) <= 1024:
        texts += [f"repeat_interleave(2, {dim})", f"unsqueeze(0).expand({[2, *shape]})"]
    return texts


def parts(b: Builder) -> None:
    x = b.pick(lambda value: len(value.shape) >= 1 and value.width > 1)
    if x:
        texts = ["chunk(2, -1)", f"split({(x.width + 1) // 2}, -1)"]
        texts += ["unbind(0)"] if len(x.shape) >= 2 and x.shape[0] in (1, 2, 3) else []
        b.emit_parts(f"{x.name}.{b.one_of(*texts)}", x)


def join(b: Builder) -> None:
    def fits(x: Value, y: Value) -> bool:
        others = (x.shape[:-1], y.shape[:-1]) if dim == -1 else (x.shape[1:], y.shape[1:])
        same_kind = len(x.shape) == len(y.shape) and x.dtype == y.dtype
        return same_kind and others[0] == others[1]

    dim = b.one_of(-1, 0)
    x = b.pick(lambda value: len(value.shape) >= 1)
    y = b.pick(lambda value: x is not None and fits(x, value))
    if x and y:
        call = "stack" if y.shape == x.shape and b.seldom() else "cat"
        b.emit(f"torch.{call}([{x.name}, {y.name}], {dim})", x, y)


def combine(b: Builder) -> None:
    """Two values to one, such as a residual sum."""

    def fits(x: Value, y: Value) -> bool:
        sizes = zip(x.shape[::-1], y.shape[::-1], strict=False)
        if not all(m == n or 1 in (m, n) for m, n in sizes):
            return False
        return torch.broadcast_shapes(x.shape, y.shape).numel() <= _RESULT_MAX

    x = b.pick(lambda value: value.is_float)
    y = b.pick(lambda value: value.is_float and x is not None and fits(x, value))
    if x and y:
        sign = b.one_of("+", "*", "-")
        b.emit(f"{x.name} {sign} {y.name}", x, y, fresh=sign == "+")


def in_place(b: Builder) -> None:
    """A write into a value that nothing has read yet."""
    x = b.pick(lambda value: value.fresh and value.is_float)
    if x:
        b.run(f"{x.name}.{b.one_of('relu_()', 'add_(1)', 'mul_(0.5)', 'tanh_()')}", x)
        x.used = False


def buffer(b: Builder) -> None:
    """A buffer that is read or written.

    Not both: backward may compute again what was read, from what was written. Inductor does (torch
    2.13): with ``self.b.add_(1); return x * self.b.exp()``, x's gradient is that of a buffer
    increased twice, without FP8 too.
    """
    x = b.pick(lambda value: value.is_matrix and value.has_numbers)
    if x:
        name = b.attribute("b", f"nn.Buffer(torch.ones({x.width}))")
        if b.flip():
            b.emit(f"{x.name} * {name}.to({x.dtype})", x)
        else:
            mean = f"{x.name}.detach().float().flatten(0, -2).mean(0)"
            b.run(f"{name}.mul_(0.9).add_({mean}, alpha=0.1)", x)


def embedding(b: Builder) -> None:
    """Rows of a table, which may be tied to a projection."""
    width, dtype = b.one_of(*_ALIGNED), b.one_of(*b.dtypes)
    ids = b.input(b.one_of((16,), (2, 16)), below=32)
    table = b.attribute("e", f"nn.Embedding(32, {width}, dtype={dtype})")
    x = b.emit(f"{table}({ids.name})", ids)
    if b.flip():
        b.emit(f"F.linear({x.name}, {table}.weight)", x)


_STEPS = (
    *(linear, linear, linear, shared_input, swiglu, attention, weight_left, product, norm),
    *(
        factors,
        pointwise,
        pointwise,
        combine,
        view,
        view,
        parts,
        join,
        cast,
        reduce,
        in_place,
        buffer,
    ),
    embedding,
)


# All recipes of a program keep scales in the same way, or find them in the tensor.
_KEPT = (("delayed", "e4m3_only"), ("static",), ())
_FOUND = ("current", "rowwise", "blockwise", "mx")


def _recipe(b: Builder, names: tuple[str, ...]) -> str:
    """One of these, as it is or changed."""
    name = b.one_of(*names)
    changes = [f"{b.one_of(*Operand)} in e5m2"] if b.seldom() else []
    changes += [f"{b.one_of(*Gemm)} is not cast"] if b.seldom() else []
    if not RECIPES[name].is_tensorwise and b.seldom():
        changes.append("powers of two")
    return ", ".join((name, *changes))


def _recipes(b: Builder) -> tuple[str, tuple[tuple[str, str], ...]]:
    """One for all sites, and others for those whose number ends in certain digits."""
    names = (*b.one_of(*_KEPT), *_FOUND)
    overrides = []
    for _ in range(b.one_of(0, 1, 2)):
        digits = b.draw(st.sets(st.sampled_from("0123456789"), min_size=2, max_size=5))
        overrides.append((f"*[{''.join(sorted(digits))}]", _recipe(b, names)))
    return _recipe(b, names), tuple(dict(overrides).items())


@st.composite
def programs(draw: st.DrawFn, max_steps: int = 12) -> Program:
    """A program with at least one output."""
    b = Builder(draw, draw(st.sampled_from(((torch.float32,), _DTYPES))))
    for _ in range(draw(st.integers(1, 2))):
        rows, width = b.one_of(*_ROWS), b.one_of(*_WIDTHS)
        shape = (*b.one_of((), (2,), (2, 2)), rows, width)
        b.input(shape, dtype=b.one_of(*b.dtypes), requires_grad=not b.seldom())
    for step in draw(st.lists(st.sampled_from(_STEPS), min_size=2, max_size=max_steps)):
        step(b)
    outputs = [value.name for value in b.values if not value.used]
    if not outputs or b.flip():  # a value that others read, too
        outputs.append(b.one_of(*b.values).name)
    recipe, overrides = _recipes(b)
    return Program(
        inputs=tuple(b.inputs),
        init=tuple(b.init),
        forward=tuple(b.forward),
        outputs=", ".join(dict.fromkeys(outputs)),
        recipe=recipe,
        overrides=overrides,
        formats="auto" if b.seldom() else "recipe",
        attention=b.one_of(*ATTENTION),
        unknown_batch=b.seldom(),
    )
