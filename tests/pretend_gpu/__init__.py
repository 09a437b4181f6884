"""Runs the code of GPUs without one: on a CUDA device that is made of host memory, in a process of its own.

torch's own C++ sees tensors on `cuda:0`: autograd runs their backward in the device's thread, DeepSpeed and Megatron
take their ways for CUDA, NCCL's interface stands over gloo, memory is counted as torch's allocator counts it. What it
cannot show: the real kernels' numbers and times, races between streams, Triton's code.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import which
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


def find_obstacle() -> str | None:
    """Why there are none here; None where there can be."""
    if torch.backends.cuda.is_built():
        return "pretend GPUs need a torch without CUDA, whose own kernels would be in the way"
    return None if which("g++") else "pretend GPUs need a C++ compiler, e.g. g++"


def run_pretending(
    *words: str | Path, timeout_s: float | None = None, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Python with these words, in the checkout; it, and each Python that it starts, has pretend GPUs (everywhere/)."""
    places = [ROOT / "tests" / "pretend_gpu" / "everywhere", ROOT, ROOT / "tools"]
    pretending = {"DS_ACCELERATOR": "cuda", "PYTHONPATH": os.pathsep.join(map(str, places))}
    return subprocess.run(
        [sys.executable, *words],
        env=dict(os.environ) | pretending | environ,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


class PretendGpus:
    def __init__(self) -> None:
        environment = dict(os.environ) | {
            "DS_ACCELERATOR": "cuda",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        self._server = subprocess.Popen(
            [sys.executable, "-m", "pretend_gpu.serve"],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def run(
        self, fn: Callable[..., Any], world_size: int, *args: Any, capability: tuple[int, int] = (9, 0)
    ) -> list[Any]:
        """`processes.run_distributed` on as many GPUs: results, by global rank, and arguments are JSON."""
        request = {"module": fn.__module__, "function": fn.__name__, "world_size": world_size}
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps(request | {"capability": capability, "args": args}), file=self._server.stdin, flush=True)
        answer = self._server.stdout.readline()
        assert answer, f"the process with the GPUs ended with {self._server.wait()}"
        reply = json.loads(answer)
        assert "results" in reply, reply["problem"]
        results: list[Any] = reply["results"]
        return results

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=60)
