"""Adapters written by PEFT itself, and read into a store, for the tests of import and export."""

from pathlib import Path

import peft
import torch

from lora_dist.adapter_config import ImportConfig
from lora_dist.checkpoint.convert import import_adapter
from lora_dist.checkpoint.store import StoredAdapter, open_adapter
from lora_dist.config import ModelConfig


@torch.no_grad()
def write_with_peft(
    model: torch.nn.Module, directory: Path, dtype: torch.dtype = torch.float32, **options: object
) -> None:
    """An adapter with nothing zero, saved by PEFT itself."""
    settings = {"task_type": "CAUSAL_LM", "fan_in_fan_out": True, **options}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(4)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
            if "lora_" in name:
                parameter.data = parameter.to(dtype)
    adapted.save_pretrained(directory)


def read_in(source: Path, output: Path, model: ModelConfig, **options: object) -> StoredAdapter:
    import_adapter(ImportConfig(model=model, source=str(source), output=str(output), **options), "base")  # type: ignore[arg-type]
    return open_adapter(output, model=model, base_fingerprint="base")


def build_loralib_state(targets: list[str], model: ModelConfig, *, wrapped: bool) -> dict:
    """MergedLinear's state on c_attn and Linear's on c_proj, in the shapes loralib gives them."""
    generator = torch.Generator().manual_seed(9)
    h, r, n = model.hidden_size, 3, len(targets)
    state = {}
    for layer in range(model.num_layers):
        name = f"transformer.h.{layer}.attn"
        state[f"{name}.c_attn.lora_A"] = torch.randn(r * n, h, generator=generator)
        state[f"{name}.c_attn.lora_B"] = torch.randn(h * n, r, generator=generator)
        state[f"{name}.c_proj.lora_A"] = torch.randn(r, h, generator=generator)
        state[f"{name}.c_proj.lora_B"] = torch.randn(h, r, generator=generator)
    return {"model_state_dict": state} if wrapped else state
