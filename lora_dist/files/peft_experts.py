"""Adapters on experts as HF PEFT stores them, on the parameters that transformers stacks all experts' linears in; pure.

PEFT names them in target_parameters. gate_up_proj has gate and up fused, so their adapters are stacked as those of a
fused linear are (`peft_fused`); where both parameters of a layer have adapters, PEFT wraps the one in the other.

Shapes: E experts, A [E R, X] expert by expert, B [Y, R E] with the experts innermost.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from lora_dist.config import ModelConfig
from lora_dist.files.hf_families import HF_FAMILIES
from lora_dist.files.hf_wrappers import name_in_memory
from lora_dist.files.imported import find_block_owners, scale_alpha
from lora_dist.files.peft_base import KEY_PREFIX
from lora_dist.files.peft_fused import PeftModule, assign_columns
from lora_dist.lora.spec import AdapterSpec
from lora_dist.lora.targets import compute_mlp_shapes

TARGETS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Parameter of transformers' experts -> what is stacked in it, one after the other or by turns."""


@dataclass(frozen=True, slots=True)
class ExpertParameter:
    """One of the two parameters of a layer's experts, and where PEFT's file has its adapter."""

    layer: int
    name: str
    is_wrapped: bool = False
    """By the wrapper of the other one."""
    wrapper: str | None = None
    """Model that the text model is a part of."""

    @property
    def full_name(self) -> str:
        return f"{self._module}.{self.name}"

    @property
    def _module(self) -> str:
        return name_in_memory(f"model.layers.{self.layer}.mlp.experts", self.wrapper)

    def key(self, factor: str) -> str:
        return f"{KEY_PREFIX}{self._module}{'.base_layer' if self.is_wrapped else ''}.{factor}.weight"


def list_parameters(layer: int, names: Sequence[str], model: ModelConfig) -> list[ExpertParameter]:
    """Those of a layer that are adapted. Whatever the order they are named in, PEFT's last wrapper is down_proj's."""
    wrapped = "gate_up_proj" if len(names) == 2 else None
    return [
        ExpertParameter(layer, name, is_wrapped=name == wrapped, wrapper=model.wrapper)
        for name in TARGETS
        if name in names
    ]


def _group(specs: Sequence[AdapterSpec], model: ModelConfig) -> Iterator[tuple[ExpertParameter, PeftModule]]:
    layers: dict[int, list[AdapterSpec]] = defaultdict(list)
    for spec in specs:
        layers[spec.layer].append(spec)
    for layer, group in layers.items():
        own = {name: [spec for spec in group if spec.target in TARGETS[name]] for name in TARGETS}
        for parameter in list_parameters(layer, [name for name, found in own.items() if found], model):
            rows = find_rows(parameter, model)
            yield parameter, PeftModule(parameter.full_name, tuple(own[parameter.name]), rows)


def find_rows(parameter: ExpertParameter, model: ModelConfig) -> dict[str, torch.Tensor]:
    """Of each target, in an expert's matrix of the parameter."""
    shapes, targets = compute_mlp_shapes(model, parameter.layer), TARGETS[parameter.name]
    all_rows = torch.arange(sum(shapes[target][1] for target in targets))
    alternate = len(targets) > 1 and _has_interleaved_gates(parameter.layer, model)
    parts = all_rows.view(-1, len(targets)).t() if alternate else all_rows.view(len(targets), -1)
    return dict(zip(targets, parts, strict=True))


def _has_interleaved_gates(layer: int, model: ModelConfig) -> bool:
    first = f"decoder.layers.{layer}.mlp.experts.0.linear_fc1.weight"
    return any(part.interleaved for part in HF_FAMILIES[model.family].find_parts(first, model))


def describe_parameters(specs: Sequence[AdapterSpec], model: ModelConfig) -> dict[str, tuple[int, float]]:
    """Full name of each adapted parameter -> its rank and alpha."""
    return {parameter.full_name: (module.lora_rank, module.alpha) for parameter, module in _group(specs, model)}


def compute_expert_shapes(specs: Sequence[AdapterSpec], model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every key of the factors and its shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for parameter, module in _group(specs, model):
        stacked_rank = _count(module) * module.lora_rank
        shapes[parameter.key("lora_A")] = (stacked_rank, module.specs[0].in_features)
        shapes[parameter.key("lora_B")] = (module.out_features, stacked_rank)
    return shapes


def find_folded_ratios(specs: Sequence[AdapterSpec], model: ModelConfig) -> dict[str, float]:
    """As `PeftModule.compute_folded_ratios`, of all."""
    return {name: ratio for _, module in _group(specs, model) for name, ratio in module.compute_folded_ratios().items()}


def to_peft_experts(
    values: Mapping[str, torch.Tensor], specs: Sequence[AdapterSpec], model: ModelConfig
) -> dict[str, torch.Tensor]:
    """Whole values by canonical name -> factors by key."""
    tensors = {}
    for parameter, module in _group(specs, model):
        num_experts, ratios = _count(module), module.compute_folded_ratios()
        a_parts = [_part_rows(values[f"{spec.name}.lora_A"], num_experts) for spec in module.specs]
        a_ERX = a_parts[0] if module.shares_a else torch.cat(a_parts, dim=1)
        tensors[parameter.key("lora_A")] = a_ERX.flatten(0, 1)
        b_YRE = torch.zeros(module.out_features, module.lora_rank, num_experts)
        for spec, columns in assign_columns(module):
            b_YER = values[f"{spec.name}.lora_B"].view(-1, num_experts, spec.lora_rank)
            b_YRE[module.rows[spec.target], columns] = b_YER.mT * ratios.get(spec.name, 1.0)
        tensors[parameter.key("lora_B")] = b_YRE.flatten(1)
    return tensors


def from_peft_experts(
    tensors: Mapping[str, torch.Tensor], specs: Sequence[AdapterSpec], model: ModelConfig
) -> dict[str, torch.Tensor]:
    """The inverse of `to_peft_experts` where no scaling was folded into B; exact."""
    values = {}
    for parameter, module in _group(specs, model):
        assert not module.compute_folded_ratios()
        num_experts = _count(module)
        a_ERX = _part_rows(tensors[parameter.key("lora_A")], num_experts)
        b_YRE = tensors[parameter.key("lora_B")].unflatten(1, (-1, num_experts))
        for spec, columns in assign_columns(module):
            values[f"{spec.name}.lora_A"] = a_ERX[:, columns].flatten(0, 1)
            values[f"{spec.name}.lora_B"] = b_YRE[module.rows[spec.target], columns].mT.flatten(1)
    return values


def _count(module: PeftModule) -> int:
    assert module.specs[0].num_experts is not None
    return module.specs[0].num_experts


def _part_rows(stacked: torch.Tensor, num_experts: int) -> torch.Tensor:
    return stacked.view(num_experts, -1, stacked.shape[1])


def split_targets(
    parameter: ExpertParameter,
    a: torch.Tensor,
    b: torch.Tensor,
    model: ModelConfig,
    *,
    alpha: float,
    rank_stabilized: bool,
) -> list[tuple[AdapterSpec, dict[str, torch.Tensor]]]:
    """PEFT's pair of one parameter as canonical adapters with their values.

    gate and up have their own columns where B is made of blocks, else the same A.
    """
    num_experts, rows = model.num_experts or 1, find_rows(parameter, model)
    shapes = compute_mlp_shapes(model, parameter.layer)
    a_ERX, b_YRE = _part_rows(a, num_experts), b.unflatten(1, (-1, num_experts))
    blocks = {target: b_YRE[own] for target, own in rows.items()}
    owners = find_block_owners([block.mT.flatten(0, 1) for block in blocks.values()])
    found = []
    for index, (target, block) in enumerate(blocks.items()):
        columns = slice(None) if owners is None else (owners == index).nonzero()[:, 0]
        a_own, b_own = a_ERX[:, columns], block[:, columns]
        if b_own.shape[1] == 0:
            continue
        spec = AdapterSpec(
            layer=parameter.layer,
            target=target,
            lora_rank=b_own.shape[1],
            alpha=scale_alpha(alpha, b_own.shape[1] / b_YRE.shape[1], rank_stabilized),
            in_features=shapes[target][0],
            out_features=shapes[target][1],
            rank_stabilized=rank_stabilized,
            shares_a=owners is None and len(blocks) > 1,
            num_experts=num_experts,
        )
        values = {f"{spec.name}.lora_A": a_own.flatten(0, 1), f"{spec.name}.lora_B": b_own.mT.flatten(1)}
        found.append((spec, values))
    return found
