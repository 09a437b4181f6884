"""Directories that appear whole or not at all, and the manifest that says what whole means."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_dist.writing import format_json, fsync_path, name_when_full

MANIFEST = "manifest.json"


@contextmanager
def open_new_directory(target: Path) -> Iterator[Path]:
    """A temporary directory that takes `target`'s place when the block ends well, and vanishes when it does not."""
    with name_when_full(target):
        temporary = prepare_temporary(target)
        try:
            yield temporary
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        commit_directory(temporary, target)


def prepare_temporary(target: Path) -> Path:
    """An empty directory beside `target`, under a name no reader takes for a finished one."""
    temporary = target.parent / f".{target.name}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def commit_directory(temporary: Path, target: Path) -> None:
    """Rename to `target`, in place of what was there; both names and contents are on the disk afterwards."""
    fsync_path(temporary)
    replaced = target.parent / f".{target.name}.replaced"
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)
    temporary.rename(target)
    fsync_path(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def write_json(path: Path, content: Mapping[str, Any]) -> str:
    """Write and fsync; the file's sha256. For the files of a directory that is not whole yet."""
    raw = format_json(content).encode()
    with path.open("wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(raw).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """ValueError naming the file where it is missing or not a JSON object."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def compute_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(directory: Path, hashes: Mapping[str, str], content: Mapping[str, Any]) -> None:
    """The last file of a directory: without it, or with a file that does not fit it, the directory is not whole."""
    write_json(directory / MANIFEST, {**content, "sha256": dict(hashes)})


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a directory whose every file has the content it had. ValueError naming the file otherwise."""
    manifest = read_json(directory / MANIFEST)
    hashes = manifest.get("sha256")
    if not isinstance(hashes, dict) or not all(isinstance(expected, str) for expected in hashes.values()):
        raise ValueError(f"{directory / MANIFEST} lists no files")
    for name, expected in hashes.items():
        path = directory / name
        if Path(name).name != name:
            raise ValueError(f"{directory / MANIFEST} names a file outside its directory: {name}")
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        actual = compute_sha256(path)
        if actual != expected:
            raise ValueError(f"{path} is damaged: its sha256 is {actual[:12]}..., the manifest says {expected[:12]}...")
    return manifest
