"""Verbs as a launcher's process calls them, on the packaged demo base and data, and what their runs computed."""

import os
from pathlib import Path

import torch.distributed as dist

from lora_dist.cli.main import main
from lora_dist.measure.metrics_file import read_metrics

ASSETS = Path(__file__).parents[1] / "lora_dist" / "assets"
DEMO = [
    *("experiment=e2e_demo", "track=none", "loop.num_steps=4", "loop.micro_batch_size=2", "optim.num_warmup_steps=0"),
    *("data.max_train_examples=40", "data.max_valid_examples=12"),
]


def call(words: list[str]) -> int:
    """`lora-dist WORDS` as one process of a job that a launcher started."""
    os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    return main(words)


def read_losses(run_dir: Path) -> list[dict[str, float]]:
    """What training computed, without what depends on the clock."""
    keys = ("step", "loss", "grad_norm", "lr", "valid_loss")
    return [{key: line[key] for key in keys if key in line} for line in read_metrics(run_dir / "metrics.jsonl")]
