"""Before a job loads anything: can every node run it? Asked of all processes, answered by the first, in seconds."""

import json
import os
import socket
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from torch.distributed import DistError
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from lora_dist.config import RunConfig
from lora_dist.measure.environment import describe_environment
from lora_dist.measure.report_table import format_bytes
from lora_dist.needed_bytes import compute_needed_bytes
from lora_dist.topology import check_device, choose_device

_SECONDS_TO_MEET = 60.0
_PROBE = ".preflight-"
_SECONDS_TO_SEE_A_FILE = 5.0


@dataclass(kw_only=True, slots=True)
class Facts:
    """One process's; what belongs to the node comes from its first process alone."""

    node: str
    device: str
    """Name of the GPU, or cpu."""
    free_bytes: int
    needed_bytes: int
    """Lower bound of what the process will hold."""
    versions: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of each input, by its key in the configuration."""
    problems: list[str] = field(default_factory=list)


def check_job(config: RunConfig) -> str | None:
    """What was found, on global rank 0; ValueError there with every problem, its nodes named. All processes call it."""
    started = time.monotonic()
    global_rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = _meet(global_rank, world_size)
    if global_rank != 0:
        facts = collect_facts(config, Path(store.get("probe").decode()))
        store.set(f"facts/{global_rank}", json.dumps(asdict(facts)))
        return None  # and ask nothing more: process 0, which holds the store, may be gone
    probe = make_probe(_find_existing(Path(config.run_dir).absolute()))
    try:
        store.set("probe", str(probe))
        first = collect_facts(config, probe)
        everyone = [first, *(Facts(**json.loads(store.get(f"facts/{one}"))) for one in range(1, world_size))]
    finally:
        probe.unlink()
    if problems := find_problems(everyone):
        raise ValueError("; ".join(problems))
    return f"{describe(everyone)}; passed in {time.monotonic() - started:.1f} s"


def make_probe(directory: Path) -> Path:
    """A new empty file. What killed checks have left there is taken away, once no check can still be using it."""
    for left in directory.glob(f"{_PROBE}*"):
        with suppress(FileNotFoundError):  # another job's check may be as tidy
            if time.time() - left.stat().st_mtime > _SECONDS_TO_MEET + 3600:
                left.unlink()
    probe = directory / f"{_PROBE}{uuid.uuid4().hex}"
    probe.touch()
    return probe


def _meet(global_rank: int, world_size: int) -> Store:
    """The store through which the training's processes will find each other, too."""
    timeout = timedelta(seconds=_SECONDS_TO_MEET)
    try:
        store, _, _ = next(rendezvous("env://", global_rank, world_size, timeout=timeout))
    except (DistError, TimeoutError) as error:
        raise ValueError(
            f"global rank {global_rank} of {world_size} cannot meet the others at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} within {_SECONDS_TO_MEET:.0f} s ({str(error).splitlines()[0]});"
            " check MASTER_ADDR and the network between the nodes"
        ) from error
    store.set_timeout(timeout)
    return PrefixStore("preflight", store)


def collect_facts(config: RunConfig, probe: Path) -> Facts:
    """This process's part. `probe` is a file that the first process has made beside the run directory."""
    local_rank = int(os.environ["LOCAL_RANK"])
    facts = Facts(
        node=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        device="none",
        free_bytes=0,
        needed_bytes=compute_needed_bytes(config, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])),
    )
    _examine_device(config, local_rank, facts)
    if local_rank == 0:
        facts.versions = _flatten_versions(describe_environment())
        facts.sizes = measure_inputs(config)
        facts.problems += _check_shared(probe)
    return facts


def _examine_device(config: RunConfig, local_rank: int, facts: Facts) -> None:
    try:
        device = choose_device(config.device, local_rank)
        check_device(device, config.dtype)
    except ValueError as error:
        facts.problems.append(str(error))
        return
    if device.type == "cuda":
        facts.device = torch.cuda.get_device_name(device)
        facts.free_bytes, _ = torch.cuda.mem_get_info(device)
    else:
        facts.device = "cpu"
        num_sharers = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or 1)
        facts.free_bytes = psutil.virtual_memory().available // num_sharers
        num_gpus = os.environ.get("SLURM_GPUS_ON_NODE", "0")
        if config.device == "auto" and num_gpus != "0":
            facts.problems.append(
                f"Slurm gives {num_gpus} GPUs, but torch {torch.__version__} sees none: a build without CUDA or a"
                " driver too old for it; device=cpu means to go without"
            )
    if facts.free_bytes < facts.needed_bytes:
        facts.problems.append(
            f"{facts.device} {local_rank} has {format_bytes(facts.free_bytes)} free, this process needs more than"
            f" {format_bytes(facts.needed_bytes)}; free it, or raise topology.tp_size or topology.pp_size"
        )


def measure_inputs(config: RunConfig) -> dict[str, int]:
    """Bytes of what the run reads, by key; -1 where it is not there."""
    named = {
        "model.checkpoint": config.model.checkpoint,
        "model.tokenizer": config.model.tokenizer,
        "data.train": config.data.train,
        "data.valid": config.data.valid,
    }
    return {f"{key}={path}": _measure(Path(path)) for key, path in named.items() if path is not None}


def _measure(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    return path.stat().st_size if path.is_file() else -1


def _check_shared(probe: Path) -> list[str]:
    """The first process's file must appear here, and a file of ours must be possible beside it."""
    deadline = time.monotonic() + _SECONDS_TO_SEE_A_FILE
    while not probe.exists():
        if time.monotonic() > deadline:
            return [f"{probe.parent} is not the folder that process 0 sees; give a run_dir that all nodes share"]
        time.sleep(0.1)
    own = probe.with_name(f"{probe.name}-{os.environ['RANK']}")
    try:
        own.touch()
        own.unlink()
    except OSError as error:
        return [f"{probe.parent} cannot be written ({error.strerror}); give another run_dir"]
    return []


def _find_existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.is_dir())


def _flatten_versions(environment: Mapping[str, object]) -> dict[str, str]:
    """What must be the same on every node."""
    versions, git, gpus = environment["versions"], environment["git"], environment["gpus"]
    assert isinstance(versions, dict)
    flat = {name: str(version) for name, version in versions.items()}
    if isinstance(git, dict):
        flat["commit"] = str(git["commit"])
    if isinstance(gpus, dict):
        flat |= {name: str(gpus[name]) for name in ("cuda", "nccl", "driver")}
    return flat


def find_problems(everyone: Sequence[Facts]) -> list[str]:
    """Every process's own, and where nodes differ; each once, with the nodes that have it."""
    nodes_of: dict[str, list[str]] = {}
    for facts in everyone:
        for problem in facts.problems:
            nodes_of.setdefault(problem, []).append(facts.node)
    found = [f"{_list_nodes(nodes)}: {problem}" for problem, nodes in nodes_of.items()]
    return found + _find_differences({facts.node: _list_equal(facts) for facts in everyone if facts.versions})


def _list_equal(facts: Facts) -> dict[str, str]:
    """What must be the same on every node, as its first process found it."""
    device = {"none": {}, "cpu": {"device": "cpu"}}.get(facts.device, {"device": "gpu"})
    sizes = {key: "not there" if size < 0 else f"{size} bytes" for key, size in facts.sizes.items()}
    return {**device, **facts.versions, **sizes}


def _find_differences(values: Mapping[str, Mapping[str, str]]) -> list[str]:
    """`values` by node and key; a line for each key that has several."""
    found = []
    for key in sorted({key for one in values.values() for key in one}):
        nodes_of: dict[str, list[str]] = {}
        for node, one in values.items():
            nodes_of.setdefault(one.get(key, "nothing"), []).append(node)
        if len(nodes_of) > 1:
            shown = " / ".join(f"{value} on {_list_nodes(nodes)}" for value, nodes in nodes_of.items())
            found.append(f"{key} differs: {shown}")
    return found


def _list_nodes(nodes: Iterable[str]) -> str:
    names = list(dict.fromkeys(nodes))
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def describe(everyone: Sequence[Facts]) -> str:
    """One line: nodes, devices, memory, torch."""
    num_nodes = len({facts.node for facts in everyone})
    devices = ", ".join(sorted({facts.device for facts in everyone}))
    free, needed = min(f.free_bytes for f in everyone), max(f.needed_bytes for f in everyone)
    return (
        f"preflight: {len(everyone)} processes on {num_nodes} nodes, {devices}, at least {format_bytes(free)} free for"
        f" {format_bytes(needed)} or more that it takes, torch {torch.__version__}"
    )
