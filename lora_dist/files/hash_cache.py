"""Hashes of large files that do not change, kept from one command to the next: a base of 350 GB is read once for it."""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_dist.files.directories import compute_sha256

_SETTLED_NS = 2 * 10**9
"""A file that changed less long ago could change again within one tick of its file system's clock."""


def find_sha256(path: Path) -> str:
    """As `compute_sha256`, without reading a file whose inode, size and times are those it was hashed at.

    The time of a file's last change of any kind cannot be set by a program, so that a copy over it tells.
    """
    state = _describe(path)
    entry = _find_directory() / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.json"
    known = _read(entry)
    if known.get("state") == state and isinstance(known.get("sha256"), str):
        return str(known["sha256"])
    sha256 = compute_sha256(path)
    if _describe(path) == state and time.time_ns() - max(state["mtime_ns"], state["ctime_ns"]) > _SETTLED_NS:
        _write(entry, {"path": str(path.resolve()), "state": state, "sha256": sha256})
    return sha256


def _find_directory() -> Path:
    """LORA_DIST_CACHE, or lora_dist in the user's directory of caches."""
    own = os.environ.get("LORA_DIST_CACHE")
    everyones = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return (Path(own) if own else everyones / "lora_dist") / "sha256"


def _describe(path: Path) -> dict[str, int]:
    stat = path.stat()
    return {
        "device": stat.st_dev,
        "inode": stat.st_ino,
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "ctime_ns": stat.st_ctime_ns,
    }


def _read(entry: Path) -> dict[str, Any]:
    """Empty where there is none, or none that can be read."""
    try:
        content = json.loads(entry.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(entry: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all. Where nothing can be kept, as in a home without room, the next command hashes again."""
    temporary = entry.with_name(f".{entry.name}.{os.getpid()}")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content), encoding="utf-8")
        temporary.replace(entry)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
