"""What `recipe_study.py` keeps of its runs: four CSV files in a folder, one row per number or step.

runs.csv       where and how each recipe ran, and how long it took
losses.csv     the loss of every step, in nats per byte
gradients.csv  the SQNR of every layer's weight gradient, in dB, in steps that were looked at
scales.csv     quantiles of log2(scale) for weights, activations and gradients, in these steps
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from statistics import median

import train_gpt

import fp8compile
from fp8compile import Operand

ROLES = {Operand.WEIGHT: "weights", Operand.INPUT: "activations", Operand.GRAD_OUTPUT: "gradients"}
QUANTILES = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}
OWN = ("fp32", "bf16")  # the model's own precision, on a CPU and on a GPU
AUTO = "auto"  # delayed scaling, with formats chosen by a profile
ORDER = (*OWN, *fp8compile.RECIPES, AUTO)

Rows = Iterator[Sequence[object]]


@dataclass(frozen=True)
class Place:
    """What runs that are compared have in common."""

    device: str
    config: train_gpt.Config

    def __str__(self) -> str:
        layers = f"{self.config.layers} layer{'s' if self.config.layers > 1 else ''}"
        batch = f"{self.config.batch} x {self.config.context} bytes a step"
        return f"{layers}, width {self.config.width}, {batch}, {self.config.steps} steps"


@dataclass
class Run:
    """What was seen of one recipe.

    ``sqnr``: step -> layer -> dB of its weight's gradient. ``scales``: step -> role -> log2 of the
    scales' QUANTILES. ``formats``: role -> FP8 formats. ``step_ms``: None on a CPU, where it would
    mean nothing. ``compile_s``, ``train_s``, ``look_s``: seconds up to the first gradients, a
    profile included, in all other steps, and to find ``sqnr`` and ``scales``.
    """

    name: str
    place: Place
    versions: tuple[str, str, str]  # torch, triton, fp8compile
    formats: dict[str, str] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    sqnr: dict[int, dict[str, float]] = field(default_factory=dict)
    scales: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    step_ms: float | None = None
    compile_s: float = 0.0
    train_s: float = 0.0
    look_s: float = 0.0

    @property
    def final_loss(self) -> float:
        """The mean over the last tenth of the steps."""
        last = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(last) / len(last)

    def __str__(self) -> str:
        found = [db for layers in self.sqnr.values() for db in layers.values()]
        step = "" if self.step_ms is None else f", {self.step_ms:.1f} ms a step"
        return (
            f"{self.name:10} final loss {self.final_loss:.4f}, gradients {min(found):.1f} dB at "
            f"worst, {median(found):.1f} median{step} (compiled in {self.compile_s:.1f} s, trained "
            f"for {self.train_s:.1f}, looked at for {self.look_s:.1f})"
        )


def load(folder: Path) -> list[Run]:
    """The runs in a folder, in ORDER."""
    runs = {}
    for row in _read(folder, "runs"):
        sizes = {f.name: row[f.name] for f in fields(train_gpt.Config)}
        rate = float(sizes.pop("learning_rate"))
        config = train_gpt.Config(**{k: int(v) for k, v in sizes.items()}, learning_rate=rate)
        run = runs[row["recipe"]] = Run(
            row["recipe"],
            Place(row["device"], config),
            (row["torch"], row["triton"], row["fp8compile"]),
            {role: row[role] for role in ROLES.values()},
            step_ms=float(row["step_ms"]) if row["step_ms"] else None,
        )
        for name in ("compile_s", "train_s", "look_s"):
            setattr(run, name, float(row[name]))
    for row in _read(folder, "losses"):
        runs[row["recipe"]].losses.append(float(row["nats"]))
    for row in _read(folder, "gradients"):
        sqnr = runs[row["recipe"]].sqnr.setdefault(int(row["step"]), {})
        sqnr[row["layer"]] = float(row["db"])
    for row in _read(folder, "scales"):
        scales = runs[row["recipe"]].scales.setdefault(int(row["step"]), {})
        scales[row["role"]] = [float(row[name]) for name in QUANTILES]
    return [runs[name] for name in ORDER if name in runs]


def save(folder: Path, *new: Run) -> None:
    """Add runs to those in a folder, in place of what is there of the same recipes."""
    runs = {run.name: run for run in (*load(folder), *new)}
    for run in new:
        check_place(folder, run.place)
    folder.mkdir(parents=True, exist_ok=True)
    in_order = [runs[name] for name in ORDER if name in runs]
    config = [f.name for f in fields(train_gpt.Config)]
    where = ("recipe", "device", "torch", "triton", "fp8compile", *config)
    times = ("step_ms", "compile_s", "train_s", "look_s")
    _write(folder, "runs", (*where, *times, *ROLES.values()), _runs(in_order))
    _write(folder, "losses", ("recipe", "step", "nats"), _losses(in_order))
    _write(folder, "gradients", ("recipe", "step", "layer", "db"), _gradients(in_order))
    _write(folder, "scales", ("recipe", "step", "role", *QUANTILES), _scales(in_order))


def check_place(folder: Path, place: Place) -> None:
    """Exit with a message if a folder has runs that cannot be compared with others there."""
    for run in load(folder):
        if run.place != place:
            raise SystemExit(
                f"{folder} has {run.name!r} with {run.place} on {run.place.device}, which cannot be"
                f" compared with {place} on {place.device}; choose another --out"
            )


def _runs(runs: Sequence[Run]) -> Rows:
    for run in runs:
        where = (run.name, run.place.device, *run.versions, *astuple(run.place.config))
        times = (run.step_ms, run.compile_s, run.train_s, run.look_s)
        yield (*where, *times, *(run.formats.get(role, "") for role in ROLES.values()))


def _losses(runs: Sequence[Run]) -> Rows:
    for run in runs:
        yield from ((run.name, step, loss) for step, loss in enumerate(run.losses))


def _gradients(runs: Sequence[Run]) -> Rows:
    for run in runs:
        for step, layers in run.sqnr.items():
            yield from ((run.name, step, layer, db) for layer, db in layers.items())


def _scales(runs: Sequence[Run]) -> Rows:
    for run in runs:
        for step, roles in run.scales.items():
            yield from ((run.name, step, role, *values) for role, values in roles.items())


def _read(folder: Path, kind: str) -> list[dict[str, str]]:
    path = folder / f"{kind}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _write(folder: Path, kind: str, columns: Sequence[str], rows: Rows) -> None:
    unfinished = folder / f"{kind}.csv.new"
    with unfinished.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in rows:
            writer.writerow([f"{x:.5g}" if isinstance(x, float) else x for x in row])
    unfinished.replace(folder / f"{kind}.csv")
