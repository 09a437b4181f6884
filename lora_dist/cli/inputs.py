"""What can be refused before any process starts: files, sizes, targets."""

import os
from pathlib import Path

from lora_dist.config import RunConfig, compute_dp_size, compute_num_microbatches
from lora_dist.files.hf_checkpoint import check_hf_checkpoint
from lora_dist.lora.targets import build_adapter_specs


def check_inputs(config: RunConfig, world_size: int) -> None:
    """ValueError for what a run of `config` on `world_size` processes cannot use. Reads headers, no data."""
    dp_size = compute_dp_size(config.topology, world_size)
    compute_num_microbatches(config.loop, dp_size)
    build_adapter_specs(config.lora, config.model)
    if config.model.checkpoint is not None:
        check_hf_checkpoint(config.model, config.model.checkpoint)
    _check_directory("model.tokenizer", config.model.tokenizer)
    _check_data_files(config)


def _check_data_files(config: RunConfig) -> None:
    if config.data.format == "fake":
        return
    if (config.model.tokenizer or config.model.checkpoint) is None:
        raise ValueError(f"data={config.data.name} is text, but there is no tokenizer; give model.tokenizer=DIR")
    for key, path in (("data.train", config.data.train), ("data.valid", config.data.valid)):
        if path is not None and not Path(path).is_file():
            raise ValueError(f"{key}={path} is no file; give the path of a {config.data.format} file")
        if path is not None and not os.access(path, os.R_OK):
            raise ValueError(f"{key}={path} cannot be read: no permission")


def _check_directory(key: str, path: str | None) -> None:
    if path is not None and not Path(path).is_dir():
        raise ValueError(f"{key}={path} is no directory; give a Hugging Face GPT-2 directory")
