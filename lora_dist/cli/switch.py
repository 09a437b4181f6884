"""Merge adapters one after the other into the same weights in place: time, memory, and the base back bit for bit."""

from lora_dist.adapter_config import SwitchConfig
from lora_dist.cli.inputs import check_adapter

CONFIG = SwitchConfig


def check(config: SwitchConfig) -> None:
    """ValueError where an adapter is missing."""
    for directory in config.adapters:
        check_adapter("adapters", directory)


def run(config: SwitchConfig) -> None:
    """Every process calls it; the first prints."""
    from lora_dist.adapter_jobs import measure_switch

    measure_switch(config)
