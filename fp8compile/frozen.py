"""Weights that are FP8 only: what ``freeze`` makes of ``nn.Linear``.

A frozen module is of a subclass of its class, whose ``weight`` is a property: the FP8 parameter,
dequantized. So it computes in eager what it computed before, up to rounding, and a compiled graph,
which finds that dequantization in front of a GEMM, takes the FP8 weight instead.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .arguments import checked_model
from .errors import FrozenError, OptionError, RecipeError
from .formats import FP8_DTYPES, Format
from .ops import ALIGNMENT, current_scale
from .options import parse_options
from .pretrained import guard_saving
from .progress import progress
from .read_only import ReadOnly, ordinary, read_only
from .recipe import Granularity, Operand, Recipe, Scaling, get_recipe
from .rounding import gram_matrices, in_groups, rounded
from .states import known_weight_scale, replace_weight
from .untouched import Step, check_has_data, checked_batches, plain_step

log = logging.getLogger(__name__)

_UNFROZEN = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
GRANULARITIES = (Granularity.TENSOR, Granularity.ROW, Granularity.BLOCK_128X128)
# How to have a weight for a parameter again, by what its module holds instead.
_UNDO = {
    "weight_mask": "prune.remove(module, 'weight')",
    "weight_u": "remove_spectral_norm(module)",
    "weight_g": "remove_weight_norm(module)",
}
_CHUNK = 2**22  # elements: what is cast at a time, so that it takes little memory


class FrozenWeight:
    """A mixin for ``nn.Linear``: its ``weight`` is kept in FP8.

    The parameter ``weight`` (``e4m3[N, K]``) and the buffer ``weight_scale`` (``f32``, with a
    number per block, see ``fp8::dequantize``) are what ``state_dict`` holds. ``module.weight`` is
    their product, in ``weight_dtype``, which ``to``, ``half`` and the like change instead.
    """

    granularity: Granularity
    weight_dtype: torch.dtype
    _parameters: dict[str, Any]
    weight_scale: Tensor

    @property
    def weight(self) -> Tensor:
        q: Tensor = self._parameters["weight"]
        if q.dtype not in FP8_DTYPES:  # put there past register_parameter, as functional_call does
            return q
        block, dtype = list(self.granularity.block), self.weight_dtype
        return read_only(torch.ops.fp8.dequantize.default(q, self.weight_scale, block, dtype))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As ``nn.Module.register_parameter``; another weight than one in FP8 ends the freeze."""
        if isinstance(param, ReadOnly):
            raise FrozenError(
                f"the weight is frozen in FP8, and what is dequantized of it can be no parameter "
                f"{name!r}; call fp8compile.unfreeze(model) first, or give a copy: "
                "nn.Parameter(module.weight.clone())"
            )
        super().register_parameter(name, param)  # type: ignore[misc]
        if name == "weight" and not is_frozen(self):
            _thaw(self)

    def __delattr__(self, name: str) -> None:
        if name == "weight":  # what parametrizations begin with
            raise FrozenError(
                "the weight is frozen in FP8, and can be neither parametrized nor deleted; call "
                "fp8compile.unfreeze(model) first"
            )
        super().__delattr__(name)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As ``nn.Module``'s, but a weight without its scale, or in another dtype, is an error,
        strict or not: it would be cast without a scale.
        """
        q, given = self._parameters["weight"], state_dict.get(f"{prefix}weight")
        has_scale = f"{prefix}weight_scale" in state_dict
        if is_frozen(self) and given is not None and not (given.dtype is q.dtype and has_scale):
            error_msgs.append(
                f"{prefix}weight is frozen in FP8, {q.dtype} with a weight_scale, and given as "
                f"{given.dtype} {'with' if has_scale else 'without'} one; for weights in high "
                "precision call fp8compile.unfreeze(model) first, and freeze again afterwards"
            )
            return
        rest = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[misc]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As ``nn.Module._apply``, but FP8 and its scales change their device only."""

        def move(x: Tensor) -> Tensor:
            moved = fn(x)
            is_ours = x is self._parameters["weight"] or x is self.weight_scale
            return x.to(moved.device) if is_ours and moved.dtype is not x.dtype else moved

        of_weights = torch.empty(0, dtype=self.weight_dtype, device=self.weight_scale.device)
        self.weight_dtype = fn(of_weights).dtype
        super()._apply(move, recurse)  # type: ignore[misc]
        return self

    def extra_repr(self) -> str:
        shape: str = super().extra_repr()  # type: ignore[misc]
        return f"{shape}, frozen in e4m3 {self.granularity}" if is_frozen(self) else shape

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _instance, (type(self).__bases__[1],), self.__dict__


_classes: dict[type, type] = {}  # what instances of a class become: one class, so that types agree


def _class_of(base: type) -> type:
    if base not in _classes:
        name = f"Frozen{base.__name__}"
        module: dict[str, Any] = {"__module__": base.__module__}
        _classes[base] = type(name, (FrozenWeight, base), module)
    return _classes[base]


def _instance(base: type) -> Any:
    cls: Any = _class_of(base)
    return cls.__new__(cls)


def freeze(
    model: nn.Module,
    recipe: str | Recipe = "rowwise",
    *,
    skip: Sequence[str] | Callable[[str], bool] = (),
    batches: Iterable[Any] | None = None,
    step: Step = plain_step,
) -> dict[str, str]:
    """Keep the weights of every ``nn.Linear`` in FP8 only, for inference; changes the model.

    They are cast as the compiler casts them under that recipe, so that compiled results stay the
    same bit by bit, with scales that a training left, if it left some. But where one GEMM did for
    several layers that take one input (q, k and v), each of these gets scales of its own: under a
    tensorwise recipe, which had one, and under a blockwise one where a block reached from one
    layer, with ``out_features`` that are not divisible by 128, into the next. The parameters then
    take half of the memory of bfloat16. Layers are cast one after the other, some rows at a time:
    at no time is more needed than the model took before, and a layer or 100 MB.

    A write to such a weight in eager code raises FrozenError, and so does ``save_pretrained`` of a
    model of transformers, which would leave its format out: ``unfreeze`` first. One that is
    assigned, ``module.weight = nn.Parameter(...)``, is not frozen.

    Compile and call it as before: the recipe is known by the scales of the weights, be the option
    ``recipe`` what it may. Gradients for inputs and other parameters still work; an optimizer that
    knows the old parameters keeps them alive.

    Args:
        recipe: which elements share a scale: ``"rowwise"``, ``"blockwise"``, or ``"delayed"`` and
            other tensorwise ones.
        skip: as the option of ``torch.compile``: names, with wildcards, of modules to leave alone.
        batches: some hundred examples of what the model is called with, in batches. Weights are
            then rounded so that their errors make up for each other on these (GPTQ, arXiv
            2210.17323), instead of to the nearest: results differ from those of the model that is
            cast when it is called, and are closer to those in high precision. The model runs them
            in its own precision and mode, several times if it is large.
        step: what to do with the model and a batch, instead of ``model(*batch)``.

    Returns the names of the modules whose matrices were left as they are, each with the reason; of
    what is frozen already nothing is said. Raises RecipeError for a recipe that weights cannot
    be kept in, OptionError for names to skip that match nothing, for no batch, and for batches with
    which a layer's input is not finite.
    """
    model, recipe = checked_model(model, "freeze"), get_recipe(recipe)
    granularity = frozen_granularity(recipe)
    left = left_out(model, granularity, skip)
    before = _bytes(model)
    chosen = {n: m for n, m in linears(model) if n not in left and not is_frozen(m)}
    if batches is None:
        for module in chosen.values():
            _freeze(module, recipe)
    else:
        given = list(checked_batches(batches))  # each group runs them
        if not given:
            raise OptionError("to round weights for batches takes at least one; or leave them out")
        check_has_data(model)
        for group in in_groups(chosen):
            grams = gram_matrices(model, group, given, step)
            for name in progress(list(group), "rounding weights"):
                _freeze(group[name], recipe, grams.pop(name, None))
    guard_saving(model, is_frozen)
    log.info("froze a model: %.4g MB, now %.4g MB", before / 1e6, _bytes(model) / 1e6)
    return left


def unfreeze(model: nn.Module, dtype: torch.dtype | None = None) -> list[str]:
    """Give every frozen ``nn.Linear`` an ordinary parameter again; changes the model.

    What rounding to FP8 has lost stays lost: the parameter is what ``module.weight`` was, in
    ``dtype``, or in that which eager computes in. It may be written to, as where an adapter is
    merged into it, and be frozen again. Its ``requires_grad`` is that of the frozen one, False if
    nobody has changed it. The scaling state, such as calibrated scales of the input, stays.

    Returns the names of the modules that were frozen. Raises OptionError for a dtype of no float.
    """
    model = checked_model(model, "unfreeze")
    if dtype is not None and dtype not in _UNFROZEN:
        raise OptionError(f"dtype={dtype!r}; weights become one of {[*map(str, _UNFROZEN)]}")
    names = [name for name, module in linears(model) if is_frozen(module)]
    for name in names:
        _unfreeze(model.get_submodule(name), dtype)
    guard_saving(model, is_frozen)
    return names


@torch.inference_mode(False)  # tensors of whoever calls there can be neither trained nor written to
@torch.no_grad()
def _unfreeze(module: nn.Module, dtype: torch.dtype | None) -> None:
    frozen: Any = module
    q, value = frozen._parameters["weight"], ordinary(frozen.weight).to(dtype)
    new = nn.Parameter(value, requires_grad=q.requires_grad)
    frozen.weight = new
    replace_weight(q, new)


def _thaw(module: Any) -> None:
    """Let a module be of the class that it was of before it was frozen."""
    module.__class__ = type(module).__bases__[1]
    del module.weight_scale, module.granularity, module.weight_dtype


@torch.inference_mode(False)
@torch.no_grad()
def _freeze(module: nn.Linear, recipe: Recipe, gram: Tensor | None = None) -> None:
    weight, granularity = module.weight.detach(), frozen_granularity(recipe)
    is_delayed = recipe.scaling is Scaling.DELAYED
    scale = known_weight_scale(module.weight) if is_delayed else None
    q, weight_scale = quantize_weight(weight, granularity, scale)
    if gram is not None:
        q = rounded(weight, weight_scale, granularity, gram)
    set_frozen(module, q, weight_scale, granularity, weight.dtype)


def frozen_granularity(recipe: Recipe) -> Granularity:
    """How many elements of a weight share a scale; RecipeError if none can be frozen so."""
    granularity = recipe.granularity_of(Operand.WEIGHT)
    fmt = recipe.format_of(Operand.WEIGHT)
    if recipe.scaling is Scaling.STATIC:
        raise RecipeError(
            f"recipe {recipe.name!r} derives scales from weights in high precision, of which "
            "nothing is left; freeze with 'current', or with 'delayed' after fp8compile.calibrate"
        )
    if granularity not in GRANULARITIES or fmt is not Format.E4M3 or recipe.power_of_two:
        raise RecipeError(
            f"recipe {recipe.name!r} casts weights to {fmt} {granularity}"
            f"{' with power-of-two scales' if recipe.power_of_two else ''}, in which none can be "
            f"kept; freeze with 'rowwise', 'blockwise', 'delayed', or another with e4m3 weights "
            f"that are {', '.join(map(str, GRANULARITIES))}"
        )
    return granularity


def left_out(
    model: nn.Module, granularity: Granularity, skip: Sequence[str] | Callable[[str], bool] = ()
) -> dict[str, str]:
    """The modules whose matrices cannot, or shall not, be FP8, each with the reason.

    Those of embeddings, convolutions and positions, which no GEMM multiplies with, do not count.
    Raises OptionError for a glob in ``skip`` that matches no module, and no site's name.
    """
    skip = parse_options({"skip": skip}).skip
    _check_globs(model, () if callable(skip) else skip)
    multiple = max(granularity.block[1], ALIGNMENT)
    names: dict[int, list[str]] = {}
    for module_name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(id(parameter), []).append(f"{module_name}.{key}".lstrip("."))

    def reason(name: str, module: nn.Linear) -> str | None:
        if skip(name) if callable(skip) else any(fnmatchcase(name, glob) for glob in skip):
            return "skipped by the user"
        weight = module._parameters.get("weight")
        if weight is None:
            return _not_a_parameter(module)
        others = [each for each in names[id(weight)] if each != f"{name}.weight".lstrip(".")]
        if others:
            return f"its weight is also {', '.join(others)}"
        if not weight.numel():
            return "its weight is empty"
        if module.in_features % multiple:
            return f"in_features, {module.in_features}, is not divisible by {multiple}"
        if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
        return None

    found = {name: reason(name, m) for name, m in linears(model) if not is_frozen(m)}
    left = {name: why for name, why in found.items() if why is not None}
    return left | {
        name: f"{type(module).__name__} is no nn.Linear"
        for name, module in model.named_modules()
        if _has_other_matrices(module) and _owner(name) not in found
    }


def _owner(name: str) -> str:
    """The module that a part of its parametrizations belongs to; others belong to themselves."""
    return f".{name}".partition(".parametrizations.")[0].removeprefix(".")


def _not_a_parameter(module: nn.Linear) -> str:
    """Why a weight that something computes at every call stays as it is, and what to do first."""
    held = {*module._parameters, *module._buffers}
    if is_parametrized(module, "weight"):
        call = "parametrize.remove_parametrizations(module, 'weight')"
    else:
        call = next((_UNDO[key] for key in _UNDO if key in held), "")
    undo = f"call torch.nn.utils.{call} first" if call else "assign one: module.weight = ..."
    return f"its weight is no parameter; {undo}"


def _check_globs(model: nn.Module, globs: Sequence[str]) -> None:
    known = {name for name, _ in model.named_modules()}
    known |= {name.removesuffix(".weight") for name, _ in model.named_parameters()}
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in known):
            names = [name for name, _ in linears(model)]
            raise OptionError(f"skip={glob!r} matches nothing; the nn.Linear are {names}")


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Every ``nn.Linear`` of a model once, by name, frozen or not."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module


def _has_other_matrices(module: nn.Module) -> bool:
    """Whether GEMMs may multiply with a parameter of the module that ``freeze`` does not know, such
    as the ``Conv1D`` of GPT-2 in transformers, or experts of which all are in one parameter.
    """
    if isinstance(module, nn.Linear | nn.Embedding | nn.EmbeddingBag | nn.modules.conv._ConvNd):
        return False
    own = [p for p in module._parameters.values() if p is not None and p.is_floating_point()]
    return any(p.dim() >= 2 and p.shape[0] > 1 for p in own)


def is_frozen(module: object) -> TypeGuard[FrozenWeight]:
    """Whether the module's weight is kept in FP8."""
    weight = module._parameters.get("weight") if isinstance(module, FrozenWeight) else None
    return weight is not None and weight.dtype in FP8_DTYPES


def quantize_weight(
    weight: Tensor, granularity: Granularity, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A weight ``[N, K]`` in E4M3 and its scale_inv, which lies as the blocks do.

    ``scale``: ``f32[1]``, of a tensorwise weight, where it is known. The rows are cast some at a
    time, which takes some 100 MB.
    """
    block, fmt = list(granularity.block), Format.E4M3.dtype
    step = max(_CHUNK // max(weight.shape[1], 1) // 128, 1) * 128
    if granularity is Granularity.TENSOR and scale is None:
        scale = _current_scale(weight)
    q = torch.empty(weight.shape, dtype=fmt, device=weight.device)
    scales = []
    for start in range(0, max(weight.shape[0], 1), step):
        rows = weight[start : start + step]
        if granularity is Granularity.TENSOR:
            part, _, scale_inv, _, _ = torch.ops.fp8.quantize(rows, scale, 0, fmt, True, False)
        else:
            part, _, scale_inv, _ = torch.ops.fp8.quantize_blocks(
                rows, block, False, fmt, True, False
            )
        q[start : start + step] = part[:, : weight.shape[1]]
        scales.append(scale_inv.reshape(-1, 1) if block[0] == 1 else scale_inv)
    return q, scales[0] if granularity is Granularity.TENSOR else torch.cat(scales)


def _current_scale(weight: Tensor) -> Tensor:
    """That of ``fp8::quantize``, without a copy of the weight."""
    ends = torch.stack(torch.aminmax(weight)) if weight.numel() else weight.new_zeros(1)
    return current_scale(ends.abs().amax().float(), Format.E4M3.max).reshape(1)


def set_frozen(
    module: nn.Linear,
    q: Tensor,
    weight_scale: Tensor,
    granularity: Granularity,
    dtype: torch.dtype,
) -> None:
    """Give an ``nn.Linear`` a weight in FP8, instead of what it has.

    ``q``: ``e4m3[N, K]``. ``weight_scale``: see ``FrozenWeight``. ``dtype``: in which eager
    multiplies. The scaling state of the old weight, such as calibrated scales of the input, is
    that of the new one.
    """
    old = module._parameters["weight"]
    new = nn.Parameter(q, requires_grad=False)
    if not isinstance(module, FrozenWeight):
        module.__class__ = _class_of(type(module))
    module._parameters["weight"] = new
    module.register_buffer("weight_scale", weight_scale)
    frozen: Any = module
    frozen.granularity, frozen.weight_dtype = granularity, dtype
    if old is not None:
        replace_weight(old, new)


def _bytes(model: nn.Module) -> int:
    return sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
