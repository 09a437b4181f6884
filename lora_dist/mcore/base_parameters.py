"""The base model's parameters on this rank: canonical names, how TP splits them, and a topology-free seeded start."""

import math
import re

import torch
from torch import nn

from lora_dist.config import ModelConfig
from lora_dist.lora.factors import derive_seed
from lora_dist.mcore.model import ShardedGpt
from lora_dist.parameters import TrainableParameter

_SHARD_DIMS = {
    "word_embeddings.weight": 0,
    "output_layer.weight": 0,
    "linear_qkv.weight": 0,
    "linear_qkv.bias": 0,
    "linear_fc1.weight": 0,
    "linear_fc1.bias": 0,
    "linear_proj.weight": 1,
    "linear_fc2.weight": 1,
}
_ON_SEQUENCE_SHARD = ("layernorm.weight", "layernorm.bias", "linear_proj.bias", "linear_fc2.bias")
"""Replicated parameters that act on the local sequence shard under sequence parallelism."""


def describe_base_parameters(gpt: ShardedGpt) -> list[TrainableParameter]:
    """Every parameter of this rank's base shard, adapters left out, in the module's order."""
    described = []
    for local_name, parameter in gpt.named_parameters():
        if "lora_" in local_name or "_bottleneck." in local_name:
            continue
        described.append(_describe(gpt, canonical_name(gpt, local_name), parameter))
    return described


def canonical_name(gpt: ShardedGpt, local_name: str) -> str:
    """Megatron's name with the layer's global index, the same at every pipeline size."""
    local_name = re.sub(r"parametrizations\.(\w+)\.original$", r"\1", local_name)  # a bias that trains in fp32
    return re.sub(r"^decoder\.layers\.(\d+)\.", lambda m: f"decoder.layers.{int(m[1]) + gpt.first_layer}.", local_name)


def _describe(gpt: ShardedGpt, name: str, parameter: nn.Parameter) -> TrainableParameter:
    topology = gpt.topology
    shard_dim = next((dim for suffix, dim in _SHARD_DIMS.items() if name.endswith(suffix)), None)
    full_shape = list(parameter.shape)
    if shard_dim is not None:
        full_shape[shard_dim] *= topology.tp_size
    is_embedding = name.endswith(("word_embeddings.weight", "output_layer.weight"))
    if is_embedding:
        full_shape[0] = gpt.true_vocab_size
    on_sequence_shard = topology.sequence_parallel and name.endswith(_ON_SEQUENCE_SHARD)
    return TrainableParameter(
        name=name,
        parameter=parameter,
        full_shape=tuple(full_shape),
        shard_dim=shard_dim,
        tp_partial_grad=on_sequence_shard,
        kind="bias" if name.endswith("bias") else "base",
        tied=is_embedding and topology.pp_size > 1,
        owned=not name.endswith("output_layer.weight"),
    )


@torch.no_grad()
def initialize_base(gpt: ShardedGpt, model: ModelConfig, seed: int) -> None:
    """GPT-2's initialisation, each whole tensor drawn from (seed, name) and sliced: the same at every topology.

    Normal with `init_std`, the two projections into the residual stream by 1 / sqrt(2 num_layers) smaller, biases
    zero, norms one (Radford et al. 2019, section 2.3).
    """
    for described in describe_base_parameters(gpt):
        name, parameter = described.name, described.parameter
        if name.endswith("bias"):
            parameter.zero_()
        elif "layernorm" in name:
            parameter.fill_(1.0)
        else:
            residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            std = model.init_std / math.sqrt(2 * model.num_layers) if residual else model.init_std
            _fill_with_shard(described, gpt, _draw(name, described.full_shape, std, seed))


def _draw(name: str, shape: tuple[int, ...], std: float, seed: int) -> torch.Tensor:
    source = "embedding.word_embeddings.weight" if name == "output_layer.weight" else name
    generator = torch.Generator().manual_seed(derive_seed(seed, source))
    return torch.randn(shape, generator=generator) * std


def _fill_with_shard(described: TrainableParameter, gpt: ShardedGpt, whole: torch.Tensor) -> None:
    """Copy this TP rank's part; the rows that pad the vocabulary become zero."""
    parameter, dim = described.parameter, described.shard_dim
    if dim is None:
        parameter.copy_(whole)
        return
    size = parameter.shape[dim]
    start = gpt.topology.tp_rank * size
    available = max(0, min(size, whole.shape[dim] - start))
    parameter.zero_()
    if available:
        parameter.narrow(dim, 0, available).copy_(whole.narrow(dim, start, available))
