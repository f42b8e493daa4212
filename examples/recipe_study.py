"""Train the same small GPT with every recipe, and draw what each does to loss, gradients, scales.

    python examples/recipe_study.py                    # on a GPU, minutes for all
    python examples/recipe_study.py --jobs 3           # the same, three recipes at a time
    python examples/recipe_study.py --tiny             # one layer, 64 wide: minutes on a CPU
    python examples/recipe_study.py --recipes delayed blockwise --steps 1000 --out here
    python examples/recipe_study.py --out here --merge there   # add what another run has found
    python examples/recipe_study.py --out here --draw          # draw again, without training

All runs start from the same seed and see the same batches of real text; the model and the loop are
those of `train_gpt.py`. A run in the model's own precision, fp32 on a CPU and bf16 on a GPU, is the
`reference`; `auto` is `delayed` with formats chosen by a profile of the first two batches; all
others are the recipes by name. They have every GEMM in FP8 but the head's, also where it does not
pay. As soon as a recipe is done, its results replace those of an earlier run of it in a folder
(beside this file, by default), whose CSV files `recipe_results.py` describes. From these are drawn

    loss.png       loss curves, and how far each is from the first
    gradients.png  SQNR of every layer's weight gradient, against float32 in eager PyTorch
    scales.png     scales of weights, activations and gradients over the steps, by recipe, as in
                   arXiv 2309.17224 ("Training and inference of large language models using 8-bit
                   floating point")

Gradients and scales are looked at every `--sqnr-every` steps. A delayed or static scale is read
from the scaling state (static ones of gradients for those that are expected to enter the graph).
Other recipes find theirs in the tensors: shown are those that they find in
the operands of the float32 run that the gradients are compared with. On a GPU each recipe's step
is timed with nothing beside it: with `--jobs` after all have been trained, for which most are
taken from Inductor's caches.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import train_gpt
import triton
from recipe_looking import Watch
from recipe_pictures import draw
from recipe_results import AUTO, OWN, Place, Run, check_place, load, save
from torch import Tensor

import fp8compile
from fp8compile.progress import progress

sys.path.insert(0, str(Path(__file__).parent / "bench"))
from soak import TINY
from timing import device_name, median_ms, sqnr_db

REFERENCE = "reference"
CHOICES = (REFERENCE, *fp8compile.RECIPES, AUTO)
ON_GPU = replace(train_gpt.ON_GPU, layers=4)  # compiles in a third of the time of twelve
LOOKS = 8  # so many times a run is looked at closely, if nothing else is asked for
WARMUP_STEPS, TIMED_STEPS = 3, 20
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ---- one run -------------------------------------------------------------------------------------
@dataclass
class Trainer:
    """A new model, compiled for one of the CHOICES."""

    choice: str
    config: train_gpt.Config
    text: Tensor

    def __post_init__(self) -> None:
        self.started = train_gpt.now(DEVICE)
        torch._dynamo.reset()
        self.model = train_gpt.new_model(self.config, DEVICE)
        self.options = {} if self.choice == REFERENCE else self._options()
        fp8 = {"backend": "fp8", "options": self.options} if self.options else {}
        self.compiled = torch.compile(self.model, **fp8)

    def _options(self) -> dict[str, Any]:
        every = {"decline_slower": False}
        if self.choice != AUTO:
            return {"recipe": self.choice, **every}

        def step(call: Callable[..., Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
            with train_gpt.own_precision(DEVICE):
                return call(*batch)

        generator = torch.Generator().manual_seed(1)
        pairs = [train_gpt.random_batch(self.text, self.config, generator) for _ in range(2)]
        batches = [tuple(t.to(DEVICE) for t in pair) for pair in pairs]
        found = fp8compile.profile(self.model, batches, step=step, sensitivity=False)
        return {"profile": found, "formats": "auto", **every}

    def steps(self, count: int) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
        config = replace(self.config, steps=count)
        return train_gpt.training_steps(self.model, self.compiled, self.text, config, DEVICE)

    def step_ms(self) -> float:
        """Of a model that may have been trained already: another recipe's may not be slower."""
        steps = self.steps(WARMUP_STEPS + TIMED_STEPS)
        for _ in range(WARMUP_STEPS):
            next(steps)
        return median_ms(lambda: next(steps), TIMED_STEPS, DEVICE)


def trained(trainer: Trainer, every: int) -> Run:
    """Train, and look at gradients and scales in every so many steps and in the last."""
    watch = Watch(trainer.model, trainer.options)
    versions = (torch.__version__, triton.__version__, fp8compile.__version__)
    place = Place(device_name(DEVICE), trainer.config)
    name = OWN[DEVICE.type == "cuda"] if trainer.choice == REFERENCE else trainer.choice
    run = Run(name, place, versions, watch.formats())
    losses = []
    count = trainer.config.steps
    for step, (loss, batch) in enumerate(progress(trainer.steps(count), name, total=count)):
        losses.append(loss.detach())
        if step == 0:
            run.compile_s = train_gpt.now(DEVICE) - trainer.started
        if step % every == 0 or step == count - 1:
            before = train_gpt.now(DEVICE)
            exact, scales = watch.look(batch)
            run.sqnr[step] = {
                layer: sqnr_db(exact[layer], linear.weight.grad)
                for layer, linear in watch.linears.items()
            }
            if scales:
                run.scales[step] = scales
            run.look_s += train_gpt.now(DEVICE) - before
    run.train_s = train_gpt.now(DEVICE) - trainer.started - run.compile_s - run.look_s
    run.losses = torch.stack(losses).tolist()
    return run


# ---- all runs ------------------------------------------------------------------------------------
def one_by_one(args: argparse.Namespace, config: train_gpt.Config) -> None:
    text = train_gpt.standard_library_text()
    for choice in args.recipes:
        trainer = Trainer(choice, config, text)
        run = trained(trainer, args.sqnr_every)
        if args.times:
            run.step_ms = trainer.step_ms()
        save(args.out, run)
        print(run, flush=True)


def side_by_side(args: argparse.Namespace, config: train_gpt.Config) -> None:
    """Train several recipes at once, each in a process of its own, and then time one by one."""

    def train(choice: str, folder: Path) -> Path:
        sizes = ("--steps", config.steps, "--sqnr-every", args.sqnr_every, "--out", folder)
        flags = ("--no-draw", "--no-times", *(("--tiny",) if args.tiny else ()))
        command = (sys.executable, __file__, "--recipes", choice, *sizes, *flags)
        # Their bars would be drawn over each other: what they say on stderr is shown at their end.
        parts = [str(part) for part in command]
        done = subprocess.run(parts, stderr=subprocess.PIPE, text=True)
        print(done.stderr, end="", file=sys.stderr)
        done.check_returncode()
        return folder

    with tempfile.TemporaryDirectory() as top, ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(train, choice, Path(top) / choice) for choice in args.recipes]
        for job in progress(as_completed(jobs), "training recipes", total=len(jobs)):
            save(args.out, *load(job.result()))
    runs = {run.name: run for run in load(args.out)}
    text = train_gpt.standard_library_text()
    for choice in progress(args.recipes if args.times else (), "timing recipes"):
        run = runs[OWN[1] if choice == REFERENCE else choice]
        run.step_ms = Trainer(choice, config, text).step_ms()
        save(args.out, run)
        print(run, flush=True)


def main() -> None:
    args = parse()
    if args.merge or args.draw:
        for folder in args.merge:
            save(args.out, *load(folder))
    else:
        config = TINY if args.tiny else ON_GPU if DEVICE.type == "cuda" else train_gpt.ON_CPU
        config = replace(config, steps=args.steps or (60 if args.tiny else config.steps))
        check_place(args.out, Place(device_name(DEVICE), config))
        args.sqnr_every = args.sqnr_every or max(1, config.steps // LOOKS)
        args.times = args.times and DEVICE.type == "cuda"
        (side_by_side if args.jobs > 1 else one_by_one)(args, config)
    if not args.no_draw:
        draw(args.out)
        print(f"Results: {args.out}")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    what = f"default: {' '.join(CHOICES)}"
    add("--recipes", nargs="+", choices=CHOICES, default=CHOICES, metavar="NAME", help=what)
    add("--tiny", action="store_true", help="one layer, 64 wide")
    add("--steps", type=int, help="default: as train_gpt.py; tiny: 60")
    add("--sqnr-every", type=int, metavar="STEPS", help=f"default: {LOOKS} times in all")
    add("--jobs", type=int, default=1, help="how many recipes to train at once")
    add("--no-times", action="store_false", dest="times", help="do not time the steps")
    add("--no-draw", action="store_true", help="leave the pictures as they are")
    add("--draw", action="store_true", help="only draw, from the results there are")
    add("--merge", nargs="+", type=Path, default=[], metavar="FOLDER", help="only add these runs")
    folder = Path(__file__).with_suffix("")
    default = folder / "gpu" if DEVICE.type == "cuda" else folder
    add("--out", type=Path, default=default, help=f"default: {default}")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
