"""The planned peak of one GPU against what CUDA's allocator says of the same step; skipped without a GPU."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_dist.cli.compose import compose_config
from lora_dist.cli.ranks import become_single_process
from lora_dist.config import HardwareConfig, RunConfig
from lora_dist.plan.execute import build_batches, execute_process
from lora_dist.run import build_engine, open_job

TOLERANCE = 0.03
OVERRIDES = [
    *("model=gpt3_1_3b", "data=fake", "data.seq_len=2048", "track=none", "device=cuda", "hardware=h100"),
    *("loop.micro_batch_size=2", "loop.global_batch_size=4"),
]
CASES = {
    "lora": ["dtype=bf16"],
    "lora-recompute": ["dtype=bf16", "loop.recompute=full"],
    "lora-padded": ["dtype=bf16", "data.collate=pad"],
    "lora-masked": ["dtype=bf16", "packed_attention=mask"],
    "full": ["dtype=bf16", "method=full", "loop.micro_batch_size=1"],
    "lora-fp16": ["dtype=fp16"],
}


def build_config(name: str) -> RunConfig:
    config = compose_config([*OVERRIDES, *CASES[name]])
    assert config.hardware is not None
    major, minor = torch.cuda.get_device_capability()
    hardware: HardwareConfig = replace(config.hardware, compute_capability=major + minor / 10)
    return replace(config, hardware=hardware)


def measure(name: str) -> int:
    """Peak allocated bytes of the second step, cuBLAS's workspace left out: the plan counts that as reserved."""
    config = build_config(name)
    with open_job(config) as topology:
        torch.zeros(8, 8, device=topology.device) @ torch.zeros(8, 8, device=topology.device)
        workspace = torch.cuda.memory_allocated()
        engine, _ = build_engine(config, topology)
        batches = build_batches(config, topology, config.loop.global_batch_size // config.loop.micro_batch_size)
        engine.train_step(batches, step=0, lr=1e-4)
        torch.cuda.reset_peak_memory_stats()
        engine.train_step(batches, step=1, lr=1e-4)
        return torch.cuda.max_memory_allocated() - workspace


def run_alone(what: str, name: str) -> int:
    """In a fresh interpreter: the plan's patches and CUDA's state keep out of each other's way."""
    environment = dict(os.environ) | {"DS_ACCELERATOR": "cpu" if what == "plan" else "cuda"}
    become_single_process(environment)
    done = subprocess.run(
        [sys.executable, __file__, what, name], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_planned_peak_is_what_cuda_says(name: str) -> None:
    planned, measured = run_alone("plan", name), run_alone("measure", name)
    assert planned == pytest.approx(measured, rel=TOLERANCE)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    what, name = sys.argv[1:]
    peak = (
        measure(name) if what == "measure" else execute_process(build_config(name), world_size=1, pp_rank=0).peak_bytes
    )
    print(json.dumps(peak))
