"""The errors a user can meet. Each says what was given, what is legal, and what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.fx


class Fp8CompileError(Exception):
    """Base of every error that fp8compile raises on purpose."""


class OptionError(Fp8CompileError, ValueError):
    """An option of ``torch.compile(..., backend="fp8", options=...)`` is unknown or ill-typed."""


class RecipeError(Fp8CompileError, ValueError):
    """A recipe names something that does not exist or combines choices that are not legal."""


class ScalingStateError(Fp8CompileError, ValueError):
    """A scaling state dict does not fit the model it is loaded into."""


class CheckpointError(Fp8CompileError, ValueError):
    """A checkpoint cannot be written, cannot be read, or does not fit the model."""


class FrozenError(Fp8CompileError, RuntimeError):
    """A weight that is FP8 only is written to, trained, or loaded in high precision."""


class MonitorError(Fp8CompileError, RuntimeError):
    """A Monitor is asked for what it has not recorded, or cannot."""


class StrictError(Fp8CompileError):
    """Under ``strict=True`` something stayed in high precision."""


class PassError(Fp8CompileError):
    """A pass failed; names the pass, the node and the user's source line."""

    def __init__(self, pass_name: str, message: str, node: torch.fx.Node | None = None) -> None:
        where = "" if node is None else f" at node {node.format_node() or node.name}"
        line = "" if node is None else source_line(node)
        super().__init__(
            f"pass {pass_name} failed{where}: {message}" + (f"\n  from: {line}" if line else "")
        )
        self.pass_name = pass_name
        self.node = node


@contextlib.contextmanager
def own_errors() -> Iterator[None]:
    """Raise an error of this package as it is, out of what Dynamo wraps around a backend's."""
    try:
        yield
    except Exception as error:
        inner = getattr(error, "inner_exception", None)
        if isinstance(inner, Fp8CompileError):
            raise inner from None
        raise


def source_line(node: torch.fx.Node) -> str:
    """The user's source line a node came from, or its module path, or an empty string."""
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in trace.strip().splitlines() if line.strip(" ^~\n")]
    if len(lines) >= 2:
        return f"{lines[-2]}: {lines[-1]}"
    if lines:
        return lines[-1]
    stack = node.meta.get("nn_module_stack") or {}
    return next((str(path) for path, *_ in reversed(list(stack.values()))), "")
