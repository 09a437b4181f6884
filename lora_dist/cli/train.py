"""Train one method on one model and write a run directory."""

from lora_dist.cli.settle import settle
from lora_dist.config import RunConfig


def run(config: RunConfig) -> None:
    """Every process calls it; lora_dist.run is imported late because it brings torch, Megatron and DeepSpeed."""
    from lora_dist.run import train

    train(config, settle)
