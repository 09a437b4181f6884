"""Megatron-core, imported nowhere else: the model's shards, the LoRA linears in them, weights, the schedule."""

import importlib
import sys
import warnings

from lora_dist.uncompiled import without_compiler

# Remarks while it loads about packages that it can do without.
warnings.filterwarnings("ignore", module=r"megatron\.core")
# Of collectives whose names torch 2.13 changes: the older ones are what Megatron, DeepSpeed and older torch know.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)


def _import_megatron() -> None:
    """The first time, without wandb, which it loads on the way and nothing here needs, and without the compiler."""
    had_wandb = "wandb" in sys.modules
    if not had_wandb:
        sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        with without_compiler():
            importlib.import_module("megatron.core.models.gpt.gpt_model")
    finally:
        if not had_wandb:
            del sys.modules["wandb"]


_import_megatron()
