"""Kept hashes: taken while a file stays what it was, and never after it has changed."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from lora_dist.files import hash_cache
from lora_dist.files.hash_cache import find_sha256


@pytest.fixture
def hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Which files have been read, from now on; what is kept is kept below `tmp_path`."""
    monkeypatch.setenv("LORA_DIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hash_cache, "_SETTLED_NS", 0)
    read: list[Path] = []
    compute = hash_cache.compute_sha256
    monkeypatch.setattr(hash_cache, "compute_sha256", lambda path: read.append(path) or compute(path))
    return read


def compute(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_file_is_read_once(tmp_path: Path, hashed: list[Path]) -> None:
    path, link = tmp_path / "a", tmp_path / "link"
    path.write_bytes(b"weights")
    link.symlink_to(path)
    assert [find_sha256(path), find_sha256(path), find_sha256(link)] == [compute(b"weights")] * 3
    assert hashed == [path]


def test_whatever_changes_a_file_has_it_read_again(tmp_path: Path, hashed: list[Path]) -> None:
    """Another content of the same size under the same time of writing, too."""
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"weights")
    other.write_bytes(b"WEIGHTS")
    assert find_sha256(path) == compute(b"weights")
    written = path.stat()
    path.write_bytes(b"WEIGHTS")
    os.utime(path, ns=(written.st_atime_ns, written.st_mtime_ns))
    assert find_sha256(path) == compute(b"WEIGHTS")
    path.unlink()
    shutil.copy2(other, path)
    assert find_sha256(path) == compute(b"WEIGHTS")
    assert hashed == [path] * 3


def test_a_file_that_has_just_changed_is_not_kept(
    tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hash_cache, "_SETTLED_NS", 10**12)
    path = tmp_path / "a"
    path.write_bytes(b"weights")
    assert [find_sha256(path), find_sha256(path)] == [compute(b"weights")] * 2
    assert hashed == [path] * 2


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"state"', b'{"sha256": "0"}'])
def test_a_damaged_entry_is_made_anew(tmp_path: Path, hashed: list[Path], damage: bytes) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"weights")
    find_sha256(path)
    (entry,) = (tmp_path / "cache/sha256").iterdir()
    entry.write_bytes(damage)
    assert [find_sha256(path), find_sha256(path)] == [compute(b"weights")] * 2
    assert hashed == [path] * 2


def test_it_is_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORA_DIST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert hash_cache._find_directory() == tmp_path / "lora_dist" / "sha256"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hash_cache._find_directory() == tmp_path / ".cache" / "lora_dist" / "sha256"


def test_where_nothing_can_be_kept_it_is_read_each_time(tmp_path: Path, hashed: list[Path]) -> None:
    (tmp_path / "cache").write_text("no directory")
    path = tmp_path / "a"
    path.write_bytes(b"weights")
    assert [find_sha256(path), find_sha256(path)] == [compute(b"weights")] * 2
    assert hashed == [path] * 2
