"""The passes in order, and the runner."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import fx

from ..cost import Device
from ..errors import Fp8CompileError, OptionError, PassError
from ..ir import Site
from ..recipe import Recipe, Scaling
from ..verify import Verifier
from .add_in_gemms import add_in_gemms
from .cast_attention import cast_attention
from .cast_attention_backward import cast_attention_backward
from .choose_formats import choose_formats
from .choose_precision import choose_precision
from .choose_scaling import choose_scaling
from .derive_scales import derive_scales
from .drop_unused_outputs import drop_unused_outputs
from .find_gemms import find_gemms
from .fold_scales import fold_scales
from .grow_regions import grow_regions
from .insert_casts import insert_casts
from .keep_scales import keep_scales
from .merge_gemms import merge_gemms
from .plan_saved import plan_saved
from .share_casts import share_casts
from .split_regions import split_regions
from .store_activations import store_activations
from .take_attention_output import take_attention_output
from .take_frozen_weights import take_frozen_weights
from .track_amax import track_amax
from .unbatch_gemms import unbatch_gemms

log = logging.getLogger(__name__)

Pass = Callable[[fx.GraphModule], int]


# All that may run on a joint graph, in order; ``joint_passes`` chooses.
JOINT_PASSES = (
    unbatch_gemms,
    find_gemms,
    choose_precision,
    merge_gemms,
    choose_formats,
    choose_scaling,
    insert_casts,
    take_frozen_weights,
    fold_scales,
    cast_attention,
    take_attention_output,
    cast_attention_backward,
    share_casts,
    drop_unused_outputs,
    derive_scales,
    track_amax,
    plan_saved,
    keep_scales,
    store_activations,
)


@dataclass(frozen=True)
class StateNodes:
    """The graph inputs that hold a graph's scaling state, each ``f32[slots]``.

    Static scaling has a scale only.
    """

    scale: fx.Node
    amax_fwd: fx.Node | None = None
    amax_bwd: fx.Node | None = None


def joint_passes(
    *,
    recipe: Recipe,
    sites: Sequence[Site] | None = None,
    skips: Callable[[str], bool] | None = None,
    state: StateNodes | None = None,
    training: bool = True,
    device: Device | None = None,
    decline_slower: bool = True,
    choose_scales: bool = False,
    store_in_fp8: bool = False,
    statistics_of: Mapping[fx.Node, int] | None = None,
    take_frozen: bool = True,
    attention_in_fp8: bool = False,
    attention_backward_in_fp8: bool = False,
) -> list[Pass]:
    """The passes for a joint graph (``training``) or an inference graph, in order.

    ``choose_scales``: delayed or current scaling by its cost on ``device``, instead of what the
    recipe says. ``statistics_of``: for static scaling, the ``inputs`` of ``derive_scales``.
    ``take_frozen``: or dequantize frozen weights and cast them anew, as others.
    ``attention_backward_in_fp8``: of what ``attention_in_fp8`` has in FP8 in forward.
    """
    passes: list[Pass] = [
        unbatch_gemms,  # so that find_gemms finds them
        partial(find_gemms, sites=sites),
        partial(  # needs the GEMMs' sizes
            choose_precision,
            skips=skips,
            device=device,
            decline_slower=decline_slower,
            recipe=recipe,
            weights_cast_once=not training,
        ),
        merge_gemms,  # only GEMMs that stay FP8; before anything is said about their operands
        partial(choose_formats, recipe=recipe),  # only GEMMs that stay FP8 have edges
    ]
    if choose_scales:
        assert device is not None, "costs are those on a device"
        passes.append(
            partial(choose_scaling, recipe=recipe, device=device, weights_cast_once=not training)
        )
    passes += [
        partial(insert_casts, recipe=recipe, scale=state.scale if state else None),
        *([take_frozen_weights] if take_frozen else []),  # instead of the casts of them
        fold_scales,  # needs the casts; gives share_casts more of one value
    ]
    if attention_in_fp8:  # with the scale that factors are in now
        delayed = [s for s in sites or () if (s.recipe or recipe).scaling is Scaling.DELAYED]
        known = state.scale if state else None
        declined_on = device if decline_slower else None
        how: Mapping[str, Any] = {"device": declined_on, "scale": known, "sites": delayed}
        passes.append(partial(cast_attention, **how))
        if statistics_of is None:  # derive_scales follows values from cast to cast
            passes.append(take_attention_output)
        if attention_backward_in_fp8 and training:
            passes.append(partial(cast_attention_backward, **how))
    passes += [
        share_casts,  # needs all casts of a value in place
        drop_unused_outputs,  # knows what is used only now
    ]
    if statistics_of is not None:
        passes.append(partial(derive_scales, inputs=statistics_of))  # one cast per value
    if training and state is not None and state.amax_fwd and state.amax_bwd:
        # After share_casts: one amax per value. Inference observes nothing.
        passes.append(partial(track_amax, amax_fwd=state.amax_fwd, amax_bwd=state.amax_bwd))
    if training:
        passes.append(plan_saved)  # reads which outputs backward uses
        passes.append(keep_scales)  # knows now what is cast again
        if store_in_fp8:
            passes.append(store_activations)  # what backward still keeps in high precision
    return passes


def run_final_passes(
    gm: fx.GraphModule,
    direction: str,
    *,
    fused: bool,
    adds: Callable[[fx.Node], bool] | None = None,
) -> None:
    """Prepare a graph without the other direction's nodes (``direction``: forward, backward or
    weights) for its kernels; ``fused``: for those of regions; ``adds``: which GEMMs may add to
    their output, see ``add_in_gemms``.
    """
    passes: list[Pass] = [drop_unused_outputs]
    if adds is not None:
        passes.append(partial(add_in_gemms, pays=adds))
    if fused:
        passes += [grow_regions, split_regions]  # take whatever is left of a sum
    for run in passes:
        with naming_errors(f"{pass_name(run)} ({direction})"):
            run(gm)


def with_own_passes(passes: Sequence[Pass], own: Sequence[tuple[str, Pass]]) -> list[Pass]:
    """The passes, each followed by the user's ``(after, pass)`` of its name.

    One runs where the pass does that it comes after. Raises OptionError if there is none of that
    name.
    """
    names = [run.__name__ for run in JOINT_PASSES]
    for after, run in own:
        if after not in names:
            raise OptionError(
                f"option 'own_passes' has {pass_name(run)} run after {after!r}; the passes of a "
                f"joint graph are {names}"
            )
    found: list[Pass] = []
    for each in passes:
        found += [each, *(run for after, run in own if after == pass_name(each))]
    return found


def run_passes(
    gm: fx.GraphModule,
    passes: Sequence[Pass],
    *,
    after_each: Callable[[str, fx.GraphModule], None] | None = None,
) -> dict[str, int]:
    """Run passes in order; returns how many rewrites each made.

    After each pass the IR is verified and ``after_each(name, gm)`` is called. An exception that is
    not ours becomes a PassError that names the pass.
    """
    counts = {}
    verifier = Verifier(gm)
    for run in passes:
        name = pass_name(run)
        start = time.perf_counter()
        with naming_errors(name):
            counts[name] = run(gm)
        verifier.check(gm, name)
        log.debug("%s: %d rewrites, %.3f s", name, counts[name], time.perf_counter() - start)
        if after_each is not None:
            after_each(name, gm)
    gm.recompile()
    return counts


@contextlib.contextmanager
def naming_errors(pass_name: str) -> Iterator[None]:
    """Turn an exception that is not ours into a PassError that names pass, node and source line."""
    try:
        yield
    except Fp8CompileError:
        raise
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        raise PassError(pass_name, message, _node_at_fault(error)) from error


def _node_at_fault(error: Exception) -> fx.Node | None:
    """The node that the innermost function with one was working on when it raised."""
    found = None
    trace = error.__traceback__
    while trace is not None:
        nodes = [v for v in trace.tb_frame.f_locals.values() if isinstance(v, fx.Node)]
        found = nodes[-1] if nodes else found
        trace = trace.tb_next
    return found


def pass_name(run: Pass) -> str:
    """The name of a pass, also when its settings are bound with ``partial`` or are an object's."""
    function = run.func if isinstance(run, partial) else run
    return getattr(function, "__name__", type(function).__name__)
