"""FP8 for PyTorch, done by a compiler: ``torch.compile(model, backend="fp8")``."""

from .errors import (
    CheckpointError,
    Fp8CompileError,
    FrozenError,
    MonitorError,
    OptionError,
    PassError,
    RecipeError,
    ScalingStateError,
    StrictError,
)
from .formats import Format
from .named_state import Events, events, load_state_dict, state_dict
from .profiles import Profile
from .quantized_weights import refresh
from .recipe import RECIPES, Gemm, Granularity, Operand, Recipe, Scaling
from .records import Record
from .states import update_scales

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # These need the compiler, and with it Inductor, or safetensors: loaded when first asked for.
    if name == "explain":
        from .explanation import explain

        return explain
    if name == "calibrate":
        from .calibration import calibrate

        return calibrate
    if name in ("freeze", "unfreeze"):
        from . import frozen

        return getattr(frozen, name)
    if name == "profile":
        from .profiling import profile

        return profile
    if name == "Monitor":
        from .monitoring import Monitor

        return Monitor
    if name in ("load", "save_pretrained"):
        from . import checkpoints

        return getattr(checkpoints, name)
    if name == "view":
        from .viewer import view

        return view
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "RECIPES",
    "CheckpointError",
    "Events",
    "Format",
    "Fp8CompileError",
    "FrozenError",
    "Gemm",
    "Granularity",
    "Monitor",
    "MonitorError",
    "Operand",
    "OptionError",
    "PassError",
    "Profile",
    "Recipe",
    "RecipeError",
    "Record",
    "Scaling",
    "ScalingStateError",
    "StrictError",
    "__version__",
    "calibrate",
    "events",
    "explain",
    "freeze",
    "load",
    "load_state_dict",
    "profile",
    "refresh",
    "save_pretrained",
    "state_dict",
    "unfreeze",
    "update_scales",
    "view",
]
