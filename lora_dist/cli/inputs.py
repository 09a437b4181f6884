"""What can be refused before any process starts: files, sizes, targets."""

import os
from collections.abc import Collection
from pathlib import Path

from lora_dist.config import LORA_METHODS, ModelConfig, RunConfig, compute_dp_size, compute_num_microbatches
from lora_dist.lora.targets import build_adapter_specs
from lora_dist.lora.trained_base import check_biases
from lora_dist.run_dir import find_adapter
from lora_dist.stopping import load_torch


def check_inputs(config: RunConfig, world_size: int, methods: Collection[str]) -> None:
    """ValueError for what a job of `methods` on `world_size` processes cannot use. Starts no process, joins no group.

    LoRA's targets are checked where LoRA trains: a family may have none of the default ones.
    """
    dp_size = compute_dp_size(config.topology, world_size)
    compute_num_microbatches(config.loop, dp_size)
    if not set(LORA_METHODS).isdisjoint(methods):
        check_biases(build_adapter_specs(config.lora, config.model), config.model, config.lora.bias)
    _check_data_files(config)


def list_methods(verb: str, config: RunConfig) -> list[str]:
    """The methods that `verb` trains; before `preflight`, whose job may be either, those of train and compare both."""
    if verb == "compare":
        return config.compare.methods
    if verb == "bench":
        return config.bench.methods
    return [config.method] if verb == "train" or config.method in config.compare.methods else []


def check_checkpoint(model: ModelConfig) -> None:
    """ValueError where the base checkpoint is not whole or not this model's. Reads its headers; imports torch."""
    load_torch()
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
    template = config.model.chat_template
    if template is not None and not Path(template).is_file():
        raise ValueError(f"model.chat_template={template} is no file; give the path of a Jinja file")
    for key, path in (("data.train", config.data.train), ("data.valid", config.data.valid)):
        if path is not None and not Path(path).is_file():
            raise ValueError(f"{key}={path} is no file; give the path of a file in format {config.data.format}")
        if path is not None and not os.access(path, os.R_OK):
            raise ValueError(f"{key}={path} cannot be read: no permission")


def check_new(key: str, directory: str) -> None:
    """ValueError where `directory` exists already: what is there is not written over."""
    path = Path(directory)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{key}={directory} exists already; give a new directory")
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise ValueError(f"{key}={directory} cannot be made in {parent}; give another directory")


def check_adapter(key: str, directory: str) -> None:
    """ValueError where `directory` is no adapter of the store and no run that wrote one; its files are read later."""
    if not Path(directory).is_dir():
        raise ValueError(
            f"{key}={directory} is not a directory; `lora-dist adapters directory=DIR` lists what there is"
        )
    if (Path(find_adapter(directory)) / "manifest.json").is_file():
        return
    if (Path(directory) / "model").is_dir():
        whole = f"model.checkpoint={Path(directory) / 'model'}"
        raise ValueError(f"{key}={directory} is a run that trained the whole model; give {whole} and no adapter")
    raise ValueError(f"{key}={directory} has no manifest.json; `lora-dist import` makes one of PEFT's or loralib's")
