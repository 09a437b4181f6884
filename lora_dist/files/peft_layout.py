"""An adapter in HF PEFT's files for the base's family: on GPT-2's fused c_attn, else one a projection; pure.

Those on experts are beside it (`peft_experts`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lora_dist.config import ModelConfig
from lora_dist.files.modules import list_linear_names
from lora_dist.files.peft_base import compute_base_shapes, from_peft_base, to_peft_base
from lora_dist.files.peft_config import describe_peft_config
from lora_dist.files.peft_experts import (
    compute_expert_shapes,
    describe_parameters,
    find_folded_ratios,
    from_peft_experts,
    to_peft_experts,
)
from lora_dist.files.peft_fused import (
    compute_fused_shapes,
    describe_fused_modules,
    from_peft_fused,
    group_specs,
    to_peft_fused,
)
from lora_dist.files.peft_modules import name_peft_modules
from lora_dist.files.peft_split import compute_split_keys, describe_split_modules
from lora_dist.lora.spec import AdapterSpec
from lora_dist.lora.targets import is_mlp_beside_experts


def to_peft_files(
    values: Mapping[str, torch.Tensor],
    specs: Sequence[AdapterSpec],
    model: ModelConfig,
    bias: str,
    modules: Sequence[str] = (),
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Whole values by canonical name -> adapter_model.safetensors and adapter_config.json."""
    plain, of_experts = _split(specs)
    if model.architecture.fused_targets:
        tensors, adapted = to_peft_fused(values, plain, model), describe_fused_modules(plain, model)
    else:
        names = list_linear_names(model)
        tensors = {key: values[name] for name, key in compute_split_keys(plain, names).items()}
        adapted = describe_split_modules(plain, names)
    # PEFT takes a linear of such a name for the experts' own, so it is given the name of its weight.
    beside = {
        list_linear_names(model)[spec.target].format(layer=spec.layer)
        for spec in plain
        if is_mlp_beside_experts(spec, model)
    }
    parameters = {f"{name}.weight": adapted.pop(name) for name in list(adapted) if name in beside}
    tensors |= to_peft_experts(values, of_experts, model)
    tensors |= to_peft_base(values, specs, model, bias, modules)
    config = describe_peft_config(
        adapted,
        specs[0],
        bias=bias,
        base_name=model.checkpoint,
        fan_in_fan_out=model.family == "gpt2",
        modules_to_save=name_peft_modules(modules, model),
        parameters=parameters | describe_parameters(of_experts, model),
    )
    return {key: tensors[key] for key in sorted(tensors)}, config  # the order in which PEFT writes them


def from_peft_tensors(
    tensors: Mapping[str, torch.Tensor],
    specs: Sequence[AdapterSpec],
    model: ModelConfig,
    bias: str,
    modules: Sequence[str] = (),
) -> dict[str, torch.Tensor]:
    """The inverse of `to_peft_files` where no scaling was folded into B; exact."""
    plain, of_experts = _split(specs)
    others = from_peft_experts(tensors, of_experts, model) | from_peft_base(tensors, specs, model, bias, modules)
    if model.architecture.fused_targets:
        return from_peft_fused(tensors, plain, model) | others
    keys = compute_split_keys(plain, list_linear_names(model))
    return {name: tensors[key] for name, key in keys.items()} | others


def compute_peft_shapes(
    specs: Sequence[AdapterSpec], model: ModelConfig, bias: str, modules: Sequence[str] = ()
) -> dict[str, tuple[int, ...]]:
    """Every key of adapter_model.safetensors and its shape."""
    plain, of_experts = _split(specs)
    others = compute_expert_shapes(of_experts, model) | compute_base_shapes(specs, model, bias, modules)
    if model.architecture.fused_targets:
        return compute_fused_shapes(plain, model) | others
    keys, shapes = compute_split_keys(plain, list_linear_names(model)), compute_factor_shapes(plain, model)
    return {key: shapes[name] for name, key in keys.items()} | others


def _split(specs: Sequence[AdapterSpec]) -> tuple[list[AdapterSpec], list[AdapterSpec]]:
    """Those on a linear that every token passes, and those on experts."""
    return [spec for spec in specs if spec.num_experts is None], [
        spec for spec in specs if spec.num_experts is not None
    ]


def compute_factor_shapes(specs: Sequence[AdapterSpec], model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every factor, and DoRA's row lengths, by canonical name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for spec in specs:
        shapes[f"{spec.name}.lora_A"] = (spec.stacked_rank, spec.in_features)
        shapes[f"{spec.name}.lora_B"] = (spec.out_features, spec.stacked_rank)
        if spec.use_dora:
            shapes[f"{spec.name}.magnitude"] = (spec.out_features,)
    if model.architecture.fused_targets:  # one linear, which has the lengths of all its rows
        for module in group_specs(_split(specs)[0], model):
            shapes |= {name: (len(rows),) for name, rows in module.magnitude_rows.items()}
    return shapes


def find_folded_scalings(specs: Sequence[AdapterSpec], model: ModelConfig) -> dict[str, float]:
    """Adapters whose B is multiplied, since PEFT has one scaling a module; none where every projection has its own."""
    plain, of_experts = _split(specs)
    modules = group_specs(plain, model) if model.architecture.fused_targets else []
    folded = {name: ratio for module in modules for name, ratio in module.compute_folded_ratios().items()}
    return folded | find_folded_ratios(of_experts, model)
