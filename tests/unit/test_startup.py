"""What a process loads before it does anything: a job's start waits for the slowest of its processes."""

import subprocess
import sys

_PROGRAM = """
import sys
import lora_dist.run, lora_dist.generate_job
print(*(name for name in ("torch._inductor", "wandb", "matplotlib") if name in sys.modules))
import torch
assert torch.compile.__module__ == "torch", torch.compile
import wandb
"""


def test_a_run_loads_neither_compiler_nor_tracker_nor_plots() -> None:
    """Megatron would load the first two, and leave its own torch.compile behind if it were not put back."""
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
