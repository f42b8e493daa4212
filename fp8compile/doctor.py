"""What ``python -m fp8compile doctor`` finds: whether FP8 works here, on what, and why not."""

from __future__ import annotations

import os
import platform
import tempfile
import time
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .backends import device_constants, why_not_attention, why_not_triton
from .internals import cache_folder
from .progress import progress
from .recipe import RECIPES

PACKAGES = ("fp8compile", "torch", "triton", "networkx", "sympy", "numpy", "rich")
SELF_TEST_DB = 15.0  # an output has about 28, a gradient 19; what is wrong has less than 0
STEPS = 3


def examine() -> list[str]:
    """Print what is found; the problems among it."""
    print(f"Python {platform.python_version()}, {platform.platform()}")
    print(", ".join(f"{package} {_version(package)}" for package in PACKAGES))
    print(_gpus())
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in devices:
        print(f"{device}: {_what_runs_on(device)}")
    problems = _cache_problems(cache_folder())
    for device in devices:
        problems += _self_test(device)
    return problems


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _gpus() -> str:
    """What there is of CUDA: in PyTorch, and in the machine."""
    if torch.version.cuda is None:
        return "CUDA: this PyTorch is built without it; install one that is, to use an NVIDIA GPU"
    found = [
        f"{p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB"
        for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    return f"CUDA {torch.version.cuda}: {'; '.join(found) or 'no GPU, or no driver for it'}"


def _recipes() -> str:
    """Which recipes a GPU with FP8 runs on its tensor cores, and why not the others."""
    slow = [name for name, recipe in RECIPES.items() if recipe.is_emulated]
    fast = [name for name in RECIPES if name not in slow]
    why = "whose scales no tensor core of Hopper takes: right, but slower than bf16"
    return f"recipes {', '.join(fast)} on tensor cores, not {', '.join(slow)}, {why}"


def _attention() -> str:
    missing = why_not_attention()
    return f"no attention in FP8, which needs {missing}" if missing else "attention in FP8"


def _what_runs_on(device: torch.device) -> str:
    reason = why_not_triton(device)
    if reason is not None:
        return f"FP8 is emulated, all recipes, with no speed-up; that needs {reason}"
    found = device_constants(device)
    gain = found.fp8_flops / found.bf16_flops
    return (
        f"{torch.cuda.get_device_name(device)}, Triton kernels; an FP8 GEMM reaches"
        f" {found.fp8_flops / 1e12:.0f} TFLOP/s, {gain:.2f}x bf16; memory"
        f" {found.copy_bandwidth / 1e12:.2f} TB/s; {_recipes()}; {_attention()}"
    )


def _cache_problems(folder: Path) -> list[str]:
    """Print where kernels and measurements are kept; what keeps them from being kept there."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    print(f"cache: {folder}, {len(files)} files, {size / 1e6:.1f} MB")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return []
    except OSError as error:
        variable = "TORCHINDUCTOR_CACHE_DIR"
        now = f"it is {os.environ[variable]!r}" if variable in os.environ else "it is not set"
        return [
            f"nothing can be kept in {folder} ({error.strerror}): every process compiles and"
            f" measures anew; set {variable} to a folder that can be written to ({now})"
        ]


class _Model(nn.Module):
    """One site, with all of its GEMMs and a bias, behind an operator that its casts are fused with.

    On a CPU it is compiled to few C++ files; each takes a compiler seconds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(nn.functional.gelu(x))


def _self_test(device: torch.device) -> list[str]:
    """Train a small model for some steps, print how far from eager it is; what is wrong."""
    start = time.perf_counter()
    torch.compiler.reset()
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FP8 is emulated here")
        torch.manual_seed(0)
        try:
            x = torch.randn(32, 64).to(device).requires_grad_()
            found = _train(_Model().to(device), x)
        except Exception as error:
            what = str(error).strip().splitlines() or [""]
            return [f"{device}: the self-test raised {type(error).__name__}: {what[0]}"]
    worst = min(found, key=lambda name: found[name])
    print(
        f"self-test on {device}: {STEPS} steps, output {found['output']:.1f} dB, worst {worst}"
        f" {found[worst]:.1f} dB, {time.perf_counter() - start:.1f} s"
    )
    if not found[worst] >= SELF_TEST_DB:
        return [f"{device}: the self-test should reach {SELF_TEST_DB:.0f} dB everywhere"]
    return []


def _train(model: nn.Module, x: Tensor) -> dict[str, float]:
    """The worst quality, over the steps, of the output and each gradient, in dB."""
    # To find the vector instructions of a CPU, Inductor compiles programs for longer than this test
    # takes; it does without those that fail, and so does this test.
    inductor = {"cpp.vec_isa_ok": False}
    options: dict[str, Any] = {"decline_slower": False, "inductor": inductor}
    compiled = torch.compile(model, backend="fp8", options=options)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    quality: dict[str, float] = {}
    for _ in progress(range(STEPS), "self-test"):
        results = []
        for call in (model, compiled):
            model.zero_grad()
            x.grad = None
            output = call(x)
            output.square().mean().backward()
            found = {"input": x, **dict(model.named_parameters())}
            gradients = {name: value.grad for name, value in found.items()}
            results.append({"output": output.detach(), **gradients})
        for name, reference in results[0].items():
            db = _sqnr_db(reference, results[1][name])
            quality[name] = min(db, quality.get(name, db))
        optimizer.step()
    return quality


def _sqnr_db(reference: Tensor, other: Tensor) -> float:
    noise = (reference - other).double().square().sum()
    if not noise.isfinite():  # min() would overlook a NaN
        return float("-inf")
    return float(10 * torch.log10(reference.double().square().sum() / noise))
