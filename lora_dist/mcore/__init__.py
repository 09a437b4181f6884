"""Megatron-core, imported nowhere else: the model's shards, the LoRA linears in them, weights, the schedule."""

import importlib
import sys
import warnings

import torch

# Remarks while it loads about packages that it can do without.
warnings.filterwarnings("ignore", module=r"megatron\.core")
# Of collectives whose names torch 2.13 changes: the older ones are what Megatron, DeepSpeed and older torch know.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)


def _import_megatron() -> None:
    """The first time, without what it loads on the way and nothing here uses: torch's compiler, as it wraps functions
    of its own in torch.compile, and wandb. Every process would wait seconds for them.
    """
    compile_function, had_wandb = torch.compile, "wandb" in sys.modules
    torch.compile = lambda function=None, **_: function if function is not None else lambda wrapped: wrapped
    if not had_wandb:
        sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        importlib.import_module("megatron.core.models.gpt.gpt_model")
    finally:
        torch.compile = compile_function
        if not had_wandb:
            del sys.modules["wandb"]


_import_megatron()
