"""A JSON object in a file that several processes add to."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def read_entries(file: Path) -> dict[str, Any]:
    """The object, empty if there is none that can be read."""
    try:
        entries = json.loads(file.read_text())
        return entries if isinstance(entries, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def add_entry(file: Path, key: str, entry: Any) -> dict[str, Any]:
    """Add an entry; the file is replaced in one step, so that no reader sees half of it."""
    entries = {**read_entries(file), key: entry}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as new:
            json.dump(entries, new, indent=1)
        os.replace(new.name, file)
    except OSError as error:
        log.debug("measurements are not kept: %s", error)
    return entries
