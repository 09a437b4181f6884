"""Adapters as HF PEFT stores them on GPT-2: names, configuration, and q, k, v stacked on the one fused c_attn; pure.

PEFT puts one adapter on c_attn, so the A of q, k and v are stacked to [summed ranks, in] and their B become the
blocks of [3 hidden, summed ranks]. A block matrix's zeros cost file space (twice B at q,v) but change nothing.
Where q, k and v share one A, as an adapter that PEFT itself trained does, that A is stored once.

Shapes: A [R, H], B [O, R].
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_dist.config import ModelConfig
from lora_dist.files.hf_gpt2 import (
    PREFIX,
    QKV_TARGETS,
    compute_hf_shapes,
    find_canonical_name,
    find_hf_tensor,
    from_hf_layout,
    to_hf_layout,
)
from lora_dist.lora.saved_modules import is_saved
from lora_dist.lora.spec import AdapterSpec

_KEY_PREFIX = f"base_model.model.{PREFIX}"
_HEAD_KEY = "base_model.model.lm_head.weight"
_MODULE_OF_TARGET = {
    **dict.fromkeys(QKV_TARGETS, "attn.c_attn"),
    "o_proj": "attn.c_proj",
    "up_proj": "mlp.c_fc",
    "down_proj": "mlp.c_proj",
}


@dataclass(frozen=True, slots=True)
class PeftModule:
    """One linear of GPT-2 and the adapters on it."""

    name: str
    """`h.3.attn.c_attn`"""
    specs: tuple[AdapterSpec, ...]

    @property
    def shares_a(self) -> bool:
        return self.specs[0].shares_a

    @property
    def lora_rank(self) -> int:
        return self.specs[0].lora_rank if self.shares_a else sum(spec.lora_rank for spec in self.specs)

    @property
    def alpha(self) -> float:
        """Gives the first adapter's scaling at the module's rank."""
        ratio = self.lora_rank / self.specs[0].lora_rank
        alpha = self.specs[0].alpha * (math.sqrt(ratio) if self.specs[0].rank_stabilized else ratio)
        return int(alpha) if alpha == int(alpha) else alpha

    @property
    def out_features(self) -> int:
        return self.specs[0].out_features * (3 if self.is_qkv else 1)

    @property
    def is_qkv(self) -> bool:
        return self.name.endswith("c_attn")

    def key(self, factor: str) -> str:
        return f"{_KEY_PREFIX}{self.name}.{factor}.weight"

    @property
    def magnitude_key(self) -> str:
        return f"{_KEY_PREFIX}{self.name}.lora_magnitude_vector"

    @property
    def magnitude_names(self) -> list[str]:
        """Canonical names of the lengths of all its rows, q's, k's and v's whether they are adapted or not; DoRA's."""
        first = self.specs[0]
        targets = QKV_TARGETS if self.is_qkv else (first.target,)
        return [f"layers.{first.layer}.{target}.magnitude" for target in targets] if first.use_dora else []

    def compute_folded_ratios(self) -> dict[str, float]:
        """What each adapter's B is multiplied by, since PEFT has one scaling a module; those that differ from 1."""
        first = self.specs[0].scaling
        return {spec.name: spec.scaling / first for spec in self.specs if spec.scaling != first}


def group_specs(specs: Sequence[AdapterSpec]) -> list[PeftModule]:
    """Adapters by the linear of GPT-2 that holds them."""
    groups: dict[str, list[AdapterSpec]] = defaultdict(list)
    for spec in specs:
        groups[f"h.{spec.layer}.{_MODULE_OF_TARGET[spec.target]}"].append(spec)
    return [PeftModule(name, tuple(group)) for name, group in groups.items()]


def list_bias_names(specs: Sequence[AdapterSpec], model: ModelConfig, bias: str) -> list[str]:
    """Canonical names of the biases that `lora.bias` trains, of the whole model."""
    if bias == "none":
        return []
    adapted = {f"{module.name}.bias" for module in group_specs(specs)}
    names = [name for name in compute_hf_shapes(model) if name.endswith(".bias") and (bias == "all" or name in adapted)]
    return [find_canonical_name(name) for name in names]


def list_module_names(model: ModelConfig, modules: Sequence[str]) -> list[str]:
    """Canonical names of the parameters of lora.modules_to_save, of the whole model."""
    names = [find_canonical_name(name) for name in compute_hf_shapes(model)]
    return [name for name in names if is_saved(name, modules)]


def find_module_keys(model: ModelConfig, modules: Sequence[str]) -> dict[str, str]:
    """Key -> canonical name. PEFT would leave the output layer at the base's embedding, so it gets its own copy."""
    keys = {f"{_KEY_PREFIX}{find_hf_tensor(name).name}": name for name in list_module_names(model, modules)}
    if (embedding := f"{_KEY_PREFIX}wte.weight") in keys:
        keys[_HEAD_KEY] = keys[embedding]
    return keys


def compute_peft_shapes(
    specs: Sequence[AdapterSpec], model: ModelConfig, bias: str, modules: Sequence[str] = ()
) -> dict[str, tuple[int, ...]]:
    """Every key of adapter_model.safetensors and its shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for module in group_specs(specs):
        shapes[module.key("lora_A")] = (module.lora_rank, module.specs[0].in_features)
        shapes[module.key("lora_B")] = (module.out_features, module.lora_rank)
        if module.magnitude_names:
            shapes[module.magnitude_key] = (module.out_features,)
    keys = {key: name for name, key in _find_bias_keys(specs, model, bias).items()} | find_module_keys(model, modules)
    hf_shapes = compute_hf_shapes(model)
    return shapes | {key: hf_shapes[find_hf_tensor(name).name] for key, name in keys.items()}


def _find_bias_keys(specs: Sequence[AdapterSpec], model: ModelConfig, bias: str) -> dict[str, str]:
    """Canonical name -> key; PEFT moves an adapted linear's own parameters to its `base_layer`."""
    adapted = {module.name for module in group_specs(specs)}
    keys = {}
    for name in list_bias_names(specs, model, bias):
        module = find_hf_tensor(name).name.removesuffix(".bias")
        keys[name] = f"{_KEY_PREFIX}{module}{'.base_layer' if module in adapted else ''}.bias"
    return keys


def to_peft_tensors(
    values: Mapping[str, torch.Tensor],
    specs: Sequence[AdapterSpec],
    model: ModelConfig,
    bias: str,
    modules: Sequence[str] = (),
) -> dict[str, torch.Tensor]:
    """Whole values by canonical name -> adapter_model.safetensors."""
    tensors = {}
    for module in group_specs(specs):
        a_parts = [values[f"{spec.name}.lora_A"] for spec in module.specs]
        tensors[module.key("lora_A")] = a_parts[0] if module.shares_a else torch.cat(a_parts)
        b_OR, ratios = torch.zeros(module.out_features, module.lora_rank), module.compute_folded_ratios()
        for spec, block in _iterate_blocks(module, b_OR):
            block.copy_(values[f"{spec.name}.lora_B"] * ratios.get(spec.name, 1.0))
        tensors[module.key("lora_B")] = b_OR
        if names := module.magnitude_names:
            tensors[module.magnitude_key] = torch.cat([values[name] for name in names])
    for name, key in _find_bias_keys(specs, model, bias).items():
        tensors[key] = to_hf_layout(values[name], find_hf_tensor(name), model.num_heads)
    tensors |= {key: values[name] for key, name in find_module_keys(model, modules).items()}
    return {key: tensors[key] for key in sorted(tensors)}  # the order in which PEFT writes them


def from_peft_tensors(
    tensors: Mapping[str, torch.Tensor],
    specs: Sequence[AdapterSpec],
    model: ModelConfig,
    bias: str,
    modules: Sequence[str] = (),
) -> dict[str, torch.Tensor]:
    """The inverse of `to_peft_tensors` where no scaling was folded into B; exact."""
    values = {}
    for module in group_specs(specs):
        assert not module.compute_folded_ratios()
        stacked = tensors[module.key("lora_A")]
        ranks = [spec.lora_rank for spec in module.specs]
        a_parts = [stacked] * len(ranks) if module.shares_a else stacked.split(ranks)
        values.update({f"{spec.name}.lora_A": a for spec, a in zip(module.specs, a_parts, strict=True)})
        for spec, block in _iterate_blocks(module, tensors[module.key("lora_B")]):
            values[f"{spec.name}.lora_B"] = block
        if names := module.magnitude_names:
            values.update(zip(names, tensors[module.magnitude_key].chunk(len(names)), strict=True))
    for name, key in _find_bias_keys(specs, model, bias).items():
        values[name] = from_hf_layout(tensors[key], find_hf_tensor(name), model.num_heads)
    return values | {name: tensors[key] for key, name in find_module_keys(model, modules).items()}


def _iterate_blocks(module: PeftModule, b_OR: torch.Tensor) -> list[tuple[AdapterSpec, torch.Tensor]]:
    """Each adapter's block of the stacked B, as a view."""
    blocks, column = [], 0
    for spec in module.specs:
        row = QKV_TARGETS.index(spec.target) * spec.out_features if module.is_qkv else 0
        blocks.append((spec, b_OR[row : row + spec.out_features, column : column + spec.lora_rank]))
        column += 0 if module.shares_a else spec.lora_rank
    return blocks


def build_adapter_config(
    specs: Sequence[AdapterSpec], *, bias: str, base_name: str | None, modules: Sequence[str] = ()
) -> dict[str, Any]:
    """adapter_config.json of the fused form."""
    adapted = {f"{PREFIX}{module.name}": (module.lora_rank, module.alpha) for module in group_specs(specs)}
    config = describe_peft_config(adapted, specs[0], bias=bias, base_name=base_name, fan_in_fan_out=True)
    if modules:
        config["modules_to_save"] = [*modules, *(["lm_head"] if "wte" in modules else [])]
    return config


def describe_peft_config(
    modules: Mapping[str, tuple[int, float]],
    first: AdapterSpec,
    *,
    bias: str,
    base_name: str | None,
    fan_in_fan_out: bool,
) -> dict[str, Any]:
    """The commonest of the modules' ranks and alphas are the defaults, the others are patterns on full names."""
    (lora_rank, alpha), _ = Counter(modules.values()).most_common(1)[0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "fan_in_fan_out": fan_in_fan_out,
        "r": lora_rank,
        "lora_alpha": alpha,
        "lora_dropout": first.dropout,
        "use_rslora": first.rank_stabilized,
        "bias": bias,
        **({"use_dora": True} if first.use_dora else {}),
        "target_modules": list(modules),
        "rank_pattern": {name: r for name, (r, _) in modules.items() if r != lora_rank},
        "alpha_pattern": {name: a for name, (_, a) in modules.items() if a != alpha},
    }
