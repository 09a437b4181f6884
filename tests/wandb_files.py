"""Offline W&B runs, read back from their files."""

import struct
from pathlib import Path

import wandb
from wandb.proto.wandb_internal_pb2 import Record

BLOCK_SIZE, HEADER_SIZE = 32768, 7


def read_records(path: Path) -> list[Record]:
    """The records of a .wandb file: LevelDB's log format, fragments over blocks of 32 KiB."""
    data, position, fragments, records = path.read_bytes(), HEADER_SIZE, b"", []
    while position + HEADER_SIZE <= len(data):
        left = BLOCK_SIZE - position % BLOCK_SIZE
        if left < HEADER_SIZE:
            position += left
            continue
        _, size, kind = struct.unpack("<IHB", data[position : position + HEADER_SIZE])
        fragments += data[position + HEADER_SIZE : position + HEADER_SIZE + size]
        position += HEADER_SIZE + size
        if kind in (1, 4):  # whole, or the last fragment
            records.append(Record.FromString(fragments))
            fragments = b""
    return records


def read_offline_run(run_dir: Path) -> list[Record]:
    wandb.teardown()  # until here its service may still be writing
    [file] = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    return read_records(file)


def read_exit_codes(run_dir: Path) -> list[int]:
    """What the run told W&B at its end; not 0 where W&B is to show it as failed."""
    return [record.exit.exit_code for record in read_offline_run(run_dir) if record.HasField("exit")]
