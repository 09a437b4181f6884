"""Whether a launcher started this process, as one of how many; Slurm's words put into torch.distributed's."""

import re
import socket
from collections.abc import Mapping, MutableMapping

_FIRST_SPECIAL_STEP = 4294967000
"""Slurm numbers a batch script's and an interactive shell's steps from here: they are no tasks of ours."""


def adopt_ranks(environ: MutableMapping[str, str]) -> int | None:
    """Processes of this job, or None where this process was started bare.

    torchrun, deepspeed and mpi-style launchers set RANK and WORLD_SIZE. `srun` does not: for a step of several tasks
    they are set here, with LOCAL_RANK, MASTER_ADDR and MASTER_PORT. ValueError where WORLD_SIZE comes without RANK.
    """
    if "WORLD_SIZE" in environ:
        if "RANK" not in environ:
            raise ValueError("WORLD_SIZE is set but RANK is not; unset WORLD_SIZE, or start through torchrun or srun")
        environ.setdefault("LOCAL_RANK", "0")
        return int(environ["WORLD_SIZE"])
    if not _is_slurm_task(environ):
        return None
    environ["WORLD_SIZE"] = environ["SLURM_STEP_NUM_TASKS"]
    environ["RANK"] = environ["SLURM_PROCID"]
    environ["LOCAL_RANK"] = environ["SLURM_LOCALID"]
    nodes = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
    environ.setdefault("MASTER_ADDR", first_slurm_node(nodes))
    environ.setdefault("MASTER_PORT", str(10000 + int(environ["SLURM_JOB_ID"]) % 20000))
    return int(environ["WORLD_SIZE"])


def become_single_process(environ: MutableMapping[str, str]) -> None:
    """A job of one process, on a free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def get_job_id(environ: Mapping[str, str]) -> str | None:
    """What every process of a launched job can name it by; None where the launcher gives nothing."""
    elastic_id = environ.get("TORCHELASTIC_RUN_ID", "none")
    return elastic_id if elastic_id != "none" else environ.get("SLURM_JOB_ID")


def name_node(environ: Mapping[str, str]) -> str:
    """`NODE: ` for an error of one of a job's many nodes; empty where Slurm has not started this process."""
    node = environ.get("SLURMD_NODENAME")
    return f"{node}: " if node else ""


def first_slurm_node(nodes: str) -> str:
    """`gpu[03-04,7],login1` -> `gpu03`."""
    found = re.match(r"([^\[,]+)(?:\[(\w+))?", nodes)
    assert found, nodes
    return found.group(1) + (found.group(2) or "")


def _is_slurm_task(environ: Mapping[str, str]) -> bool:
    if "SLURM_STEP_ID" not in environ or int(environ["SLURM_STEP_ID"]) >= _FIRST_SPECIAL_STEP:
        return False
    return int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
