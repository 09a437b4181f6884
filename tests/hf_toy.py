"""Tiny random GPT-2 checkpoints written by transformers, and what transformers computes from them."""

import json
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lora_dist.config import ModelConfig
from lora_dist.files.hf_checkpoint import read_model_fields

VOCAB_SIZE = 101
"""Divides by no tp_size, and is padded at each."""


def build_hf_model(seed: int = 0) -> GPT2LMHeadModel:
    """Four layers, eval mode, every parameter drawn: transformers leaves biases zero and norms one."""
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_positions=32, n_embd=32, n_layer=4, n_head=4, n_inner=48)
    config.bos_token_id = config.eos_token_id = 100
    model = GPT2LMHeadModel(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + drawn if ".ln_" in name and name.endswith("weight") else drawn)
    return model.eval()


def write_toy_checkpoint(
    directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB"
) -> ModelConfig:
    """transformers' own files of the toy model; its configuration here."""
    build_hf_model(seed).to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    return read_toy_config(directory)


def read_toy_config(directory: Path) -> ModelConfig:
    return ModelConfig(**read_model_fields(directory) | {"hidden_dropout": 0.0, "attention_dropout": 0.0})


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def draw_tokens() -> torch.Tensor:
    """[B, S] = [2, 16]."""
    return torch.randint(0, VOCAB_SIZE, (2, 16), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def compute_hf_logits(directory: Path) -> torch.Tensor:
    """[B, S, V], fp32."""
    model = GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float32).eval()
    return model(draw_tokens()).logits
