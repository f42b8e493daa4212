"""A progress bar on a terminal, and nothing elsewhere."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
_shown = threading.Lock()


def progress(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """The items one by one, with a bar on stderr that says ``what`` is done with them.

    The bar is there while items are taken, and leaves no line behind; what is printed meanwhile
    stands above it. Where stderr is no terminal,
    or shows a bar already, nothing is written. ``total``: how many there are, where ``items`` does
    not say.
    """
    console = Console(stderr=True)
    if not (console.is_terminal and _shown.acquire(blocking=False)):
        yield from items
        return
    count = len(items) if total is None and isinstance(items, Sized) else total
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    shown = Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # what goes elsewhere must arrive there
    )
    try:
        with shown as bar:
            yield from bar.track(items, total=count, description=what)
    finally:
        _shown.release()
