"""Files that appear whole or not at all; one for which there is no room is named, with the remedy. Standard library."""

import errno
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_REMEDIES = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space there or have the quota raised",
    errno.EFBIG: "raise the limit on a file's size (ulimit -f)",
}
"""For a file that has no room. The system's error names it only where it was being opened."""


@contextmanager
def name_when_full(target: Path) -> Iterator[None]:
    """Around writing `target`: OSError naming it and the remedy where there is no room for it."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        raise OSError(
            f"{target} cannot be written: [Errno {error.errno}] {error.strerror}; {_REMEDIES[error.errno]},"
            " then give the command again (with resume=auto where it trains)"
        ) from error


@contextmanager
def open_new_file(target: Path) -> Iterator[Path]:
    """A path whose file takes `target`'s place when the block ends well, and vanishes when it does not."""
    temporary = target.parent / f".{target.name}.partial"
    with name_when_full(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            fsync_path(temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_path(target.parent)


def write_text(path: Path, text: str) -> None:
    """In UTF-8, whole or not at all."""
    with open_new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines that appear under `path` whole or not at all."""
    with open_new_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def format_json(content: Mapping[str, Any]) -> str:
    """A JSON document. What is not a finite number becomes null: NaN is not JSON."""
    return json.dumps(_drop_infinite(content), indent=1, allow_nan=False) + "\n"


def fsync_path(path: Path) -> None:
    """What a file or a directory holds is on the disk afterwards."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _drop_infinite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _drop_infinite(value) for key, value in content.items()}
    return [_drop_infinite(value) for value in content] if isinstance(content, list | tuple) else content
