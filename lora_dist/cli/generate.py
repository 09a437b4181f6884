"""Generate text from contexts with the base, an adapter beside or merged into it, or several mixed in one batch."""

from pathlib import Path

from lora_dist.cli.inputs import check_adapter
from lora_dist.generation_config import GenerateConfig

CONFIG = GenerateConfig


def check(config: GenerateConfig) -> None:
    """ValueError where an adapter, the contexts or the tokenizer is missing, or the output is a directory."""
    for directory in config.directories:
        check_adapter("adapters" if config.adapters else "adapter", directory)
    if config.model.tokenizer is None and config.model.checkpoint is None:
        raise ValueError(
            f"model={config.model.name} has no tokenizer; give model.tokenizer=DIR or model.checkpoint=DIR"
        )
    options = config.generate
    if options.input is not None and not Path(options.input).is_file():
        raise ValueError(f"generate.input={options.input} is no file; give a file of contexts")
    if options.output is not None and Path(options.output).is_dir():
        raise ValueError(f"generate.output={options.output} is a directory; give a new file")


def run(config: GenerateConfig) -> None:
    """Every process calls it; the first writes or prints."""
    from lora_dist.generate_job import generate

    generate(config)
