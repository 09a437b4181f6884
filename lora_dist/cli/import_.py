"""Read a PEFT or loralib adapter into a new directory of the store."""

from pathlib import Path

from lora_dist.adapter_config import ImportConfig
from lora_dist.cli.inputs import check_new

CONFIG = ImportConfig


def check(config: ImportConfig) -> None:
    """ValueError where there is no source, or something where the adapter would go."""
    if not Path(config.source).exists():
        raise ValueError(f"source={config.source} does not exist")
    check_new("output", config.output)


def run(config: ImportConfig) -> None:
    """One process calls it."""
    from lora_dist.checkpoint.convert import import_adapter
    from lora_dist.files.hf_checkpoint import compute_base_fingerprint

    imported = import_adapter(config, compute_base_fingerprint(config.model, config.seed))
    print(f"{len(imported.specs)} adapters of {config.source} are in {config.output}", flush=True)
