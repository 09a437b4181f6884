"""Say what trained adapters have learnt: shared directions between them, and what of the base they amplify."""

from lora_dist.adapter_config import AnalyseConfig
from lora_dist.cli.inputs import check_adapter, check_new

CONFIG = AnalyseConfig


def check(config: AnalyseConfig) -> None:
    """ValueError where an adapter is missing or the output exists already."""
    for directory in config.adapters:
        check_adapter("adapters", directory)
    check_new("output", config.output)


def run(config: AnalyseConfig) -> None:
    """Every process calls it; the first prints and writes."""
    from lora_dist.analyse_job import analyse

    analyse(config)
