"""The graph passes. Each is one function in one file: ``pass(gm, *, settings) -> rewrites``."""

from .choose_formats import choose_formats
from .choose_precision import choose_precision
from .drop_unused_outputs import drop_unused_outputs
from .find_gemms import find_gemms
from .insert_casts import insert_casts
from .pipeline import StateNodes, joint_passes, run_passes
from .plan_saved import plan_saved
from .share_casts import share_casts
from .tag_sites import tag_sites
from .track_amax import track_amax

__all__ = [
    "StateNodes",
    "choose_formats",
    "choose_precision",
    "drop_unused_outputs",
    "find_gemms",
    "insert_casts",
    "joint_passes",
    "plan_saved",
    "run_passes",
    "share_casts",
    "tag_sites",
    "track_amax",
]
