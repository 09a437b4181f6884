"""The base model's parameters on this rank: canonical names, how TP splits them, and a topology-free seeded start."""

import math
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from lora_dist.base_shapes import CHOICE_OFFSETS
from lora_dist.config import ModelConfig
from lora_dist.lora.factors import derive_seed
from lora_dist.lora.layer import find_shared_ranges
from lora_dist.mcore.model import ShardedGpt
from lora_dist.mcore.router import Router
from lora_dist.parameters import TrainableParameter, find_shape
from lora_dist.quant.weight import QuantizedWeight
from lora_dist.whole import cut_shard

_SHARD_DIMS = {
    "word_embeddings.weight": 0,
    "output_layer.weight": 0,
    "linear_qkv.weight": 0,
    "linear_qkv.bias": 0,
    "linear_q_proj.weight": 0,
    "linear_q_up_proj.weight": 0,
    "linear_kv_up_proj.weight": 0,
    "linear_fc1.weight": 0,
    "linear_fc1.bias": 0,
    "linear_in.weight": 0,
    "linear_proj.weight": 1,
    "linear_out.weight": 1,
    "linear_fc2.weight": 1,
    **{f"core_attention.{name}": 0 for name in ("sinks", "kernels", "decay_logs", "step_offsets")},
    "layernorm_q.weight": 0,
    "layernorm_k.weight": 0,
}
SHARED_ROWS = {".linear_qkv.": "fused", ".layernorm_k.": "k_proj"}
"""Parts of the names of what ranks that share a key-value head have alike, and whose ranges those are."""
_BLOCK_SIZE = 2**24
"""Elements drawn from one generator: one thread draws some 1e8 a second, and GPT-3 has 1.75e11."""
_ON_SEQUENCE_SHARD = (
    *("layernorm.weight", "layernorm.bias", "linear_proj.bias", "linear_fc2.bias"),
    *("linear_q_down_proj.weight", "linear_kv_down_proj.weight"),
)
"""Replicated parameters that act on the local sequence shard under sequence parallelism."""
_ON_OWN_SLICE = (
    *("q_layernorm.weight", "k_layernorm.weight", "core_attention.norm_factors"),
    *("router.weight", "router.bias", "shared_experts.gate.weight"),
)
"""Replicated parameters that act on this rank's heads alone, or for its slices of the experts."""
_ADDED = ("lora_", "_bottleneck.", "prefix_vectors.")
"""Parts of the names of what methods put beside the base."""


def describe_weights(gpt: ShardedGpt) -> list[TrainableParameter]:
    """As `describe_base_parameters`, but experts' weights and biases one by one and with what no method trains: how
    files and the seeded start have them.

    To be filled and read, not to be trained: an expert's parameter is a part of its layer's.
    """
    weights = [weight for one in describe_base_parameters(gpt) for weight in _split_experts(one)]
    return weights + _describe_offsets(gpt)


def _describe_offsets(gpt: ShardedGpt) -> list[TrainableParameter]:
    return [
        TrainableParameter(
            name=canonical_name(gpt, f"{local_name}.{CHOICE_OFFSETS.rpartition('.')[2]}"),
            parameter=nn.Parameter(module.choice_offsets_E, requires_grad=False),
            full_shape=tuple(module.choice_offsets_E.shape),
            shard_dim=None,
            tp_partial_grad=False,
            kind="constant",
            kept_dtype=torch.float32,
        )
        for local_name, module in gpt.named_modules()
        if isinstance(module, Router) and module.choice_offsets_E is not None
    ]


def _split_experts(one: TrainableParameter) -> list[TrainableParameter]:
    if not _is_of_experts(one.name, one.full_shape):
        return [one]
    return [
        replace(
            one,
            name=_name_expert(one.name, expert),
            parameter=nn.Parameter(_select_expert(one.parameter, expert), requires_grad=False),
            full_shape=one.full_shape[1:],
            shard_dim=None if one.shard_dim is None else one.shard_dim - 1,
            stack=(one, expert) if one.quantized is None else None,
            quantized=None if one.quantized is None else one.quantized[expert],
        )
        for expert in range(one.full_shape[0])
    ]


def _is_of_experts(name: str, shape: Sequence[int]) -> bool:
    """Whether a parameter holds those of all experts of a layer, which come first."""
    return len(shape) == (2 if name.endswith(".bias") else 3)


def _select_expert(stacked: nn.Parameter, expert: int) -> torch.Tensor:
    """A part of the same memory; where ZeRO 3 has partitioned it, of the same shape only."""
    shape = find_shape(stacked)
    return stacked.detach()[expert] if tuple(stacked.shape) == shape else _show_shape(shape[1:], stacked.dtype)


def _show_shape(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """One element shown in every place: on the planner's tensors, which are all meta, it takes no memory either."""
    return torch.empty((), dtype=dtype, device="meta").expand(tuple(shape))


def _name_expert(name: str, expert: int) -> str:
    """`decoder.layers.0.mlp.linear_fc1.weight` -> `decoder.layers.0.mlp.experts.3.linear_fc1.weight`."""
    return name.replace(".mlp.", f".mlp.experts.{expert}.")


def describe_base_parameters(gpt: ShardedGpt) -> list[TrainableParameter]:
    """Every parameter of this rank's base shard, adapters left out, in the module's order.

    A linear of experts is one parameter [E, O, H] a layer, and its bias one [E, O].
    """
    described = []
    for local_name, parameter in gpt.named_parameters():
        if any(part in local_name for part in _ADDED):
            continue
        described.append(_describe(gpt, canonical_name(gpt, local_name), parameter))
    return described + _describe_quantized(gpt)


def _describe_quantized(gpt: ShardedGpt) -> list[TrainableParameter]:
    described = []
    for local_name, module in gpt.named_modules():
        if isinstance(module, QuantizedWeight):
            shape_only = nn.Parameter(_show_shape(module.shape, gpt.config.params_dtype), requires_grad=False)
            one = _describe(gpt, canonical_name(gpt, local_name), shape_only)
            one.quantized = module
            described.append(one)
    return described


@contextmanager
def open_value(one: TrainableParameter) -> Iterator[torch.Tensor]:
    """A tensor of the shard's shape to fill: the parameter itself, or a temporary that is quantised at the end.

    The temporary is fp32, so that what is stored does not depend on the run's dtype.
    """
    if one.quantized is None:
        yield one.parameter
    else:
        value = torch.empty(one.local_shape, device=one.quantized.device)
        yield value
        one.quantized.fill(value)


def canonical_name(gpt: ShardedGpt, local_name: str) -> str:
    """Megatron's name with the layer's global index, the same at every pipeline size."""
    local_name = re.sub(r"parametrizations\.(\w+)\.original$", r"\1", local_name)  # a bias that trains in fp32
    local_name = re.sub(r"\.whole_norm\.([qk])_weight$", r".layernorm_\1.weight", local_name)  # one module for both
    return re.sub(r"^decoder\.layers\.(\d+)\.", lambda m: f"decoder.layers.{int(m[1]) + gpt.first_layer}.", local_name)


def find_shard_dim(name: str) -> int | None:
    """Dimension that TP splits, by canonical name; None for what every TP rank holds whole."""
    return next((dim for suffix, dim in _SHARD_DIMS.items() if name.endswith(suffix)), None)


def _describe(gpt: ShardedGpt, name: str, parameter: nn.Parameter) -> TrainableParameter:
    topology = gpt.topology
    shard_dim = find_shard_dim(name)
    full_shape = list(find_shape(parameter))
    shared_ranges = find_shared_ranges(gpt.model, topology.tp_size)
    tp_ranges = next((shared_ranges.get(rows) for part, rows in SHARED_ROWS.items() if part in name), None)
    is_of_experts = _is_of_experts(name, full_shape)
    if shard_dim is not None:
        shard_dim += is_of_experts
        full_shape[shard_dim] *= topology.tp_size
    if tp_ranges is not None:
        full_shape[0] = max(start + size for ranges in tp_ranges for start, size in ranges)
    is_embedding = name.endswith(("word_embeddings.weight", "output_layer.weight"))
    if is_embedding:
        full_shape[0] = gpt.true_vocab_size
    on_sequence_shard = topology.sequence_parallel and name.endswith(_ON_SEQUENCE_SHARD)
    adds_share = is_of_experts and shard_dim is None  # of a bias, each rank the same
    on_own_slice = topology.tp_size > 1 and (name.endswith(_ON_OWN_SLICE) or adds_share)
    is_gated = gpt.config.gated_linear_unit and ".linear_fc1." in name
    is_tied = is_embedding and gpt.share_embeddings_and_output_weights
    return TrainableParameter(
        name=name,
        parameter=parameter,
        full_shape=tuple(full_shape),
        shard_dim=shard_dim,
        tp_ranges=tp_ranges,
        tp_partial_grad=on_sequence_shard or on_own_slice,
        kind="bias" if name.endswith("bias") else "base",
        num_blocks=2 if is_gated else 1,
        tied=is_tied and topology.pp_size > 1,
        owned=not (is_tied and name.endswith("output_layer.weight")),
    )


@torch.no_grad()
def initialize_base(gpt: ShardedGpt, model: ModelConfig, seed: int) -> None:
    """GPT-2's initialisation, whatever the family: the same at every topology.

    Each whole tensor is drawn from (seed, name) and sliced. Normal with `init_std`, the two projections into the
    residual stream by 1 / sqrt(2 num_layers) smaller, biases zero, norms at one (Radford et al. 2019, section 2.3). A
    gated DeltaNet's steps are offset by one, and its heads' decays differ.
    """
    for described in describe_weights(gpt):
        with open_value(described) as value:
            _initialize(value, described, gpt, model, seed)


def _initialize(
    value: torch.Tensor, described: TrainableParameter, gpt: ShardedGpt, model: ModelConfig, seed: int
) -> None:
    name = described.name
    if name.endswith(("bias", CHOICE_OFFSETS)):
        value.zero_()
    elif "layernorm" in name:
        value.fill_(0.0 if model.architecture.unit_norms else 1.0)
    elif name.endswith(("norm_factors", "step_offsets")):
        value.fill_(1.0)
    elif name.endswith("decay_logs"):
        value.copy_(cut_shard(_draw(name, described.full_shape, 1.0, seed), described, gpt.topology))
    else:
        residual = name.endswith(("linear_proj.weight", "linear_out.weight", "linear_fc2.weight"))
        std = model.init_std / math.sqrt(2 * model.num_layers) if residual else model.init_std
        source = name if described.owned else "embedding.word_embeddings.weight"
        value.copy_(cut_shard(_draw(source, described.full_shape, std, seed), described, gpt.topology))


def _draw(source: str, shape: tuple[int, ...], std: float, seed: int) -> torch.Tensor:
    """Normal; blocks of it in as many threads as there are cores, each from a generator of its own."""
    whole = torch.empty(shape)

    def fill(index: int, block: torch.Tensor) -> None:
        parts = (source, index) if index else (source,)
        block.normal_(generator=torch.Generator().manual_seed(derive_seed(seed, *parts))).mul_(std)

    blocks = whole.view(-1).split(_BLOCK_SIZE)
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        list(pool.map(fill, range(len(blocks)), blocks))
    return whole
