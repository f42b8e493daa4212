"""What a model was seen to do in FP8, and what follows from it for precision.

``profile`` (profiling.py) measures; a Profile holds the numbers, chooses formats from them, and
says which sites an error budget keeps in high precision.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .errors import OptionError
from .formats import Format
from .recipe import OPERANDS, Operand, Recipe

# Formats differ from the recipe's only where that gains more than this: a second profile, of other
# batches, should not turn what is a draw.
HYSTERESIS_DB = 0.5
BUDGET = "kept by the error budget"
_VERSION = 1


@dataclass(frozen=True)
class Seen:
    """What the edges of one role held, over all batches.

    ``amax``: the largest magnitude. ``rms``. ``quantiles``: of magnitudes, by share, sampled.
    The others are by format: ``noise``, how much of a vector that a GEMM sums over is lost, as the
    power of the error over that of the vector, on average over vectors and batches; ``underflow``,
    the share of elements other than zero that become zero; ``saturated``, the share clipped.
    """

    amax: float
    rms: float
    quantiles: Mapping[str, float]
    noise: Mapping[str, float]
    underflow: Mapping[str, float]
    saturated: Mapping[str, float]


@dataclass(frozen=True)
class Group:
    """The sites that take one input, which are decided together.

    ``edges``: by operand role. ``output_noise``: what the model's outputs lose if only this group
    is in FP8, as the power of the error over that of the outputs. ``gradient_noise``: the same for
    the gradients of parameters, on average over parameters. ``saved_us``: predicted microseconds
    that FP8 saves per step. They are None where they were not measured or predicted.
    """

    sites: tuple[str, ...]
    edges: Mapping[str, Seen]
    output_noise: float | None = None
    gradient_noise: float | None = None
    saved_us: float | None = None

    @property
    def noise(self) -> float:
        """The larger of the two: 0 if none was measured."""
        return max(self.output_noise or 0.0, self.gradient_noise or 0.0)


@dataclass(frozen=True)
class Profile:
    """What ``fp8compile.profile`` found.

    ``groups``: in the order of their first call. ``left_out``: the sites that cannot or shall not
    be in FP8. ``predicted_for``: the device that ``saved_us`` is for.
    """

    groups: tuple[Group, ...]
    left_out: tuple[str, ...] = ()
    predicted_for: str = ""

    # --- decisions ------------------------------------------------------------------------------

    def group_of(self, fqn: str) -> Group | None:
        """The group of a site, None if that is left out; OptionError if it is not known."""
        for group in self.groups:
            if fqn in group.sites:
                return group
        if fqn in self.left_out:
            return None
        raise OptionError(
            f"the profile has not seen the site {fqn!r}; it knows {self._sites()}. Profile the "
            "model that is compiled, with batches that call all of it"
        )

    def formats_of(self, fqn: str, recipe: Recipe) -> tuple[tuple[Operand, Format], ...]:
        """The formats for a site: those that lose least, of all that its GEMMs may multiply.

        The errors of a GEMM's operands add up to that of its result, so what is least is the sum
        of the operands' noise. No GEMM takes E5M2 x E5M2. The recipe's formats stay where no
        others gain HYSTERESIS_DB, and for a role that was not seen.
        """
        group = self.group_of(fqn)
        edges = group.edges if group else {}
        seen = [o for o in Operand if str(o) in edges and _is_finite(edges[str(o)].noise)]
        own = {operand: recipe.format_of(operand) for operand in Operand}

        def noise(formats: Mapping[Operand, Format]) -> float:
            return sum(edges[str(o)].noise[str(formats[o])] for o in seen)

        choices = ({**own, **dict(zip(seen, f, strict=True))} for f in _formats(len(seen)))
        best = min((c for c in choices if _is_legal(c, recipe)), key=noise)
        gains = noise(best) < noise(own) / 10 ** (HYSTERESIS_DB / 10)
        return tuple((best if gains else own).items())

    def kept_for(self, budget_db: float) -> dict[str, str]:
        """The sites to keep in high precision, with the reason, so that outputs and gradients have
        an SQNR of ``budget_db`` or more.

        The noise of groups is taken to add up. Those go first that bring most of it per
        microsecond that they save.
        """
        left = sorted(self.groups, key=_worth)
        kept: dict[str, str] = {}
        while left and max(_total(left)) > 10 ** (-budget_db / 10):
            group = left.pop()
            why = f"{BUDGET} of {budget_db:g} dB: alone it has {_db(group.noise)}"
            kept |= dict.fromkeys(group.sites, why)
        return kept

    # --- text and files -------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a JSON file."""
        text = json.dumps({"version": _VERSION, **asdict(self)}, indent=1)
        Path(path).write_text(text, encoding="utf-8")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Profile:
        """Read what ``save`` wrote; OptionError if there is no file, or no profile in it."""
        try:
            held = json.loads(Path(path).read_text(encoding="utf-8"))
            version = held.pop("version")
            if version != _VERSION:
                raise ValueError(f"it is of version {version!r}, not {_VERSION}")
            groups = tuple(_group(group) for group in held.pop("groups"))
            return Profile(groups, _names("left_out", held.pop("left_out")), **held)
        except OSError as error:
            raise OptionError(
                f"the profile {path} cannot be read: {error.strerror}; give the path that "
                "Profile.save wrote to"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OptionError(
                f"{path} holds no profile of version {_VERSION}: {error!r}; make one anew"
            ) from error

    def table(self) -> Table:
        """A row per group and operand role."""
        table = Table(caption=self._summary(), caption_justify="left")
        columns = (
            "sites",
            "operand",
            "amax",
            "noise e4m3 / e5m2",
            "underflow",
            "only this: outputs / gradients, saved",
        )
        for name in columns:
            table.add_column(name, justify="left" if name in columns[:2] else "right")
        for group in self.groups:
            first = [", ".join(group.sites), _only(group)]
            for operand, seen in group.edges.items():
                lost = (" / ".join(_db(seen.noise[str(f)]) for f in Format),)
                small = " / ".join(f"{seen.underflow[str(f)]:.2%}" for f in Format)
                table.add_row(first[0], operand, f"{seen.amax:.3g}", *lost, small, first[1])
                first = ["", ""]
        return table

    def sensitivity(self) -> Table:
        """A row per group, those first that outputs lose most by.

        ``alone``: the SQNR of outputs if only this group is in FP8. ``all below in FP8``: what they
        have if this one and those above stay in high precision, and noise adds up. So the rows down
        to the first that is good enough are the fewest to keep.
        """
        table = Table(caption=self._summary(), caption_justify="left")
        for name in ("sites", "alone", "all below in FP8"):
            table.add_column(name, justify="left" if name == "sites" else "right")
        ordered = sorted(self.groups, key=lambda group: -(group.output_noise or 0.0))
        for number, group in enumerate(ordered, 1):
            noise = group.output_noise
            alone = "not measured" if noise is None else _db(noise)
            below = _db(_total(ordered[number:])[0]) if noise is not None else ""
            table.add_row(", ".join(group.sites), alone, below)
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=200, color_system=None).print(self.table())
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())

    def _summary(self) -> str:
        output, gradient = _total(self.groups)
        parts = [f"{len(self._sites())} sites in {len(self.groups)} groups"]
        parts += [f"outputs {_db(output)}" if output else "outputs not measured"]
        parts += [f"gradients {_db(gradient)}" if gradient else "gradients not measured"]
        return ", ".join(parts) + ", if noise adds up"

    def _sites(self) -> list[str]:
        return [site for group in self.groups for site in group.sites]


def _formats(count: int) -> Iterator[Sequence[Format]]:
    return itertools.product(Format, repeat=count)


def _is_legal(formats: Mapping[Operand, Format], recipe: Recipe) -> bool:
    pairs = (OPERANDS[gemm] for gemm in OPERANDS if gemm not in recipe.high_precision)
    return not any(formats[a] is formats[b] is Format.E5M2 for a, b in pairs)


def _is_finite(noise: Mapping[str, float]) -> bool:
    return all(map(math.isfinite, noise.values()))


def _worth(group: Group) -> tuple[float, float]:
    """Noise per microsecond; where no time is saved or predicted, all noise is too much."""
    saves = group.saved_us is not None and group.saved_us > 0
    return (group.noise / group.saved_us if saves and group.saved_us else math.inf, group.noise)


def _total(groups: Sequence[Group]) -> tuple[float, float]:
    """The noise of outputs and of gradients, if that of groups adds up."""
    return (
        sum(group.output_noise or 0.0 for group in groups),
        sum(group.gradient_noise or 0.0 for group in groups),
    )


def _only(group: Group) -> str:
    measured = [n for n in (group.output_noise, group.gradient_noise) if n is not None]
    text = " / ".join(map(_db, measured))
    return text + (f", {group.saved_us:+.0f} us" if group.saved_us is not None else "")


def _db(noise: float) -> str:
    """Noise as SQNR."""
    if not math.isfinite(noise):
        return "not finite"
    return f"{-10 * math.log10(noise):.1f} dB" if noise > 0 else "exact"


# --- from a file, of which nothing is known ------------------------------------------------------


def _group(held: dict[str, Any]) -> Group:
    edges = {operand: _seen(seen) for operand, seen in held.pop("edges").items()}
    if not edges.keys() <= {str(operand) for operand in Operand}:
        raise ValueError(f"edges are of {list(edges)}")
    group = Group(_names("sites", held.pop("sites")), edges, **held)
    numbers = {name: getattr(group, name) for name in ("output_noise", "gradient_noise")}
    _check_numbers({name: value for name, value in numbers.items() if value is not None})
    if group.saved_us is not None:
        _check_numbers({"saved_us": group.saved_us}, least=-math.inf)
    return group


def _seen(held: dict[str, Any]) -> Seen:
    seen = Seen(**held)
    _check_numbers({"amax": seen.amax, "rms": seen.rms, **seen.quantiles})
    for by_format in (seen.noise, seen.underflow, seen.saturated):
        _check_numbers({str(fmt): by_format[str(fmt)] for fmt in Format})
    return seen


def _check_numbers(values: Mapping[str, object], least: float = 0.0) -> None:
    for name, value in values.items():
        # One that is not finite is what was measured.
        if not isinstance(value, int | float) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} is {value!r}")


def _names(what: str, held: object) -> tuple[str, ...]:
    if not isinstance(held, list) or not all(isinstance(name, str) for name in held):
        raise ValueError(f"{what} is {held!r}")
    return tuple(held)
