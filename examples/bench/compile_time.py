"""Benchmark compiling: the first training step of Llama layers, bf16 against FP8.

    python examples/bench/compile_time.py                       # 8 layers of width 2048, on a GPU
    python examples/bench/compile_time.py --contenders bf16 fp8 fp8-rowwise --csv compile.csv
    python examples/bench/compile_time.py --tiny --device cpu   # does it run at all?

Every number is of a process of its own: the seconds of its first step, less those of a second one,
after something small was compiled (what PyTorch loads once is nobody's). Ratios are to the
contender named first. In turn per contender:

    cold     all caches empty, and so the autotuning done
    kernels  compiled kernels and autotune results at hand; the graph is planned and written anew,
             as when the model has changed
    graphs   Inductor's graph caches at hand, too: the same script started again
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from llama_layers import LlamaShape
from monitor import training_step
from timing import append_csv, device_name, equal_attention, load_compiler, seconds, versions
from training_step import CONTENDERS, Job

from fp8compile.progress import progress

# How much a process finds, and whether it may use the caches of whole graphs.
STATES = {"cold": True, "kernels": False, "graphs": True}
GRAPH_CACHES = ("TORCHINDUCTOR_FX_GRAPH_CACHE", "TORCHINDUCTOR_AUTOGRAD_CACHE")


def compile_seconds(name: str, job: Job) -> float:
    """Of one contender's first step, in this process: what it takes longer than the second."""
    with equal_attention(job.device):
        load_compiler(job.device)
        step = training_step(CONTENDERS[name](job), job)
        first, second = (seconds(step, job.device) for _ in range(2))
    return first - second


def in_a_process(name: str, state: str, caches: Path, argv: Sequence[str]) -> float:
    """`compile_seconds` of a new process that keeps its caches in ``caches``."""
    allowed = {variable: str(int(STATES[state])) for variable in GRAPH_CACHES}
    env = {
        **os.environ,
        **allowed,
        "TORCHINDUCTOR_CACHE_DIR": str(caches),
        "TRITON_CACHE_DIR": str(caches / "triton"),
    }
    command = [sys.executable, __file__, *argv, "--measure", name]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    found = re.search(r"^seconds ([\d.]+)$", done.stdout, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{name}, {state}, gave no time:\n{done.stdout}\n{done.stderr}")
    return float(found[1])


def measure(
    contenders: Sequence[str], states: Sequence[str], argv: Sequence[str]
) -> Iterator[tuple[str, dict[str, float]]]:
    """Seconds by state, contender by contender."""
    with tempfile.TemporaryDirectory() as folder:
        for name in progress(contenders, "compiling"):
            caches = Path(folder) / name
            yield name, {state: in_a_process(name, state, caches, argv) for state in states}


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    choices = list(CONTENDERS)
    parser.add_argument("--contenders", nargs="+", choices=choices, default=["bf16", "fp8"])
    parser.add_argument("--states", nargs="+", choices=STATES, default=list(STATES))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--csv", type=Path, help="append the numbers to this file")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="64 wide, 64 tokens")
    parser.add_argument("--measure", choices=choices, help="one contender, in this process")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    args = parse_arguments(argv)
    device = torch.device(args.device)
    width, batch, tokens = (64, 1, 64) if args.tiny else (2048, 4, 2048)
    job = Job(LlamaShape.of_width(width), args.layers, batch, tokens, 1, device)
    if args.measure:
        print(f"seconds {compile_seconds(args.measure, job):.3f}")
        return
    print(f"{device_name(device)}, {versions()}\n{job}\n")
    print(f"{'compile s':<14}" + "".join(f"{state:>17}" for state in args.states))
    first: dict[str, float] = {}
    for name, times in measure(args.contenders, args.states, argv):
        first = first or times
        cells = (f"{times[state]:.1f} ({times[state] / first[state]:.2f}x)" for state in times)
        print(f"{name:<14}" + "".join(f"{cell:>17}" for cell in cells), flush=True)
        if args.csv:
            rows = [(name, state, value, "s") for state, value in times.items()]
            append_csv(args.csv, device, str(job), rows)


if __name__ == "__main__":
    main(sys.argv[1:])
