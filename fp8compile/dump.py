"""Write numbered graph text and kernel source into a folder."""

from __future__ import annotations

import itertools
import re
import threading
from pathlib import Path

from torch import fx

from .ir import format_graph

_lock = threading.Lock()


class Dump:
    """Files of one compiled graph, in a folder of their own: ``<root>/graph_000/03.name.txt``."""

    def __init__(self, root: str) -> None:
        with _lock:  # two graphs, or two processes, never share a folder
            for number in itertools.count():
                self.folder = Path(root) / f"graph_{number:03d}"
                try:
                    self.folder.mkdir(parents=True)
                    break
                except FileExistsError:
                    continue
        self._next = itertools.count()

    def graph(self, name: str, gm: fx.GraphModule) -> None:
        """Write a graph as text under the next number."""
        self.text(f"{name}.txt", format_graph(gm) + "\n")

    def text(self, name: str, text: str) -> None:
        """Write a file under the next number."""
        safe = re.sub(r"[^\w.-]", "_", name)
        (self.folder / f"{next(self._next):02d}.{safe}").write_text(text, encoding="utf-8")
