"""What was measured or found out once on this machine: small JSON files in the cache folder."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

MOST_TEXT = 1 << 20


def read_kept(file: Path) -> dict[str, Any]:
    """Empty where there is none. The file is the user's, and may hold anything: check each entry."""
    try:
        if file.stat().st_size > MOST_TEXT:
            return {}
        known = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def write_kept(file: Path, known: dict[str, Any]) -> None:
    """Does nothing where the folder cannot be written: it is found out again then, no more."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_name(f"{file.name}.{os.getpid()}")
        beside.write_text(json.dumps(known), "utf-8")
        beside.replace(file)
