"""Time the contenders of bench.contenders side by side on one device and write a record."""

from lora_dist.config import RunConfig


def run(config: RunConfig) -> None:
    """One process calls it; lora_dist.bench is imported late because it brings torch, Megatron and DeepSpeed."""
    from lora_dist.bench.runner import bench

    bench(config)
