"""What the commands do, each a function of its arguments that returns the exit status."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import shutil
import sys
import warnings
from typing import Any

import torch
from rich.console import Console

from ..doctor import examine
from ..explanation import explain as explain_model
from ..explanation.timed import time_step
from ..internals import cache_folder
from ..viewer.page import check_writable
from .targets import load, parse_json


def doctor(args: argparse.Namespace) -> int:
    problems = examine()
    for problem in problems:
        print(f"PROBLEM: {problem}")
    print("FP8 works here." if not problems else f"{len(problems)} problems.")
    return 1 if problems else 0


def explain(args: argparse.Namespace) -> int:
    options = _options(args)
    json_file = None if args.json == "-" else args.json
    for path in (json_file, args.html):
        if path is not None:
            check_writable(path)
    model, inputs = load(args.target, args.device)
    warnings.filterwarnings("ignore", message="FP8 is emulated here")  # the tables say it
    found = explain_model(model, *inputs, options=options, measure=args.measure)
    if args.json == "-":
        print(found.to_json())
    elif Console().is_terminal:
        Console().print(found)
    else:
        print(found)
    for path, write in ((json_file, found.to_json), (args.html, found.to_html)):
        if path is not None:
            write(path)
            print(f"wrote {path}", file=sys.stderr if args.json == "-" else sys.stdout)
    return 0


def view(args: argparse.Namespace) -> int:
    options = _options(args)
    check_writable(args.out)
    model, inputs = load(args.target, args.device)
    package: Any = importlib.import_module("fp8compile")
    package.view(model, *inputs, path=args.out, options=options)
    print(f"wrote {args.out}; open it in a browser")
    return 0


def bench(args: argparse.Namespace) -> int:
    options = _options(args)
    model, inputs = load(args.target, args.device)
    with torch.no_grad() if args.forward else contextlib.nullcontext():
        found = time_step(model, inputs, {}, options)
    what = "forward" if args.forward else "step"
    print(f"{found.device}, median {what}:")
    print(f"  torch.compile                  {found.high_ms:9.3f} ms")
    print(f"  torch.compile(backend='fp8')   {found.fp8_ms:9.3f} ms")
    print(f"  {found.high_ms / found.fp8_ms:.2f}x as fast")
    return 0


def cache(args: argparse.Namespace) -> int:
    folder = cache_folder()
    if args.action == "path":
        print(folder)
        return 0
    files = sum(file.is_file() for file in folder.rglob("*"))
    if folder.exists():
        shutil.rmtree(folder)
    print(f"removed {files} files from {folder}")
    return 0


def _options(args: argparse.Namespace) -> dict[str, Any]:
    options = parse_json(args.options)
    return options if args.recipe is None else {**options, "recipe": args.recipe}
