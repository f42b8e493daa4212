"""Benchmark what a Monitor costs: the training step of `training_step.py` with and without one.

    python examples/bench/monitor.py                      # 4 Llama-3-8B layers, on a GPU
    python examples/bench/monitor.py --csv monitor.csv
    python examples/bench/monitor.py --tiny --device cpu  # does it run at all?

In every round each contender has its turn, on the same compiled model: a few steps to get going,
and then a block of steps, as many as its interval but 10 at least, timed from an idle device to an
idle device. A block so has what is recorded in it, and the host's work for that. Given are medians
over the rounds. Records go to a CSV file. Compare the times of one run only.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from llama_layers import LlamaShape
from timing import append_csv, device_name, equal_conditions, seconds, versions
from training_step import Contender, Job, fp8, input_and_grad_output

import fp8compile
from fp8compile.progress import progress

# Not a multiple of 10: what the last steps record is then written within the block.
WARMUP_STEPS, SHORTEST_BLOCK = 5, 10
WITHOUT = "without"


def training_step(contender: Contender, job: Job) -> Callable[[], None]:
    x, grad_output = input_and_grad_output(job)

    def step() -> None:
        x.grad = None
        contender.model.zero_grad(set_to_none=True)
        contender.forward(x).backward(grad_output)
        contender.after_backward()

    return step


def ms_per_step(
    step: Callable[[], None], model: torch.nn.Module, every: int | None, job: Job, path: Path
) -> float:
    """One turn: the mean of a block's steps. ``every``: the Monitor's interval, or None."""
    steps = max(SHORTEST_BLOCK, every or 0)

    def block() -> None:
        for _ in range(steps):
            step()

    watching = nullcontext() if every is None else fp8compile.Monitor(model, every, path, step=0)
    with watching:
        for _ in range(WARMUP_STEPS):
            step()
        return 1e3 * seconds(block, job.device) / steps


def measure(intervals: Sequence[int], rounds: int, job: Job) -> dict[str, float]:
    """Milliseconds per step, by contender; medians over rounds."""
    contender = fp8(job)
    step = training_step(contender, job)
    times: dict[str, list[float]] = defaultdict(list)
    contenders = {WITHOUT: None} | {f"every {interval}": interval for interval in intervals}
    with equal_conditions(job.device), tempfile.TemporaryDirectory() as folder:
        step()  # compiles
        turns = [(name, every) for _ in range(rounds) for name, every in contenders.items()]
        for name, every in progress(turns, "taking turns"):
            path = Path(folder) / "records.csv"
            times[name].append(ms_per_step(step, contender.model, every, job, path))
    return {name: statistics.median(values) for name, values in times.items()}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--intervals", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--rounds", type=int, default=7, help="whose median is taken")
    parser.add_argument("--csv", type=Path, help="append the numbers to this file")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="one layer, 64 wide, 64 tokens")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    device = torch.device(args.device)
    width, layers, batch, tokens = (64, 1, 1, 64) if args.tiny else (4096, 4, 2, 8192)
    job = Job(LlamaShape.of_width(width), layers, batch, tokens, SHORTEST_BLOCK, device)
    print(f"{device_name(device)}, {versions()}\n{job}")
    ms = measure(args.intervals, args.rounds, job)
    percent = {name: 100 * (each / ms[WITHOUT] - 1) for name, each in ms.items()}
    print(f"\n{'Monitor':<12} {'step ms':>9} {'cost':>9}")
    for name in ms:
        print(f"{name:<12} {ms[name]:>9.3f} {percent[name]:>+8.2f}%")
    if device.type == "cpu":
        print("These times mean nothing: on a CPU, FP8 is emulated.")
    if args.csv:
        rows = [(name, "step", value, "ms") for name, value in ms.items()]
        rows += [(name, "cost", percent[name], "%") for name in ms if name != WITHOUT]
        append_csv(args.csv, device, str(job), rows)


if __name__ == "__main__":
    main()
