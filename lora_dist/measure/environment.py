"""What a run ran on, for environment.json: versions, commit, hardware, threads. No host names, no paths, no keys."""

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "megatron-core",
    "deepspeed",
    "transformers",
    "peft",
    "safetensors",
    "hydra-core",
    "wandb",
    "lora-dist",
)
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def describe_environment() -> dict[str, Any]:
    """JSON-able. None stands for what is not there or cannot be read."""
    packages = {name: _read_version(name) for name in _PACKAGES}
    return {
        # torch's own names what it is built for, as its package's does not always.
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__), **packages},
        "git": describe_checkout(Path(__file__).resolve().parents[2]),
        "system": {"platform": platform.platform(), "machine": platform.machine()},
        "cpu": {
            "model": _read_cpu_model(),
            "num_cores": os.cpu_count(),
            "num_usable_cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        },
        "gpus": _describe_gpus(),
        "threads": {
            "torch": torch.get_num_threads(),
            "torch_interop": torch.get_num_interop_threads(),
            **{name: os.environ.get(name) for name in _THREAD_VARIABLES},
        },
    }


def describe_checkout(directory: Path) -> dict[str, Any] | None:
    """Commit of the source and whether it was changed since; None where the source is not a git checkout.

    A copy of a checkout is told its commit in LORA_DIST_COMMIT; whether it was changed, nobody knows.
    """
    if not (directory / ".git").exists():
        told = os.environ.get("LORA_DIST_COMMIT")
        return None if told is None else {"commit": told, "dirty": None}
    commit = _run_git(directory, "rev-parse", "HEAD")
    # Records change no code: the first of several must not make the others look changed.
    changes = _run_git(directory, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!tools/records")
    return None if commit is None or changes is None else {"commit": commit, "dirty": bool(changes)}


def _run_git(directory: Path, *arguments: str) -> str | None:
    """What it says. It takes no lock: one that is killed would leave it, and have the user's own git refuse to work."""
    git = ["git", "--no-optional-locks", "-C", str(directory)]
    try:
        done = subprocess.run([*git, *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, or a checkout of another owner
        return None
    return done.stdout.strip()


def _read_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _read_cpu_model() -> str | None:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return match[1] if match else None


def _describe_gpus() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    nccl = torch.cuda.nccl.version()
    return {
        "devices": [
            {
                "name": device.name,
                "memory_gib": round(device.total_memory / 2**30, 1),
                "capability": f"{device.major}.{device.minor}",
            }
            for device in devices
        ],
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, nccl)),
        "driver": _read_driver_version(),
    }


def _read_driver_version() -> str | None:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout else None
