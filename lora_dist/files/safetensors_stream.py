"""safetensors files one tensor at a time: headers checked, parts read, whole files written in order."""

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()} | {
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    "BOOL": torch.bool,
}
"""What can be read and written, by its name in a header."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000
"""safetensors' own limit; a larger number is not a header's length."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One header entry: what a tensor is, and where."""

    path: Path
    start: int
    """Of its first byte in the file."""
    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes in a safetensors file. ValueError where the file is missing, truncated or not one."""
    entries, data_start = _parse_header(path)
    data_end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    promised, actual = data_start + data_end, path.stat().st_size
    if promised != actual:
        raise ValueError(
            f"{path} is damaged: its header promises {promised} bytes, the file has {actual}; copy the file again"
        )
    return {name: _describe(path, name, entry, data_start) for name, entry in entries.items()}


def _describe(path: Path, name: str, entry: Mapping[str, Any], data_start: int) -> TensorInfo:
    (start, end), dtype, shape = entry["data_offsets"], entry["dtype"], tuple(entry["shape"])
    if dtype in DTYPES and end - start != prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(
            f"{path} is damaged: its header gives {name}, {dtype} of shape {shape}, {end - start} bytes; copy the file"
            " again"
        )
    return TensorInfo(path, data_start + start, dtype, shape)


def _parse_header(path: Path) -> tuple[dict[str, Any], int]:
    """Header entries and the offset of the first data byte."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; copy the checkpoint again or name another one")
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= _MAX_HEADER_BYTES or 8 + length > path.stat().st_size:
            raise ValueError(f"{path} is truncated or no safetensors file; copy the file again")
        raw = file.read(length)
    try:
        entries = json.loads(raw)
        entries.pop("__metadata__", None)
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{path} has a damaged header ({error}); copy the file again") from None
    return entries, 8 + length


def read_part(
    info: TensorInfo, *, dim: int | None = None, start: int = 0, size: int | None = None, entry: int | None = None
) -> torch.Tensor:
    """One tensor, or that entry of it along its first dimension; of this its `size` entries from `start` along `dim`,
    all that follow without `size`; copied.

    The file is mapped for this one read, so that nothing of it stays in memory, and the header is not parsed again: a
    model of experts has a hundred thousand tensors. ValueError for a dtype that torch does not have.
    """
    if info.dtype not in DTYPES:
        raise ValueError(f"{info.path} holds a tensor of {info.dtype}, not one of {', '.join(DTYPES)}")
    dtype, num_bytes = DTYPES[info.dtype], prod(info.shape) * DTYPES[info.dtype].itemsize
    if num_bytes == 0:
        return torch.empty(info.shape, dtype=dtype)
    # Copy on write, since torch has no tensors that must not be written; nobody writes.
    mapped = torch.from_numpy(np.memmap(info.path, np.uint8, "c", info.start, (num_bytes,)))
    whole = mapped.view(dtype).view(info.shape)
    if entry is not None:
        whole = whole[entry]
    if dim is None:
        return whole.clone()
    return whole.narrow(dim, start, whole.shape[dim] - start if size is None else size).clone()


class SafetensorsWriter:
    """Writes tensors of known shapes in the announced order, whole or some entries of one at a time, and hashes the
    file on the way.
    """

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, torch.dtype],
        metadata: Mapping[str, str],
    ) -> None:
        self._dtypes, self._shapes, self._waiting = dtypes, dict(shapes), list(shapes)
        self._num_written, self._sha256 = 0, hashlib.sha256()
        self._file = path.open("xb")
        self._append(_build_header(shapes, dtypes, metadata))

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append the next tensor, converted to its dtype in the file."""
        assert tuple(tensor.shape) == self._shapes[name], f"{name} is {tuple(tensor.shape)}, not {self._shapes[name]}"
        self.write_entries(name, tensor)

    def write_entries(self, name: str, tensor: torch.Tensor) -> None:
        """Append the next entries, along its first dimension, of the next tensor."""
        expected, whole = self._waiting[0], self._shapes[name]
        assert name == expected, f"{name} is written where {expected} is due"
        assert tuple(tensor.shape[1:]) == whole[1:], f"{name} has entries {tuple(tensor.shape[1:])}, not {whole[1:]}"
        flat = tensor.detach().to(device="cpu", dtype=self._dtypes[name]).contiguous().flatten()
        self._append(flat.view(torch.uint8).numpy().data)
        self._num_written += tensor.numel()
        assert self._num_written <= prod(whole), f"{name} has more entries than {whole[0]}"
        if self._num_written == prod(whole):
            self._waiting.pop(0)
            self._num_written = 0

    def close(self) -> str:
        """Flush to the disk; the file's sha256. Everything announced must have been written."""
        assert not self._waiting, f"not written: {self._waiting[:3]}"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._sha256.hexdigest()

    def abandon(self) -> None:
        self._file.close()

    def _append(self, data: bytes | memoryview) -> None:
        self._sha256.update(data)
        self._file.write(data)


@contextmanager
def open_writer(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype | Mapping[str, torch.dtype],
    metadata: Mapping[str, str] | None = None,
) -> Iterator[SafetensorsWriter]:
    """A writer that is not left open on an error; the caller closes it for its sha256. `dtype` is that of all tensors,
    or each one's.
    """
    dtypes = dict.fromkeys(shapes, dtype) if isinstance(dtype, torch.dtype) else dtype
    writer = SafetensorsWriter(path, shapes, dtypes, metadata or {"format": "pt"})
    try:
        yield writer
    finally:
        writer.abandon()


def _build_header(
    shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype], metadata: Mapping[str, str]
) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, shape in shapes.items():
        end = offset + prod(shape) * dtypes[name].itemsize
        header[name] = {"dtype": _NAMES[dtypes[name]], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw
