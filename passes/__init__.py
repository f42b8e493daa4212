"""The graph passes. Each is one function in one file: ``pass(gm, *, settings) -> rewrites``."""

from .add_in_gemms import add_in_gemms
from .cast_attention import cast_attention
from .cast_attention_backward import cast_attention_backward
from .choose_formats import choose_formats
from .choose_precision import choose_precision
from .choose_scaling import choose_scaling
from .derive_scales import STATIC_SCALES, derive_scales
from .drop_unused_outputs import drop_unused_outputs
from .find_gemms import find_gemms
from .fold_scales import fold_scales
from .grow_regions import grow_regions
from .insert_casts import insert_casts
from .keep_logits import keep_logits
from .keep_scales import keep_scales
from .merge_gemms import merge_gemms
from .pipeline import (
    StateNodes,
    joint_passes,
    naming_errors,
    run_final_passes,
    run_passes,
    with_own_passes,
)
from .plan_saved import plan_saved
from .refine_attention_gradients import refine_attention_gradients
from .share_casts import share_casts
from .split_regions import split_regions
from .store_activations import store_activations
from .tag_sites import tag_sites
from .take_attention_output import take_attention_output
from .take_frozen_weights import take_frozen_weights
from .track_amax import track_amax
from .unbatch_gemms import unbatch_gemms

__all__ = [
    "STATIC_SCALES",
    "StateNodes",
    "add_in_gemms",
    "cast_attention",
    "cast_attention_backward",
    "choose_formats",
    "choose_precision",
    "choose_scaling",
    "derive_scales",
    "drop_unused_outputs",
    "find_gemms",
    "fold_scales",
    "grow_regions",
    "insert_casts",
    "joint_passes",
    "keep_logits",
    "keep_scales",
    "merge_gemms",
    "naming_errors",
    "plan_saved",
    "refine_attention_gradients",
    "run_final_passes",
    "run_passes",
    "share_casts",
    "split_regions",
    "store_activations",
    "tag_sites",
    "take_attention_output",
    "take_frozen_weights",
    "track_amax",
    "unbatch_gemms",
    "with_own_passes",
]
