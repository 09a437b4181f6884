"""Write an adapter in another tool's format, or merged into its base as a Hugging Face checkpoint."""

from lora_dist.adapter_config import ExportConfig
from lora_dist.cli.inputs import check_adapter, check_new
from lora_dist.run_dir import find_adapter

CONFIG = ExportConfig


def check(config: ExportConfig) -> None:
    """ValueError where there is no adapter, or something where the files would go."""
    check_adapter("adapter", config.adapter)
    check_new("output", config.output)


def run(config: ExportConfig) -> None:
    """Every process calls it; one alone where nothing but files is converted."""
    from lora_dist.adapter_jobs import export_files, write_merged

    if config.format == "hf_merged":
        write_merged(config, find_adapter(config.adapter), config.output)
    else:
        export_files(config)
