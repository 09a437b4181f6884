"""Resume checkpoints: `checkpoints/step-000123/`, whole or not there, good for any topology and ZeRO stage.

Each pipeline stage's first process streams the stage's parameters, whole over TP and DP, into stage-NN.safetensors
under the keys `value/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME` (fp32, 12 bytes a trainable parameter). state.json holds
the rest; manifest.json, written last, the hashes of all.
"""

import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from lora_dist.checkpoint.identity import check_same
from lora_dist.checkpoint.store import describe_versions
from lora_dist.files.directories import (
    MANIFEST,
    commit_directory,
    prepare_temporary,
    read_json,
    read_manifest,
    write_json,
    write_manifest,
)
from lora_dist.files.safetensors_stream import TensorInfo, open_writer, read_header, read_part
from lora_dist.parameters import TrainableParameter, find_source
from lora_dist.topology import Topology
from lora_dist.whole import iterate_stage, list_whole, raise_together, read_shard, write_together
from lora_dist.writing import name_when_full

STATE_KEYS = ("value", "exp_avg", "exp_avg_sq")
STATE_FILE = "state.json"
_DIRECTORY = "checkpoints"
_LOG = logging.getLogger(__name__)
_PASSED_OVER: set[Path] = set()
"""Generations that this process found damaged. Process 0 looks for them, and is the one that prunes."""


class TrainingState(Protocol):
    """What is saved and loaded of an optimizer: `ZeroEngine`."""

    num_steps: int

    def read_state(self, one: TrainableParameter) -> Mapping[str, torch.Tensor]: ...
    def write_state(self, one: TrainableParameter, state: Mapping[str, torch.Tensor]) -> None: ...
    def read_loss_scale(self) -> Mapping[str, float]: ...
    def write_loss_scale(self, state: Mapping[str, float]) -> None: ...


def save_checkpoint(
    run_dir: str | Path,
    *,
    engine: TrainingState,
    trainable: Sequence[TrainableParameter],
    topology: Topology,
    step: int,
    identity: Mapping[str, Any],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Commit the state after `step` steps, then drop all but the newest `keep` generations. Every process calls it.

    `state` is the caller's own JSON-able part. OSError, on every process, where a file cannot be written: the older
    generations stand.
    """
    target = Path(run_dir) / _DIRECTORY / f"step-{step:06d}"
    temporary = target.parent / f".{target.name}.partial"
    is_first = topology.global_rank == 0
    try:
        raise_together(_attempt(target, lambda: prepare_temporary(target)) if is_first else None)
        hashes = _write_stages(temporary, target, engine, trainable, topology)
        content = {
            "step": step,
            "num_adam_steps": engine.num_steps,
            "loss_scale": dict(engine.read_loss_scale()),
            "identity": dict(identity),
            "state": dict(state),
        }
        raise_together(_attempt(target, lambda: _commit(temporary, target, hashes, content)) if is_first else None)
    except OSError:
        if is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if is_first:
        _PASSED_OVER.discard(target)
        _prune(target.parent, keep, step)
    return target


def _attempt(target: Path, action: Callable[[], object]) -> OSError | None:
    try:
        with name_when_full(target):
            action()
    except OSError as error:
        return error
    return None


def _write_stages(
    temporary: Path,
    target: Path,
    engine: TrainingState,
    trainable: Sequence[TrainableParameter],
    topology: Topology,
) -> dict[str, str]:
    """Every stage's file; their hashes by name, on every process."""
    stream = iterate_stage(trainable, topology, engine.read_state, torch.float32)
    hashes: dict[str, str] = {}

    def write() -> None:
        name = f"stage-{topology.pp_rank:02d}.safetensors"
        owned = [one for one in trainable if one.owned]
        shapes = {f"{key}/{one.name}": one.full_shape for one in owned for key in STATE_KEYS}
        with name_when_full(target), open_writer(temporary / name, shapes, torch.float32) as writer:
            for one, whole in stream:
                for key in STATE_KEYS:
                    writer.write(f"{key}/{one.name}", whole[key])
            hashes[name] = writer.close()

    is_writer = topology.tp_rank == 0 and topology.zero_rank == 0 and any(one.owned for one in trainable)
    write_together(write if is_writer else None, stream)
    parts: list[dict[str, str]] = [{} for _ in range(topology.world_size)]
    dist.all_gather_object(parts, hashes)
    return {name: sha256 for part in parts for name, sha256 in part.items()}


def _commit(temporary: Path, target: Path, hashes: Mapping[str, str], content: Mapping[str, Any]) -> None:
    state_hash = write_json(temporary / STATE_FILE, content)
    write_manifest(temporary, {**hashes, STATE_FILE: state_hash}, {"versions": describe_versions()})
    commit_directory(temporary, target)


def _prune(directory: Path, keep: int, step: int) -> None:
    """All but the newest `keep` up to `step`, and what an interrupted save has left. Those that were passed over do not
    count, nor do later ones: the run would have gone on from them.
    """
    generations = [path for path in _list_generations(directory) if _read_step(path) <= step]
    generations = [path for path in generations if path not in _PASSED_OVER]
    others = set(_list_generations(directory)) - set(generations[:keep])
    for path in [*others, *directory.glob(".step-*")]:
        shutil.rmtree(path, ignore_errors=True)


def _list_generations(directory: Path) -> list[Path]:
    """Newest first; whole or not."""
    found = [path for path in directory.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name)]
    return sorted(found, key=_read_step, reverse=True)


def _read_step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def find_newest_checkpoint(run_dir: str | Path) -> Path | None:
    """The newest generation that is whole, every file hashed; None where none was ever saved.

    A generation that is not whole is passed over with a warning that names the file. ValueError where there are
    generations but none is whole: starting over would throw them away; OSError where a file that is there cannot be
    read, as it may be whole. One process calls it, for all.
    """
    generations = _list_generations(Path(run_dir) / _DIRECTORY)
    for path in generations:
        try:
            read_manifest(path)
        except ValueError as error:
            if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
                raise error.__cause__ from None
            _PASSED_OVER.add(path)
            _LOG.warning("passing over checkpoint %s: %s", path.name, error)
        else:
            return path
    if generations:
        raise ValueError(
            f"none of the {len(generations)} checkpoints in {Path(run_dir) / _DIRECTORY} is whole;"
            " remove that directory to start over, or name another run_dir"
        )
    return None


def read_resume_state(path: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """state.json of a checkpoint of this very run. ValueError with both values and the remedy where the runs differ."""
    content = read_json(path / STATE_FILE)
    try:
        check_same(identity, content["identity"], path)
    except ValueError as error:
        raise ValueError(f"{error}: give what that run was given, or another run_dir") from None
    return content


def load_checkpoint(
    path: Path,
    *,
    engine: TrainingState,
    trainable: Sequence[TrainableParameter],
    topology: Topology,
    identity: Mapping[str, Any],
) -> dict[str, Any]:
    """Set this process's parameters, moments, step count and loss scale; returns state.json's content.

    `path` comes from `find_newest_checkpoint`, which has verified it. Nothing is set unless run, names and shapes fit
    (ValueError). Every process calls it, at any topology and ZeRO stage, and reads only its own part.
    """
    content = read_resume_state(path, identity)
    files = _index_files(path, trainable, topology)
    for one in trainable:
        engine.write_state(one, {key: _read_shard(files, key, one, topology) for key in STATE_KEYS})
    engine.num_steps = content["num_adam_steps"]
    engine.write_loss_scale(content["loss_scale"])
    return content


def _index_files(path: Path, trainable: Sequence[TrainableParameter], topology: Topology) -> dict[str, TensorInfo]:
    """Key -> where it is, once the keys and shapes of all stages are those of this model."""
    files: dict[str, TensorInfo] = {}
    for name in read_json(path / MANIFEST)["sha256"]:
        if name.endswith(".safetensors"):
            files |= read_header(path / name)
    found = {key: info.shape for key, info in files.items()}
    entries = list_whole(trainable, topology)
    expected = {f"{key}/{entry.name}": entry.full_shape for entry in entries for key in STATE_KEYS}
    for key in sorted(expected.keys() | found.keys()):
        if expected.get(key) != found.get(key):
            raise ValueError(
                f"{path}: {key} has shape {found.get(key, 'none')}, this run needs {expected.get(key, 'none')}"
            )
    return files


def _read_shard(files: Mapping[str, TensorInfo], key: str, one: TrainableParameter, topology: Topology) -> torch.Tensor:
    """This TP rank's part; a copy of the tied embedding reads what its owner wrote."""
    info, dim = files[f"{key}/{find_source(one)}"], one.shard_dim
    if dim is None:
        return read_part(info)
    return read_shard(lambda start, size: read_part(info, dim=dim, start=start, size=size), one, topology)
