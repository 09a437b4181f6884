"""Train the methods of compare.methods on the same shards and data, and write one report."""

from lora_dist.cli.settle import settle
from lora_dist.config import RunConfig


def run(config: RunConfig) -> None:
    """Every process calls it; lora_dist.run is imported late because it brings torch, Megatron and DeepSpeed."""
    from lora_dist.run import compare

    compare(config, settle)
