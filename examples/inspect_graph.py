"""Look at what the compiler does: the graph of one MLP block before and after each pass.

    python examples/inspect_graph.py

`options={"dump": folder}` writes the graph after every pass, numbered in the order in which they
ran, then the final forward and backward graphs, and on a GPU the source of the kernels. This
example prints the graph before all passes, forward and backward after them, and lists the rest.
Any program writes the same files when it runs with `FP8COMPILE_DUMP=folder` in its environment.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fp8compile
from fp8compile.progress import progress

EVERYTHING = {"decline_slower": False}  # on a GPU a block this small would stay in float32


class MLPBlock(nn.Module):
    """Normalize, widen, SwiGLU, narrow, add: the second half of a Llama layer."""

    def __init__(self, width: int = 64, ff: int = 128) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate = nn.Linear(width, ff, bias=False)
        self.up = nn.Linear(width, ff, bias=False)
        self.down = nn.Linear(ff, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def compile_and_dump(model: nn.Module, x: Tensor, folder: Path) -> list[Path]:
    """Compile forward and backward by running them once; return what was written, in order."""
    compiled = torch.compile(model, backend="fp8", options={"dump": str(folder), **EVERYTHING})
    compiled(x).sum().backward()
    return sorted(path for path in folder.rglob("*") if path.is_file())


def show(path: Path, folder: Path) -> None:
    print(f"\n===== {path.relative_to(folder)} =====\n{path.read_text().strip()}")


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, x = MLPBlock().to(device), torch.randn(32, 64, device=device, requires_grad=True)

    print("What happens to each matmul:\n")
    print(fp8compile.explain(model, x, options=EVERYTHING))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (files,) = progress(map(partial(compile_and_dump, model, x), [folder]), "compiling")
        print("\nFiles of the dump:")
        for path in files:
            print(f"  {path.relative_to(folder)}  ({len(path.read_text().splitlines())} lines)")

        show(files[0], folder)  # as PyTorch traced it, forward and backward in one graph
        for path in files:
            if path.stem.endswith(("forward", "backward")):  # as they are compiled in the end
                show(path, folder)


if __name__ == "__main__":
    main()
