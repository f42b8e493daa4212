"""How ``config.json`` says which weights are FP8 in a checkpoint, and in which blocks.

compressed-tensors is what llm-compressor writes and vLLM and transformers read; the format of
DeepSeek-V3 is that of its own checkpoints, called ``fp8`` in transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from ..frozen import is_frozen, linears
from ..recipe import Granularity

LEGAL = (
    "compressed-tensors of format float-quantized, with weights of 8-bit float per tensor, per "
    "channel or in blocks of 128x128; or quant_method fp8 with weight_block_size [128, 128]"
)
_BLOCK = [128, 128]
_STRATEGIES = {
    "tensor": Granularity.TENSOR,
    "channel": Granularity.ROW,
    "block": Granularity.BLOCK_128X128,
}
_FORMATS = ("float-quantized", "naive-quantized")
_EMPTY: tuple[Any, ...] = (None, {}, [])


@dataclass(frozen=True)
class Scheme:
    """How a weight is stored: its granularity, the name of its scale, and whether the input of its
    module has a scale, too.
    """

    granularity: Granularity
    scale: str = "weight_scale"
    static: bool = False


SchemeOf = Callable[[str, nn.Linear, torch.dtype | None], Scheme | None]


# --- writing ------------------------------------------------------------------------------------


def quantization_config(model: nn.Module, static: Container[str]) -> dict[str, Any]:
    """What ``config.json`` says of a frozen model; ``static``: modules whose input has a scale."""
    groups: dict[tuple[Granularity, bool], list[str]] = {}
    ignore = []
    for name, module in linears(model):
        if is_frozen(module):
            groups.setdefault((module.granularity, name in static), []).append(name)
        else:
            ignore.append(name)
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {
                "targets": ["Linear"] if len(groups) == 1 else names,
                "weights": _weights(granularity),
                "input_activations": _activations(granularity, is_static),
            }
            for i, ((granularity, is_static), names) in enumerate(groups.items())
        },
        "ignore": ignore,
    }


def _weights(granularity: Granularity) -> dict[str, Any]:
    strategy = next(name for name, each in _STRATEGIES.items() if each is granularity)
    block = {"block_structure": _BLOCK} if strategy == "block" else {}
    return _float8(strategy, dynamic=False) | block


def _activations(granularity: Granularity, static: bool) -> dict[str, Any]:
    """What the recipe of such weights does with inputs."""
    if granularity is Granularity.BLOCK_128X128:
        return _float8("group", dynamic=True) | {"group_size": 128}
    return _float8("token" if granularity is Granularity.ROW else "tensor", dynamic=not static)


def _float8(strategy: str, dynamic: bool) -> dict[str, Any]:
    return {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": strategy,
        "dynamic": dynamic,
    }


# --- reading ------------------------------------------------------------------------------------


def scheme_of(config: Mapping[str, Any]) -> SchemeOf | None:
    """Says, by name, module and the dtype in the file, how a weight is stored, None: as it is.

    ``config``: all of ``config.json``. Returns None if it speaks of no quantization. Raises
    CheckpointError for one that is none of ``LEGAL``.
    """
    found = config.get("quantization_config") or config.get("compression_config")
    if found is None:
        return None
    if not isinstance(found, dict):
        raise _unsupported(f"quantization_config is {found!r}")
    method = found.get("quant_method")
    if method == "compressed-tensors":
        return _compressed_tensors(found)
    if method == "fp8":
        return _deepseek(found)
    raise _unsupported(f"quant_method is {method!r}")


def _compressed_tensors(found: Mapping[str, Any]) -> SchemeOf:
    if found.get("format") not in _FORMATS:
        raise _unsupported(f"format is {found.get('format')!r}")
    for key in ("kv_cache_scheme", "transform_config"):
        if found.get(key) not in _EMPTY:
            raise _unsupported(f"{key} is {found[key]!r}")
    sparsity = found.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        raise _unsupported(f"sparsity_config is {sparsity!r}")
    described = found.get("config_groups") or {}
    if not isinstance(described, dict) or not all(isinstance(g, dict) for g in described.values()):
        raise _unsupported(f"config_groups is {described!r}")
    groups = [(group.get("targets") or (), _scheme(group)) for group in described.values()]
    ignore = found.get("ignore") or ()
    for targets in (ignore, *(targets for targets, _ in groups)):
        _check_targets(targets)

    def of(name: str, module: nn.Linear, dtype: torch.dtype | None) -> Scheme | None:
        if _matches(name, module, ignore):
            return None
        return next((scheme for targets, scheme in groups if _matches(name, module, targets)), None)

    return of


def _check_targets(targets: Any) -> None:
    if not isinstance(targets, list | tuple) or not all(isinstance(t, str) for t in targets):
        raise _unsupported(f"targets, or names to ignore, are {targets!r}")
    for target in targets:
        try:
            re.compile(target[3:] if target.startswith("re:") else "")
        except re.error as error:
            raise _unsupported(f"{target!r} is to match names ({error})") from error


def _scheme(group: Mapping[str, Any]) -> Scheme:
    weights, inputs = group.get("weights"), group.get("input_activations") or {}
    if not weights or not _is_float8(weights) or weights.get("dynamic"):
        raise _unsupported(f"a config group has weights {weights!r}")
    granularity = _STRATEGIES.get(weights.get("strategy") or "tensor")
    in_blocks = granularity is Granularity.BLOCK_128X128
    if granularity is None or (in_blocks and weights.get("block_structure") != _BLOCK):
        raise _unsupported(f"a config group has weights {weights!r}")
    if inputs and not _is_float8(inputs):
        raise _unsupported(f"a config group has input_activations {inputs!r}")
    if group.get("output_activations") is not None:
        raise _unsupported("a config group has output_activations")
    return Scheme(granularity, static=bool(inputs) and not inputs.get("dynamic"))


def _is_float8(args: Any) -> bool:
    if not isinstance(args, dict):
        return False
    is_float = args.get("type") == "float" and args.get("num_bits", 8) == 8
    return is_float and bool(args.get("symmetric", True))


def _matches(name: str, module: nn.Module, targets: Sequence[str]) -> bool:
    """As compressed-tensors matches names, regular expressions and classes."""
    classes = {cls.__name__ for cls in type(module).__mro__ if issubclass(cls, nn.Module)}
    return any(
        re.match(target[3:], name) if target.startswith("re:") else target in (name, *classes)
        for target in targets
    )


def _deepseek(found: Mapping[str, Any]) -> SchemeOf:
    if found.get("weight_block_size") != _BLOCK:
        raise _unsupported(f"weight_block_size is {found.get('weight_block_size')!r}")
    scheme = Scheme(Granularity.BLOCK_128X128, scale="weight_scale_inv")

    # Such a config.json does not name all that is left out, such as lm_head.
    def of(name: str, module: nn.Linear, dtype: torch.dtype | None) -> Scheme | None:
        return scheme if dtype is torch.float8_e4m3fn else None

    return of


def _unsupported(what: str) -> CheckpointError:
    return CheckpointError(
        f"cannot read a checkpoint whose config.json says: {what}. Legal: {LEGAL}. Or give one in "
        "bfloat16, float16 or float32, and a recipe: load(model, path, recipe='rowwise')"
    )
