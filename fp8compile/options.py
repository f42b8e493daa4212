"""The options of ``torch.compile(model, backend="fp8", options={...})``, parsed once."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any

import torch

from .cost import DEVICES
from .errors import OptionError
from .formats import Format
from .profiles import Profile
from .recipe import RECIPES, Operand, Recipe, Scaling, get_recipe

KERNELS = ("auto", "triton", "reference")
RAISE, FALLBACK = ON_ERROR = ("raise", "fallback")
HIGH_PRECISION, FP8 = PRECISIONS = ("high_precision", "fp8")
SAVE_ACTIVATIONS = ("default", FP8)
FP8_BOTH = "fp8_both"
ATTENTION = (*PRECISIONS, FP8_BOTH)
RECIPE, AUTO = CHOICES = ("recipe", "auto")
DUMP_VARIABLE = "FP8COMPILE_DUMP"
# Inductor's settings that the backend works through.
HOOKS = ("joint_custom_pre_pass", "custom_partitioner_fn", "post_grad_custom_post_pass")
_NEEDED = ("use_joint_graph_passes", "use_post_grad_passes")


@dataclass(frozen=True)
class Options:
    """What the user chose.

    ``recipe``: a name from ``RECIPES`` or a Recipe. ``overrides``: recipes of their own for the
    sites whose names match a glob; the first that matches counts. ``skip``: globs over fully
    qualified names of sites, or a callable ``fqn -> bool``; what matches stays in high precision.
    ``strict``: anything left in high precision that was not skipped on purpose, or declined as
    slower, is an error. ``dump``: a folder for graph text and kernel source. ``kernels``: "triton"
    (needs compute capability 9.0), "reference" (emulation, any device) or "auto" (by device).
    ``inductor``: Inductor config patches, passed through. ``decline_slower``: leave in high
    precision what FP8 is predicted not to make faster, where Triton kernels run; the name of a
    device from ``DEVICES``: decide as on that one, whatever runs. ``save_activations``: "fp8" keeps
    for backward in FP8, with a scale per 1x128 group, what norms and activations need there;
    "default" keeps it in the model's dtype. ``on_error``: what happens where a pass fails: "raise"
    a PassError, or "fallback", with a warning: the graph stays in its own precision, or runs the
    reference bodies of its FP8 operators if it is its kernels that could not be written.
    ``logits``: "high_precision" keeps the matmuls whose results a cross entropy in the same graph
    is computed from in the model's dtype, "fp8" casts them like all others. ``attention``: "fp8"
    has scaled dot product attention multiply FP8 in forward, "fp8_both" in forward and backward,
    "high_precision" leaves it as it is.
    ``profile``: what ``fp8compile.profile`` measured, or the path it was saved to. ``formats``:
    "recipe", or "auto": those that lose least by the profile. ``scaling``: "recipe", or "auto": for
    each operand of a recipe of delayed scaling, current where that takes hardly longer.
    ``error_budget_db``: the SQNR that outputs and gradients shall have by the profile; sites that
    cost too much stay in high precision. ``own_passes``: functions of a joint graph, by the name of
    the pass that each runs after.
    """

    recipe: Recipe = RECIPES["delayed"]
    overrides: tuple[tuple[str, Recipe], ...] = ()
    skip: tuple[str, ...] | Callable[[str], bool] = ()
    strict: bool = False
    dump: str | None = None
    kernels: str = "auto"
    inductor: Mapping[str, Any] = field(default_factory=dict)
    decline_slower: bool | str = True
    save_activations: str = "default"
    on_error: str = RAISE
    logits: str = HIGH_PRECISION
    attention: str = HIGH_PRECISION
    profile: Profile | None = None
    formats: str = RECIPE
    scaling: str = RECIPE
    error_budget_db: float | None = None
    own_passes: tuple[tuple[str, Callable[[Any], int]], ...] = ()

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """All that a site may have, before formats are chosen."""
        return (self.recipe, *(recipe for _, recipe in self.overrides))

    def own_recipe(self, fqn: str, frozen: tuple[int, int] | None = None) -> Recipe | None:
        """The recipe that the site of that name has of its own, if it has one.

        ``frozen``: the block that shares a scale in its weight, if that is FP8 already. Then the
        recipe has to be one of such weights; OptionError if static scales are asked for.
        """
        found = (recipe for glob, recipe in self.overrides if fnmatchcase(fqn, glob))
        own = next(found, None)
        recipe = own or self.recipe
        if frozen is not None and recipe.scaling is Scaling.STATIC:
            raise OptionError(
                f"{fqn} has a frozen weight, and static scales are derived from weights in high "
                "precision; choose recipe 'current', or 'delayed' after fp8compile.calibrate"
            )
        if frozen is not None and not _casts_weights_to(recipe, frozen):
            return next(r for r in RECIPES.values() if _casts_weights_to(r, frozen))
        if self.formats != AUTO or self.profile is None:
            return own
        formats = self.profile.formats_of(fqn, recipe)
        if formats == recipe.formats:
            return own
        return replace(recipe, name=f"{recipe.name} with chosen formats", formats=formats)

    def kept_by_budget(self) -> Mapping[str, str]:
        """The sites that the error budget keeps in high precision, each with the reason."""
        if self.profile is None or self.error_budget_db is None:
            return {}
        return self.profile.kept_for(self.error_budget_db)

    def skips(self, fqn: str) -> bool:
        """Whether the site of that name was asked to stay in high precision."""
        if callable(self.skip):
            return bool(self.skip(fqn))
        return any(fnmatchcase(fqn, glob) for glob in self.skip)

    def cache_key(self) -> str:
        """Everything here that changes the compiled code.

        Not ``overrides``, ``skip``, ``logits``, and what follows from a profile: what they do to
        the sites does.
        """
        inductor = sorted(self.inductor.items())
        choices = (self.decline_slower, self.save_activations, self.scaling, self.attention)
        return repr((self.recipe, self.strict, self.kernels, inductor, choices))


def _casts_weights_to(recipe: Recipe, frozen: tuple[int, int]) -> bool:
    e4m3 = recipe.format_of(Operand.WEIGHT) is Format.E4M3
    return e4m3 and recipe.granularity_of(Operand.WEIGHT).block == frozen


def parse_options(options: Mapping[str, Any] | None, mode: str | None = None) -> Options:
    """Check what the user passed and return it as Options.

    Raises OptionError, listing what is legal, for an unknown key, an ill-typed value, or an
    unknown ``mode`` or Inductor option; RecipeError for an unknown recipe.
    """
    if options is not None and not isinstance(options, Mapping):
        raise OptionError(
            f"options is {options!r}; give a dict from names to values, such as "
            "{'recipe': 'current'}"
        )
    given = dict(options or {})
    legal = [f.name for f in fields(Options)]
    for key in given:
        if key not in legal:
            close = difflib.get_close_matches(str(key), legal, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise OptionError(
                f"unknown option {key!r}{hint} Legal options: {legal}. Inductor's own options "
                "go into options={'inductor': {...}}"
            )
    recipe = _recipe("recipe", given.get("recipe", "delayed"))
    formats = _one_of("formats", given.get("formats", RECIPE), CHOICES)
    error_budget_db = _error_budget(given.get("error_budget_db"))
    overrides = _overrides(given.get("overrides", {}), recipe)
    scaling = _scaling(given.get("scaling", RECIPE), (recipe, *(each for _, each in overrides)))
    decisions = {"formats": formats, "error_budget_db": error_budget_db}
    return Options(
        recipe=recipe,
        overrides=overrides,
        skip=_skip(given.get("skip", ())),
        strict=_typed("strict", given.get("strict", False), bool),
        dump=_dump(given.get("dump")),
        kernels=_one_of("kernels", given.get("kernels", "auto"), KERNELS),
        inductor=_inductor(given.get("inductor", {}), mode),
        decline_slower=_decline_slower(given.get("decline_slower", True)),
        save_activations=_one_of(
            "save_activations", given.get("save_activations", "default"), SAVE_ACTIVATIONS
        ),
        on_error=_one_of("on_error", given.get("on_error", RAISE), ON_ERROR),
        logits=_one_of("logits", given.get("logits", HIGH_PRECISION), PRECISIONS),
        attention=_one_of("attention", given.get("attention", HIGH_PRECISION), ATTENTION),
        profile=_profile(given.get("profile"), decisions),
        formats=formats,
        scaling=scaling,
        error_budget_db=error_budget_db,
        own_passes=_own_passes(given.get("own_passes", {})),
    )


def _scaling(value: Any, recipes: Sequence[Recipe]) -> str:
    choice = _one_of("scaling", value, CHOICES)
    if choice == AUTO and all(recipe.scaling is not Scaling.DELAYED for recipe in recipes):
        raise OptionError(
            "option 'scaling' is 'auto', which chooses current or delayed scaling for recipes that "
            f"are delayed; {recipes[0].name!r} is {recipes[0].scaling}. Choose recipe 'delayed'"
        )
    return choice


def _own_passes(value: Any) -> tuple[tuple[str, Callable[[Any], int]], ...]:
    """Which passes there are is for the compiler to say."""
    if not isinstance(value, Mapping) or not all(
        isinstance(after, str) and callable(run) for after, run in value.items()
    ):
        raise OptionError(
            f"option 'own_passes' is {value!r}; give a dict from the name of a pass to a function "
            "of a GraphModule that runs after it, such as {'choose_formats': my_pass}"
        )
    return tuple(value.items())


def _profile(value: Any, decisions: Mapping[str, Any]) -> Profile | None:
    if value is None:
        for name, choice in decisions.items():
            if choice not in (RECIPE, None):
                raise OptionError(
                    f"option {name!r} is {choice!r}, which needs to know the model: make a profile "
                    "with fp8compile.profile(model, batches), and give it as option 'profile'"
                )
        return None
    if isinstance(value, str | os.PathLike):
        return Profile.load(value)
    return _typed("profile", value, Profile)


def _error_budget(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise OptionError(
            f"option 'error_budget_db' is {value!r}; give the SQNR that outputs and gradients "
            "shall have, in dB, such as 20.0"
        )
    return float(value)


def _recipe(name: str, value: Any) -> Recipe:
    if not isinstance(value, str | Recipe):
        raise OptionError(
            f"option {name!r} is {value!r}; give one of {sorted(RECIPES)} or an fp8compile.Recipe"
        )
    return get_recipe(value)


def _overrides(value: Any, recipe: Recipe) -> tuple[tuple[str, Recipe], ...]:
    if not isinstance(value, Mapping) or not all(isinstance(glob, str) for glob in value):
        raise OptionError(
            f"option 'overrides' is {value!r}; give a dict from globs over fully qualified names "
            "to recipes, such as {'layers.0.*': 'current', 'lm_head': 'rowwise'}"
        )
    overrides = tuple((g, _recipe(f"overrides[{g!r}]", each)) for g, each in value.items())
    recipes = Options(recipe, overrides=overrides).recipes
    kept = [each for each in recipes if each.scaling is not Scaling.CURRENT]
    for name in ("scaling", "history_len", "jump_limit", "saturation_limit"):
        found = {getattr(each, name): each.name for each in kept}
        if len(found) > 1:  # they share a state
            raise OptionError(
                f"all scales that a model keeps move alike, but {name} is "
                f"{' and '.join(f'{n} in {r!r}' for n, r in found.items())}; choose one"
            )
    return overrides


def _skip(value: Any) -> tuple[str, ...] | Callable[[str], bool]:
    if callable(value):
        return value
    if isinstance(value, list | tuple | set) and all(isinstance(glob, str) for glob in value):
        return tuple(value)
    raise OptionError(
        f"option 'skip' is {value!r}; give a list of globs over fully qualified names, such as "
        "['lm_head', 'layers.0.*'], or a callable that takes a name and returns a bool"
    )


def _typed(name: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise OptionError(f"option {name!r} is {value!r}; it must be a {kind.__name__}")
    return value


def _one_of(name: str, value: Any, legal: tuple[str, ...]) -> str:
    if value not in legal:
        raise OptionError(f"option {name!r} is {value!r}; choose one of {list(legal)}")
    return value


def _decline_slower(value: Any) -> bool | str:
    if isinstance(value, bool) or (isinstance(value, str) and value in DEVICES):
        return value
    raise OptionError(
        f"option 'decline_slower' is {value!r}; give True, False, or one of {sorted(DEVICES)} to "
        "decide as on that device"
    )


def _dump(value: Any) -> str | None:
    if value is None:
        return os.environ.get(DUMP_VARIABLE) or None
    if not isinstance(value, str | os.PathLike):
        raise OptionError(f"option 'dump' is {value!r}; it must be the path of a folder")
    return os.fspath(value)


def _inductor_key(key: Any, value: Any) -> str:
    """The name of an Inductor option, which may be written with dashes as for torch.compile."""
    from .internals import inductor_option_type  # loads Inductor

    known = torch._inductor.list_options()
    name = str(key).replace("-", "_")
    if not isinstance(key, str) or name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        raise OptionError(
            f"option 'inductor' has the unknown key {str(key)!r}; close matches: {close}; all are "
            "listed by torch._inductor.list_options()"
        )
    kind = inductor_option_type(name)
    if kind is not None and not isinstance(value, kind):
        raise OptionError(f"inductor={{{key!r}: {value!r}}}: it must be a {kind.__name__}")
    return name


def _inductor(value: Any, mode: str | None) -> dict[str, Any]:
    given = _typed("inductor", value, dict)
    patches = {_inductor_key(key, patch): patch for key, patch in given.items()}
    modes = torch._inductor.list_mode_options()
    if mode is not None and mode not in modes:
        raise OptionError(f"unknown mode {mode!r}; choose one of {sorted(modes)}")
    patches = {**modes[mode or "default"], **patches}
    for key in _NEEDED:
        if patches.get(key, True) is not True:
            given = (
                f"mode={mode!r}" if mode and key in modes[mode] else f"inductor={{{key!r}: ...}}"
            )
            raise OptionError(f"{given} turns off {key}, which the FP8 passes need")
    for key in HOOKS:
        if key in patches:
            raise OptionError(
                f"inductor={{{key!r}: ...}} is taken: the FP8 passes run in that hook"
            )
    return patches
