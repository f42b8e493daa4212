"""What a checkpoint means for a model: found, and checked, before anything is changed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ScalingStateError
from ..frozen import is_frozen, left_out, linears
from ..named_state import check_state_dict, state_dict
from ..pretrained import is_pretrained
from ..recipe import Granularity
from .reading import SCALES, Checkpoint, read_json
from .scales import from_json, state_from_scales
from .schemes import Scheme, SchemeOf

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SCALES = (*_FLOATS, torch.float8_e8m0fnu)
_SHOWN = 10  # problems of one kind

Skip = Sequence[str] | Callable[[str], bool]


@dataclass
class Plan:
    """What ``load`` reads. ``tensors``: by the name in the file, all names that a tensor has in the
    model. ``weights``: by the name of a module, how it is frozen. ``left``: the others, and why.
    ``state``: see ``fp8compile.state_dict``; ``is_from_scales``: it is made of ``input_scale``.
    """

    tensors: dict[str, list[str]] = field(default_factory=dict)
    weights: dict[str, Weight] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    is_from_scales: bool = False


@dataclass(frozen=True)
class Weight:
    """A weight to be frozen. ``scale``: that of the file, ``f32``; None: it is to be cast."""

    stored: str
    granularity: Granularity
    scale: Tensor | None


def make_plan(
    model: nn.Module,
    checkpoint: Checkpoint,
    scheme_of: SchemeOf | None,
    cast_to: Granularity | None,
    skip: Skip,
    ignore: Sequence[str],
) -> Plan:
    """Find where each tensor goes. ``cast_to``: for weights that are not FP8 in the file.

    Raises CheckpointError, with all that does not fit.
    """
    planner = _Planner(model, checkpoint, scheme_of, cast_to, skip)
    problems = list(planner.run(ignore))
    if problems:
        raise misfit(checkpoint, model, problems)
    return planner.plan


def misfit(checkpoint: Checkpoint, model: nn.Module, problems: Sequence[str]) -> CheckpointError:
    """The error that lists what does not fit."""
    shown = list(problems[:_SHOWN])
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more")
    if is_pretrained(model) and any(problem.startswith("missing") for problem in problems):
        shown.append(
            "of some models transformers calls tensors otherwise in a file, puts several together "
            "as it reads, or leaves some out; if so, call from_pretrained, and freeze the model"
        )
    return CheckpointError(
        f"the checkpoint {checkpoint.path} does not fit this {type(model).__name__}; nothing was "
        "changed:\n  " + "\n  ".join(shown)
    )


class _Planner:
    def __init__(
        self,
        model: nn.Module,
        checkpoint: Checkpoint,
        scheme_of: SchemeOf | None,
        cast_to: Granularity | None,
        skip: Skip,
    ) -> None:
        self.plan = Plan()
        self._model, self._checkpoint = model, checkpoint
        self._scheme_of, self._cast_to = scheme_of, cast_to
        self._used: set[str] = set()
        self._input_scales: dict[str, Tensor] = {}
        self._left = {
            granularity: left_out(model, granularity, skip)
            for granularity in (Granularity.TENSOR, Granularity.ROW, Granularity.BLOCK_128X128)
        }
        # A module that two others share is met under its first name only.
        self._linears = {id(m._parameters.get("weight")): (n, m) for n, m in linears(model)}

    def run(self, ignore: Sequence[str]) -> Iterator[str]:
        """Fill the plan; what does not fit."""
        for names, tensor in self._own_tensors():
            yield from self._place(names, tensor)
        why = {} if self._cast_to is None else self._left[self._cast_to]
        for name, _ in linears(self._model):
            if name not in self.plan.weights:
                self.plan.left[name] = why.get(name, "in high precision in the checkpoint")
        known = [*ignore, *self._ignored_by_transformers()]
        for name in sorted(self._checkpoint.tensors.keys() - self._used):
            if not any(fnmatchcase(name, glob) for glob in known):
                yield f"unexpected: {name}; if the model does not need it, give ignore=[{name!r}]"
        yield from self._plan_state()

    def _own_tensors(self) -> Iterator[tuple[list[str], Tensor]]:
        """Every parameter and persistent buffer, with all its names, without the scales of weights
        that are frozen already.
        """
        scales = {id(m.weight_scale) for m in self._model.modules() if is_frozen(m)}
        names: dict[int, list[str]] = {}
        own = self._model.state_dict(keep_vars=True)
        tensors = {id(t): t for t in own.values() if isinstance(t, Tensor)}
        for name, tensor in own.items():
            if id(tensor) in tensors and id(tensor) not in scales:
                names.setdefault(id(tensor), []).append(name)
        for key, found in names.items():
            yield found, tensors[key]

    def _place(self, names: list[str], tensor: Tensor) -> Iterator[str]:
        stored = [name for name in names if name in self._checkpoint.tensors]
        self._used.update(stored)
        if not stored:
            yield f"missing: {' = '.join(names)}, {_text(tensor.dtype, tensor.shape)}"
            return
        first = self._checkpoint.tensors[stored[0]]
        if first.shape != tuple(tensor.shape):
            yield (f"shape: {stored[0]} is {list(first.shape)}, in the model {list(tensor.shape)}")
            return
        for other in stored[1:]:
            if not torch.equal(*(self._checkpoint.read(n) for n in (stored[0], other))):
                yield f"tied: {stored[0]} and {other} are one in the model, and differ in the file"
        name, module = self._linears.get(id(tensor), ("", None))
        if module is None:
            yield from self._place_plain(stored[0], names, tensor)
        else:
            yield from self._place_weight(stored[0], names, tensor, name, module)

    def _place_plain(self, stored: str, names: list[str], tensor: Tensor) -> Iterator[str]:
        dtype = self._checkpoint.tensors[stored].dtype
        if dtype is not tensor.dtype and not (dtype in _FLOATS and tensor.dtype in _FLOATS):
            yield f"dtype: {stored} is {_text(dtype)}, in the model {_text(tensor.dtype)}"
        self.plan.tensors[stored] = names

    def _place_weight(
        self, stored: str, names: list[str], tensor: Tensor, name: str, module: nn.Linear
    ) -> Iterator[str]:
        dtype = self._checkpoint.tensors[stored].dtype
        scheme = None if self._scheme_of is None else self._scheme_of(name, module, dtype)
        if scheme is not None:
            yield from self._place_fp8(stored, name, scheme)
        elif self._cast_to is not None and name not in self._left[self._cast_to]:
            if dtype not in _FLOATS:
                yield f"dtype: {stored} is {_text(dtype)}; only floats are cast to FP8"
            self.plan.weights[name] = Weight(stored, self._cast_to, None)
        elif is_frozen(module):
            yield (
                f"{name} is frozen, but in high precision in the checkpoint: build the model again"
            )
        else:
            yield from self._place_plain(stored, names, tensor)

    def _place_fp8(self, stored: str, name: str, scheme: Scheme) -> Iterator[str]:
        dtype = self._checkpoint.tensors[stored].dtype
        why = self._left[scheme.granularity].get(name)
        if dtype is not torch.float8_e4m3fn:
            yield f"dtype: {stored} is {_text(dtype)}; config.json says that it is float8_e4m3fn"
        elif why is not None:
            yield f"{stored} is FP8 {scheme.granularity}, which the model cannot have: {why}"
        else:
            yield from self._place_scales(stored, name, scheme)

    def _place_scales(self, stored: str, name: str, scheme: Scheme) -> Iterator[str]:
        prefix = stored.removesuffix("weight")
        rows, columns = self._checkpoint.tensors[stored].shape
        shape = _scale_shape(scheme.granularity, rows, columns)
        problem, scale = self._scale(prefix + scheme.scale, shape)
        yield from problem
        if scale is not None:
            self.plan.weights[name] = Weight(stored, scheme.granularity, scale)
        if scheme.static:
            problem, scale = self._scale(f"{prefix}input_scale", (1,))
            yield from problem
            if scale is not None and not scale > 0:
                yield f"scale: {prefix}input_scale is 0, by which nothing can be divided"
            elif scale is not None:
                self._input_scales[name] = scale

    def _scale(self, name: str, shape: tuple[int, ...]) -> tuple[list[str], Tensor | None]:
        """A scale in float32, or what is wrong with it."""
        self._used.add(name)
        found = self._checkpoint.tensors.get(name)
        if found is None:
            return [f"missing: {name}, without which {name.rpartition('.')[0]} means nothing"], None
        count = torch.Size(shape).numel()
        # One number may have any number of dimensions, and those of rows one or two.
        is_alike = torch.Size(found.shape).numel() == count and found.shape[:1] in ((), shape[:1])
        if found.dtype not in _SCALES or not (found.shape == shape or (is_alike and 1 in shape)):
            return [
                f"scale: {name} is {_text(found.dtype, found.shape)}; it should be float32 "
                f"{list(shape)}"
            ], None
        scale = self._checkpoint.read(name).float().reshape(shape)
        if not (scale.isfinite() & (scale >= 0)).all():
            return [f"scale: {name} has values that are negative or not finite"], None
        return [], scale

    def _ignored_by_transformers(self) -> Iterator[str]:
        """What such a model says that it does not need of its checkpoints."""
        patterns = getattr(self._model, "_keys_to_ignore_on_load_unexpected", None) or ()
        for name in self._checkpoint.tensors:
            if any(re.search(pattern, name) for pattern in patterns):
                yield name

    def _plan_state(self) -> Iterator[str]:
        held = read_json(self._checkpoint.path / SCALES)
        if held is None:
            self.plan.state = state_from_scales(self._model, self._input_scales)
            self.plan.is_from_scales = True
        else:
            self.plan.state = from_json(held, str(self._checkpoint.path / SCALES))
        if self.plan.state and state_dict(self._model):
            yield "the model has scales already, and so has the checkpoint: build the model again"
            return
        try:
            check_state_dict(self._model, self.plan.state)
        except ScalingStateError as error:
            yield str(error)


def _scale_shape(granularity: Granularity, rows: int, columns: int) -> tuple[int, ...]:
    if granularity is Granularity.TENSOR:
        return (1,)
    if granularity is Granularity.ROW:
        return (rows, 1)
    return (-(-rows // 128), -(-columns // 128))


def _text(dtype: torch.dtype | None, shape: Sequence[int] | None = None) -> str:
    name = "of a dtype that PyTorch lacks" if dtype is None else str(dtype).removeprefix("torch.")
    return name if shape is None else f"{name} {list(shape)}"
