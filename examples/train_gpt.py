"""Train a small GPT in its own precision and in FP8, and compare the two losses.

    python examples/train_gpt.py              # about 3 minutes on 2 CPU cores; larger on a GPU
    python examples/train_gpt.py --steps 20   # a quick look
    python examples/train_gpt.py --logits fp8   # the head, too

The text is the source code of the Python that runs this file, read as bytes, so there is nothing
to download. Both runs start from the same seed and see the same batches; the only difference is
one argument of `torch.compile`:

    torch.compile(model)                  # its own precision: fp32 on a CPU, bf16 on a GPU
    torch.compile(model, backend="fp8")   # FP8 matmuls, forward and backward, in all but the head

The model, the optimizer and the training loop do not know about FP8. On a CPU the FP8 arithmetic
is emulated bit for bit: slower than fp32, but the loss predicts what an H100 would reach.
"""

from __future__ import annotations

import argparse
import math
import os
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

# CPU threads that wait for each other sleep: spinning is several times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import fp8compile  # only for explain() and bars: torch.compile finds the backend without it
from fp8compile.progress import progress

VOCAB = 256  # the model reads bytes


@dataclass(frozen=True)
class Config:
    """Sizes of the model and of its training; ``seed``: of its weights and of the batches."""

    layers: int
    width: int
    context: int
    batch: int
    steps: int
    learning_rate: float
    seed: int = 0
    head_dim: int = 32


ON_CPU = Config(layers=3, width=128, context=128, batch=12, steps=300, learning_rate=2e-3)
ON_GPU = Config(layers=12, width=1024, context=1024, batch=16, steps=400, learning_rate=6e-4)


# ---- the text ------------------------------------------------------------------------------------
def standard_library_text(limit: int = 16 * 2**20) -> Tensor:
    """The first `limit` bytes of the standard library's .py files, in alphabetical order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    text = bytearray()
    for path in sorted(root.rglob("*.py")):
        if skipped.isdisjoint(path.relative_to(root).parts):
            text += path.read_bytes()
        if len(text) >= limit:
            break
    return torch.frombuffer(text[:limit], dtype=torch.uint8)


def random_batch(text: Tensor, config: Config, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Windows of the text at random places, and the same windows one byte later."""
    starts = torch.randint(len(text) - config.context, (config.batch, 1), generator=generator)
    windows = text[starts + torch.arange(config.context + 1)].long()
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


# ---- the model -----------------------------------------------------------------------------------
def rotary_table(context: int, head_dim: int) -> Tensor:
    """cos and sin of every position's rotation angles: (2, context, head_dim / 2)."""
    frequencies = 10_000 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.outer(torch.arange(context), frequencies)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn each pair of features by an angle that grows with the position (RoPE)."""
    cos, sin = table[:, : x.shape[-2]].to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        heads = self.qkv(x).view(batch, tokens, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind()
        y = F.scaled_dot_product_attention(rotate(q, table), rotate(k, table), v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))


class SwiGLU(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 3 * width, bias=False)
        self.up = nn.Linear(width, 3 * width, bias=False)
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = Attention(width, head_dim)
        self.mlp_norm = nn.RMSNorm(width)
        self.mlp = SwiGLU(width)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), table)
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    rotary: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, config.width)
        sizes = config.width, config.head_dim
        self.blocks = nn.ModuleList(Block(*sizes) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        self.lm_head = nn.Linear(config.width, VOCAB, bias=False)
        table = rotary_table(config.context, config.head_dim)
        self.register_buffer("rotary", table, persistent=False)
        self.apply(self._init)

    @staticmethod
    def _init(module: nn.Module) -> None:
        """Let every matmul keep the variance of its input."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)

    def logits(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.rotary)
        return self.lm_head(self.norm(x)).float()

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(tokens).flatten(0, 1), targets.flatten())


# ---- training ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Run:
    """What one training run leaves behind."""

    name: str
    model: GPT
    losses: list[float]
    first_step_s: float
    step_ms: float

    @property
    def final_loss(self) -> float:
        """The mean over the last tenth of the steps: a single batch is too noisy to compare."""
        last = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(last) / len(last)


def new_model(config: Config, device: torch.device) -> GPT:
    torch.manual_seed(config.seed)
    return GPT(config).to(device)


def own_precision(device: torch.device) -> torch.autocast:
    """fp32 on a CPU; on a GPU bf16 matmuls over fp32 parameters, the usual mixed precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def learning_rate(step: int, config: Config) -> float:
    """Rise linearly over the first twentieth of the steps, then fall along a cosine to a tenth."""
    warmup = max(1, config.steps // 20)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
    return config.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))


def now(device: torch.device) -> float:
    """The time, once the device has finished what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def training_steps(
    model: GPT,
    compiled: Callable[..., Tensor],
    text: Tensor,
    config: Config,
    device: torch.device,
) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
    """Train, and give each step's loss and batch when the gradients are there to be looked at."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(config.seed + 1)
    for step in range(config.steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step, config)
        tokens, targets = (t.to(device) for t in random_batch(text, config, generator))
        with own_precision(device):
            loss = compiled(tokens, targets)
        loss.backward()
        yield loss, (tokens, targets)
        optimizer.step()  # in FP8 this also updates the scales
        optimizer.zero_grad()


def train(
    name: str,
    text: Tensor,
    config: Config,
    device: torch.device,
    compile_model: Callable[[nn.Module], Callable[..., Tensor]],
) -> Run:
    """Train a new model. Nothing here depends on the precision but `compile_model`."""
    model = new_model(config, device)
    losses = torch.empty(config.steps, device=device)
    start = first = now(device)
    steps = training_steps(model, compile_model(model), text, config, device)
    bar = tqdm(steps, desc=name.ljust(4), unit="step", total=config.steps, disable=None)
    for step, (loss, _) in enumerate(bar):
        losses[step] = loss.detach()
        if step == 0:  # compiles
            first = now(device)
        if step % 10 == 0 and not bar.disable:  # reading the loss waits for the GPU: not each step
            bar.set_postfix(loss=f"{loss.item():.3f}")
    step_ms = 1e3 * (now(device) - first) / max(1, config.steps - 1)
    return Run(name, model, losses.tolist(), first - start, step_ms)


# ---- what comes out ------------------------------------------------------------------------------
def running_mean(losses: list[float], window: int) -> list[float]:
    """Mean of the last `window` losses at each step (of fewer at the start)."""
    means = []
    for end in range(1, len(losses) + 1):
        last = losses[max(0, end - window) : end]
        means.append(sum(last) / len(last))
    return means


def save_curves(high: Run, fp8: Run, path: Path) -> None:
    """Plot both losses, and below them how far FP8 is from the other precision."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    window = max(1, len(high.losses) // 20)
    means = {run.name: running_mean(run.losses, window) for run in (high, fp8)}
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 6), sharex=True, height_ratios=[3, 1], layout="constrained"
    )
    for run, color, style in ((high, "tab:blue", "-"), (fp8, "tab:orange", "--")):
        top.plot(run.losses, color=color, alpha=0.2, linewidth=0.8)
        top.plot(
            means[run.name],
            style,
            color=color,
            linewidth=2,
            label=f"{run.name}: {run.final_loss:.4f} at the end",
        )
    top.set_ylabel("training loss (nats per byte)")
    top.legend(title=f"mean of {window} steps; single steps in the background")
    difference = [100 * (b / a - 1) for a, b in zip(*means.values(), strict=True)]
    bottom.axhline(0, color="gray", linewidth=0.8)
    bottom.plot(difference, color="tab:orange")
    bottom.set(xlabel="step", ylabel=f"FP8 against\n{high.name} (%)")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


@torch.no_grad()
def sample(model: GPT, prompt: str, context: int, length: int = 200) -> str:
    """Continue the prompt. The trained module is an ordinary one: here it runs uncompiled."""
    generator = torch.Generator().manual_seed(0)
    device = model.lm_head.weight.device
    text = torch.tensor([list(prompt.encode())])
    for _ in progress(range(length), "continuing a prompt"):
        logits = model.logits(text[:, -context:].to(device))[:, -1].cpu()
        next_byte = torch.multinomial((logits / 0.8).softmax(-1), 1, generator=generator)
        text = torch.cat([text, next_byte], dim=1)
    return bytes(text[0].tolist()).decode(errors="replace")


def print_comparison(high: Run, fp8: Run) -> None:
    print(f"\n{'':<6} {'final loss':>10} {'ms per step':>12} {'s to compile (first step)':>26}")
    for run in (high, fp8):
        times = f"{run.step_ms:>12.1f} {run.first_step_s:>26.1f}"
        print(f"{run.name:<6} {run.final_loss:>10.4f} {times}")
    difference = 100 * (fp8.final_loss / high.final_loss - 1)
    print(f"FP8's final loss differs by {difference:+.2f} %.")


def parse_config(argv: list[str] | None) -> tuple[Config, torch.device, str, Path]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    default = ON_GPU if device.type == "cuda" else ON_CPU
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("steps", "layers", "width"):
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name))
    parser.add_argument("--logits", choices=["high_precision", "fp8"], default="high_precision")
    parser.add_argument("--out", type=Path, default=Path("train_gpt.png"), help="the curves")
    args = parser.parse_args(argv)
    config = replace(default, steps=args.steps, layers=args.layers, width=args.width)
    return config, device, args.logits, args.out


def main(argv: list[str] | None = None) -> None:
    start = time.perf_counter()
    config, device, logits, out = parse_config(argv)
    options = {"logits": logits}
    text = standard_library_text()
    model = new_model(config, device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(text) / 1e6:.1f} MB of text, {parameters / 1e6:.1f} M parameters on {device}")
    print(config)

    batch = [t.to(device) for t in random_batch(text, config, torch.Generator().manual_seed(1))]
    with own_precision(device):
        print(fp8compile.explain(model, *batch, options=options))

    name = "bf16" if device.type == "cuda" else "fp32"
    high = train(name, text, config, device, torch.compile)
    compile_fp8 = partial(torch.compile, backend="fp8", options=options)
    fp8 = train("fp8", text, config, device, compile_fp8)

    print_comparison(high, fp8)
    save_curves(high, fp8, out)
    print(f"Curves: {out}")
    print("\nThe model trained in FP8 continues a prompt:")
    print(sample(fp8.model, "import os\n\ndef ", config.context))
    print(f"\nEverything took {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
