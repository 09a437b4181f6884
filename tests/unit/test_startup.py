"""What a process loads before it does anything: a job's start waits for the slowest of its processes."""

import subprocess
import sys
from pathlib import Path

_LOADED = """
import sys
print("loaded:", *(name for name in ("torch._inductor.compile_fx", "wandb", "matplotlib") if name in sys.modules))
import torch
assert torch.compile.__module__ == "torch", torch.compile
"""
_IMPORTS = "import lora_dist.run, lora_dist.generate_job"
_TRAINS = """
from lora_dist.cli.main import main
assert main(["train", "experiment=debug/tiny_lora", "topology=single", "device=cpu", "loop.num_steps=1"]) == 0
"""


def _run(program: str, directory: Path) -> list[str]:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=directory)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_imports_load_neither_compiler_nor_tracker_nor_plots(tmp_path: Path) -> None:
    """Megatron would load the first two, and leave its own torch.compile behind if it were not put back."""
    assert _run(_IMPORTS + _LOADED + "import wandb", tmp_path) == ["loaded:"]


def test_a_run_loads_no_compiler(tmp_path: Path) -> None:
    """DeepSpeed would, with its first engine."""
    *_, last = _run(_TRAINS + _LOADED, tmp_path)
    assert last == "loaded:"
