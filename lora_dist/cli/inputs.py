"""What can be refused before any process starts: files, sizes, targets."""

import os
from pathlib import Path

from lora_dist.config import ModelConfig, RunConfig, compute_dp_size, compute_num_microbatches
from lora_dist.lora.targets import build_adapter_specs


def check_inputs(config: RunConfig, world_size: int) -> None:
    """ValueError for what a run of `config` on `world_size` processes cannot use. Starts no process, joins no group."""
    dp_size = compute_dp_size(config.topology, world_size)
    compute_num_microbatches(config.loop, dp_size)
    build_adapter_specs(config.lora, config.model)
    _check_data_files(config)


def check_checkpoint(model: ModelConfig) -> None:
    """ValueError where the base checkpoint is not whole or not this model's. Reads its headers; imports torch."""
    from lora_dist.files.hf_checkpoint import check_hf_checkpoint

    if model.checkpoint is not None:
        check_hf_checkpoint(model, model.checkpoint)


def _check_data_files(config: RunConfig) -> None:
    if config.data.format == "fake":
        return
    key = "model.checkpoint" if config.model.tokenizer is None else "model.tokenizer"
    tokenizer = config.model.tokenizer or config.model.checkpoint
    if tokenizer is None:
        raise ValueError(f"data={config.data.name} is text, but there is no tokenizer; give model.tokenizer=DIR")
    if not Path(tokenizer).is_dir():
        raise ValueError(f"{key}={tokenizer} is not a directory; it should hold the tokenizer's files")
    for key, path in (("data.train", config.data.train), ("data.valid", config.data.valid)):
        if path is not None and not Path(path).is_file():
            raise ValueError(f"{key}={path} is no file; give the path of a {config.data.format} file")
        if path is not None and not os.access(path, os.R_OK):
            raise ValueError(f"{key}={path} cannot be read: no permission")
