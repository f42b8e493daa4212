"""What can be written behind ``python -m fp8compile``."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable
from typing import Any

from ..recipe import RECIPES
from . import commands

PROGRAM = "python -m fp8compile"
TARGET = """
SCRIPT_OR_MODEL names a function or a value in a file or a module: path/to/file.py:name or
package.module:name. It gives (model, inputs), the inputs as a tuple:

    # tiny.py
    import torch
    from torch import nn

    def job():
        model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        return model, (torch.randn(128, 64),)
"""


def parser() -> argparse.ArgumentParser:
    """The parser; ``run`` of what it returns is the command, which takes the arguments."""
    top = argparse.ArgumentParser(
        prog=PROGRAM,
        description="FP8 for PyTorch, done by a compiler: torch.compile(model, backend='fp8').",
        epilog=f"{PROGRAM} COMMAND --help has an example for each command.",
    )
    subparsers = top.add_subparsers(required=True, metavar="COMMAND")

    def add(
        run: Callable[[argparse.Namespace], int], what: str, more: str, example: str, **kwargs: Any
    ) -> argparse.ArgumentParser:
        epilog = f"example:\n  {PROGRAM} {example}"
        command = subparsers.add_parser(
            run.__name__,
            help=what,
            description=more,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **kwargs,
        )
        command.set_defaults(run=run)
        return command

    add(
        commands.doctor,
        "check this installation and its devices",
        _text(
            """Print versions, what runs on each device and why, the cache folder, and train a small
            model on each device as a test. The exit status is 1 if something is wrong."""
        ),
        "doctor",
    )
    explain = add(
        commands.explain,
        "say what runs in FP8, what does not and why, and in which kernels",
        _text(
            """Trace a model, and print a row per GEMM (its formats, or the reason why it stays in
            its own precision; predicted microseconds in either), a row per fused kernel, the work,
            and what forward keeps for backward."""
        )
        + TARGET,
        "explain tiny.py:job --recipe current --html tiny.html\n"
        f"  {PROGRAM} explain big.py:job --device meta     # a model too large for this machine",
    )
    _add_target(explain)
    explain.add_argument("--json", metavar="PATH", help="write JSON; - prints it instead of tables")
    explain.add_argument("--html", metavar="PATH", help="write a page that needs no network")
    explain.add_argument(
        "--measure", action="store_true", help="also time kernels and steps, on a GPU"
    )
    view = add(
        commands.view,
        "draw the graph, with its regions and passes, as one HTML file",
        "Trace a model, and write its graph as one HTML file that needs no network.\n" + TARGET,
        "view tiny.py:job --out tiny.html",
    )
    _add_target(view)
    view.add_argument("--out", metavar="PATH", default="graph.html", help="default: graph.html")
    bench = add(
        commands.bench,
        "time a step in FP8 against torch.compile, on a GPU",
        _text(
            """Compile a model with torch.compile and with FP8, run both in turns, and print the
            median time of a step: a forward and, where something has a gradient, a backward."""
        )
        + TARGET,
        "bench tiny.py:job --device cuda",
    )
    _add_target(bench)
    bench.add_argument("--forward", action="store_true", help="no gradients: inference")
    cache = add(
        commands.cache,
        "show or clear the compiled kernels and measurements",
        _text(
            """What is kept on disk: the source of fused kernels, the fastest kernel per GEMM shape,
            the constants of devices. All of it is made again when it is missing."""
        ),
        "cache clear",
    )
    cache.add_argument("action", choices=["path", "clear"], help="print the folder, or remove it")
    return top


def _add_target(command: argparse.ArgumentParser) -> None:
    command.add_argument("target", metavar="SCRIPT_OR_MODEL", help="file.py:name or module:name")
    command.add_argument("--recipe", metavar="NAME", help=f"one of {', '.join(RECIPES)}")
    command.add_argument(
        "--options",
        metavar="JSON",
        help="""those of torch.compile(..., backend='fp8'), such as '{"skip": ["layers.0.*"]}'""",
    )
    command.add_argument(
        "--device",
        metavar="DEVICE",
        help="where to make the model: cpu, cuda, cuda:1, meta; default: where it makes itself",
    )


def _text(paragraph: str) -> str:
    return textwrap.fill(" ".join(paragraph.split()), 80) + "\n"
