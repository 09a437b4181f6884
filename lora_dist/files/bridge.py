"""Adapters under Megatron-Bridge's names: one pair a linear, the rows of a fused linear_qkv head by head.

Shapes: A [R, H], B [O, R].
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lora_dist.config import ModelConfig
from lora_dist.lora.layer import compute_fused_rows
from lora_dist.lora.spec import AdapterSpec
from lora_dist.lora.targets import find_linear


def to_bridge(
    values: Mapping[str, torch.Tensor], specs: Sequence[AdapterSpec], model: ModelConfig, bias: str
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors, and the settings of Megatron-Bridge's LoRA: one dim and one alpha for every linear.

    Smaller ranks are padded with zeros, which change nothing; where scalings differ, B takes up the difference.
    ValueError for trained biases, which its adapters have not.
    """
    if bias != "none":
        raise ValueError(f"format=bridge: the adapter has trained biases (bias={bias}); use format=peft")
    groups: dict[str, list[AdapterSpec]] = defaultdict(list)
    for spec in specs:
        groups[f"decoder.layers.{spec.layer}.{find_linear(spec.target, model)}"].append(spec)
    dim = max(sum(spec.lora_rank for spec in group) for group in groups.values())
    scaling = specs[0].scaling
    tensors = {}
    for name, group in groups.items():
        a_RH, b_OR = _stack(values, group, model, scaling)
        padding = dim - a_RH.shape[0]
        tensors[f"{name}.adapter.linear_in.weight"] = torch.nn.functional.pad(a_RH, (0, 0, 0, padding))
        tensors[f"{name}.adapter.linear_out.weight"] = torch.nn.functional.pad(b_OR, (0, padding))
    targets = list(dict.fromkeys(name.rpartition(".")[2] for name in groups))
    return tensors, {"target_modules": targets, "dim": dim, "alpha": scaling * dim, "dropout": specs[0].dropout}


def _stack(
    values: Mapping[str, torch.Tensor], group: Sequence[AdapterSpec], model: ModelConfig, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The A one below the other, the B as blocks on the rows that Megatron gives each target of a fused linear."""
    a_RH = torch.cat([values[f"{spec.name}.lora_A"] for spec in group])
    bs = [values[f"{spec.name}.lora_B"] for spec in group]
    bs = [b if spec.scaling == scaling else b * (spec.scaling / scaling) for b, spec in zip(bs, group, strict=True)]
    rows = compute_fused_rows(group[0].target, model, group[0].layer)
    if rows is None:
        return a_RH, bs[0]
    b_OR = a_RH.new_zeros(sum(map(len, rows.values())), a_RH.shape[0])
    b_OR[torch.cat([rows[spec.target] for spec in group])] = torch.block_diag(*bs)
    return a_RH, b_OR
