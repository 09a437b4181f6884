"""A tiny random checkpoint of every supported family, written by transformers' own classes."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from family_models import FAMILIES
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from lora_dist.config import ModelConfig
from lora_dist.files.hf_checkpoint import read_model_fields

_FROM_ONE = ("gemma3_text", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
"""Whose norms' factors are one more than their weights, but for those inside a gated DeltaNet."""


@torch.no_grad()
def build_family_model(name: str, seed: int = 0) -> PreTrainedModel:
    """Eval mode, every parameter drawn: transformers leaves biases zero and norms one."""
    model = FAMILIES[name]()
    if hasattr(model.config, "num_local_experts") or hasattr(model.config, "num_experts"):
        model.set_experts_implementation("eager")  # the other ones have no fp64
    generator = torch.Generator().manual_seed(seed)
    for parameter_name, parameter in model.named_parameters():
        drawn = 0.3 * torch.randn(parameter.shape, generator=generator)
        is_factor = "norm" in parameter_name and parameter_name.endswith("weight")
        if name in _FROM_ONE:
            is_factor = parameter_name.endswith("linear_attn.norm.weight")
        drawn = drawn / 0.3 if parameter_name.endswith("sinks") else drawn  # as large as scores
        parameter.copy_(1 + drawn if is_factor else drawn)
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("e_score_correction_bias"):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    return model.eval()


class StayDouble(TorchFunctionMode):
    """Within, what is double and has a gradient stays double where transformers would make it fp32: in its norms,
    routers and delta rule. Angles, which have none, are computed in fp32 here too.
    """

    def __torch_function__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> torch.Tensor:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, torch.Tensor) and first.dtype == torch.float64 and first.requires_grad:
            if func is torch.Tensor.float:
                return first
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()}
        return func(*args, **kwargs)


def name_as_stored(tensors: Mapping[str, torch.Tensor], model: ModelConfig) -> dict[str, torch.Tensor]:
    """What transformers holds in memory by the names of its files, where it stacks the experts of a layer."""
    if model.num_experts is None or model.family == "gpt_oss":  # whose files have them so too
        return dict(tensors)
    as_mixtral = model.family in ("mixtral", "minimax_m2")
    gate, up, down = ("w1", "w3", "w2") if as_mixtral else ("gate_proj", "up_proj", "down_proj")
    stored = {}
    for name, tensor in tensors.items():
        if as_mixtral:
            name = name.replace(".mlp.", ".block_sparse_moe.")
        place, _, kind = name.rpartition(".")
        if kind == "gate_up_proj":
            for expert, (one, other) in enumerate(chunk.chunk(2) for chunk in tensor):
                stored |= {f"{place}.{expert}.{gate}.weight": one, f"{place}.{expert}.{up}.weight": other}
        elif kind == "down_proj":
            stored |= {f"{place}.{expert}.{down}.weight": one for expert, one in enumerate(tensor)}
        else:
            stored[name] = tensor
    return stored


def write_family_checkpoint(name: str, directory: Path, *, dtype: torch.dtype = torch.float32) -> ModelConfig:
    """transformers' own files; its configuration here."""
    build_family_model(name).to(dtype).save_pretrained(directory)
    return read_family_config(directory)


def read_family_config(directory: Path) -> ModelConfig:
    return ModelConfig(**read_model_fields(directory) | {"hidden_dropout": 0.0, "attention_dropout": 0.0})


@torch.no_grad()
def compute_family_logits(directory: Path, tokens_BS: torch.Tensor) -> torch.Tensor:
    """[B, S, V], fp32, from the files."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()(tokens_BS).logits


def edit_family_config(directory: Path, **changes: object) -> None:
    """Set keys of config.json; the value "gone" leaves one out."""
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "gone"}))
