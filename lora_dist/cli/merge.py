"""Merge an adapter into its base, shard by shard, and write a whole Hugging Face checkpoint."""

from lora_dist.adapter_config import MergeConfig
from lora_dist.cli.inputs import check_adapter, check_new
from lora_dist.run_dir import find_adapter

CONFIG = MergeConfig


def check(config: MergeConfig) -> None:
    """ValueError where there is no adapter, or something where the checkpoint would go."""
    check_adapter("adapter", config.adapter)
    check_new("output", config.output)


def run(config: MergeConfig) -> None:
    """Every process calls it."""
    from lora_dist.adapter_jobs import write_merged

    write_merged(config, find_adapter(config.adapter), config.output)
