"""A model's row of the table. A process of its own can be asked for it."""

from __future__ import annotations

import time
import traceback
import warnings

import transformers

from .check import Report, Settings, check

COLUMNS = (
    "model",
    "graphs",
    "GEMMs",
    "in FP8",
    "left in high precision",
    "output dB",
    "worst gradient dB",
    "agrees to dB",
    "seconds",
    "result",
)


def be_quiet() -> None:
    """What every model would warn of once more."""
    warnings.filterwarnings("ignore", message="FP8 is emulated here")
    warnings.filterwarnings("ignore", message="no GEMM of this graph runs in FP8")
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    transformers.logging.set_verbosity_error()


def run(name: str, settings: Settings) -> tuple[list[str], list[str]]:
    """A model's row, and what is wrong with it. What is raised is printed, and is a failure."""
    start = time.perf_counter()
    try:
        report = check(name, settings)
    except Exception as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        return [name, *[""] * (len(COLUMNS) - 2), "raised"], [message]
    return _row(report, time.perf_counter() - start), report.problems


def _row(report: Report, seconds: float) -> list[str]:
    output, gradient = report.worst(is_output=True), report.worst(is_output=False)
    agreement = min(q.agreement for q in report.qualities if q.has_signal)
    return [
        report.name,
        str(report.graphs),
        str(len(report.gemms)),
        str(report.in_fp8),
        "; ".join(f"{count} {what}" for what, count in report.left_out.items()),
        f"{output.fp8:.1f} (simulated {output.simulated:.1f})",
        f"{gradient.fp8:.1f} (simulated {gradient.simulated:.1f})",
        f"{agreement:.0f}",
        f"{seconds:.0f}",
        "failed" if report.problems else "passed",
    ]
